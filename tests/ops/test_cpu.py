"""The C kernels against the law: values and every gradient, every gate, odd sizes, groups, packing, faults."""

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch

from palimpsest.ops import backends, gates, reference
from palimpsest.ops.cpu import jit, register
from palimpsest.ops.variants import gdn2, kda, kda_from_logits, kda_step_
from palimpsest.testing import BETAS, DECAYS, KEYS, Case, assert_within_budget, judge

pytestmark = pytest.mark.skipif(jit.refusal() is not None, reason=f"the kernel {jit.refusal()}")
NAMES = ("output", "state", "d_q", "d_k", "d_v", "d_log_decay", "d_beta", "d_state")


def drawn(T, K, V, B=1, H=1, HV=1, decay="slow", beta="sigmoid", keys="correlated", seed=0):
    """fp32 inputs of kda: q, k, v, log_decay, beta, state."""
    q, k, *_ = Case(keys, beta, decay, T, B, H, K, V, seed).kda(torch.float32)
    _, _, v, log_decay, strength, state = Case(keys, beta, decay, T, B, HV, K, V, seed + 1).kda(torch.float32)
    return q, k, v, log_decay, strength, state


def law(q, k, v, log_decay, beta, state):
    """The reference, heads repeated as the definition says, q scaled by 1/2."""
    q, k = (x.repeat_interleave(v.shape[2] // k.shape[2], 2) for x in (q, k))
    beta = beta[..., None]
    return reference.delta_memory(q / 2, k, beta * k, beta * v, log_decay, state)


def ours(q, k, v, log_decay, beta, state, **options):
    return kda(q, k, v, log_decay, beta, state=state, scale=0.5, backend="cpu", **options)


def with_gradients(function, inputs, dtype):
    """Outputs and gradients of a loss in which every output and every entry of the state has its own weight."""
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    results = function(*leaves)
    weights = torch.Generator().manual_seed(5)
    loss = sum((x * torch.randn(x.shape, generator=weights, dtype=torch.float64).to(x.dtype)).sum() for x in results)
    return [x.detach() for x in (*results, *torch.autograd.grad(loss, leaves))]


def assert_exact(name, actual, truth, peer):
    """One part in 10^6 of the largest entry; where the honest recurrence in fp32 does worse, its budget."""
    if truth.numel() and not (actual - truth).abs().max() <= 1e-6 * truth.abs().max():
        assert_within_budget(name, actual, truth, peer)


def assert_is_the_law(inputs, function=ours, law=law, names=NAMES):
    truth = with_gradients(law, inputs, torch.float64)
    peer = with_gradients(law, inputs, torch.float32)
    actual = with_gradients(function, inputs, torch.float32)
    for name, a, t, p in zip(names, actual, truth, peer):
        assert_exact(name, a, t, p)
    return actual, truth, peer


# ---- the law ----


def test_the_judge_passes_it():
    decays = [Case("correlated", beta, decay) for beta in ("sigmoid", "one") for decay in DECAYS]
    others = [Case(keys, beta, "slow") for keys in KEYS for beta in BETAS]
    report = judge(lambda *x: kda(*x[:5], state=x[5], scale=1.0, backend="cpu"), cases=decays + others)
    assert report.passed, report


@pytest.mark.parametrize("beta", ["sigmoid", "one", "zero"])
@pytest.mark.parametrize("decay", DECAYS)
def test_gradients_are_the_laws_at_every_gate(decay, beta):
    assert_is_the_law(drawn(77, 16, 24, decay=decay, beta=beta))


@pytest.mark.parametrize("wrong", range(len(NAMES)))
def test_the_budget_would_see_a_small_mistake(wrong):
    """A mutant of every result: its second half, one part in 10^5 too large."""
    actual, truth, peer = assert_is_the_law(drawn(40, 16, 24))
    mutant = actual[wrong].clone()
    mutant[:, mutant.shape[1] // 2 :] *= 1 + 1e-5
    with pytest.raises(AssertionError, match="exceeds budget"):
        assert_exact(NAMES[wrong], mutant, truth[wrong], peer[wrong])


@pytest.mark.parametrize(
    ("T", "K", "V", "H", "HV"),
    [
        (1, 1, 1, 1, 1), (8, 3, 5, 1, 1), (9, 3, 5, 1, 1), (16, 16, 16, 5, 5), (17, 17, 33, 2, 2), (65, 40, 72, 3, 3),
        (129, 64, 64, 2, 4), (33, 128, 128, 1, 3), (20, 256, 8, 1, 1), (20, 8, 300, 1, 2), (31, 128, 31, 2, 6),
    ],
)  # fmt: skip
def test_every_size_and_group(T, K, V, H, HV):
    assert_is_the_law(drawn(T, K, V, 2, H, HV, decay="half_slow", keys="random"))


def test_short_sequences_without_a_gradient_go_token_by_token():
    inputs = drawn(8, 24, 40, 2, 2, 4)
    truth, peer = law(*(x.double() for x in inputs)), law(*inputs)
    for name, a, t, p in zip(NAMES, ours(*inputs), truth, peer):
        assert_exact(name, a, t, p)


def test_erase_and_write_of_their_own():
    q, k, v, log_decay, _, state = drawn(50, 24, 40, 2, 2, 4)
    draw = torch.Generator().manual_seed(3)
    gates = [torch.rand(x, generator=draw) for x in (log_decay.shape, v.shape)]

    def both(backend):
        return lambda *x: gdn2(*x[:6], state=x[6], scale=0.5, backend=backend)

    names = ("output", "state", "d_q", "d_k", "d_v", "d_log_decay", "d_erase_gate", "d_write_gate", "d_state")
    assert_is_the_law((q, k, v, log_decay, *gates, state), both("cpu"), both("reference"), names)


GATES = {"softplus": gates.SoftplusDecay, "sigmoid": gates.SigmoidDecay}


@pytest.mark.parametrize("gate", GATES)
def test_from_logits(gate):
    q, k, v, _, _, state = drawn(70, 24, 40, 2, 2, 4)
    draw = lambda *shape: torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))
    logits, beta_logits, A_log, dt_bias = 3 * draw(2, 70, 4, 24), draw(2, 70, 4), draw(4), draw(4, 24)

    def both(backend):
        return lambda *x: kda_from_logits(*x[:5], state=x[5], gate=GATES[gate](x[6], x[7]), scale=0.5, backend=backend)

    names = ("output", "state", "d_q", "d_k", "d_v", "d_logits", "d_beta_logits", "d_state", "d_A_log", "d_dt_bias")
    inputs = (3 * q, 2 * k, v, logits, beta_logits, state, A_log, dt_bias)
    assert_is_the_law(inputs, both("cpu"), both("reference"), names)


def test_half_precision_is_rounded_once():
    """Inputs and outputs in bf16, arithmetic in fp32: the only error is that of rounding the result."""
    q, k, v, log_decay, beta, state = drawn(70, 32, 48, 1, 2, 2)
    q, k, v = (x.bfloat16() for x in (q, k, v))
    inputs = (q, k, v, log_decay, beta, state)
    leaves = [x.clone().requires_grad_() for x in inputs]
    results = ours(*leaves)
    weights = torch.Generator().manual_seed(5)
    d_results = [torch.randn(x.shape, generator=weights, dtype=torch.float64).to(x.dtype) for x in results]
    actual = [*results, *torch.autograd.grad(results, leaves, d_results)]
    truth = with_rounded_weights(inputs, d_results)
    for name, a, t in zip(NAMES, actual, truth):
        assert a.dtype == (torch.bfloat16 if name in ("output", "d_q", "d_k", "d_v") else torch.float32)
        rounding = 2**-8 if a.dtype == torch.bfloat16 else 0
        allowed = rounding * t.abs() + 1e-6 * t.abs().max()
        assert ((a.double() - t).abs() <= allowed).all(), name


def with_rounded_weights(inputs, d_results):
    leaves = [x.double().requires_grad_() for x in inputs]
    results = law(*leaves)
    return [*results, *torch.autograd.grad(results, leaves, [x.double() for x in d_results])]


def test_fp16_goes_through_fp32():
    q, k, v, log_decay, beta, state = drawn(20, 16, 16)
    half = ours(q.half(), k.half(), v.half(), log_decay, beta, state)
    full = ours(q.half().float(), k.half().float(), v.half().float(), log_decay, beta, state)
    assert half.output.dtype == torch.float16
    assert torch.equal(half.output, full.output.half())
    assert torch.equal(half.state, full.state)


# ---- sequences ----


@pytest.mark.parametrize("cut", [3, 16, 57, 64])
def test_segments_carry_the_state(cut):
    q, k, v, log_decay, beta, state = drawn(130, 24, 40)
    whole = ours(q, k, v, log_decay, beta, state)
    head = ours(*(x[:, :cut] for x in (q, k, v, log_decay, beta)), state)
    tail = ours(*(x[:, cut:] for x in (q, k, v, log_decay, beta)), head.state)
    torch.testing.assert_close(torch.cat([head.output, tail.output], 1), whole.output, rtol=0, atol=2e-6)
    torch.testing.assert_close(tail.state, whole.state, rtol=0, atol=2e-6)


def test_packed_sequences_are_separate_sequences():
    """Bit for bit, empty ones too, gradients too."""
    lengths = [0, 5, 64, 1, 0, 70, 16, 0]
    borders = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    q, k, v, log_decay, beta, _ = drawn(sum(lengths), 16, 24, 1, 2, 4)
    state = torch.randn(len(lengths), 4, 16, 24, generator=torch.Generator().manual_seed(0))

    leaves = [x.requires_grad_() for x in (q, k, v, log_decay, beta, state)]
    packed = ours(*leaves, cu_seqlens=borders)
    weights = torch.linspace(-1, 1, packed.output.numel()).view_as(packed.output)
    packed_gradients = torch.autograd.grad((packed.output * weights).sum() + packed.state.square().sum(), leaves)
    for n, (start, stop) in enumerate(zip(borders[:-1], borders[1:])):
        own = [x[:, start:stop].detach().requires_grad_() for x in leaves[:5]] + [
            state[n : n + 1].detach().requires_grad_()
        ]
        alone = ours(*own)
        gradients = torch.autograd.grad((alone.output * weights[:, start:stop]).sum() + alone.state.square().sum(), own)
        assert torch.equal(alone.output, packed.output[:, start:stop])
        assert torch.equal(alone.state[0], packed.state[n])
        for mine, theirs in zip(gradients[:5], packed_gradients[:5]):
            assert torch.equal(mine, theirs[:, start:stop])
        assert torch.equal(gradients[5][0], packed_gradients[5][n])


@pytest.mark.parametrize("sizes", [(2, 0), (0, 5)])
def test_nothing_to_do(sizes):
    B, T = sizes
    q, k, v, log_decay, beta, state = (x[:B, :T] if x.ndim < 4 or x.shape[1] != 1 else x for x in drawn(8, 8, 8, 2))
    state = torch.ones(B, 1, 8, 8)
    results = with_gradients(ours, (q, k, v, log_decay, beta, state), torch.float32)
    assert results[0].shape == (B, T, 1, 8)
    assert torch.equal(results[1], state)


def test_strided_inputs_are_read_as_they_are():
    q, k, v, log_decay, beta, state = drawn(40, 16, 16, 2, 2, 2)
    fused = torch.cat((q, k, v), -1)
    parts = fused.split(16, -1)
    assert not parts[0].is_contiguous()
    ours_strided = ours(*parts, log_decay[..., :1].expand_as(log_decay), beta, state)
    plain = ours(q, k, v, log_decay[..., :1].expand_as(log_decay).contiguous(), beta, state)
    assert torch.equal(ours_strided.output, plain.output)


# ---- one token ----


@pytest.mark.parametrize(
    ("K", "V", "H", "HV"), [(64, 64, 2, 2), (128, 128, 1, 2), (5, 3, 1, 1), (40, 290, 2, 6), (256, 72, 1, 1)]
)
def test_steps_are_the_law(K, V, H, HV):
    inputs = drawn(12, K, V, 3, H, HV, decay="half_slow")
    truth, true_state = law(*(x.double() for x in inputs))
    peer, peer_state = law(*inputs)
    memory = inputs[5].clone()
    tokens = zip(*(x.unbind(1) for x in inputs[:5]))
    output = torch.stack([kda_step_(*token, memory, scale=0.5, backend="cpu") for token in tokens], 1)
    assert_exact("output", output, truth, peer)
    assert_exact("state", memory, true_state, peer_state)


def test_a_step_in_half_precision():
    q, k, v, log_decay, beta, state = (
        x[:, 0] if x.shape[1] == 1 and x.ndim > 2 else x for x in drawn(1, 32, 32, 2, 1, 1)
    )
    memory, wide = state.reshape(2, 1, 32, 32).clone(), state.reshape(2, 1, 32, 32).clone()
    inputs = (q.bfloat16(), k.bfloat16(), v.bfloat16(), log_decay, beta)
    output = kda_step_(*inputs, memory, backend="cpu")
    expected = kda_step_(*(x.float() for x in inputs), wide, backend="cpu")
    assert torch.equal(output, expected.bfloat16())
    assert torch.equal(memory, wide)


# ---- promises ----


def test_the_bits_depend_on_nothing_but_the_inputs():
    inputs = drawn(200, 64, 64, 2, 4, 4)
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            runs.append(with_gradients(ours, inputs, torch.float32))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0]))


def test_a_bad_number_reaches_no_earlier_token_and_no_other_head():
    clean = drawn(60, 16, 24, 1, 2, 2)
    good = ours(*clean).output
    for i, where in enumerate(("q", "k", "v", "log_decay", "beta")):
        inputs = [x.clone() for x in clean]
        inputs[i][0, 37, 1] = float("nan")
        bad = ours(*inputs)
        assert torch.equal(bad.output[:, :37], good[:, :37]), where
        assert torch.equal(bad.output[:, :, 0], good[:, :, 0]), where
        assert bad.output[0, 37, 1].isnan().all(), where
        rest = bad.output[0, 38:, 1]
        assert torch.equal(rest, good[0, 38:, 1]) if where == "q" else rest.isnan().all(), where


def test_denormals_of_others_stay_alive():
    """The kernel flushes them while it runs; threads are shared with torch, so it must put that back."""
    small = torch.full((1 << 20,), 1e-38)
    ours(*drawn(200, 64, 64, 2, 2, 2))
    assert (small * 0.1 > 0).all()


def test_infinite_decay_forgets_all():
    q, k, v, log_decay, beta, state = drawn(40, 8, 8)
    log_decay[:, 20] = -torch.inf
    assert_is_the_law((q, k, v, log_decay.clamp(min=-1e9), beta, state))
    forgotten, nearly = (ours(q, k, v, x, beta, state) for x in (log_decay, log_decay.clamp(min=-1e4)))
    assert torch.equal(forgotten.output, nearly.output)
    assert torch.equal(forgotten.state, nearly.state)


def test_backward_keeps_one_state_in_64_tokens():
    q, k, v, log_decay, beta, state = drawn(300, 8, 8, 1, 2, 2)
    run = lambda keep: register.forward(
        q, k, v, log_decay, None, beta, state, None, None, None, 1.0, "none", 0.0, keep
    )  # fmt: skip
    assert run(True)[2].shape == (300 // 64 + 1, 2, 8, 8)
    assert run(False)[2].numel() == 0
    torch.testing.assert_close(run(True)[2][1], ours(*(x[:, :64] for x in (q, k, v, log_decay, beta)), state).state[0])


def test_torch_compile_sees_one_graph():
    q, k, v, log_decay, beta, state = drawn(40, 16, 16, 1, 2, 2)
    options, sequences = {"fullgraph": True, "backend": "aot_eager"}, (q, k, v, log_decay, beta)
    whole = torch.compile(lambda *x: kda(*x), **options)
    assert all(torch.equal(a, b) for a, b in zip(whole(*sequences), kda(*sequences, backend="cpu")))

    gate = gates.SoftplusDecay(torch.zeros(2), torch.zeros(2, 16))
    from_logits = lambda *x: kda_from_logits(*x, gate=gate)
    assert all(
        torch.equal(a, b) for a, b in zip(torch.compile(from_logits, **options)(*sequences), from_logits(*sequences))
    )

    step = torch.compile(lambda *x: kda_step_(*x), **options)
    token, memories = [x[:, 0] for x in sequences], (state.clone(), state.clone())
    assert torch.equal(step(*token, memories[0]), kda_step_(*token, memories[1]))
    assert torch.equal(*memories)
    assert not torch.equal(memories[0], state)


def test_torch_compile_of_a_training_step():
    inputs = drawn(40, 16, 16, 1, 2, 2)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for a, b in zip(with_gradients(compiled, inputs, torch.float32), with_gradients(ours, inputs, torch.float32)):
        assert torch.equal(a, b)


def test_the_operators_keep_torchs_rules():
    q, k, v, log_decay, beta, state = (x.requires_grad_() for x in drawn(20, 8, 8))
    call = (q, k, v, log_decay, None, beta, state, None, None, None, 1.0, "none", 0.0, True)
    torch.library.opcheck(
        register.forward, call, test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
    )
    token = [x[:, 0].detach().contiguous() for x in (q, k, v, log_decay, beta)]
    torch.library.opcheck(register._step, (*token, state.detach(), 1.0), test_utils=("test_schema", "test_faketensor"))


def test_a_second_derivative_is_refused():
    q, k, v, log_decay, beta, state = (x.requires_grad_() for x in drawn(20, 8, 8))
    (d_q,) = torch.autograd.grad(ours(q, k, v, log_decay, beta, state).output.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only, .* call with backend='chunked'"):
        torch.autograd.grad(d_q.sum(), k)


# ---- choice ----


def problem(**changes):
    facts = {"op": "kda", "variant": "kda", "device": "cpu", "dtype": torch.float32, "key_dim": 64, "value_dim": 64}
    return backends.Problem(**{**facts, "tokens": 9, "sequences": 1, "heads": 1, "value_heads": 1, **changes})


def test_it_runs_by_default_and_says_why_not():
    assert backends.choose(problem()).name == "cpu"
    assert backends.choose(problem(op="step")).name == "cpu"
    assert backends.choose(problem(dtype=torch.bfloat16, op="core")).name == "cpu"
    assert register.refuses(problem(dtype=torch.float64)) == "computes in fp32, and these tensors are fp64"
    assert register.refuses(problem(key_dim=257)) == "holds at most 256 key channels, and these are 257"
    assert register.refuses(problem(device="cuda")) == "needs tensors on the CPU, and these are on cuda"
    inputs = [x.double() for x in drawn(4, 4, 4)]
    with pytest.raises(ValueError, match="backend 'cpu' cannot run this call: it computes in fp32"):
        ours(*inputs)
    assert kda(*inputs[:5]).output.dtype == torch.float64  # by the torch form


def test_borders_out_of_range_are_refused_inside_a_graph_too():
    q, k, v, log_decay, beta, state = drawn(20, 8, 8)
    call = (q, k, v, log_decay, None, beta, state, None, None, torch.tensor([0, 4000]), 1.0, "none", 0.0, False)
    with pytest.raises(ValueError, match="it must rise from 0 to the number of tokens, 20"):
        register.forward(*call)


# ---- other processors: the same source for narrower registers ----

PROCESSORS = {
    "plain": (),
    "avx2": ("-mavx2", "-mfma"),
    "avx512": ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl"),
}


@pytest.mark.parametrize("processor", PROCESSORS)
def test_every_width_of_register_is_the_law(processor, tmp_path, monkeypatch):
    described = jit._processor()
    if any(flag.removeprefix("-m") not in described for flag in PROCESSORS[processor]):
        pytest.skip(f"this processor has no {processor}")
    path = jit.compile_source(jit.find_compiler(), tmp_path, flags=(PROCESSORS[processor],))
    opened = ctypes.CDLL(str(path))
    monkeypatch.setattr(jit, "library", lambda: opened)
    register._step_function.cache_clear()
    try:
        assert_is_the_law(drawn(77, 40, 72, 1, 1, 2, decay="mixed"))
        assert_is_the_law(drawn(33, 128, 31, decay="strong", beta="one"))
        test_steps_are_the_law(40, 290, 2, 6)
        test_from_logits("softplus")
    finally:
        register._step_function.cache_clear()


def test_sanitizers_find_nothing(tmp_path):
    """The kernels on arrays of exactly the promised size, in a program of its own; and the compiler has no warnings."""
    compiler, program = jit.find_compiler(), tmp_path / "driver"
    sanitize = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    probe = tmp_path / "probe.c"
    probe.write_text("int main(void) { return 0; }")
    if subprocess.run([compiler, *sanitize, probe, "-o", program], capture_output=True).returncode:
        pytest.skip("this compiler has no sanitizers")
    driver = Path(__file__).with_name("cpu_driver.c")
    flags = ("-std=gnu11", "-g", "-march=native", "-fopenmp", "-Wall", "-Wextra", *sanitize, f"-I{jit.SOURCE.parent}")
    compiled = subprocess.run([compiler, *flags, driver, "-o", program, "-lm"], capture_output=True, text=True)
    assert compiled.returncode == 0
    assert compiled.stderr == ""
    run = subprocess.run([program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "64 calls"
    caught = subprocess.run([program, "overrun"], capture_output=True, text=True)
    assert caught.returncode != 0, "the mutant, an array one element short, went unseen"
    assert "heap-buffer-overflow" in caught.stderr

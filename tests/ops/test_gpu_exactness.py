"""On a GPU: every backend over the matrix of inputs that hurt, and the habits of a good citizen. Skipped without one."""

import contextlib
import itertools
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from palimpsest import (
    backends,
    delta_rule,
    dplr,
    gated_delta,
    gated_delta_product,
    gated_linear_attention,
    gdn2,
    kda,
    kda_from_logits,
    kda_step_,
    linear_attention,
)  # fmt: skip
from palimpsest.ops import chunked, reference
from palimpsest.ops.gates import SigmoidDecay, SoftplusDecay, l2norm
from palimpsest.ops.gpu.triton.step import steps_
from palimpsest.testing import BETAS, DECAYS, KEYS, MUTANTS, Case, assert_within_budget, rounded_products
from palimpsest.testing.budget import rms

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
BACKENDS = [("triton", torch.float32), ("triton", torch.bfloat16), ("triton", torch.float16)]
BACKENDS += [("hopper", torch.bfloat16), ("hopper", torch.float16)] if HOPPER else []
LENGTHS = [1, 15, 16, 17, 31, 33, 63, 64, 65, 127, 500, 1000]
PACKED = [0, 1, 63, 0, 64, 200, 72]  # tokens of sequences end to end
NAMES = "output state d_q d_k d_v d_log_decay d_beta d_state".split()


def law(q, k, v, g, beta, state):
    return reference.delta_memory(q, k, beta[..., None] * k, beta[..., None] * v, g, state)


def honest(form, inputs, dtype):
    """The same in `dtype`, plainly: the chunked form, in the kernels' chunks, its products of rounded numbers."""
    chunked.CHUNK, before = 64, chunked.CHUNK
    try:
        with rounded_products(dtype):  # on the CPU, where gradients are formed in this thread
            return form(plain_law, inputs)
    finally:
        chunked.CHUNK = before


def plain_law(q, k, v, g, beta, state):
    return chunked.delta_memory(q, k, beta[..., None] * k, beta[..., None] * v, g, state)


def relative(actual, truth):
    return ((actual.cpu().double() - truth).norm() / truth.norm().clamp_min(1e-20)).item()  # faded by 2^60 is empty


EMPTY = 2.0**-70  # a memory that faded so far: its exponent alone is off by 70 units in fp32, and nothing reads it


def assert_honest(names, actual, truth, peer, dtype):
    for name, a, t, p in zip(names, actual, truth, peer):
        if rms(t) < EMPTY:
            assert rms(a) < 2 * EMPTY, f"{name}: {rms(a):.1e} where the law is empty"
        else:
            assert_within_budget(name, a, t, p, dtype)


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_the_law(backend, dtype, keys):
    for beta, decay in itertools.product(BETAS, DECAYS):
        inputs = Case(keys, beta, decay, 130, 2, 2, 64, 64).kda(dtype)
        q, k, v, g, strength, state = (x.cuda() for x in inputs)
        ours = kda(q, k, v, g, strength, state=state, scale=1.0, backend=backend)
        peer = honest(lambda f, x: f(*x), [x.float() for x in inputs], dtype)
        assert_honest(
            (f"{beta} {decay} output", f"{beta} {decay} state"), ours, law(*(x.double() for x in inputs)), peer, dtype
        )


def test_wrong_memories_are_rejected():
    uncaught = set(MUTANTS)
    for keys, beta, decay in itertools.product(KEYS, BETAS, DECAYS):
        inputs = [x.double() for x in Case(keys, beta, decay, 130, 1, 1, 64, 64).kda(torch.bfloat16)]
        q, k, v, g, strength, state = inputs
        core, truth = (q, k, strength[..., None] * k, strength[..., None] * v, g, state), law(*inputs)
        peer = honest(lambda f, x: f(*x), [x.float() for x in inputs], torch.bfloat16)
        for name in list(uncaught):
            with contextlib.suppress(AssertionError):
                assert_honest(("output", "state"), MUTANTS[name](*core), truth, peer, torch.bfloat16)
                continue
            uncaught.discard(name)
        if not uncaught:
            return
    raise AssertionError(f"no case tells {uncaught} from the law")


def with_gradients(form, inputs):
    """Results, and gradients of a sum of them with weights that every dtype holds."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    result = form(*leaves)
    rng = torch.Generator().manual_seed(5)
    weights = [torch.randn(x.shape, generator=rng).bfloat16().to(x.device) for x in result]
    loss = sum((x.double() * weight).sum() for x, weight in zip(result, weights))
    return [x.detach() for x in (*result, *torch.autograd.grad(loss, leaves))]


def on_gpu(inputs, backend, **options):
    form = lambda *x: kda(*x[:5], state=x[5], scale=1.0, backend=backend, **options)
    return with_gradients(form, [x.cuda() for x in inputs])


def drawn(T, dtype, keys="correlated", beta="sigmoid", decay="half_slow", B=2, H=2, K=128, V=128, device="cuda"):
    return Case(keys, beta, decay, T, B, H, K, V).kda(dtype, device)


def assert_gradients(inputs, dtype, backend):
    truth = with_gradients(law, [x.double() for x in inputs])
    peer = honest(with_gradients, [x.float() for x in inputs], dtype)
    assert_honest(NAMES, on_gpu(inputs, backend), truth, peer, dtype)


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_every_gradient_at_every_length(backend, dtype, T):
    heads = max(2, 64 // T)  # the error of a few numbers wanders
    assert_gradients(drawn(T, dtype, H=heads, device="cpu"), dtype, backend)


@pytest.mark.parametrize(("K", "V"), [(256, 256), (96, 160), (24, 40), (16, 16), (64, 32), (32, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_gradient_of_other_channels(dtype, K, V):
    assert_gradients(drawn(100, dtype, B=1, K=K, V=V, device="cpu"), dtype, "triton")


@pytest.mark.parametrize(("keys", "beta", "decay"), list(itertools.product(KEYS, BETAS, DECAYS))[::3])
@pytest.mark.parametrize("backend", ["triton", "hopper"] if HOPPER else ["triton"])
def test_every_gradient_on_inputs_that_hurt(backend, keys, beta, decay):
    assert_gradients(drawn(130, torch.bfloat16, keys, beta, decay, device="cpu"), torch.bfloat16, backend)


@pytest.mark.parametrize("gate", [SoftplusDecay, SigmoidDecay])
@pytest.mark.parametrize(
    ("backend", "dtype", "K", "V"),
    [(*x, 128, 128) for x in BACKENDS] + [("triton", x, 40, 72) for _, x in BACKENDS[:3]],
)
def test_every_gradient_from_logits(backend, dtype, K, V, gate):
    """Norms, gate and sigmoid inside the kernel; two value heads share a key head; gates from still to forgetful.

    Of A_log there is one number a head, so many heads: the error of a few numbers wanders.
    """
    H, HV = 16, 32
    rng = torch.Generator().manual_seed(0)
    draw = lambda *shape, size=1.0: size * torch.randn(*shape, generator=rng)
    keys = draw(1, 130, H, K), draw(1, 130, H, K)
    values = draw(1, 130, HV, V), draw(1, 130, HV, K, size=4), draw(1, 130, HV)
    inputs = *(x.to(dtype) for x in (*keys, *values)), draw(1, HV, K, V), draw(HV), draw(HV, K)

    def law_from(memory, q, k, v, x, beta, state, A_log, dt_bias):
        q, k = (l2norm(y).repeat_interleave(2, 2) for y in (q, k))
        return memory(q, k, v, gate(A_log, dt_bias)(x), beta.sigmoid(), state)

    def fused(q, k, v, x, beta, state, A_log, dt_bias):
        options = dict(state=state, scale=1.0, backend=backend)
        return kda_from_logits(q, k, v, x, beta, gate=gate(A_log, dt_bias), **options)

    truth = with_gradients(partial(law_from, law), [x.double() for x in inputs])
    peer = honest(lambda f, x: with_gradients(partial(law_from, f), x), [x.float() for x in inputs], dtype)
    names = [*NAMES[:5], "d_logits", "d_beta_logits", "d_state", "d_A_log", "d_dt_bias"]
    assert_honest(names, with_gradients(fused, [x.cuda() for x in inputs]), truth, peer, dtype)


@pytest.mark.parametrize("backend", ["triton", "hopper"] if HOPPER else ["triton"])
def test_packed_permuted_and_in_segments(backend):
    dtype = torch.bfloat16
    q, k, v, g, beta, _ = drawn(400, dtype, B=1)
    borders = torch.tensor([0, *itertools.accumulate(PACKED)], device="cuda")
    state = torch.randn(len(PACKED), 2, 128, 128, device="cuda")
    output, last = kda(q, k, v, g, beta, state=state, cu_seqlens=borders, backend=backend)
    for n, (start, stop) in enumerate(itertools.pairwise(borders.tolist())):
        alone = kda(*(x[:, start:stop] for x in (q, k, v, g, beta)), state=state[n : n + 1], backend=backend)
        torch.testing.assert_close(output[:, start:stop], alone.output, rtol=0, atol=0)
        torch.testing.assert_close(last[n], alone.state[0], rtol=0, atol=0)
    whole = kda(q, k, v, g, beta, backend=backend)
    head = kda(*(x[:, :128] for x in (q, k, v, g, beta)), backend=backend)
    tail = kda(*(x[:, 128:] for x in (q, k, v, g, beta)), state=head.state, backend=backend)
    torch.testing.assert_close(torch.cat((head.output, tail.output), 1), whole.output, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["triton", "hopper"] if HOPPER else ["triton"])
def test_gradients_of_packed_sequences_are_their_own(backend):
    borders = torch.tensor([0, *itertools.accumulate(PACKED)], device="cuda")
    *sequences, _ = drawn(400, torch.bfloat16, B=1)
    state = torch.randn(len(PACKED), 2, 128, 128, device="cuda")
    d_out, d_state = torch.randn_like(sequences[2]), torch.randn_like(state)

    def gradients(sequences, state, d_out, d_state, **packing):
        leaves = [x.detach().requires_grad_() for x in (*sequences, state)]
        return torch.autograd.grad(
            kda(*leaves[:5], state=leaves[5], backend=backend, **packing), leaves, (d_out, d_state)
        )

    *together, d_first = gradients(sequences, state, d_out, d_state, cu_seqlens=borders)
    for n, (start, stop) in enumerate(itertools.pairwise(borders.tolist())):
        part, at = slice(start, stop), slice(n, n + 1)
        *alone, first = gradients([x[:, part] for x in sequences], state[at], d_out[:, part], d_state[at])
        for x, y in zip((*(x[:, part] for x in together), d_first[at]), (*alone, first)):
            torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["triton", "hopper"] if HOPPER else ["triton"])
def test_a_later_token_never_changes_an_earlier_output(backend):
    inputs = drawn(256, torch.bfloat16)
    before = kda(*inputs[:5], backend=backend).output
    changed = [torch.cat((x[:, :150], -3 * x[:, 150:].abs()), 1) for x in inputs[:5]]
    after = kda(*changed, backend=backend).output
    torch.testing.assert_close(before[:, :150], after[:, :150], rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["triton", "hopper"] if HOPPER else ["triton"])
def test_the_same_bits_a_thousand_times(backend):
    inputs = drawn(300, torch.bfloat16)
    first = on_gpu(inputs, backend)
    for run in range(1000):
        poison = torch.full((1 << 22,), torch.nan, device="cuda")  # what the next workspaces may find
        del poison
        again = kda(*inputs[:5], state=inputs[5], scale=1.0, backend=backend)
        torch.testing.assert_close(again.output, first[0], rtol=0, atol=0)
        if run % 20 == 0:
            for a, b in zip(on_gpu(inputs, backend), first):
                torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.skipif(not HOPPER, reason="a choice of the Hopper tier")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_launch_or_two_give_the_same_bits(monkeypatch, dtype):
    from palimpsest.ops.gpu.hopper import delta_memory

    monkeypatch.setattr(delta_memory, "MANY", 0)
    borders = torch.tensor([0, 0, 1, 64, 700, 700, 1000], device="cuda")

    def both(call, *inputs, **options):
        results = []
        for few in (0, 1):  # never at once; always
            monkeypatch.setattr(delta_memory, "FEW", few)
            results.append(call(*inputs, **options))
        for x, y in zip(*results):
            torch.testing.assert_close(x, y, rtol=0, atol=0)

    for T, K, V in itertools.product((1, 65, 1000), (64, 128), (64, 128)):
        q, k, v, g, beta, state = drawn(T, dtype, K=K, V=V)
        both(kda, q, k, v, g, beta, state=state)
        gate = SigmoidDecay(torch.zeros(2, device="cuda"), torch.zeros(2, K, device="cuda"))
        both(kda_from_logits, q, k, v, g.to(dtype), beta, gate=gate, state=state)
    alone = [x[:1] for x in (q, k, v, g, beta)]
    packed = lambda: kda(*alone, state=state[:1].expand(6, -1, -1, -1).contiguous(), cu_seqlens=borders)
    both(packed)
    first = packed()
    for _ in range(1000):
        for x, y in zip(packed(), first):
            torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.parametrize(("backend", "K", "V"), [("auto", 128, 128), ("triton", 128, 128), ("triton", 40, 72)])
def test_the_family(backend, K, V):
    q, k, v, g, beta, _ = drawn(200, torch.bfloat16, K=K, V=V, device="cpu")
    a, b = (F.normalize(torch.randn_like(k), dim=-1) for _ in range(2))
    calls = {
        "gdn2": (gdn2, (q, k, v, g, a.sigmoid(), v.sigmoid())),
        "gla": (gated_linear_attention, (q, k, v, g)),
        "dplr": (dplr, (q, k, v, a, -b / 2, g)),
        "gated delta": (gated_delta, (q, k, v, g[..., 0], beta)),
        "gated delta product": (
            gated_delta_product,
            (q, torch.stack((k, a), 2), torch.stack((v, v.flip(1)), 2), g[..., 0], torch.stack((beta, beta), 2)),
        ),
        "delta rule": (delta_rule, (q, k, v, beta)),
        "linear attention": (linear_attention, (q, k.abs(), v)),
        "plain linear attention": (partial(linear_attention, feature_map=lambda x: x, normalise=False), (q, k, v)),
    }
    for name, (call, inputs) in calls.items():
        names = [f"{name}: {part}" for part in ("output", "state", *map(str, range(len(inputs))))]
        ours = with_gradients(partial(call, backend=backend), [x.cuda() for x in inputs])
        truth = with_gradients(call, [x.double() for x in inputs])
        with rounded_products(torch.bfloat16):
            peer = with_gradients(partial(call, backend="chunked"), [x.float() for x in inputs])
        assert_honest(names, ours, truth, peer, torch.bfloat16)
        for at, (part, x, t) in enumerate(zip(names, ours, truth)):
            if backend == "auto" and part != "linear attention: 0":  # which cancels: an honest peer is off by a fifth
                assert relative(x, t) < (1.2e-2 if at < 2 else 1.5e-2), part  # output and state; gradients


@pytest.mark.parametrize(("K", "V"), [(128, 128), (32, 32), (24, 40), (256, 256)])
def test_steps_are_the_sequence(K, V):
    q, k, v, g, beta, state = drawn(8, torch.bfloat16, K=K, V=V)
    whole = kda(*(x.double() for x in (q, k, v, g, beta)), state=state.double(), scale=1.0)
    one_by_one, at_once = state.clone(), state.clone()
    outputs = [kda_step_(*(x[:, t] for x in (q, k, v, g, beta)), one_by_one, scale=1.0) for t in range(8)]
    several, each = steps_(q, k, v, g, beta, at_once, 1.0, each=True)
    assert each is not None
    assert relative(torch.stack(outputs, 1), whole.output.cpu()) < 5e-3
    assert relative(several, torch.stack(outputs, 1).cpu().double()) < 5e-3
    assert relative(each[:, -1], one_by_one.cpu().double()) < 1e-6
    assert relative(one_by_one, whole.state.cpu()) < 1e-6


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # torch's own
def test_compiled_and_captured():
    inputs = drawn(130, torch.bfloat16)
    eager = on_gpu(inputs, "auto")
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    compiled = torch.compile(lambda *x: kda(*x[:5], state=x[5], scale=1.0), fullgraph=True)
    result = compiled(*leaves)
    torch.testing.assert_close(result.output, eager[0], rtol=0, atol=0)
    result.output.sum().backward()
    assert leaves[0].grad is not None

    call = lambda: kda(*inputs[:5], state=inputs[5], scale=1.0)
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    captured.output.zero_()
    graph.replay()
    torch.testing.assert_close(captured.output, eager[0], rtol=0, atol=0)


def test_side_streams_and_autocast():
    inputs = drawn(130, torch.bfloat16)
    expected = kda(*inputs[:5]).output
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.autocast("cuda", torch.float16):
        output = kda(*inputs[:5]).output
    torch.cuda.current_stream().wait_stream(stream)
    torch.testing.assert_close(output, expected, rtol=0, atol=0)


def test_packed_calls_never_wait_for_the_gpu(never_waiting):
    q, k, v, g, beta, _ = drawn(300, torch.bfloat16, B=1)
    borders = torch.tensor([0, 100, 300], device="cuda", dtype=torch.int32)
    kda(q, k, v, g, beta, cu_seqlens=borders)
    with never_waiting():
        kda(q, k, v, g, beta, cu_seqlens=borders)


@pytest.mark.skipif(not HOPPER, reason="beyond 2^31 elements, on a GPU with room for them")
def test_more_than_two_to_the_31_elements():
    T, H = 2**18 + 64, 64
    one = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
    q, k, v, beta = (
        F.normalize(one(1, T, H, 128), dim=-1),
        F.normalize(one(1, T, H, 128), dim=-1),
        one(1, T, H, 128),
        one(1, T, H),
    )
    g = -one(1, T, H, 128).abs()
    whole = kda(q, k, v, g, beta.sigmoid())
    head = kda(*(x[:, : 2**17] for x in (q, k, v, g, beta.sigmoid())))
    tail = kda(*(x[:, 2**17 :] for x in (q, k, v, g, beta.sigmoid())), state=head.state)
    torch.testing.assert_close(whole.output[:, 2**17 :], tail.output, rtol=0, atol=0)


def test_the_first_gradient_comes_soon():
    program = (
        "import time; began = time.time(); import torch; from palimpsest import kda\n"
        "x = [torch.randn(1, 256, 2, 128, device='cuda', dtype=torch.bfloat16).requires_grad_() for _ in range(3)]\n"
        "kda(*x, -torch.rand(1, 256, 2, 128, device='cuda'), torch.rand(1, 256, 2, device='cuda')).output.sum().backward()\n"
        "torch.cuda.synchronize(); assert time.time() - began < 30, time.time() - began"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_what_cannot_run_says_why():
    q, k, v, g, beta, _ = drawn(10, torch.bfloat16, K=64, V=64)
    facts = dict(op="kda", variant="kda", device="cuda", dtype=torch.float64, key_dim=64, value_dim=64, tokens=10)
    problem = backends.Problem(**facts, sequences=1, heads=2, value_heads=2)
    assert "float64" in backends.explain(problem)
    wide = torch.cat([q] * 5, -1)
    with pytest.raises(ValueError, match="at most 256 channels"):
        kda(wide, wide, v, torch.cat([g] * 5, -1), beta, backend="triton")

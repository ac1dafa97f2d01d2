"""The Triton kernels against the law: under the interpreter without a GPU (fp32), compiled with one."""

import pytest
import torch
import torch.nn.functional as F

from palimpsest.ops import affine, gates, reference
from palimpsest.ops.gpu.register import TRITON
from palimpsest.ops.gpu.triton.borders import borders_of
from palimpsest.ops.gpu.triton.step import steps_
from palimpsest.ops.gpu.warmup import warmup
from palimpsest.ops.split import split_sequence
from palimpsest.testing import Case, assert_within_budget

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = "output state d_q d_k d_v d_log_decay d_beta d_state".split()


def drawn(T, K=16, V=16, H=1, HV=1, B=1, decay="slow", beta="sigmoid", keys="correlated"):
    q, k, *_ = Case(keys, beta, decay, T, B, H, K, V).kda(torch.float32, DEVICE)
    _, _, v, g, strength, state = Case(keys, beta, decay, T, B, HV, K, V, 1).kda(torch.float32, DEVICE)
    return q, k, v, g, strength, state


def kda_law(q, k, v, g, beta, state):
    q, k = (x.repeat_interleave(v.shape[2] // k.shape[2], 2) for x in (q, k))
    return reference.delta_memory(q / 2, k, beta[..., None] * k, beta[..., None] * v, g, state)


def ours(q, k, v, g, beta, state, cu_seqlens=None):
    return TRITON.kda(q, k, v, g, beta, state, 0.5, cu_seqlens)


def with_gradients(function, inputs, dtype):
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    results = function(*leaves)
    weights = torch.Generator().manual_seed(5)
    draw = lambda x: torch.randn(x.shape, generator=weights, dtype=torch.float64).to(x.dtype).to(x.device)
    return [x.detach() for x in (*results, *torch.autograd.grad(sum((x * draw(x)).sum() for x in results), leaves))]


def assert_is_the_law(inputs, function=ours, law=kda_law, names=NAMES):
    truth, peer = (with_gradients(law, inputs, dtype) for dtype in (torch.float64, torch.float32))
    for name, a, t, p in zip(names, with_gradients(function, inputs, torch.float32), truth, peer):
        if t.numel() and not (a - t).abs().max() <= 2e-6 * t.abs().max():
            assert_within_budget(name, a, t, p)


@pytest.mark.parametrize(
    ("T", "K", "V", "H", "HV", "decay"),
    [
        (1, 16, 16, 1, 1, "slow"),
        (33, 16, 24, 1, 2, "half_slow"),
        (70, 24, 16, 1, 1, "bottomless"),
        (32, 16, 16, 2, 2, "floor"),
    ],
)
def test_kda(T, K, V, H, HV, decay):
    assert_is_the_law(drawn(T, K, V, H, HV, decay=decay))


@pytest.mark.parametrize(("beta", "keys"), [("up_to_two", "nearly_identical"), ("one", "repeated")])
def test_kda_on_colliding_keys(beta, keys):
    assert_is_the_law(drawn(40, beta=beta, keys=keys, decay="slower"))


def test_packed_with_empty_sequences():
    inputs = drawn(40, HV=2)
    borders = [0, 0, 5, 33, 33, 40]
    state = torch.randn(5, 2, 16, 16, device=DEVICE)

    def one_by_one(*inputs):
        *sequences, state = inputs
        pieces = [
            kda_law(*(x[:, a:b] for x in sequences), state[n : n + 1])
            for n, (a, b) in enumerate(zip(borders, borders[1:]))
        ]
        return torch.cat([o for o, _ in pieces], 1), torch.cat([s for _, s in pieces])

    packed = lambda *x: ours(*x, cu_seqlens=torch.tensor(borders, device=DEVICE))
    assert_is_the_law((*inputs[:5], state), packed, one_by_one)


def test_the_general_core():
    q, k, v, g, _, state = drawn(40)
    erase = F.normalize(torch.randn(k.shape, device=DEVICE), dim=-1)
    core = lambda q, k, erase, write, g, state: TRITON.core(q, k, erase, write, g, state, 1.0, None)
    assert_is_the_law((q, k, erase, v, g, state), core, reference.delta_memory)


@pytest.mark.parametrize(
    ("T", "K", "V", "H", "HV", "B", "scale"),
    [(1, 16, 16, 1, 1, 1, 0.5), (300, 24, 17, 1, 2, 1, 0.5), (1300, 16, 33, 2, 2, 2, 0.5), (70, 16, 16, 1, 1, 1, 0.0)],
)
def test_linear_attention(T, K, V, H, HV, B, scale):
    q, k, v, *_, state = drawn(T, K, V, H, HV, B)

    def law(q, k, v, state):
        q, k = (x.repeat_interleave(v.shape[2] // k.shape[2], 2) for x in (q, k))
        return reference.delta_memory(scale * q, k, torch.zeros_like(k), v, torch.zeros_like(k), state)

    ours = lambda *x: TRITON.linear(*x, scale, None)
    assert_is_the_law((q, k, v, state), ours, law, "output state d_q d_k d_v d_state".split())


def test_no_state_is_a_state_of_zeros():
    q, k, v, g, beta, state = drawn(40, HV=2)
    zeros = torch.zeros_like(state)
    calls = [
        (lambda S: TRITON.kda(q, k, v, g, beta, S, 1.0, None)),
        (lambda S: TRITON.linear(q, k, v, S, 1.0, None)),
    ]
    for x in (q, k, v, g, beta):
        x.requires_grad_()
    for call in calls:
        gradients = []
        for S in (None, zeros):
            output, _ = call(S)
            gradients.append([output.detach(), *torch.autograd.grad(output.square().sum(), (q, k, v))])
        for x, y in zip(*gradients):
            torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_linear_attention_of_packed_sequences():
    q, k, v, *_ = drawn(600, HV=2)
    borders, state = [0, 0, 5, 300, 300, 600], torch.randn(5, 2, 16, 16, device=DEVICE)
    output, last = TRITON.linear(q, k, v, state, 1.0, torch.tensor(borders, device=DEVICE))
    for n, (start, stop) in enumerate(zip(borders, borders[1:])):
        alone = TRITON.linear(*(x[:, start:stop] for x in (q, k, v)), state[n : n + 1], 1.0, None)
        torch.testing.assert_close(output[:, start:stop], alone[0], rtol=0, atol=0)
        torch.testing.assert_close(last[n], alone[1][0], rtol=0, atol=0)


def test_dplr():
    q, k, v, g, _, state = drawn(20)
    a, b = (torch.randn(k.shape, device=DEVICE) / 4 for _ in range(2))
    dplr = lambda *x: TRITON.dplr(*x, 1.0, None)
    assert_is_the_law((q, k, v, a, b, g, state), dplr, reference.dplr, [*NAMES, "more"])


@pytest.mark.parametrize("gate", [gates.SoftplusDecay, gates.SigmoidDecay])
def test_logits(gate):
    draw = lambda *shape: torch.randn(*shape, device=DEVICE)
    q, k, v, x, beta, state = (
        draw(1, 35, 1, 16),
        draw(1, 35, 1, 16),
        draw(1, 35, 2, 16),
        draw(1, 35, 2, 16),
        draw(1, 35, 2),
        draw(1, 2, 16, 16),
    )
    A_log, dt_bias = draw(2), draw(2, 16)

    def law(q, k, v, x, beta, state, A_log, dt_bias):
        return kda_law(gates.l2norm(q), gates.l2norm(k), v, gate(A_log, dt_bias)(x), beta.sigmoid(), state)

    def fused(q, k, v, x, beta, state, A_log, dt_bias):
        return TRITON.kda_from_logits(q, k, v, x, beta, gate(A_log, dt_bias), state, 0.5, None)

    assert_is_the_law((q, k, v, x, beta, state, A_log, dt_bias), fused, law, [*NAMES, "d_A_log", "d_dt_bias"])


@pytest.mark.parametrize(("T", "K", "V"), [(1, 16, 32), (5, 12, 40)])
def test_steps_and_the_memory_after_each(T, K, V):
    q, k, v, g, beta, state = drawn(T, K, V, 2, 4, B=2)
    memory = state.clone()
    output, each = steps_(q, k, v, g, beta, memory, 0.5, each=True)
    for t in range(T):
        truth, state64 = kda_law(*(x[:, : t + 1].double() for x in (q, k, v, g, beta)), state.double())
        torch.testing.assert_close(output[:, t].double(), truth[:, t], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(each[:, t].double(), state64, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(memory, each[:, -1], rtol=0, atol=0)


def test_nothing_is_asked_of_a_call_without_tokens():
    q, k, v, g, beta, state = drawn(4)
    output, last = ours(*(x[:, :0] for x in (q, k, v, g, beta)), state)
    assert output.shape == (1, 0, 1, 16)
    torch.testing.assert_close(last, state)


def test_a_later_token_never_changes_an_earlier_output():
    inputs = drawn(33)
    before, _ = ours(*inputs)
    changed = [x.clone() for x in inputs]
    for x in changed[:5]:
        x[:, 20:] = -3 * x[:, 20:].abs()
    after, _ = ours(*changed)
    torch.testing.assert_close(before[:, :20], after[:, :20], rtol=0, atol=0)


@pytest.mark.parametrize("training", [False, True])
def test_warmup_runs_every_form(training):
    warmup(1, value_heads=2, key_dim=16, value_dim=16, dtype=torch.float32, device=DEVICE, training=training)


def test_one_operator_under_compile():
    inputs = drawn(20, HV=2)
    eager = with_gradients(ours, inputs, torch.float32)
    compiled = torch.compile(lambda *x: ours(*x), fullgraph=True, backend="aot_eager")
    for name, a, t in zip(NAMES, with_gradients(compiled, inputs, torch.float32), eager):
        torch.testing.assert_close(a, t, rtol=0, atol=0, msg=name)


def test_the_operator_keeps_its_promises():
    q, k, v, g, beta, state = (x.requires_grad_() for x in drawn(5))
    checks, ops = ("test_schema", "test_faketensor", "test_autograd_registration"), torch.ops.palimpsest_gpu
    for S in (state, None):
        arguments = (q, k, v, g, beta, S, 0.5, None, None, None, 0, 0.0, False, False)
        torch.library.opcheck(ops.delta_memory.default, arguments, test_utils=checks)
        torch.library.opcheck(ops.linear_memory.default, (q, k, v, S, 0.5, None), test_utils=checks)


@pytest.mark.parametrize("borders", [[0, 8, 5, 20], [0, 8, 21], [1, 8, 20], [0, 8, 19]])
@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU the error ends the process's use of it")
def test_borders_that_make_no_sense_are_refused(borders):
    q, k, v, g, beta, _ = drawn(20)
    state = torch.zeros(len(borders) - 1, 1, 16, 16)
    with pytest.raises(ValueError, match="it must rise from 0 to the number of tokens, 20"):
        ours(q, k, v, g, beta, state, torch.tensor(borders))
    with pytest.raises(RuntimeError, match="cu_seqlens must rise from 0 to the number of tokens, 20"):  # on the device
        borders_of(torch.tensor(borders), 20, 32, q.device)


def test_gradients_with_and_without_the_dispatcher_are_the_same():
    """torch.compile and subclasses of Tensor take the operator, everybody else the functions behind it."""
    q, k, v, g, beta, state = (x.requires_grad_() for x in drawn(40, HV=2))
    operators = torch.ops.palimpsest_gpu
    rest = (1.0, None, None, None, 0, 0.0, False, False)
    calls = [
        (TRITON.kda, operators.delta_memory, (q, k, v, g, beta, state), (1.0, None), rest),
        (TRITON.linear, operators.linear_memory, (q, k, v, state), (1.0, None), (1.0, None)),
    ]
    for direct, operator, inputs, short, long in calls:
        found = []
        for results in (direct(*inputs, *short), operator(*inputs, *long)):
            loss = sum(x.square().sum() for x in results)
            found.append([*results, *torch.autograd.grad(loss, inputs)])
        for x, y in zip(*found):
            torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_a_part_of_a_longer_sequence():
    """Two passes of one preparation, from zero and from the identity, and the backward from what entered."""
    q, k, v, g, beta, _ = drawn(40, K=16, V=24, H=1, HV=2)
    cu_seqlens = torch.tensor([0, 15, 40], device=DEVICE)
    split = split_sequence(40, segments=2, cu_seqlens=cu_seqlens, align=5)
    assert split.open_pieces == (2,)
    whole = lambda *x: TRITON.kda(*x[:5], None, 0.5, cu_seqlens)
    parts = lambda *x: affine.remember(split, TRITON, "kda", x[:5], None, 0.5)

    def results(run):
        leaves = [x.clone().requires_grad_() for x in (q, k, v, g, beta)]
        output, after = run(*leaves)
        last = [row for row, piece in enumerate(split.pieces) if piece.ends]
        after = after[last] if len(after) == len(split.pieces) else after
        loss = output.square().sum() + after.square().sum()
        return [output.detach(), after.detach(), *torch.autograd.grad(loss, leaves)]

    for name, ours, truth in zip(NAMES, results(parts), results(whole)):
        assert (ours - truth).abs().max() <= 1e-5 * truth.abs().max(), name

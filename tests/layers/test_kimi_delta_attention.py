"""Every memory layer against a plain reading of its definition, and its state against every way of cutting a sequence."""

import dataclasses

import pytest
import torch

from palimpsest.layers.gated_delta_product import GatedDeltaProduct
from palimpsest.layers.gdn2 import GatedDeltaNet2
from palimpsest.layers.kimi_delta_attention import KimiDeltaAttention
from palimpsest.layers.layer_state import KDAState
from palimpsest.layers.linear_attention import GatedLinearAttention, ScalarDecay
from palimpsest.layers.memory_layer import MemoryLayer
from palimpsest.layers.options import MixerOptions
from palimpsest.ops import trace
from palimpsest.testing import assert_within_budget

HIDDEN, H, K, W = 24, 2, 8, 4
PARTS = {
    "released": {},
    "bounded gate": {"gate": "sigmoid"},
    "full rank": {"gate_rank": "full"},
    "head decay": {"decay": "head"},
    "constant decay": {"decay": "constant"},
    "no decay": {"decay": "none"},
    "negative eigenvalues": {"beta_max": 2.0},
    "silu output gate": {"output_gate": "silu"},
    "no output gate": {"output_gate": "none"},
    "no convolution": {"conv": False},
    "no norm": {"qk_norm": False},
    "gdn2": {},
    "gla": {},
    "linear": {"decay": "none"},
    "scalar decay": {"decay": "head"},
    "product": {"decay": "head"},
    "product of three, no convolution": {"num_householder": 3, "conv": False, "beta_max": 2.0},
    "product of one": {"decay": "none", "num_householder": 1},
}
CLASSES = {
    "gdn2": GatedDeltaNet2,
    "gla": GatedLinearAttention,
    "linear": GatedLinearAttention,
    "scalar decay": ScalarDecay,
    "product": GatedDeltaProduct,
    "product of three, no convolution": GatedDeltaProduct,
    "product of one": GatedDeltaProduct,
}


def layer(parts="released", dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    made = CLASSES.get(parts, KimiDeltaAttention)(HIDDEN, H, K, conv_size=W, options=MixerOptions(**PARTS[parts]))
    for name, parameter in made.named_parameters():
        if "o_norm" in name:
            torch.nn.init.normal_(parameter, 1, 0.2)
        elif "proj" in name:
            torch.nn.init.normal_(parameter, 0, 0.4)
    return made.to(dtype)


def draw(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def plainly(m: MemoryLayer, x):
    """One token, one head at a time, as the paper says it. x [T, hidden] -> y [T, hidden], S [H, K, K]."""
    p, weights = m.options, dict(m.named_parameters())
    T, n = len(x), m.sub_steps

    def project(*names):
        s = x
        for name in names:
            s = s @ weights[f"{name}_proj.weight"].T
        return s

    def stream(name):  # [T, sub-steps, H, K]; of the query one
        s = project(name)
        if p.conv:
            line = torch.cat([s.new_zeros(W - 1, s.shape[1]), s])
            s = sum(line[w : w + T] * weights[f"{name}_conv1d.weight"][:, 0, w] for w in range(W))
        return (s * sigmoid(s)).view(T, -1, H, K)

    q, k, v = stream("q"), stream("k"), stream("v")
    if p.qk_norm:
        q, k = (s / torch.sqrt((s * s).sum(-1, keepdim=True) + 1e-6) for s in (q, k))
    q = q[:, 0] / K**0.5
    if p.decay != "none":
        if p.decay == "constant":
            logits = torch.zeros(T, H * K, dtype=x.dtype)
        elif p.decay == "channel" and p.gate_rank == "low":
            logits = project("f_a", "f_b")
        else:
            logits = project("f")
        logits, A = (logits + weights["dt_bias"]).view(T, H, -1), weights["A_log"].exp().view(H, 1)
        g = -A * torch.log(1 + torch.exp(logits)) if p.gate == "softplus" else p.floor * sigmoid(A * logits)
        g = g.expand(T, H, K)
    else:
        g = torch.zeros(T, H, K, dtype=x.dtype)
    one = torch.ones(T, n, H, K, dtype=x.dtype)
    if isinstance(m, GatedDeltaNet2):
        erase, write = sigmoid(project("e")).view(T, 1, H, K), sigmoid(project("w")).view(T, 1, H, K)
    else:
        beta = p.beta_max * sigmoid(project("b")).view(T, n, H, 1) if type(m) is not GatedLinearAttention else one
        erase, write = (0 * one if isinstance(m, GatedLinearAttention) else beta * one), beta * one

    S, y = torch.zeros(H, K, K, dtype=x.dtype), torch.zeros(T, H, K, dtype=x.dtype)
    for t in range(T):
        for h in range(H):
            S[h] = torch.diag(g[t, h].exp()) @ S[h]
            for j in range(n):
                erased = S[h].T @ (erase[t, j, h] * k[t, j, h])
                S[h] = S[h] + torch.outer(k[t, j, h], write[t, j, h] * v[t, j, h] - erased)
            y[t, h] = S[h].T @ q[t, h]
    y = y / torch.sqrt((y * y).mean(-1, keepdim=True) + 1e-5) * weights["o_norm.weight"]
    if p.output_gate != "none":
        gate = project("g_a", "g_b").view(T, H, K)
        y = y * (sigmoid(gate) if p.output_gate == "sigmoid" else gate * sigmoid(gate))
    return y.reshape(T, -1) @ weights["o_proj.weight"].T, S


def close(a: KDAState, b: KDAState):
    for x, y in zip((a.memory, *a.conv), (b.memory, *b.conv), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("parts", PARTS)
@torch.no_grad()
def test_layer_is_its_definition(parts):
    m, x = layer(parts), draw(2, 19, HIDDEN)
    y, state = m(x)
    for b in range(2):
        truth, S = plainly(m, x[b])
        torch.testing.assert_close(y[b], truth, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(state.memory[b], S, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("other", [name for name in PARTS if name not in ("released",)])
@torch.no_grad()
def test_every_part_changes_the_output(other):
    """A part that changed nothing would pass every comparison of itself with itself."""
    released, changed, x = layer(), layer(other), draw(1, 19, HIDDEN)
    changed.load_state_dict(released.state_dict() | {
        name: tensor for name, tensor in changed.state_dict().items()
        if name not in released.state_dict() or released.state_dict()[name].shape != tensor.shape
    }, strict=False)  # fmt: skip
    assert (changed(x)[0] - released(x)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("parts", PARTS)
@torch.no_grad()
def test_segments_steps_packing_and_padding_are_the_whole(parts):
    m, x = layer(parts), draw(2, 21, HIDDEN)
    whole, end = m(x)

    outputs, state = [], None
    for a, b in [(0, 2), (2, 13), (13, 14), (14, 21)]:  # shorter than the window, odd, one token, the rest
        y, state = m(x[:, a:b], state)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=1e-9, atol=1e-10)
    close(state, end)

    _, state = m(x[:, :18])
    for t in range(18, 21):
        y, state = m.step_(x[:, t], state)
        torch.testing.assert_close(y, whole[:, t], rtol=1e-9, atol=1e-10)
    close(state, end)

    lengths = [5, 0, 1, 21]
    documents = [draw(1, n, HIDDEN, seed=n + 5) for n in lengths]
    starts = [m(draw(1, 7, HIDDEN, seed=n))[1] for n in range(4)]
    before = KDAState(torch.cat([s.memory for s in starts]), tuple(map(torch.cat, zip(*(s.conv for s in starts)))))
    y, packed = m(torch.cat(documents, 1), before, cu_seqlens=torch.tensor([0, 5, 5, 6, 27]))
    for i, (document, start, piece) in enumerate(zip(documents, starts, y.split(lengths, 1))):
        alone, after = m(document, start) if lengths[i] else (document, start)
        torch.testing.assert_close(piece, alone, rtol=1e-9, atol=1e-10)
        close(KDAState(packed.memory[i : i + 1], tuple(w[i : i + 1] for w in packed.conv)), after)

    mask = torch.zeros(4, 30, dtype=torch.bool)
    for row, (start, n) in enumerate(zip((25, 3, 0, 9), lengths)):  # left, nothing at all, right, both sides
        mask[row, start : start + n] = True
    noise = torch.where(mask[..., None], 0, draw(4, 30, HIDDEN) * 100)
    noise[mask] = torch.cat(documents, 1)[0]
    padded_y, padded = m(noise, before, mask=mask)
    torch.testing.assert_close(padded_y[mask], y[0])
    assert not padded_y[~mask].any()
    close(padded, packed)


@torch.no_grad()
def test_padding_on_the_right_of_every_row_leaves_no_trace():
    m, x, lengths = layer(), draw(3, 9, HIDDEN), [4, 9, 1]
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    y, state = m(x, mask=mask)
    for i, n in enumerate(lengths):
        alone, after = m(x[i : i + 1, :n])
        torch.testing.assert_close(y[i, :n], alone[0])
        assert not y[i, n:].any()
        close(KDAState(state.memory[i : i + 1], tuple(w[i : i + 1] for w in state.conv)), after)


@torch.no_grad()
def test_padding_poisoned_with_nan_leaves_no_trace():
    m, x = layer(), draw(1, 9, HIDDEN)
    poisoned = torch.cat([torch.full((1, 3, HIDDEN), torch.nan, dtype=torch.float64), x], 1)
    y, state = m(poisoned, mask=~poisoned[..., 0].isnan())
    alone, after = m(x)
    torch.testing.assert_close(y[:, 3:], alone)
    close(state, after)


@pytest.mark.parametrize("parts", ["released", "gdn2", "no convolution"])
@torch.no_grad()
def test_a_step_passes_over_sequences_that_rest(parts):
    m, x = layer(parts), draw(3, 9, HIDDEN)
    _, before = m(x[:, :8])
    _, moved = m(x[:, 8:], before)
    resting = KDAState(before.memory.clone(), tuple(w.clone() for w in before.conv))
    m.step_(x[:, 8], resting, mask=torch.tensor([True, False, True]))
    for x_resting, x_before, x_moved in zip(
        (resting.memory, *resting.conv), (before.memory, *before.conv), (moved.memory, *moved.conv)
    ):
        torch.testing.assert_close(x_resting[[0, 2]], x_moved[[0, 2]])
        assert x_resting[1].equal(x_before[1])


@torch.no_grad()
def test_a_refused_step_rewrites_nothing():
    m = layer()
    _, state = m(draw(3, 8, HIDDEN))
    kept = [x.clone() for x in (state.memory, *state.conv)]
    with pytest.raises(ValueError, match=r"mask is torch.bool of shape \(2,\); expected torch.bool of shape \(3,\)"):
        m.step_(draw(3, HIDDEN), state, mask=torch.tensor([True, False]))
    assert all(a.equal(b) for a, b in zip((state.memory, *state.conv), kept))


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("trained", ["b_proj", "e_proj", "o_proj", "x", "memory"])
def test_a_step_under_autograd_is_refused_before_the_windows_move(parts, trained):
    m, x = layer(parts).requires_grad_(False), draw(2, HIDDEN)
    _, state = m(draw(2, 8, HIDDEN))
    kept = [t.clone() for t in (state.memory, *state.conv)]
    wanted = {"x": x, "memory": state.memory}.get(trained)
    if wanted is None and not hasattr(m, trained):
        return
    (getattr(m, trained).weight if wanted is None else wanted).requires_grad_()
    with pytest.raises(RuntimeError, match="step_ edits the state in place and has no gradient; call forward"):
        m.step_(x, state)
    assert all(a.equal(b) for a, b in zip((state.memory, *state.conv), kept))


STATE = lambda m: m(draw(2, 6, HIDDEN))[1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(draw(5, HIDDEN)), r"x is of shape \(5, 24\); expected a tensor \[B, T, hidden_size = 24\]"),
        (lambda m: m(draw(2, 5, 23)), r"x is of shape \(2, 5, 23\); expected a tensor \[B, T, hidden_size = 24\]"),
        (lambda m: m(torch.tensor(1.0)), r"x is of shape \(\); expected a tensor"),
        (lambda m: m([[1.0] * HIDDEN]), "x is a list; expected a tensor"),
        (lambda m: m(torch.ones(2, 5, HIDDEN, dtype=torch.long)), "x is torch.int64; expected torch.float64, the weights' own"),
        (lambda m: m(draw(2, 5, HIDDEN).float()), "x is torch.float32; expected torch.float64, the weights' own"),
        (lambda m: m(draw(2, 5, HIDDEN), mask=torch.ones(2, 4, dtype=torch.bool)), "expected torch.bool of shape"),
        (lambda m: m(draw(3, 5, HIDDEN), STATE(m)), r"memory of the state has shape \(2, 2, 8, 8\); expected \(3, 2, 8, 8\)"),
        (lambda m: m(draw(1, 5, HIDDEN), STATE(m), cu_seqlens=torch.tensor([0, 5])), r"expected \(1, 2, 8, 8\)"),
        (lambda m: m(draw(2, 5, HIDDEN), STATE(m).conv), "state is a tuple; a memory layer continues a KDAState"),
        (lambda m: m(draw(2, 5, HIDDEN), KDAState(STATE(m).memory, ())), r"windows of shapes \[\]; expected \[\(2, 16, 3\)"),
        (lambda m: m.step_(draw(2, 1, HIDDEN), STATE(m)), r"\(2, 1, 24\); expected a tensor \[B, hidden_size = 24\]"),
        (lambda m: m.step_(draw(3, HIDDEN), STATE(m)), r"memory of the state has shape \(2, 2, 8, 8\)"),
        (lambda m: m.step_(draw(2, HIDDEN), None), "state is a NoneType; a memory layer continues a KDAState"),
        (lambda m: KimiDeltaAttention(64, 2, 0), "head_dim is 0; expected a whole number, 1 or more"),
        (lambda m: KimiDeltaAttention(64.0, 2), "hidden_size is 64.0; expected a whole number, 1 or more"),
    ],
)  # fmt: skip
@torch.no_grad()
def test_bad_input_is_refused_in_a_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call(layer())


@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("parts", ["released", "gla"])
@torch.no_grad()
def test_forward_leaves_the_state_it_was_given(parts, T):
    m = layer(parts)
    _, state = m(draw(2, 6, HIDDEN))
    kept = KDAState(state.memory.clone(), tuple(w.clone() for w in state.conv))
    m(draw(2, T, HIDDEN), state)
    assert all(a.equal(b) for a, b in zip((state.memory, *state.conv), (kept.memory, *kept.conv)))


def test_gradients_reach_every_parameter_and_the_state():
    for parts in PARTS:
        m, x = layer(parts), draw(1, 6, HIDDEN).requires_grad_()
        memory = draw(1, H, K, K).requires_grad_()
        empty = m.empty_state(1, dtype=torch.float64)
        windows = tuple(draw(*w.shape, seed=i).requires_grad_() for i, w in enumerate(empty.conv))
        y, state = m(x, KDAState(memory, windows))
        (y.square().sum() + state.memory.sum()).backward()
        for name, tensor in (*m.named_parameters(), ("x", x), ("memory", memory), *(("w", w) for w in windows)):
            assert tensor.grad is not None, (parts, name)
            assert tensor.grad.abs().max() > 0, (parts, name)


def test_gradient_of_one_token_is_that_of_the_whole():
    m, x = layer(), draw(1, 4, HIDDEN).requires_grad_()
    whole, _ = m(x)
    (truth,) = torch.autograd.grad(whole[:, 3].square().sum(), x)
    _, state = m(x[:, :3])
    last, _ = m(x[:, 3:], state)
    (grad,) = torch.autograd.grad(last.square().sum(), x)
    torch.testing.assert_close(grad, truth)


def test_the_watched_edits_are_the_ones_made():
    m, x = layer("negative eigenvalues"), draw(2, 9, HIDDEN)
    with torch.no_grad():
        _, state = m(x)
        torch.testing.assert_close(trace.trace(*m.recurrence_inputs(x)).written[:, -1], state.memory)


def test_names_and_shapes_are_the_released_ones():
    with torch.device("meta"):
        m = KimiDeltaAttention(2304, 32, 128)
    assert {name: tuple(tensor.shape) for name, tensor in m.state_dict().items()} == {
        **{f"{s}_proj.weight": (4096, 2304) for s in "qkv"},
        **{f"{s}_conv1d.weight": (4096, 1, 4) for s in "qkv"},
        "A_log": (1, 1, 32, 1),
        "dt_bias": (4096,),
        "f_a_proj.weight": (128, 2304),
        "f_b_proj.weight": (4096, 128),
        "b_proj.weight": (32, 2304),
        "g_a_proj.weight": (128, 2304),
        "g_b_proj.weight": (4096, 128),
        "o_norm.weight": (128,),
        "o_proj.weight": (2304, 4096),
    }


def test_decays_start_where_the_released_code_starts_them():
    torch.manual_seed(0)
    m = KimiDeltaAttention(2, 1024, 2)
    A, step = m.A_log.exp(), torch.nn.functional.softplus(m.dt_bias)
    assert A.min() >= 1
    assert A.max() <= 16
    assert 8 < A.mean() < 9  # uniform in A and not in its logarithm, so 8.5
    assert step.min() >= 1e-3 * 0.999
    assert step.max() <= 1e-1 * 1.001
    assert abs(step.log10().mean() + 2) < 0.1  # uniform in the logarithm
    assert not KimiDeltaAttention(2, 4, 2, options=MixerOptions(gate="sigmoid")).A_log.any()


def test_in_bfloat16_decay_and_strength_stay_exact():
    """The layer's own bfloat16 error, not that of a rounded decay: rates and sums in float32 over a long slow memory."""
    m = layer()
    with torch.no_grad():
        m.dt_bias.fill_(-6.0)  # softplus(-6) = 0.0025 a token, times A: bfloat16 would round the factor to 1
        m.f_b_proj.weight.mul_(0.1)
    x = draw(1, 300, HIDDEN)
    half = KimiDeltaAttention(HIDDEN, H, K)
    half.load_state_dict(m.state_dict())
    half.bfloat16()
    assert half.A_log.dtype == half.dt_bias.dtype == torch.float32
    with torch.no_grad():
        truth = m._log_decay(x.bfloat16().double()).sum(1)
        total = half._log_decay(x.bfloat16()).sum(1)
        rounded = m._log_decay(x).bfloat16().exp().bfloat16().log().sum(1)
        assert total.dtype == torch.float32
        assert (total - truth).abs().max() < 0.1 * (rounded - truth).abs().max()
        _, state = half(x.bfloat16())
        assert state.memory.dtype == torch.float32


@torch.no_grad()
def test_single_precision_is_within_budget_of_the_definition():
    m, x = layer(), draw(1, 70, HIDDEN)
    truth, S = plainly(m, x[0])
    single = layer(dtype=torch.float32)
    peer, peer_S = plainly(single, x[0].float())
    y, state = single(x.float())
    assert_within_budget("output", y[0], truth, peer)
    assert_within_budget("state", state.memory[0], S, peer_S)


class NoErasing(KimiDeltaAttention):
    remember, written = ScalarDecay.remember, ScalarDecay.written


MUTANTS = {
    "eps of the norm": lambda m: setattr(m.o_norm, "eps", 1e-1),
    "silu output gate": lambda m: setattr(m, "options", dataclasses.replace(m.options, output_gate="silu")),
    "bounded gate": lambda m: setattr(m, "options", dataclasses.replace(m.options, gate="sigmoid")),
    "double beta": lambda m: setattr(m, "options", dataclasses.replace(m.options, beta_max=2.0)),
    "no erasing": lambda m: setattr(m, "__class__", NoErasing),
    "no q/k norm": lambda m: setattr(m, "options", dataclasses.replace(m.options, qk_norm=False)),
    "k through q's convolution": lambda m: setattr(m, "k_conv1d", m.q_conv1d),
    "taps reversed": lambda m: m.v_conv1d.weight.data.copy_(m.v_conv1d.weight.data.flip(-1)),
    "bias without its place": lambda m: m.dt_bias.data.copy_(m.dt_bias.data.view(H, K).T.flatten()),
}


@pytest.mark.parametrize("mutant", MUTANTS)
@torch.no_grad()
def test_the_budget_rejects_wrong_layers(mutant):
    m, x = layer(), draw(1, 70, HIDDEN)
    truth, _ = plainly(m, x[0])
    peer, _ = plainly(layer(dtype=torch.float32), x[0].float())
    wrong = layer(dtype=torch.float32)
    MUTANTS[mutant](wrong)
    with pytest.raises(AssertionError, match="exceeds budget"):
        assert_within_budget("output", wrong(x.float())[0][0], truth, peer)

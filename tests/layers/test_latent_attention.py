"""Latent attention against a plain reading of its definition, both of its ways, and its cache as a value."""

import math
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch

from palimpsest.layers import latent_attention
from palimpsest.layers.latent_attention import MultiHeadLatentAttention, rotate
from palimpsest.layers.layer_state import CacheBuffer, LatentState
from palimpsest.testing import assert_within_budget

HIDDEN, H, R, N, P, V = 24, 3, 10, 6, 4, 5


def layer(rope=None, dtype=torch.float64):
    torch.manual_seed(0)
    m = MultiHeadLatentAttention(
        HIDDEN, H, kv_lora_rank=R, qk_nope_head_dim=N, qk_rope_head_dim=P, v_head_dim=V, rope=rope
    )
    for name, parameter in m.named_parameters():
        torch.nn.init.normal_(parameter, *((1, 0.2) if "norm" in name else (0, 0.5)))
    return m.to(dtype)


def draw(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def plainly(m, x):
    """One query and head at a time. x [T, hidden] -> y [T, hidden]."""
    w = dict(m.named_parameters())
    T = len(x)
    turn = lambda v, t: v if m.rope is None else turned(v, t, m.rope)
    q = (x @ w["q_proj.weight"].T).view(T, H, N + P)
    a = x @ w["kv_a_proj_with_mqa.weight"].T
    latent, shared = a[:, :R], a[:, R:]
    latent = latent / torch.sqrt((latent * latent).mean(-1, keepdim=True) + 1e-6) * w["kv_a_layernorm.weight"]
    kv = (latent @ w["kv_b_proj.weight"].T).view(T, H, N + V)
    y = torch.zeros(T, H, V, dtype=x.dtype)
    for t in range(T):
        for h in range(H):
            query = torch.cat([q[t, h, :N], turn(q[t, h, N:], t)])
            keys = torch.stack([torch.cat([kv[s, h, :N], turn(shared[s], s)]) for s in range(t + 1)])
            weights = (keys @ query / math.sqrt(N + P)).exp()
            y[t, h] = (weights / weights.sum()) @ kv[: t + 1, h, N:]
    return y.reshape(T, -1) @ w["o_proj.weight"].T


def turned(v, t, base):
    """Channel pairs as complex numbers."""
    half = len(v) // 2
    angle = torch.tensor([t * base ** (-i / half) for i in range(half)], dtype=torch.float64)
    z = torch.complex(v[:half].double(), v[half:].double()) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag]).to(v.dtype)


@pytest.mark.parametrize("rope", [None, 100.0])
@torch.no_grad()
def test_layer_is_its_definition(rope):
    m, x = layer(rope), draw(2, 13, HIDDEN)
    y, state = m(x)
    for b in range(2):
        torch.testing.assert_close(y[b], plainly(m, x[b]))
    assert state.latent.shape == (2, 13, R + P)
    assert state.valid is None


@pytest.mark.parametrize("rope", [None, 100.0])
@pytest.mark.parametrize("absorb", [0, 128])
@torch.no_grad()
def test_segments_and_steps_are_the_whole_both_ways(rope, absorb, monkeypatch):
    monkeypatch.setattr(latent_attention, "ABSORB_UP_TO", absorb)
    m, x = layer(rope), draw(2, 20, HIDDEN)
    whole, end = m(x)
    outputs, state = [], None
    for a, b in [(0, 3), (3, 11), (11, 12), (12, 20)]:
        y, state = m(x[:, a:b], state)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), whole)
    torch.testing.assert_close(state.latent, end.latent)

    state = LatentState(torch.empty(2, 0, R + P, dtype=torch.float64))
    for t in range(20):
        y, state = m.step_(x[:, t], state)
        torch.testing.assert_close(y, whole[:, t])


@torch.no_grad()
def test_a_step_never_builds_keys():
    """Absorbed decode: kv_b_proj is read as a matrix and never run over the cache."""
    m = layer()
    _, state = m(draw(2, 9, HIDDEN))

    def refuse(*_):
        raise AssertionError("keys were expanded")

    m.kv_b_proj.register_forward_hook(refuse)
    m.step_(draw(2, HIDDEN), state)
    m(draw(2, 1, HIDDEN), state)
    with pytest.raises(AssertionError, match="keys were expanded"):
        m(draw(2, 9, HIDDEN))


@torch.no_grad()
def test_without_positions_order_means_nothing_and_with_them_only_distance():
    x = draw(1, 8, HIDDEN)
    swapped = x[:, [3, 1, 0, 2, 4, 5, 6, 7]]
    y, z = layer()(x)[0], layer()(swapped)[0]
    torch.testing.assert_close(y[:, 4:], z[:, 4:])
    y, z = layer(100.0)(x)[0], layer(100.0)(swapped)[0]
    assert (y[:, 4:] - z[:, 4:]).abs().max() > 1e-3

    q, k = draw(P), draw(P, seed=2)
    near, far = (rotate(q, torch.tensor(5 + d), 1e4) @ rotate(k, torch.tensor(2 + d), 1e4) for d in (0, 1_000_000))
    torch.testing.assert_close(near, far)


def varlen_by_definition(q, k, v, of_q, of_k, scale):
    """What a GPU's kernel computes: one document at a time, the last query sees all keys, the one before all but one."""
    outputs = []
    for (a, b), (c, d) in zip(pairwise(of_q[0].tolist()), pairwise(of_k[0].tolist())):
        assert b - a <= of_q[1]
        assert d - c <= of_k[1]
        hidden = torch.ones(b - a, d - c, dtype=torch.bool).triu(d - c - (b - a) + 1)
        scores = torch.einsum("thc,shc->hts", q[a:b], k[c:d]) * scale
        outputs.append(torch.einsum("hts,shc->thc", scores.masked_fill(hidden, -torch.inf).softmax(-1), v[c:d]))
    return torch.cat(outputs)


@pytest.fixture(params=["a loop", "one call"])
def documents_by(request, monkeypatch):
    """Both ways to packed documents: that of a CPU, and that of a GPU with its kernel written out."""
    if request.param == "one call":
        monkeypatch.setattr(latent_attention, "_varlen", varlen_by_definition)
        monkeypatch.setattr(MultiHeadLatentAttention, "_runs_packed", lambda self, q: True)


@pytest.mark.usefixtures("documents_by")
@pytest.mark.parametrize("rope", [None, 100.0])
@torch.no_grad()
def test_packing_and_padding_are_separate_documents(rope):
    m = layer(rope)
    lengths = [5, 0, 1, 9]
    documents = [draw(1, n, HIDDEN, seed=n + 5) for n in lengths]
    starts = [draw(n, HIDDEN, seed=n + 20) for n in (3, 7, 0, 1)]
    rows = [m(s[None])[1].latent[0] if len(s) else s.new_zeros(0, R + P) for s in starts]
    before = LatentState.of_rows(rows)
    assert before.num_tokens().tolist() == [3, 7, 0, 1]

    y, packed = m(torch.cat(documents, 1), before, cu_seqlens=torch.tensor([0, 5, 5, 6, 15]))
    for i, (document, row, piece) in enumerate(zip(documents, rows, y.split(lengths, 1))):
        alone, after = m(document, LatentState(row[None])) if lengths[i] else (document, LatentState(row[None]))
        torch.testing.assert_close(piece, alone)
        torch.testing.assert_close(packed.rows()[i], after.latent[0])

    mask = torch.zeros(4, 12, dtype=torch.bool)
    for row, (start, n) in enumerate(zip((7, 3, 0, 2), lengths)):  # left, nothing at all, right, both sides
        mask[row, start : start + n] = True
    x = torch.full((4, 12, HIDDEN), torch.nan, dtype=torch.float64)
    x[mask] = torch.cat(documents, 1)[0]
    padded_y, padded = m(x, before, mask=mask)
    torch.testing.assert_close(padded_y[mask], y[0])
    assert not padded_y[~mask].any()

    token = draw(4, HIDDEN, seed=99)  # a step on ragged rows, and one that passes over some
    y, after = m.step_(token, padded)
    for i, row in enumerate(padded.rows()):
        alone, _ = m.step_(token[i : i + 1], LatentState(row[None]))
        torch.testing.assert_close(y[i], alone[0])
    _, rested = m.step_(token, padded, mask=torch.tensor([True, False, True, False]))
    assert (rested.num_tokens() - padded.num_tokens()).tolist() == [1, 0, 1, 0]
    torch.testing.assert_close(rested.rows()[1], padded.rows()[1])
    torch.testing.assert_close(rested.rows()[2], after.rows()[2])
    longer, _ = m(draw(4, 3, HIDDEN), rested)  # many tokens on ragged rows
    for i, row in enumerate(rested.rows()):
        alone, _ = m(draw(4, 3, HIDDEN)[i : i + 1], LatentState(row[None]))
        torch.testing.assert_close(longer[i], alone[0])


@torch.no_grad()
def test_padding_on_the_right_of_every_row_leaves_no_trace():
    m, x, lengths = layer(100.0), draw(3, 9, HIDDEN), [4, 9, 1]
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    y, state = m(x, mask=mask)
    for i, n in enumerate(lengths):
        alone, after = m(x[i : i + 1, :n])
        torch.testing.assert_close(y[i, :n], alone[0])
        assert not y[i, n:].any()
        torch.testing.assert_close(state.rows()[i], after.latent[0])


STATE = lambda m: m(draw(2, 6, HIDDEN))[1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(draw(5, HIDDEN)), r"x is of shape \(5, \d+\); expected a tensor \[B, T, hidden_size = "),
        (lambda m: m(draw(2, 5, 3)), r"x is of shape \(2, 5, 3\); expected a tensor \[B, T, hidden_size = "),
        (lambda m: m(draw(2, 5, HIDDEN).float()), "x is torch.float32; expected torch.float64, the weights' own"),
        (lambda m: m(draw(3, 5, HIDDEN), STATE(m)), r"latent of the state has shape \(2, 6, \d+\); expected \[3, tokens"),
        (lambda m: m(draw(2, 5, HIDDEN), LatentState(STATE(m).latent[..., 1:])), "latent of the state has shape"),
        (lambda m: m(draw(2, 5, HIDDEN), LatentState(STATE(m).latent, torch.ones(2, 6))), "valid of the state is torch.float32"),
        (lambda m: m(draw(2, 5, HIDDEN), (1, 2)), "state is a tuple; a latent attention layer continues a LatentState"),
        (lambda m: m.step_(draw(2, 1, HIDDEN), STATE(m)), r"x is of shape \(2, 1, \d+\); expected a tensor \[B, hidden_size"),
        (lambda m: MultiHeadLatentAttention(64, 0), "num_heads is 0; expected a whole number, 1 or more"),
        (lambda m: MultiHeadLatentAttention(64, 2, qk_rope_head_dim=-1), "qk_rope_head_dim is -1; expected a whole number"),
    ],
)  # fmt: skip
@torch.no_grad()
def test_bad_input_is_refused_in_a_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call(layer())


@torch.no_grad()
def test_threads_that_go_on_from_one_state_do_not_meet():
    """Each claims the spare rows or copies: no thread ever reads another's latents."""
    m, x = layer(), draw(16, HIDDEN)
    _, start = m(draw(1, 9, HIDDEN))
    _, start = m.step_(x[:1], start)  # with spare rows behind it
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            for _ in range(10):
                futures = list(pool.map(m.step_, x.split(1), [start] * len(x)))
                for token, (_, future) in zip(x.split(1), futures):
                    _, alone = m.step_(token, LatentState(start.latent.clone()))
                    assert future.latent.equal(alone.latent)
                start = futures[-1][1]
    finally:
        sys.setswitchinterval(interval)


def test_of_two_claims_of_the_same_rows_one_is_given():
    """The moment that threads can hardly be made to meet at: another claims when this one has just looked."""
    buffer, others = CacheBuffer(torch.empty(1, 20, 3), [9]), []

    class Interrupted(list):
        def meanwhile(self, seen):
            if not others:
                others.append(None)
                others[0] = buffer.claim(9, 1)
            return seen

        def pop(self):
            return self.meanwhile(super().pop())

        def __getitem__(self, at):
            return self.meanwhile(super().__getitem__(at))

    buffer.end = Interrupted(buffer.end)
    assert [buffer.claim(9, 1), others[0]] in ([True, False], [False, True])
    assert not buffer.claim(9, 1)
    assert buffer.claim(10, 10)
    assert not buffer.claim(20, 1)


def test_queries_alone_can_be_trained_over_a_carried_state():
    """Keys and values frozen, as when an adapter sits on q alone: what the backward pass reads is not written over."""
    m, x = layer(), draw(1, 12, HIDDEN)
    m.requires_grad_(False)
    m.q_proj.requires_grad_()
    for absorb_first in (4, 1):
        with torch.no_grad():
            _, state = m(x[:, :3])
            _, state = m.step_(x[:, 3], state)
        outputs = []
        for t in range(4, 12, absorb_first):
            y, state = m(x[:, t : t + absorb_first], state)
            outputs.append(y)
        (grad,) = torch.autograd.grad(torch.cat(outputs, 1).square().sum(), m.q_proj.weight)
        (truth,) = torch.autograd.grad(m(x)[0][:, 4:].square().sum(), m.q_proj.weight)
        torch.testing.assert_close(grad, truth)


def test_rows_and_documents_must_agree():
    m = layer()
    _, state = m(draw(2, 3, HIDDEN))
    with pytest.raises(ValueError, match="state has 2 rows and cu_seqlens 1 documents; give one row a document"):
        m(draw(1, 3, HIDDEN), state, cu_seqlens=torch.tensor([0, 3]))


@torch.no_grad()
def test_an_older_state_keeps_its_value_and_can_branch():
    """Appending writes into shared room; two futures of one past must not meet there."""
    m, x = layer(), draw(2, 30, HIDDEN)
    _, past = m(x[:, :9])
    _, one = m.step_(x[:, 10], past)
    kept, first = past.latent.clone(), one.latent.clone()
    _, two = m.step_(x[:, 11], past)
    _, three = m.step_(x[:, 12], one)
    torch.testing.assert_close(past.latent, kept, rtol=0, atol=0)
    torch.testing.assert_close(one.latent, first, rtol=0, atol=0)
    torch.testing.assert_close(three.latent[:, :10], first, rtol=0, atol=0)
    assert not two.latent[:, 9].equal(one.latent[:, 9])

    shorter = LatentState(one.latent[:, :5], None, one.buffer)  # rolled back
    _, again = m.step_(x[:, 13], shorter)
    torch.testing.assert_close(one.latent, first, rtol=0, atol=0)
    other = LatentState(again.latent[:1], None, again.buffer)  # one of the sequences
    _, again = m.step_(x[:1, 13], other)
    assert again.latent.shape == (1, 7, R + P)
    torch.testing.assert_close(three.latent[:, :10], first, rtol=0, atol=0)


def test_a_cache_begun_in_inference_mode_goes_on_outside_it():
    m, x = layer(), draw(1, 9, HIDDEN)
    with torch.inference_mode():
        _, state = m(x[:, :8])
        _, state = m.step_(x[:, 8], state)
    with torch.no_grad():
        _, after = m.step_(x[:, 8], state)
    assert after.num_tokens().tolist() == [10]


@torch.no_grad()
def test_appending_copies_rarely():
    m, state, buffers = layer(), LatentState(torch.empty(1, 0, R + P, dtype=torch.float64)), []
    for t in range(600):
        _, state = m.step_(draw(1, HIDDEN, seed=t), state)
        if not buffers or buffers[-1] is not state.buffer:
            buffers.append(state.buffer)  # and keeps it, so that no two can share an address
        assert state.buffer.rows.shape[1] <= 1.125 * (t + 1) + 64
    assert len(buffers) <= 10, len(buffers)


def test_gradients_reach_every_parameter_and_the_past():
    m, x = layer(10.0), draw(1, 6, HIDDEN).requires_grad_()
    _, past = m(x[:, :3])
    y, _ = m(x[:, 3:], past)
    whole, _ = m(x)
    tensors = [x, *m.parameters()]
    for grad, truth in zip(*(torch.autograd.grad(out.square().sum(), tensors) for out in (y, whole[:, 3:]))):
        torch.testing.assert_close(grad, truth)
        assert truth.abs().max() > 0


def test_names_and_shapes_are_the_released_ones():
    with torch.device("meta"):
        m = MultiHeadLatentAttention(2304, 32)
    assert {name: tuple(tensor.shape) for name, tensor in m.state_dict().items()} == {
        "q_proj.weight": (6144, 2304),
        "kv_a_proj_with_mqa.weight": (576, 2304),
        "kv_a_layernorm.weight": (512,),
        "kv_b_proj.weight": (8192, 512),
        "o_proj.weight": (2304, 4096),
    }


MUTANTS = {
    "scale of N alone": lambda m: setattr(m, "N", N) or setattr(type(m), "scale", property(lambda _: N**-0.5)),
    "eps of the model": lambda m: setattr(m.kv_a_layernorm, "eps", 1e-2),
    "rotary positions": lambda m: setattr(m, "rope", 10.0),
    "norm on the position channels": lambda m: m.kv_a_proj_with_mqa.weight.data[R:].mul_(1.01),
}


@pytest.mark.parametrize("mutant", MUTANTS)
@torch.no_grad()
def test_the_budget_rejects_wrong_layers(mutant, monkeypatch):
    monkeypatch.setattr(MultiHeadLatentAttention, "scale", MultiHeadLatentAttention.scale)  # restored afterwards
    x = draw(1, 40, HIDDEN)
    truth, peer = plainly(layer(), x[0]), plainly(layer(dtype=torch.float32), x[0].float())
    honest = layer(dtype=torch.float32)
    assert_within_budget("output", honest(x.float())[0][0], truth, peer)
    MUTANTS[mutant](honest)
    with pytest.raises(AssertionError, match="exceeds budget"):
        assert_within_budget("output", honest(x.float())[0][0], truth, peer)


@pytest.mark.usefixtures("documents_by")
@torch.no_grad()
def test_a_long_continuation_is_the_whole(monkeypatch):
    monkeypatch.setattr(latent_attention, "ABSORB_UP_TO", 2)
    m, x = layer(), draw(2, 11, HIDDEN)
    whole, _ = m(x)
    _, state = m(x[:, :4])
    y, state = m(x[:, 4:], state)
    torch.testing.assert_close(y, whole[:, 4:])
    ragged = LatentState.of_rows([state.latent[0, :3], state.latent[1]])
    y, after = m(x[:, :5], ragged)
    for i, row in enumerate(ragged.rows()):
        alone, _ = m(x[i : i + 1, :5], LatentState(row[None]))
        torch.testing.assert_close(y[i : i + 1], alone)
    assert after.num_tokens().tolist() == [8, 16]


@pytest.mark.usefixtures("documents_by")
def test_gradients_reach_packed_documents_and_their_states():
    m = layer().requires_grad_(False)
    x, latent = draw(1, 6, HIDDEN).requires_grad_(), draw(2, 3, R + P).requires_grad_()

    def run(x, latent):
        state = LatentState(latent, torch.tensor([[True, False, False], [True, True, True]]))
        return m(x, state, cu_seqlens=torch.tensor([0, 2, 6]))[0]

    assert torch.autograd.gradcheck(run, (x, latent))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("continued", [False, True])
@torch.no_grad()
def test_a_gpu_takes_documents_at_once(monkeypatch, continued):
    torch.manual_seed(0)
    m = MultiHeadLatentAttention(64, 2, kv_lora_rank=32, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32)
    m = m.cuda().bfloat16()
    ends, T = [0, 130, 130, 131, 500], 500
    x = torch.randn(1, T, 64, device="cuda").bfloat16()
    rows = [torch.randn(n, 48, device="cuda").bfloat16() for n in (3, 200, 0, 7)]
    results = {}
    for name, dtype, packs in (
        ("truth", torch.float64, False),
        ("peer", torch.bfloat16, False),
        ("ours", torch.bfloat16, True),
    ):
        with monkeypatch.context() as patch:
            if not packs:
                patch.setattr(MultiHeadLatentAttention, "_runs_packed", lambda self, q: False)
            state = LatentState.of_rows([row.to(dtype) for row in rows]) if continued else None
            y, after = m.to(dtype)(x.to(dtype), state, cu_seqlens=torch.tensor(ends))
            results[name] = y, *after.rows()
    for i, (truth, peer, ours) in enumerate(zip(results["truth"], results["peer"], results["ours"])):
        assert_within_budget(f"result {i}", ours, truth, peer)

"""The whole model: every cut of a sequence gives the same numbers, losses look where they should, and bad input is refused."""

import pytest
import torch

from palimpsest.layers.moe import MoE
from palimpsest.models.kimi_linear import KimiLinearConfig, KimiLinearForCausalLM, ModelState
from palimpsest.models.kimi_linear.model import DecoderLayer

PATTERNS = ["KKKM", "KK", "MM", "KRG"]


def build(pattern="KKKM", dtype=torch.float64, seed=0, **changes):
    torch.manual_seed(seed)
    model = KimiLinearForCausalLM(KimiLinearConfig.tiny(pattern, hidden_size=32, linear_head_dim=8, **changes))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1, 0.2)
        elif "A_log" not in name and "dt_bias" not in name:
            torch.nn.init.normal_(parameter, 0, 0.2)
    for module in model.modules():
        if isinstance(module, MoE):
            module.gate.e_score_correction_bias.normal_(0, 0.1)
    return model.to(dtype).eval()


def tokens(*shape, seed=0):
    return torch.randint(0, 257, shape, generator=torch.Generator().manual_seed(seed))


def numbers(state: ModelState):
    return [
        state.position,
        *(x for layer in state.layers for x in vars(layer).values() if isinstance(x, torch.Tensor)),
    ] + [w for layer in state.layers if hasattr(layer, "conv") for w in layer.conv]


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("pattern", PATTERNS)
@torch.no_grad()
def test_segments_and_steps_are_the_whole(pattern):
    model, ids = build(pattern), tokens(2, 70)
    whole, end, _ = model(ids)
    outputs, state = [], None
    for a, b in [(0, 2), (2, 37), (37, 38), (38, 66)]:
        logits, state, _ = model(ids[:, a:b], state=state)
        outputs.append(logits)
    for t in range(66, 70):
        logits, state = model.step_(ids[:, t], state)
        outputs.append(logits[:, None])
    close(torch.cat(outputs, 1), whole)
    assert state.position.tolist() == [70, 70]
    for a, b in zip(numbers(state), numbers(end), strict=True):
        close(a, b)

    state = ModelState.empty(model.config, 2, dtype=torch.float64)
    for t in range(5):
        logits, state = model.step_(ids[:, t], state)
        close(logits, whole[:, t])


@pytest.mark.parametrize("pattern", PATTERNS)
@torch.no_grad()
def test_packing_and_padding_are_separate_documents(pattern):
    model, lengths = build(pattern), [5, 33, 1, 18]
    documents = [tokens(1, n, seed=n) for n in lengths]
    alone = [model(document) for document in documents]
    packed = model(torch.cat(documents, 1), cu_seqlens=torch.tensor([0, 5, 38, 39, 57]))
    for piece, single in zip(packed.logits.split(lengths, 1), alone):
        close(piece, single.logits)

    mask = torch.zeros(4, 40, dtype=torch.bool)
    for row, (start, n) in enumerate(zip((35, 0, 3, 9), lengths)):
        mask[row, start : start + n] = True
    ids = tokens(4, 40, seed=9)
    ids[mask] = torch.cat(documents, 1)[0]
    padded = model(ids, mask=mask)
    close(padded.logits[mask], packed.logits[0])
    assert padded.state.position.tolist() == packed.state.position.tolist() == lengths

    following = tokens(4, 3, seed=10)  # and the state goes on as if nothing had been beside it
    after = model(following, state=padded.state).logits
    for row, single in enumerate(alone):
        close(after[row : row + 1], model(following[row : row + 1], state=single.state).logits)
    stepped, _ = model.step_(following[:, 0], padded.state)
    close(stepped, after[:, 0])


@torch.no_grad()
def test_a_full_mask_is_no_mask():
    model, ids = build(), tokens(2, 9)
    plain, masked = model(ids), model(ids, mask=torch.ones(2, 9, dtype=torch.bool))
    assert plain.logits.equal(masked.logits)
    assert all(layer.valid is None for layer in masked.state.layers if hasattr(layer, "valid"))


@torch.no_grad()
def test_a_row_of_padding_alone_leaves_its_state_as_it_was():
    model, ids = build(), tokens(2, 9)
    before = model(ids).state
    mask = torch.tensor([[False] * 9, [True] * 9])
    after = model(ids, state=before, mask=mask).state
    assert after.position.tolist() == [9, 18]
    for a, b in zip(after.layers, before.layers):
        if hasattr(a, "memory"):
            assert a.memory[0].equal(b.memory[0])
            assert not a.memory[1].equal(b.memory[1])
        else:
            assert a.num_tokens().tolist() == [9, 18]
    nothing = model(ids, state=before, mask=torch.zeros(2, 9, dtype=torch.bool))
    for a, b in zip(nothing.state.layers, before.layers):
        if hasattr(a, "memory"):
            assert a.memory.equal(b.memory)


@pytest.mark.parametrize("T", [1, 4])
@torch.no_grad()
def test_forward_leaves_the_state_it_was_given(T):
    model = build()
    state = model(tokens(2, 6)).state
    kept = [x.clone() for x in numbers(state)]
    model(tokens(2, T, seed=1), state=state)
    assert all(a.equal(b) for a, b in zip(numbers(state), kept))


@torch.no_grad()
def test_no_token_sees_the_future():
    model, ids = build("KMKR"), tokens(1, 40)
    other = ids.clone()
    other[0, 23:] = tokens(1, 17, seed=5)
    a, b = model(ids).logits, model(other).logits
    close(a[:, :23], b[:, :23])
    assert (a[:, 23:] - b[:, 23:]).abs().min(-1).values.max() > 0


def plain_loss(model, documents, labels):
    """Each document by itself, each token by itself."""
    losses = []
    for ids, wanted in zip(documents, labels):
        p = model(ids[None]).logits[0].log_softmax(-1)
        losses += [-p[t, wanted[t + 1]] for t in range(len(ids) - 1) if wanted[t + 1] != -100]
    return torch.stack(losses).mean()


@torch.no_grad()
def test_loss_predicts_the_next_token_and_crosses_no_border():
    model, lengths = build(), [4, 1, 7]
    documents = [tokens(n, seed=n) for n in lengths]
    labels = [d.clone() for d in documents]
    labels[2][3] = labels[0][2] = -100
    truth = plain_loss(model, documents, labels)
    ids, wanted, ends = torch.cat(documents)[None], torch.cat(labels)[None], torch.tensor([0, 4, 5, 12])
    close(model(ids, labels=wanted, cu_seqlens=ends).loss, truth)
    assert model(ids).loss is None
    assert abs(model(ids, labels=wanted).loss - truth) > 1e-4  # without borders it is another loss

    mask = torch.zeros(3, 9, dtype=torch.bool)
    for row, (start, n) in enumerate(zip((5, 2, 0), lengths)):
        mask[row, start : start + n] = True
    padded, padded_labels = tokens(3, 9, seed=8), tokens(3, 9, seed=8)
    padded[mask], padded_labels[mask] = ids[0], wanted[0]
    close(model(padded, labels=padded_labels, mask=mask).loss, truth)

    last = torch.tensor([0, 4, 4, 12])  # an empty document, and labels that begin one
    close(
        model(ids, labels=wanted, cu_seqlens=last).loss,
        plain_loss(model, ids[0].split([4, 8]), wanted[0].split([4, 8])),
    )


@torch.no_grad()
def test_nothing_to_predict_is_no_loss_and_not_nan():
    assert build()(tokens(1, 3), labels=torch.full((1, 3), -100)).loss == 0


@torch.no_grad()
def test_last_only_is_the_last_row():
    model, ids = build(), tokens(2, 9)
    full = model(ids).logits
    close(model(ids, last_only=True).logits, full[:, -1:])
    mask = torch.tensor([[True] * 5 + [False] * 4, [False] * 3 + [True] * 6])
    close(model(ids, mask=mask, last_only=True).logits[:, 0], model(ids, mask=mask).logits[[0, 1], [4, 8]])
    packed = model(ids[:1], cu_seqlens=torch.tensor([0, 2, 9]), last_only=True)
    close(packed.logits, model(ids[:1], cu_seqlens=torch.tensor([0, 2, 9])).logits[:, [1, 8]])
    with pytest.raises(ValueError, match="cu_seqlens has an empty one"):
        model(ids[:1], cu_seqlens=torch.tensor([0, 2, 2, 9]), last_only=True)
    with pytest.raises(ValueError, match="mask has a row without a token"):
        model(ids, mask=mask & torch.tensor([[False], [True]]), last_only=True)


@pytest.mark.parametrize("pattern", ["KKKM", "KEAS"])
def test_checkpointing_changes_memory_and_nothing_else(pattern):
    model, ids = build(pattern).train(), tokens(2, 20)
    model(ids, labels=ids).loss.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    loads = [m.total_load.clone() for m in model.modules() if isinstance(m, MoE)]
    assert [load.sum().item() for load in loads] == [2 * 40] * 3
    model.zero_grad()
    model.model.gradient_checkpointing = True
    runs = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda *_: runs.append(1))
    model(ids, labels=ids).loss.backward()
    assert len(runs) == 2 * len(model.model.layers)  # once more for the gradient
    for p, grad in zip(model.parameters(), grads):
        close(p.grad, grad)
    for m, load in zip((m for m in model.modules() if isinstance(m, MoE)), loads):
        assert m.total_load.equal(2 * load)  # two forwards, however often a layer ran
    model.zero_grad()
    with torch.no_grad():
        model.eval()(ids)
    assert all(
        m.total_load.equal(2 * load) for m, load in zip((m for m in model.modules() if isinstance(m, MoE)), loads)
    )


def test_the_gradient_flows_through_a_state():
    model, ids = build(), tokens(1, 12)
    head = model(ids[:, :7])
    loss = model(ids[:, 7:], state=head.state).logits.square().sum()
    weight = model.model.embed_tokens.weight
    (cut,) = torch.autograd.grad(loss, weight)
    (whole,) = torch.autograd.grad(model(ids).logits[:, 7:].square().sum(), weight)
    close(cut, whole)


def test_bfloat16_keeps_the_float32_contract_and_runs():
    model = build(dtype=torch.float32).to(torch.bfloat16)
    kept = {n for n, t in model.state_dict().items() if t.dtype == torch.float32}
    assert kept == {n for n in model.state_dict() if n.endswith(("A_log", "dt_bias", "e_score_correction_bias"))}
    with torch.no_grad():
        out = model(tokens(2, 9))
        assert out.logits.dtype == torch.bfloat16
        logits, state = model.step_(tokens(2), out.state)
        logits, _ = model.step_(tokens(2), ModelState.empty(model.config, 2, dtype=torch.bfloat16))
    assert {x.dtype for x in numbers(state) if x.ndim == 4} == {torch.float32}


def test_autocast_keeps_memories_in_float32_and_trains():
    model, ids = build(dtype=torch.float32), tokens(1, 20)
    with torch.autocast("cpu", torch.bfloat16):
        out, state = model(ids, labels=ids), model(ids).state
    assert state.layers[0].memory.dtype == torch.float32
    out.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        assert abs(out.loss - model(ids, labels=ids).loss) < 0.1


def test_tied_embeddings_are_one_tensor():
    model = build(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_weights_start_at_the_given_spread():
    torch.manual_seed(0)
    model = KimiLinearForCausalLM(KimiLinearConfig.tiny(initializer_range=0.05))
    for name, parameter in model.named_parameters():
        if "proj" in name or "embed" in name or "lm_head" in name or ".w1" in name:
            assert abs(parameter.std() - 0.05) < 0.01, name
        elif "conv1d" in name:
            assert 0.4 < parameter.abs().max() <= 0.5, name
        elif "norm" in name:
            assert (parameter == 1).all(), name


def test_layers_are_named_as_wrappers_expect():
    assert {type(layer) for layer in build().model.layers} == {DecoderLayer}


def bad_state(model):
    return ModelState.empty(model.config.replace(layer_types="MKKK"), dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(tokens(1, 0)), r"input_ids has shape \(1, 0\), no token at all"),
        (lambda m: m(tokens(0, 3)), r"input_ids has shape \(0, 3\), no token at all"),
        (lambda m: m(tokens(3)), r"input_ids is torch.int64 of shape \(3,\); expected whole numbers \[B, T\]"),
        (lambda m: m(torch.zeros(1, 3)), "input_ids is torch.float32"),
        (lambda m: m(torch.tensor([[5, 257]])), "input_ids has token 257; the model's vocabulary is 0..256"),
        (lambda m: m(torch.tensor([[5, -1]])), "input_ids has token -1; the model's vocabulary is 0..256"),
        (lambda m: m(tokens(1, 3), labels=tokens(1, 4)), r"labels: shape \(1, 4\); give labels like input_ids \(1, 3\)"),
        (lambda m: m(tokens(1, 3), labels=tokens(1, 3), last_only=True), "last_only leaves nothing to learn from"),
        (lambda m: m(tokens(1, 3), labels=tokens(1, 3) + 257), "labels has token .*; the model's vocabulary is 0..256"),
        (lambda m: m(tokens(1, 3), mask=torch.ones(1, 3)), "mask is torch.float32"),
        (lambda m: m(tokens(1, 3), mask=torch.ones(1, 3, dtype=torch.bool), cu_seqlens=torch.tensor([0, 3])), "both given"),
        (lambda m: m(tokens(2, 3), cu_seqlens=torch.tensor([0, 3])), "with a batch of 2"),
        (lambda m: m(tokens(1, 3), cu_seqlens=torch.tensor([0, 2, 1, 3])), "it must rise from 0 to the number of tokens, 3"),
        (lambda m: m(tokens(1, 3), cu_seqlens=torch.tensor([0.0, 3.0])), "cu_seqlens is torch.float32"),
        (lambda m: m(tokens(2, 3), state=ModelState.empty(m.config, dtype=m.dtype)), "state has 1 sequences and input_ids 2"),
        (lambda m: m(tokens(1, 3), state=bad_state(m)), "state is of another model: its layers are LatentState, KDAState"),
        (lambda m: m.step_(tokens(1, 1), ModelState.empty(m.config, dtype=m.dtype)), r"expected whole numbers \[B\]"),
        (lambda m: m.step_(torch.tensor([300]), ModelState.empty(m.config, dtype=m.dtype)), "input_ids has token 300"),
        (lambda m: m.step_(tokens(2), ModelState.empty(m.config, 2, dtype=m.dtype), torch.ones(2)), "mask is torch.float32"),
    ],
)  # fmt: skip
@torch.no_grad()
def test_bad_calls_are_refused_in_a_sentence(call, message):
    with pytest.raises(ValueError, match=message) as raised:
        call(build())
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("trained", ["everything", "the last layer", "the state"])
def test_a_step_under_autograd_is_refused_before_anything_moves(trained):
    model = build("KMK").requires_grad_(trained == "everything")
    model.model.layers[2].requires_grad_(trained != "the state")
    with torch.no_grad():
        state = model(tokens(1, 5)).state
    kept = state.snapshot()
    state.layers[2].memory.requires_grad_(trained == "the state")
    with pytest.raises(RuntimeError, match="no gradient"):
        model.step_(tokens(1), state)
    assert state.same(kept)

"""Going back: a rolled-back run continues as one that never went on."""

import pytest
import torch

from palimpsest.models.kimi_linear import KimiLinearConfig, KimiLinearForCausalLM, ModelState
from palimpsest.models.kimi_linear.history import StateHistory


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return KimiLinearForCausalLM(KimiLinearConfig.tiny("KMK", initializer_range=0.2)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tokens():
    torch.manual_seed(1)
    return torch.randint(0, 257, (2, 100))


@torch.no_grad()
def stepped(model, tokens, every=16, keep=4):
    """Read token by token, in place, and keep a copy of every state."""
    state = ModelState.empty(model.config, 2)
    history, states = StateHistory.start(state.snapshot(), every=every, keep=keep), []
    for t in range(tokens.shape[1]):
        states.append(state.snapshot())
        _, state = model.step_(tokens[:, t], state)
        history = history.record(state, tokens[:, t])
    return history, [*states, state]


def test_going_back_gives_the_bits_that_were(model, tokens):
    history, states = stepped(model, tokens)
    for position in (48, 49, 63, 64, 80, 99, 100):
        state, back = history.rollback(model, position)
        assert state.same(states[position])
        assert back.latest.same(state)


def test_going_back_and_on_is_never_having_gone_back(model, tokens):
    history, states = stepped(model, tokens)
    _, back = history.rollback(model, 70)
    state = back.latest
    for t in range(70, 100):
        with torch.no_grad():
            _, state = model.step_(tokens[:, t], state.snapshot())
        back = back.record(state, tokens[:, t])
    assert state.same(states[100])
    assert back.rollback(model, 51)[0].same(states[51])
    assert history.rollback(model, 51)[0].same(states[51])  # the value that was gone back from is as it was


@pytest.mark.parametrize("position", [3, 15, 16, 20, 37, 39])
@torch.no_grad()
def test_going_back_into_the_middle_of_a_call_is_reading_up_to_there(model, tokens, position):
    """Calls of many tokens: 0..16, 16..24, 24..32, 32..40; the state inside one is that of its first tokens."""
    start, cuts = ModelState.empty(model.config, 2), [0, 16, 24, 32, 40]
    history, states = StateHistory.start(start, every=16), {0: start}
    for a, b in zip(cuts, cuts[1:]):
        states[b] = model(tokens[:, a:b], state=history.latest).state
        history = history.record(states[b], tokens[:, a:b])
    before = max(cut for cut in cuts if cut <= position)
    truth = states[before]
    if before < position:
        truth = model(tokens[:, before:position], state=truth).state
    state, back = history.rollback(model, position)
    assert state.same(truth)
    assert back.latest.same(truth)
    assert back.rollback(model, position)[0].same(truth)


def test_steps_in_place_after_going_back_do_not_reach_the_checkpoints(model, tokens):
    history, states = stepped(model, tokens)
    state, _ = history.rollback(model, 64)
    model.step_(tokens[:, 0], state)
    assert history.rollback(model, 64)[0].same(states[64])


def test_a_step_back_reads_fewer_tokens_than_lie_between_checkpoints(model, tokens, monkeypatch):
    history, _ = stepped(model, tokens)
    calls, step = [], model.step_
    monkeypatch.setattr(model, "step_", lambda ids, state: (calls.append(1), step(ids, state))[1])
    for position in (48, 49, 63, 64, 65, 100):
        calls.clear()
        history.rollback(model, position)
        assert sum(calls) == position % 16


def test_reading_in_chunks_puts_checkpoints_where_they_are_due(model, tokens):
    start = StateHistory.start(ModelState.empty(model.config, 2), every=32, keep=2)
    logits, history = start.read(model, tokens)
    assert [c.position.tolist() for c in history.checkpoints] == [[64, 64], [96, 96]]
    torch.testing.assert_close(logits, model(tokens).logits[:, -1], atol=1e-4, rtol=1e-4)
    assert history.rollback(model, 64)[0].same(history.rollback(model, 64)[1].latest)
    assert start.latest.position.tolist() == [0, 0]


def test_memory_stays_bounded_however_long(model, tokens):
    sizes = [
        StateHistory.start(ModelState.empty(model.config, 2), every=8, keep=3).read(model, tokens[:, :n])[1]
        for n in (40, 96)
    ]
    assert sizes[0].nbytes == sizes[1].nbytes == 3 * sum(a.total for a in sizes[0].latest.account() if a.kind == "kda")
    assert all(sum(c.num_tokens for c in history.checkpoints) <= 3 * 8 for history in sizes)


def test_a_run_may_begin_anywhere(model, tokens):
    middle = model(tokens[:, :37]).state
    _, history = StateHistory.start(middle, every=16).read(model, tokens[:, 37:])
    assert history.rollback(model, 37)[0].same(middle)
    with pytest.raises(ValueError, match="position is 36; this history goes from 37 to 100"):
        history.rollback(model, 36)


def test_what_cannot_be_is_refused_in_a_sentence(model, tokens):
    state = ModelState.empty(model.config, 2)
    history = StateHistory.start(state, every=16)
    after = model(tokens[:, :4]).state
    with pytest.raises(ValueError, match="from 1 to 16, the tokens left before the next checkpoint"):
        history.record(after, tokens[:, :17])
    with pytest.raises(ValueError, match=r"the state is at position \[4, 4\]; .* and 3 tokens came"):
        history.record(after, tokens[:, :3])
    with pytest.raises(ValueError, match=r"tokens has shape \(1, 4\)"):
        history.record(after, tokens[:1, :4])
    with pytest.raises(ValueError, match="goes from 0 to 4"):
        history.record(after, tokens[:, :4]).rollback(model, 5)
    with pytest.raises(ValueError, match="tokens is empty"):
        history.read(model, tokens[:, :0])
    with pytest.raises(ValueError, match="every is 0; it must be a whole number >= 1"):
        StateHistory.start(state, every=0)

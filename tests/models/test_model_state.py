"""The state of a model is a value: nobody changes it, padding and packing leave no trace in it, and it can be taken apart."""

import pytest
import torch

from palimpsest.models.kimi_linear import KimiLinearConfig, KimiLinearForCausalLM, ModelState

LENGTHS = [5, 70, 1, 18]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return KimiLinearForCausalLM(KimiLinearConfig.tiny("KMK", initializer_range=0.2)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def rows():
    torch.manual_seed(1)
    return [torch.randint(0, 257, (1, n)) for n in LENGTHS]


def assert_close(a: ModelState, b: ModelState):
    assert a.position.equal(b.position)
    for name, x in a.tensors().items():
        torch.testing.assert_close(x, b.tensors()[name], atol=2e-5, rtol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def padded(rows, side):
    longest = max(row.shape[1] for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        at = slice(0, row.shape[1]) if side == "right" else slice(longest - row.shape[1], longest)
        ids[i, at], mask[i, at] = row[0], True
    return ids, mask


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("fill", [0, 256])
def test_padding_leaves_no_trace(model, rows, side, fill):
    ids, mask = padded(rows, side)
    state = model(ids.masked_fill(~mask, fill), mask=mask).state
    for i, row in enumerate(rows):
        assert_close(state.select([i]), model(row).state)
    more = torch.arange(len(rows) * 3).view(-1, 3)
    after = model(more, state=state)
    for i, row in enumerate(rows):
        alone = model(more[i : i + 1], state=model(row).state)
        torch.testing.assert_close(after.logits[i], alone.logits[0], atol=2e-5, rtol=2e-5)


def test_packing_leaves_no_trace(model, rows):
    borders = torch.tensor([0, *LENGTHS]).cumsum(0)
    state = model(torch.cat(rows, 1), cu_seqlens=borders).state
    for i, row in enumerate(rows):
        assert_close(state.select([i]), model(row).state)


def test_a_padding_that_were_read_would_be_seen(model, rows):
    """The mutant of the tests above: padding read as tokens."""
    ids, _ = padded(rows, "right")
    with pytest.raises(AssertionError):
        assert_close(model(ids[:1]).state, model(rows[0]).state)


def test_a_forward_pass_changes_no_state_and_steps_only_their_own(model, rows):
    state = model(rows[0]).state
    copy = state.select([0])
    model(rows[3], state=state)
    model(rows[2], state=state)
    assert state.same(copy)
    kept = state.snapshot()
    for _ in range(3):
        _, state = model.step_(torch.tensor([7]), state)
    assert kept.same(copy)
    assert not state.same(copy)
    steps = kept
    for _ in range(3):
        steps = model(torch.tensor([[7]]), state=steps).state
    assert_close(steps, state)


def test_segments_are_the_whole(model, rows):
    state = None
    for part in rows[1].split([1, 15, 16, 33, 5], 1):
        state = model(part, state=state).state
    assert_close(state, model(rows[1]).state)


def test_fork_select_and_join(model, rows):
    ids, mask = padded(rows, "right")
    state = model(ids, mask=mask).state
    assert ModelState.join([state.select([i]) for i in range(4)]).select([2, 0]).same(state.select([2, 0]))
    forked = state.select([3]).fork(2)
    assert forked.batch_size == 2
    after = model(torch.tensor([[1, 2], [3, 4]]), state=forked)
    assert_close(after.state.select([1]), model(torch.tensor([[3, 4]]), state=state.select([3])).state)
    assert forked.select([0]).same(state.select([3]))


def test_joined_states_of_unequal_length_continue_as_alone(model, rows):
    joined = ModelState.join([model(row).state for row in rows])
    after = model(torch.full((4, 2), 9), state=joined)
    for i, row in enumerate(rows):
        alone = model(torch.full((1, 2), 9), state=model(row).state)
        torch.testing.assert_close(after.logits[i], alone.logits[0], atol=2e-5, rtol=2e-5)
        assert_close(after.state.select([i]), alone.state)


def test_selecting_drops_padding_that_nobody_needs(model, rows):
    ids, mask = padded(rows, "left")
    latent = model(ids, mask=mask).state.select([0, 3]).layers[1].latent
    assert latent.shape[1] == 18


def test_accounting_is_the_bytes_of_the_tensors(model, rows):
    state = model(rows[1]).state
    assert state.nbytes == sum(x.nbytes for name, x in state.tensors().items() if "." in name and "valid" not in name)
    memory, latent, _ = state.account()
    assert (memory.kind, memory.memory, memory.bytes_per_token) == ("kda", 2 * 16 * 16 * 4, 0)
    assert memory.windows == 3 * 32 * 3 * 4
    assert (latent.kind, latent.latent, latent.bytes_per_token) == ("latent", 70 * 40 * 4, 40 * 4)


def test_the_first_layer_and_head_that_is_not_finite_is_found(model, rows):
    ids, mask = padded(rows, "right")
    state = model(ids, mask=mask).state
    assert state.nonfinite() == ()
    state.layers[1].latent[0, 60] = torch.nan  # padding of sequence 0: no token of it
    assert state.nonfinite() == ()
    state.layers[2].memory[1, 1, 3, 3] = -torch.inf
    state.layers[1].latent[3, 2, 1] = torch.nan
    state.layers[0].conv[2][3, 17, 0] = torch.nan
    assert state.nonfinite() == ((1, 2, 1), (3, 0, 1))


def test_moving_keeps_every_number(model, rows):
    state = model(rows[0]).state
    assert state.to("cpu").same(state)
    assert state.to("meta").device.type == "meta"


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda s: s.select([]), "expected sequences from 0 to 0"),
        (lambda s: s.select([1]), r"rows is \[1\]; expected sequences from 0 to 0"),
        (lambda s: s.fork(0), "count is 0; a fork has at least 1"),
        (lambda s: ModelState.join([]), "join needs at least one state"),
        (lambda s: ModelState.join([s, ModelState.empty(KimiLinearConfig.tiny("KM"))]), "one has 2 layers, another 3"),
        (
            lambda s: ModelState.join([s, ModelState.empty(KimiLinearConfig.tiny("KMK", linear_num_heads=4))]),
            r"layer 0 is a memory \(4, 16, 16\) .* in one and a memory \(2, 16, 16\)",
        ),
    ],
)
def test_impossible_requests_are_refused_in_a_sentence(model, rows, act, message):
    with pytest.raises(ValueError, match=message):
        act(model(rows[0]).state)

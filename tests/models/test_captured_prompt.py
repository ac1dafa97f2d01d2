"""Pieces of prompts by recordings: the same numbers as layer by layer. Graphs themselves: tests/generate/test_gpu_decode.py."""

import copy

import pytest
import torch
from torch import nn

from palimpsest.layers.layer_state import LatentState
from palimpsest.models.kimi_linear import KimiLinearConfig, KimiLinearForCausalLM, ModelState, captured_prompt


@pytest.fixture(autouse=True)
def recorded_without_a_gpu(monkeypatch):
    """A recording is then a call of what it would have recorded, whose results lie where they lay before."""
    walk = captured_prompt._walk

    def capture(body):
        body()
        return body

    def walk_in_place(model, recording, stretch, before):
        held = stretch.stream, stretch.after, stretch.q, stretch.latent
        walk(model, recording, stretch, before)
        if held[0] is None:
            return
        now = stretch.stream, stretch.after, stretch.q, stretch.latent
        for old, new in zip(held, now):
            for a, b in zip(old, new) if isinstance(old, list) else [(old, new)]:
                tensors = [[a], [b]] if isinstance(a, torch.Tensor | None) else [x.tensors().values() for x in (a, b)]
                [x.copy_(y) for x, y in zip(*tensors) if x is not None]
        stretch.stream, stretch.after, stretch.q, stretch.latent = held

    monkeypatch.setattr(captured_prompt, "_walk", walk_in_place)
    monkeypatch.setattr(captured_prompt, "_may_capture", lambda model, ids: not torch.is_grad_enabled())
    monkeypatch.setattr(captured_prompt, "_capturing", lambda device: capture)
    monkeypatch.setattr(captured_prompt, "FEWEST_TOKENS", 4)


def build(pattern="KMK", **changes):
    torch.manual_seed(0)
    config = KimiLinearConfig.tiny(pattern, initializer_range=0.2, first_k_dense_replace=1, **changes)
    return KimiLinearForCausalLM(config).double().eval()


def read(model, ids, pieces):
    """Logits of the last token of each piece, and the last state."""
    state = ModelState.empty(model.config, len(ids), dtype=torch.float64)
    found = []
    for piece in ids.split(pieces, dim=1):
        logits, state, _ = model(piece, state=state, last_only=True)
        found.append(logits)
    return torch.cat(found, 1), state


def plainly(model, ids, pieces):
    other = copy.deepcopy(model)
    other.model._captured_prompt._seen.subtract({(len(ids), pieces): 99})
    return read(other, ids, pieces)


def shapes(model):
    return list(model.model._captured_prompt._recordings)


@pytest.mark.parametrize("pattern", ["KKMKM", "MKK", "KK", "M"])
@torch.no_grad()
def test_the_same_numbers_piece_by_piece(pattern):
    model, ids = build(pattern), torch.randint(257, (2, 35))
    truth, after = plainly(model, ids, 5)
    for _ in range(2):  # recorded in its third piece, and replayed from then on
        logits, state = read(model, ids, 5)
        torch.testing.assert_close(logits, truth)
        assert state.position.tolist() == [35, 35]
        for a, b in zip(state.tensors().values(), after.tensors().values(), strict=True):
            torch.testing.assert_close(a, b)
    assert shapes(model) == [(2, 5)]


@torch.no_grad()
def test_a_state_given_keeps_its_numbers_and_one_handed_out_is_its_own():
    model, ids = build(), torch.randint(257, (1, 20))
    _, state = read(model, ids, 5)
    before = {name: x.clone() for name, x in state.tensors().items()}
    first = model(ids[:, :5], state=state, last_only=True)
    kept = {name: x.clone() for name, x in first.state.tensors().items()}
    hidden, _ = model.model(ids[:, :5], state=state)
    same = hidden.clone()
    model(ids[:, 5:10], state=state, last_only=True)
    assert hidden.equal(same)
    assert all(x.equal(before[name]) for name, x in state.tensors().items())
    assert all(x.equal(kept[name]) for name, x in first.state.tensors().items())


@torch.no_grad()
def test_weights_that_change_and_weights_that_move():
    model, ids = build(), torch.randint(257, (1, 20))
    read(model, ids, 5)
    first = model.model._captured_prompt._recordings[1, 5]
    model.model.layers[0].self_attn.o_proj.weight.mul_(1.5)  # in place
    torch.testing.assert_close(read(model, ids, 5)[0], plainly(model, ids, 5)[0])
    assert model.model._captured_prompt._recordings[1, 5] is first
    projection = model.model.layers[1].self_attn.o_proj
    projection.weight = nn.Parameter(projection.weight * 2)  # somewhere else
    torch.testing.assert_close(read(model, ids, 5)[0], plainly(model, ids, 5)[0])
    assert model.model._captured_prompt._recordings[1, 5] is not first


@torch.no_grad()
def test_who_is_read_layer_by_layer():
    ids = torch.randint(257, (1, 20))
    rotary, watched, busy, long = build("KR"), build(), build(), build()
    watched.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: None)
    busy.model._captured_prompt._busy.acquire()
    for model in (rotary, watched, busy):
        read(model, ids, 5)
        assert shapes(model) == []
    read(long, torch.randint(257, (1, 3 * 4100)), 4100)
    assert shapes(long) == []
    padded = build()
    _, state = read(padded, ids, 4)
    assert shapes(padded) == [(1, 4)]
    rows = [
        x if not isinstance(x, LatentState) else LatentState(x.latent, torch.ones(1, 20).bool()) for x in state.layers
    ]
    replaced = padded.model._captured_prompt.run(padded.model, ids[:, :4], tuple(rows))
    assert replaced is None


@torch.no_grad()
def test_few_shapes_are_kept_and_a_copy_has_its_own():
    model, ids = build(), torch.randint(257, (1, 24))
    for pieces in (4, 6, 8):
        for _ in range(3):
            read(model, ids, pieces)
    assert shapes(model) == [(1, 6), (1, 8)]
    assert shapes(copy.deepcopy(model)) == []

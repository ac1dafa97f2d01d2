"""A token in one compiled call: the same numbers as layer by layer, and never from weights that are no longer there."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from palimpsest.layers.latent_cache import LatentCache
from palimpsest.layers.layer_state import LatentState
from palimpsest.models.kimi_linear import KimiLinearConfig, KimiLinearForCausalLM, ModelState
from palimpsest.ops import decode
from palimpsest.testing import assert_within_budget


def build(pattern="KKM", **changes):
    torch.manual_seed(0)
    changes = {"initializer_range": 0.2, "first_k_dense_replace": 1} | changes
    return KimiLinearForCausalLM(KimiLinearConfig.tiny(pattern, **changes)).eval()


@pytest.fixture
def model():
    return build()


def steps(model, ids, one_by_one=False, cache=None):
    """Logits after each token of ids [B, T] and the last state, by steps; one_by_one: without the compiled call."""
    found, layers = [], ModelState.empty(model.config, len(ids), dtype=model.dtype).layers
    if cache:
        layers = tuple(LatentCache.of(x, cache) if isinstance(x, LatentState) else x for x in layers)
    with torch.no_grad():
        for t in range(ids.shape[1]):
            before = layers
            used = None if one_by_one else model.model._compiled_step.run(model.model, ids[:, t], layers)
            if one_by_one:
                mask = torch.ones(len(ids), dtype=torch.bool)
                x, layers = model.model.step_layers_(ids[:, t], before, mask)
            else:
                assert used is not None, "the compiled call was not made"
                x, layers = used
            found.append(model.lm_head(x))
    return torch.stack(found, 1), layers


@pytest.mark.parametrize(
    ("pattern", "changes"),
    [
        ("KKM", {}),
        ("KM", {"num_experts": 0}),
        ("M", {"num_shared_experts": 0, "first_k_dense_replace": 0}),
        ("KKM", {"linear_num_heads": 3, "linear_head_dim": 20, "num_shared_experts": 2, "moe_renormalize": False}),
        (
            "KM",
            {"router": "official_alias", "mixer_options": {"gate": "sigmoid", "output_gate": "silu", "beta_max": 2.0}},
        ),
    ],
)
@pytest.mark.parametrize(("B", "cache"), [(1, None), (3, 16)])
def test_it_is_the_model(pattern, changes, B, cache):
    model = build(pattern, **changes)
    ids = torch.randint(0, 257, (B, 12))
    truth, _ = steps(copy.deepcopy(model).double(), ids, one_by_one=True)
    peer, _ = steps(model, ids, one_by_one=True)
    ours, layers = steps(model, ids, cache=cache)
    assert_within_budget("logits", ours, truth, peer)
    for layer in layers:
        if isinstance(layer, LatentCache):
            assert layer.length.tolist() == [12] * B
        elif isinstance(layer, LatentState):
            assert layer.latent.shape[1] == 12


def test_states_are_values_still(model):
    ids = torch.randint(0, 257, (2, 6))
    with torch.no_grad():
        start = model(ids).state
        kept = start.snapshot()
        one, after = model.step_(ids[:, 0], start.snapshot())
        two, other = model.step_(ids[:, 0], start.snapshot())
        assert one.equal(two)
        assert after.same(other)
        assert start.same(kept)


def test_weights_may_change_move_and_be_watched(model):
    ids = torch.randint(0, 257, (1, 3))
    first, _ = steps(model, ids)
    step = model.model._compiled_step
    layer = model.model.layers[1].self_attn
    state = lambda: ModelState.empty(model.config, 1).layers
    with torch.no_grad():
        layer.q_proj.weight.mul_(2)  # in place: the address holds
        changed, _ = steps(model, ids)
        assert not changed.equal(first)
        assert_close = torch.testing.assert_close
        assert_close(changed, steps(model, ids, one_by_one=True)[0], rtol=1e-3, atol=1e-4)
        layer.q_proj.weight = nn.Parameter(layer.q_proj.weight / 2)  # another tensor
        assert_close(steps(model, ids)[0], first, rtol=1e-3, atol=1e-4)
        handle = layer.v_proj.register_forward_hook(lambda *_: None)
        assert step.run(model.model, ids[:, 0], state()) is None
        handle.remove()
        assert step.run(model.model, ids[:, 0], state()) is not None
        layer.q_proj = nn.Sequential(layer.q_proj)  # wrapped, as adapters do
        assert step.run(model.model, ids[:, 0], state()) is None


def test_what_it_does_not_know_runs_layer_by_layer(model):
    with torch.no_grad():
        ids = torch.tensor([[1, 2], [3, 0]])
        ragged = model(ids, mask=torch.tensor([[True, True], [True, False]])).state
        assert model.model._compiled_step.run(model.model, ids[:, 0], ragged.layers) is None
        many = ModelState.empty(model.config, 9)
        assert model.model._compiled_step.run(model.model, torch.zeros(9, dtype=torch.long), many.layers) is None
        for other in (build("KR"), build("G"), build().bfloat16(), build().double()):
            empty = ModelState.empty(other.config, 1, dtype=other.dtype)
            assert other.model._compiled_step.run(other.model, ids[0, :1], empty.layers) is None


def test_addresses_are_checked(model):
    steps(model, torch.tensor([[1]]))
    plan = model.model._compiled_step._prepared.plan
    layers = ModelState.empty(model.config, 1).layers
    states = [(x.memory, x.conv) if hasattr(x, "memory") else (torch.zeros(1, 4, 40), 0) for x in layers]
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"ids is \[257\]; the model's tokens are 0 to 256"):
            plan.run(torch.tensor([257]), states)
        assert plan.run(torch.tensor([1]), states) is not None
        for wrong in ((torch.zeros(1, 4, 40), 4), (torch.zeros(1, 4, 41), 0), (torch.zeros(1, 4, 40).double(), 0)):
            assert plan.run(torch.tensor([1]), [*states[:-1], wrong]) is None
        assert plan.run(torch.tensor([1]), [(states[0][0][:, :1], states[0][1]), *states[1:]]) is None
        with pytest.raises(ValueError, match="norm is torch.float64 of shape"):
            decode.ON_CPU["token_plan"](torch.ones(2, 4), torch.ones(4).double(), plan.sizes, [])


def test_copies_and_threads_have_plans_of_their_own(model):
    ids = torch.randint(0, 257, (1, 40))
    expected, _ = steps(model, ids)
    other = copy.deepcopy(model)
    assert other.model._compiled_step is not model.model._compiled_step
    with ThreadPoolExecutor(4) as pool:
        for found, _ in pool.map(lambda m: steps(m, ids), [model, other, model, other, model, model]):
            assert found.equal(expected)

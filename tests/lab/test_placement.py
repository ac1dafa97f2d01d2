"""Where to attend: gates that share a budget, a router before the cache, and a search replayed on the map."""

from dataclasses import replace

import pytest
import torch

from palimpsest.lab.experiments.placement import EXPERIMENT, judge, pattern, searched
from palimpsest.lab.framework.experiment import Record
from palimpsest.lab.model_variants import ModelVariant, Size, build
from palimpsest.lab.placement.gated_pair import AttentionBudget, pair_up
from palimpsest.lab.placement.placed_training import placed
from palimpsest.lab.placement.routed_attention import RoutedLatentAttention
from palimpsest.lab.tasks import MQAR
from palimpsest.lab.training import Training
from palimpsest.layers.latent_attention import MultiHeadLatentAttention

SIZE = Size(layers=2, hidden_size=16, heads=1, head_dim=8, mlp=64)
POINT = Training(
    who=pattern(2), train=(MQAR(length=16, vocab_size=16, pairs=3),), size=SIZE, steps=4, tokens_per_step=64,
    evaluate_every=2, test_batches=1,
)  # fmt: skip
MLA = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}


def test_shares_add_up_to_the_budget_and_settle_where_they_help():
    budget = AttentionBudget(4, budget=1.0)
    optimizer = torch.optim.Adam(budget.parameters(), lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        (budget.penalty() - 0.1 * budget()[2]).backward()
        optimizer.step()
    assert budget().sum().item() == pytest.approx(1, abs=1e-5)
    assert budget()[2] > 0.95
    assert budget.penalty() < 0.01
    with pytest.raises(ValueError, match="budget is 4"):
        AttentionBudget(4, budget=4)


def test_a_pair_is_what_its_gate_says():
    torch.manual_seed(0)
    memories, attentions = (build(ModelVariant(p, p), SIZE, 16) for p in ("KK", "MM"))
    tokens = torch.randint(0, 16, (2, 12))
    alone, names = memories(tokens).logits, {n for n, _ in memories.named_parameters()}
    budget = pair_up(memories, attentions)
    assert {n for n, _ in memories.named_parameters() if "budget" in n} == {"attention_budget.weight"}
    assert len(names) < len(dict(memories.named_parameters()))
    with torch.no_grad():
        budget.weight.copy_(torch.tensor([100.0, 0.0]))  # all attention in the first layer
    mixed = memories.model.without_state(tokens)
    layer = memories.model.layers[0]
    x = layer.input_layernorm(memories.model.embed_tokens(tokens))
    assert torch.allclose(layer.self_attn(x)[0], layer.self_attn.attention(x)[0])
    assert torch.allclose(memories.model.layers[1].self_attn(x)[0], memories.model.layers[1].self_attn.memory(x)[0])
    assert not torch.allclose(memories.lm_head(mixed), alone)


def routed(bias: float):
    torch.manual_seed(0)
    layer = RoutedLatentAttention(MultiHeadLatentAttention(32, 2, **MLA), budget=0.25)
    with torch.no_grad():
        layer.router.bias.fill_(bias)
        layer.router.weight.normal_()
    return layer, torch.randn(3, 20, 32)


def test_a_router_that_keeps_all_is_attention():
    layer, x = routed(100.0)
    assert torch.allclose(layer(x)[0], layer.attention(x)[0], atol=1e-6)
    assert layer.penalty().item() == pytest.approx(2 * 0.75)


def test_what_is_not_kept_is_seen_by_itself_alone():
    layer, x = routed(0.0)
    y = layer(x)[0]
    kept = layer.kept_BT.bool()
    assert 0.1 < kept.float().mean() < 0.9
    place = int((~kept[0]).nonzero()[3])
    other = x.clone()
    other[0, place] = other[0, place] + 1e-3 * torch.randn(32)
    assert layer.keep(other)[0, place] < 0.5
    changed = (layer(other)[0] - y).abs().amax(-1)[0] > 1e-7
    assert changed.nonzero().flatten().tolist() == [place]
    alone, all_kept = layer.attention, kept[0].nonzero().flatten()  # a cache of the kept tokens gives the same answer
    last = torch.cat((x[:1, all_kept[all_kept < 19]], x[:1, 19:]), 1)
    assert torch.allclose(alone(last)[0][0, -1], y[0, -1], atol=1e-6)


def test_the_router_learns_from_what_was_not_kept():
    layer, x = routed(0.0)
    layer(x)[0].square().sum().backward()
    assert layer.router.weight.grad.abs().sum() > 0


def test_a_routed_layer_has_no_positions():
    with pytest.raises(ValueError, match="no positions"):
        RoutedLatentAttention(MultiHeadLatentAttention(32, 2, rope=1e4, **MLA))


@pytest.mark.parametrize("choose", ["layers", "tokens"])
def test_a_placed_training_tells_what_it_chose(choose):
    point = placed(POINT, who=ModelVariant("mine", "KM" if choose == "tokens" else "K"), choose=choose, budget=0.5)
    point.prepare()
    assert point.material() == POINT.material()
    row = point.run("cpu", lambda *_: None)["rows"][0]
    if choose == "layers":
        assert row["share_1"] + row["share_2"] == pytest.approx(0.5, abs=1e-4)
    else:
        assert 0 <= row["kept"] <= 1


def test_impossible_placements_are_refused():
    with pytest.raises(ValueError, match="give a pattern with an M"):
        placed(POINT, choose="tokens").prepare()
    with pytest.raises(ValueError, match="'layers' or 'tokens'"):
        placed(POINT, choose="heads").prepare()
    with pytest.raises(ValueError, match="budget is 3"):
        placed(POINT, budget=3.0).prepare()


def record(word: str, seed: int, digits: float, **more):
    row = {
        "test_task": "needle",
        "test_length": 256,
        "accuracy": digits,
        "exact": digits,
        "bits": 1.0,
        "diverged": False,
    }
    row |= {"parameters": 1, "state_numbers": 1, **more}
    label = {"contestant": word, "task": "needle", "length": 256, "lr": 1e-3, "seed": seed}
    return Record(label, {"rows": [row, row, row | {"test_task": "text"}], "curve": [], "slices": []}, 1.0)


MAP = {"KKK": 0.1, "MKK": 0.2, "KMK": 0.9, "KKM": 0.5, "MMK": 0.95, "MKM": 0.99, "KMM": 0.92}


def test_a_greedy_search_is_replayed_on_the_map():
    records = [record(word, 0, digits) for word, digits in MAP.items()]
    from palimpsest.lab.experiments.placement import found

    chosen, cost, best, all_cost = searched(found(records))
    assert (chosen, cost) == (["KMK", "MMK"], 5)
    assert (best, all_cost) == (["MKM"], 3)


def test_a_choice_is_shown_only_where_seeds_agree_on_a_good_place():
    fixed = [record(word, seed, digits + seed / 100) for word, digits in MAP.items() for seed in (0, 1, 2)]
    shares = lambda layer: {f"share_{i + 1}": 0.9 if i == layer else 0.05 for i in range(3)}
    told = lambda *layers: judge(
        [*fixed, *(record("learned layers", s, 0.9, **shares(x)) for s, x in enumerate(layers))]
    )
    assert told(1, 1, 1).outcome == "shown"
    assert told(0, 0, 0).outcome == "not shown"
    assert told(1, 0, 1).outcome == "undecided"
    assert "layer 2 (share 0.90, place 1 of 3 in the map)" in " ".join(told(1, 1, 1).because)


def test_the_full_map_has_every_layer_and_every_pair():
    words = [p.who.pattern for p in EXPERIMENT.points("map") if p.seed == 0 and type(p) is Training]
    assert len(words) == len(set(words)) == 1 + 6 + 15
    assert replace(EXPERIMENT.points("full")[0], seed=1).material() != EXPERIMENT.points("full")[0].material()

"""The mixture of experts against a loop over tokens, its balance, and what a forward leaves behind."""

import pytest
import torch

from palimpsest.layers.moe import MoE, Router, update_router_bias
from palimpsest.models.kimi_linear.official_names import official_tensors

D, INNER, E, TOP = 12, 8, 6, 2


def moe(dtype=torch.float64, **changes):
    torch.manual_seed(0)
    m = MoE(D, INNER, **{"num_experts": E, "num_experts_per_token": TOP, **changes})
    for parameter in m.parameters():
        torch.nn.init.normal_(parameter, 0, 0.5)
    m.gate.e_score_correction_bias.normal_(0, 0.3)
    return m.to(dtype)


def draw(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def silu(x):
    return x / (1 + torch.exp(-x))


def plainly(m, x, alias=False):
    """One token at a time: x [N, D] -> y [N, D], and the experts chosen."""
    y, chosen = torch.zeros_like(x), []
    for n in range(len(x)):
        scores = 1 / (1 + torch.exp(-(m.gate.weight @ x[n])))
        biased = scores + m.gate.e_score_correction_bias
        best = biased.sort(descending=True).indices[:TOP].tolist()
        weights = (biased if alias else scores)[best]
        weights = weights / weights.sum() * 2.446
        for weight, e in zip(weights, best):
            w1, w3, w2 = m.experts.w1[e], m.experts.w3[e], m.experts.w2[e]
            y[n] += weight * w2 @ (silu(w1 @ x[n]) * (w3 @ x[n]))
        shared = m.shared_experts
        y[n] += shared.down_proj.weight @ (silu(shared.gate_proj.weight @ x[n]) * (shared.up_proj.weight @ x[n]))
        chosen.append(sorted(best))
    return y, chosen


@pytest.mark.parametrize("router", ["unbiased", "official_alias"])
def test_layer_is_its_definition_and_so_are_its_gradients(router):
    m, x = moe(weigh_by=router), draw(2, 10, D).requires_grad_()
    truth, chosen = plainly(m, x.flatten(0, 1), alias=router == "official_alias")
    y = m(x)
    torch.testing.assert_close(y.flatten(0, 1), truth)
    assert m.gate(x.flatten(0, 1))[0].sort().values.tolist() == chosen
    load = torch.tensor(chosen).flatten().bincount(minlength=E)
    assert m.last_load.equal(load)

    tensors = [x, *m.parameters()]
    grads, truths = (
        torch.autograd.grad(out.cos().sum(), tensors, allow_unused=True) for out in (y.flatten(0, 1), truth)
    )
    for grad, true in zip(grads, truths):
        torch.testing.assert_close(grad, torch.zeros_like(grad) if true is None else true)


def test_the_two_routers_differ_in_the_weights_alone():
    x = draw(30, D)
    (experts, weights), (same, biased) = (moe(weigh_by=w).gate(x) for w in ("unbiased", "official_alias"))
    assert experts.equal(same)
    assert (weights - biased).abs().max() > 1e-2


def test_one_token_and_none():
    m = moe()
    torch.testing.assert_close(m(draw(1, 1, D))[0], plainly(m, draw(1, D))[0])
    assert m(draw(1, 0, D)).shape == (1, 0, D)
    with torch.no_grad():
        assert m(draw(1, 0, D)).shape == (1, 0, D)


def test_an_expert_without_tokens_has_a_zero_gradient():
    m = moe()
    m.gate.e_score_correction_bias.copy_(torch.tensor([9.0, 9, 0, 0, 0, 0]))
    m(draw(3, D)).sum().backward()
    for weight in (
        m.experts.w1,
        m.experts.w3,
        m.experts.w2,
    ):  # zero and not missing: processes agree on which there are
        assert weight.grad.flatten(1).abs().amax(1).gt(0).tolist() == [True, True, False, False, False, False]


def test_only_the_best_groups_are_chosen_from():
    router = Router(D, 6, 2, num_groups=3, groups_per_token=1, renormalize=False, scaling=1.0).double()
    router.weight.data.zero_()
    router.e_score_correction_bias.copy_(torch.tensor([0.9, 0.0, 0.5, 0.5, 0.6, 0.2]))
    experts, weights = router(draw(1, D))
    assert sorted(experts[0].tolist()) == [
        2,
        3,
    ]  # 0.5 + 0.5 is the best pair of one group, though 0.9 is the best alone
    assert weights.tolist() == [[0.5, 0.5]]
    free = Router(D, 6, 2, num_groups=3, groups_per_token=3).double()
    free.weight.data.zero_()
    free.e_score_correction_bias.copy_(router.e_score_correction_bias)
    assert sorted(free(draw(1, D))[0][0].tolist()) == [0, 4]


def test_all_scores_at_zero_give_no_nan():
    m = moe()
    m.gate.weight.data.fill_(-1e4)
    assert m(draw(4, D).abs() + 1).isfinite().all()


def test_routing_is_exact_in_bfloat16_and_under_autocast():
    """The scores of the rounded weights, in float32: near ties must not flip with the precision of the sums."""
    m = moe().bfloat16()
    assert m.gate.e_score_correction_bias.dtype == torch.float32
    x = draw(200, D).bfloat16()
    scores = torch.sigmoid(x.double() @ m.gate.weight.double().T) + m.gate.e_score_correction_bias.double()
    truth = scores.topk(TOP).indices.sort().values
    assert m.gate(x)[0].sort().values.equal(truth)
    with torch.autocast("cpu", torch.bfloat16):
        experts, weights = m.gate(x)
    assert experts.sort().values.equal(truth)
    assert weights.dtype == torch.float32


def test_load_keeps_no_graph():
    m = moe()
    m(draw(5, D).requires_grad_())
    m.record_load()
    assert m.total_load.sum() == 5 * TOP
    assert not any(buffer.requires_grad for buffer in m.buffers())
    assert set(m.state_dict()) == set(dict(m.named_parameters())) | {"gate.e_score_correction_bias"}


def test_balance_evens_the_load():
    m, x = moe(), draw(400, D)
    m.gate.e_score_correction_bias.copy_(torch.tensor([2.0, 0, 0, 0, 0, 0]))

    def spread():
        return (m.last_load.double() / m.last_load.double().mean()).max().item()

    with torch.no_grad():
        m(x)
        assert spread() > 2.5
        for _ in range(300):
            m(x)
            m.record_load()
            update_router_bias(m, rate=0.02)
        m(x)
    assert spread() < 1.2
    assert not m.total_load.any()  # counted from anew


def test_balance_moves_by_the_rate_towards_the_mean():
    m = moe()
    before = m.gate.e_score_correction_bias.clone()
    m.total_load.copy_(torch.tensor([4, 2, 0, 2, 3, 1]))
    update_router_bias(torch.nn.ModuleDict({"deep": m}), rate=0.25)
    moved = m.gate.e_score_correction_bias - before
    torch.testing.assert_close(moved, torch.tensor([-0.25, 0, 0.25, 0, -0.25, 0.25], dtype=torch.float64))
    update_router_bias(m, rate=0.25)  # no load, no move
    torch.testing.assert_close(m.gate.e_score_correction_bias - before, moved)


def test_balance_counts_the_tokens_of_all_processes(monkeypatch):
    m = moe()
    m.gate.e_score_correction_bias.zero_()
    m.total_load.copy_(torch.tensor([9, 0, 0, 0, 0, 0]))
    elsewhere = torch.tensor([0, 9, 30, 9, 9, 9])
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda load: load.add_(elsewhere))
    update_router_bias(m, rate=1.0)
    assert m.gate.e_score_correction_bias.tolist() == [1, 1, -1, 1, 1, 1]


def test_names_and_shapes_are_the_released_ones():
    with torch.device("meta"):
        m = MoE(2304, 1024, 256, 8)
    expected = {
        "gate.weight": (256, 2304),
        "gate.e_score_correction_bias": (256,),
        "shared_experts.gate_proj.weight": (1024, 2304),
        "shared_experts.up_proj.weight": (1024, 2304),
        "shared_experts.down_proj.weight": (2304, 1024),
    }
    for e in range(256):
        expected |= {f"experts.{e}.w{i}.weight": (1024, 2304) for i in (1, 3)} | {
            f"experts.{e}.w2.weight": (2304, 1024)
        }
    assert {name: tuple(tensor.shape) for name, tensor in official_tensors(m.state_dict())} == expected


@pytest.mark.parametrize(
    ("counts", "says"),
    [
        ({"num_experts": 5, "num_groups": 2}, "num_experts is 5 and num_groups 2; give a number"),
        ({"num_experts": 2, "num_experts_per_token": 3}, "num_experts_per_token is 3 and 1 of 1 groups hold 2 experts"),
        ({"num_groups": 2, "groups_per_token": 3}, "groups_per_token is 3; expected 1 to num_groups = 2"),
        ({"num_experts": 8, "num_experts_per_token": 4, "num_groups": 4}, "1 of 4 groups hold 2 experts; choose fewer"),
        ({"num_experts": 0}, "num_experts is 0; expected a whole number, 1 or more"),
    ],
)
def test_counts_that_make_no_mixture(counts, says):
    with pytest.raises(ValueError, match=says):
        MoE(8, 16, **({"num_experts": 4, "num_experts_per_token": 2} | counts))


def test_no_tokens_give_none():
    moe = MoE(8, 16, num_experts=4, num_experts_per_token=2)
    assert moe(torch.zeros(2, 0, 8)).shape == (2, 0, 8)

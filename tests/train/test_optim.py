"""Optimisers against the rules they stand for, and schedules at the points that define them."""

import pytest
import torch
from torch import nn

from palimpsest.models.kimi_linear import KimiLinearConfig, KimiLinearForCausalLM
from palimpsest.train import Optim, Schedule
from palimpsest.train.optim import StackedMuon, build_optimizer, orthogonalize, rate_factor


def named_groups(model, optim):
    optimizer = build_optimizer(model, optim)
    names = {id(p): n for n, p in model.named_parameters()}
    return optimizer, [(g, {names[id(p)] for p in g["params"]}) for g in optimizer.param_groups]


def test_muon_gets_the_hidden_matrices_and_adamw_everything_else():
    model = KimiLinearForCausalLM(KimiLinearConfig.tiny("KM"))
    _, groups = named_groups(model, Optim())
    (muon, hidden), (adamw, rest) = groups
    assert (muon["rule"], adamw["rule"], adamw["weight_decay"]) == ("muon", "adamw", 0.0)
    assert hidden | rest == {n for n, _ in model.named_parameters()}
    for part in ("embed_tokens", "lm_head", "A_log", "dt_bias", "conv1d", "norm", ".gate.weight"):
        assert any(part in n for n in rest), part
        assert not any(part in n for n in hidden), part
    for part in ("q_proj", "kv_b_proj", "o_proj", "experts.w1", "mlp.gate_proj", "f_a_proj"):
        assert any(part in n for n in hidden), part
    _, groups = named_groups(model, Optim(kind="adamw"))
    assert [g["rule"] for g, _ in groups] == ["adamw", "adamw"]
    assert [g["weight_decay"] for g, _ in groups] == [0.1, 0.0]


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_a_step_is_torchs_own_and_survives_saving(kind):
    torch.manual_seed(0)
    start = KimiLinearForCausalLM(KimiLinearConfig.tiny("K")).state_dict()
    grads = [{n: torch.randn_like(p) for n, p in start.items() if p.is_floating_point()} for _ in range(3)]

    def run(optimizers_of, reload_at=None):
        model = KimiLinearForCausalLM(KimiLinearConfig.tiny("K"))
        model.load_state_dict(start)
        optimizers = optimizers_of(model)
        for i, grad in enumerate(grads):
            if i == reload_at:
                saved = [o.state_dict() for o in optimizers]
                optimizers = optimizers_of(model)
                for o, s in zip(optimizers, saved):
                    o.load_state_dict(s)
            for n, p in model.named_parameters():
                p.grad = grad[n].clone()
            for o in optimizers:
                o.step()
        return model.state_dict()

    optim = Optim(kind=kind)

    def torchs(model):
        (first, _), (second, _) = named_groups(model, optim)[1]
        plain = StackedMuon if kind == "muon" else torch.optim.AdamW
        adamw = {"betas": optim.betas, "eps": 1e-10}
        options = {"momentum": optim.momentum} if kind == "muon" else adamw
        return [
            plain(first["params"], lr=first["lr"], weight_decay=0.1, **options),
            torch.optim.AdamW(second["params"], lr=second["lr"], weight_decay=0.0, **adamw),
        ]

    ours, theirs = run(lambda m: [build_optimizer(m, optim)]), run(torchs)
    resumed = run(lambda m: [build_optimizer(m, optim)], reload_at=2)
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert all(torch.equal(ours[n], resumed[n]) for n in ours)
    assert not torch.equal(
        ours["model.layers.0.self_attn.q_proj.weight"], start["model.layers.0.self_attn.q_proj.weight"]
    )


def test_muon_in_float32_is_torchs_muon_but_for_bfloat16():
    """Matrices wide, square and tall, several of a shape; torch's own as the peer, float64 as the truth."""
    shapes = [(8, 24), (16, 16), (16, 16), (24, 8)]
    start = [torch.randn(s, generator=torch.Generator().manual_seed(i)) for i, s in enumerate(shapes)]

    def run(kind, dtype=torch.float32):
        parameters = [nn.Parameter(p.clone().to(dtype)) for p in start]
        optimizer = kind(parameters, lr=0.1, weight_decay=0.1, momentum=0.9)
        for step in range(3):
            for i, p in enumerate(parameters):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i)).to(dtype)
            optimizer.step()
        return torch.cat([p.detach().flatten().double() for p in parameters])

    truth, ours, torchs = run(StackedMuon, torch.float64), run(StackedMuon), run(torch.optim.Muon)
    moved = torch.cat([p.flatten() for p in start]).double() - truth
    assert (ours - truth).norm() < 1e-5 * moved.norm()
    assert (torchs - truth).norm() < 3e-2 * moved.norm(), "bfloat16 rounds to 8 bits"


def test_a_stack_of_matrices_is_each_of_them_alone():
    weights, grads = torch.randn(2, 3, 6, 4), torch.randn(2, 3, 6, 4)

    def stepped(parameters):
        parameters = [nn.Parameter(p.clone()) for p in parameters]
        optimizer = StackedMuon(parameters, lr=0.1)
        for _ in range(2):
            for p, g in zip(parameters, grads.view(len(parameters), *parameters[0].shape)):
                p.grad = g.clone()
            optimizer.step()
        return torch.stack([p.detach() for p in parameters]).view(weights.shape)

    stacked, alone = stepped(weights), stepped(weights.flatten(0, 1))
    torch.testing.assert_close(stacked, alone)
    StackedMuon.MOST, most = 1, StackedMuon.MOST  # one stack at a time is the same
    try:
        torch.testing.assert_close(stepped(weights), stacked)
    finally:
        StackedMuon.MOST = most


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_whose_gradient_is_not_finite_changes_nothing(fused):
    """Where `found_inf` says so: weights, momentum and moments keep their bits, and the next step is as if it never was."""
    torch.manual_seed(0)
    start, grads = torch.randn(4, 6, 4), torch.randn(3, 4, 6, 4)

    def run(with_bad_step):
        p = nn.Parameter(start.clone())
        rule = torch.optim.AdamW([p], lr=0.1, fused=True) if fused else StackedMuon([p], lr=0.1)
        for i, grad in enumerate(grads):
            if i == 1 and with_bad_step:
                p.grad, rule.found_inf = torch.full_like(p, float("nan")), torch.ones(())
                rule.step()
            p.grad, rule.found_inf = grad.clone(), torch.zeros(())
            rule.step()
        return p.detach()

    assert torch.equal(run(True), run(False))


def test_orthogonalize_works_on_each_matrix_alone():
    batch = torch.randn(5, 12, 7)
    together = orthogonalize(batch, (3.4445, -4.7750, 2.0315), 5)
    for i in range(5):
        torch.testing.assert_close(together[i], orthogonalize(batch[i : i + 1], (3.4445, -4.7750, 2.0315), 5)[0])
        torch.testing.assert_close(torch.linalg.svdvals(together[i]), torch.ones(7), atol=0.35, rtol=0)


def test_a_model_without_hidden_matrices_trains_all_the_same():
    model = nn.LayerNorm(4)
    model.weight.grad = torch.ones(4)
    build_optimizer(model, Optim(lr=0.1)).step()
    assert float(model.weight[0].detach()) == pytest.approx(0.9, abs=1e-3)


@pytest.mark.parametrize(
    ("schedule", "points"),
    [
        (
            Schedule(warmup=0.1, decay=0.2, floor=0.1),
            {0: 0, 0.05: 0.5, 0.1: 1, 0.5: 1, 0.8: 1, 0.9: 0.55, 1: 0.1, 1.5: 0.1},
        ),
        (Schedule(warmup=0, decay=0), {0: 1, 1: 1}),
        (Schedule(warmup=0, decay=1), {0: 1, 0.25: 0.75, 1: 0}),
        (Schedule(kind="cosine", warmup=0.2, floor=0.0), {0: 0, 0.1: 0.5, 0.2: 1, 0.6: 0.5, 1: 0}),
    ],
)
def test_schedules_at_the_points_that_define_them(schedule, points):
    for share, factor in points.items():
        assert rate_factor(schedule, share) == pytest.approx(factor), share

"""Muon for the hidden matrices, AdamW for the rest, and the learning rate as a function of the share of the run done."""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Muon, Optimizer

from palimpsest.train.recipe import Optim, Schedule

NOT_HIDDEN = ("embed_tokens.weight", "lm_head.weight", "gate.weight")  # tables of vectors, and the routers


class CPUMuon(Muon):
    """torch's Muon in float32, matrices of one shape together.

    torch rounds to bfloat16 on the way. A CPU without instructions for that takes 40 times as long for it as for float32
    (a product of 128 x 128 with AVX2: 5.4 ms against 0.12 ms), and small matrices one by one leave any CPU idle.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # as torch's own
        loss = _evaluated(closure)
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if any(p.is_cuda or isinstance(p, DTensor) for p in parameters):
                super().step()
                return loss
            shapes: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for p in parameters:
                momentum = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["momentum"])
                shapes[p.shape].append((p, p.grad.lerp(momentum, group["momentum"])))
            for (rows, columns), pairs in shapes.items():
                directions = orthogonalize(
                    torch.stack([g for _, g in pairs]), group["ns_coefficients"], group["ns_steps"]
                )
                rate = group["lr"] * math.sqrt(max(1, rows / columns))
                for (p, _), direction in zip(pairs, directions):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-rate)
        return loss


def orthogonalize(matrices: Tensor, coefficients: tuple[float, float, float], num_steps: int) -> Tensor:
    """[N, R, C] with all singular values brought near 1, by Newton and Schulz's iteration.

    >>> values = torch.linalg.svdvals(orthogonalize(torch.randn(3, 8, 4), (3.4445, -4.7750, 2.0315), 5))
    >>> bool(((values > 0.3) & (values < 1.5)).all())
    True
    """
    a, b, c = coefficients
    tall = matrices.shape[1] > matrices.shape[2]
    X = matrices.mT if tall else matrices
    X = X / X.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]
    for _ in range(num_steps):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X.mT if tall else X


class MuonAdamW(Optimizer):
    """One optimiser of two rules: each parameter group names its `rule`, "muon" or "adamw".

    One object and not two, because sharded checkpoints hold one optimiser per model. The two rules are torch's own and
    work on this object's groups and state.
    """

    def __init__(self, groups: list[dict[str, Any]], optim: Optim):
        muon = [g for g in groups if g["rule"] == "muon"]
        adamw = [g for g in groups if g["rule"] == "adamw"]
        self._rules: dict[str, Optimizer] = {}
        if muon:
            self._rules["muon"] = CPUMuon(muon, momentum=optim.momentum)
        if adamw:
            self._rules["adamw"] = AdamW(adamw, betas=optim.betas, eps=1e-10)
        super().__init__([g for rule in self._rules.values() for g in rule.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # as torch's own
        loss = _evaluated(closure)
        for name, rule in self._rules.items():
            rule.param_groups = [g for g in self.param_groups if g["rule"] == name]
            rule.state = self.state
            rule.step()
        return loss


def _evaluated(closure: Callable[[], float] | None) -> float | None:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def build_optimizer(model: nn.Module, optim: Optim) -> MuonAdamW:
    """The recipe's optimiser over the model's parameters; every group keeps its full rate as `base_lr`.

    Hidden matrices decay, each on its own learning rate; vectors, gates, convolutions, embeddings and routers do not.
    """
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    hidden = {n for n, p in parameters.items() if p.ndim == 2 and not n.endswith(NOT_HIDDEN)}
    rule, rate = ("muon", optim.matrix_lr) if optim.kind == "muon" else ("adamw", optim.lr)
    groups = [
        {"rule": rule, "params": [parameters[n] for n in parameters if n in hidden], "lr": rate}
        | {"base_lr": rate, "weight_decay": optim.weight_decay},
        {"rule": "adamw", "params": [parameters[n] for n in parameters if n not in hidden], "lr": optim.lr}
        | {"base_lr": optim.lr, "weight_decay": 0.0},
    ]
    return MuonAdamW([g for g in groups if g["params"]], optim)


def rate_factor(schedule: Schedule, done: float) -> float:
    """The learning rate's factor when this share of the run is done, from 0 to 1.

    >>> [round(rate_factor(Schedule(warmup=0.1, decay=0.5), done), 3) for done in (0, 0.05, 0.1, 0.5, 0.75, 1)]
    [0.0, 0.5, 1.0, 1.0, 0.5, 0.0]
    >>> round(rate_factor(Schedule(kind="cosine", warmup=0, floor=0.1), 0.5), 3)
    0.55
    """
    done = min(max(done, 0.0), 1.0)
    if done < schedule.warmup:
        return done / schedule.warmup
    if schedule.kind == "cosine":
        fall = (1 + math.cos(math.pi * (done - schedule.warmup) / max(1 - schedule.warmup, 1e-9))) / 2
    else:
        fall = min((1 - done) / schedule.decay, 1.0) if schedule.decay else 1.0
    return schedule.floor + (1 - schedule.floor) * fall

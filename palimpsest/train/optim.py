"""Muon for the hidden matrices, AdamW for the rest, and the learning rate as a function of the share of the run done."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from palimpsest.train.recipe import Optim, Schedule

NOT_HIDDEN = ("embed_tokens.weight", "lm_head.weight", "gate.weight")  # tables of vectors, and the routers


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
            self._rules["muon"] = Muon(muon, momentum=optim.momentum)
        if adamw:
            self._rules["adamw"] = AdamW(adamw, betas=optim.betas, eps=1e-10)
        super().__init__([g for rule in self._rules.values() for g in rule.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # as torch's own
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for name, rule in self._rules.items():
            rule.param_groups = [g for g in self.param_groups if g["rule"] == name]
            rule.state = self.state
            rule.step()
        return loss


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

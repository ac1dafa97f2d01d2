"""Muon for the hidden matrices, AdamW for the rest, and the learning rate as a function of the share of the run done."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import AdamW, Optimizer

from palimpsest.train.recipe import Optim, Schedule

NOT_HIDDEN = ("embed_tokens.weight", "lm_head.weight", "gate.weight")  # tables of vectors, and the routers


class StackedMuon(Optimizer):
    """Muon (Keller Jordan, 2024) over matrices and stacks of matrices [..., R, C], those of one shape together.

    The rule is torch's own: momentum with a look ahead, Newton and Schulz's iteration, a rate times sqrt(max(1, R / C)),
    decay apart from the gradient. One batched iteration serves all matrices of a shape, where torch takes them one by one:
    thousands of small products leave a GPU idle. On a GPU it runs in bfloat16 as torch's does; on a CPU in float32, since
    one without instructions for bfloat16 takes 40 times as long for it.

    Args:
        params: parameters, or groups of them. Sharded ones (DTensor) must be sharded over their first dimension.
        lr, weight_decay, momentum, ns_coefficients, ns_steps: as torch.optim.Muon's.

    `found_inf`, set on the object before a step: a scalar on the device; where it is not 0 the step changes nothing.
    """

    found_inf: Tensor | None = None
    MOST = 1 << 26  # numbers orthogonalised at once: bounds the memory of a step

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
        ns_steps: int = 5,
    ):
        rule = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(params, rule | {"ns_coefficients": ns_coefficients, "ns_steps": ns_steps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # as torch's own
        loss = _evaluated(closure)
        for group in self.param_groups:
            shapes: dict[tuple, list[_Matrix]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    momentum = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                    matrix = _Matrix(_local(p), _local(p.grad), _local(momentum), p)
                    if matrix.weight.numel() or isinstance(p, DTensor):
                        shapes[p.shape[-2:], p.dtype, p.device].append(matrix)
            for matrices in shapes.values():
                size = max(1, self.MOST // max(1, max(m.whole.numel() for m in matrices)))
                for i in range(0, len(matrices), size):
                    self._update(matrices[i : i + size], group)
        return loss

    def _update(self, matrices: list[_Matrix], group: dict[str, Any]) -> None:
        weights, grads, momenta, wholes = (list(x) for x in zip(*matrices))
        mu, lr = group["momentum"], group["lr"]
        rate = lr * math.sqrt(max(1, wholes[0].shape[-2] / wholes[0].shape[-1]))
        keep: float | Tensor = 1 - lr * group["weight_decay"]
        if self.found_inf is None:
            torch._foreach_lerp_(momenta, grads, 1 - mu)
            looks = torch._foreach_lerp(grads, momenta, mu)
        else:
            finite = self.found_inf == 0
            grads = [torch.where(finite, g, 0) for g in grads]
            torch._foreach_mul_(momenta, torch.where(finite, mu, 1.0))  # lerp towards 0 would forget
            torch._foreach_add_(momenta, grads, alpha=1 - mu)
            looks = torch._foreach_lerp(grads, momenta, mu)
            keep = torch.where(finite, keep, 1.0)
        looks = [_gathered(look, whole) for look, whole in zip(looks, wholes)]
        stacked = torch.cat([look.flatten(0, -3) if look.ndim > 2 else look[None] for look in looks])
        dtype = torch.bfloat16 if stacked.is_cuda else stacked.dtype
        directions = orthogonalize(stacked.to(dtype), group["ns_coefficients"], group["ns_steps"]).to(stacked.dtype)
        if self.found_inf is not None:
            directions = torch.where(self.found_inf == 0, directions, 0)
        parts = directions.split([look.shape[:-2].numel() for look in looks])
        parts = [_share(part.view(look.shape), whole) for part, look, whole in zip(parts, looks, wholes)]
        torch._foreach_mul_(weights, keep)
        torch._foreach_add_(weights, parts, alpha=-rate)


class _Matrix(NamedTuple):
    """What this process holds of one parameter, and the parameter itself."""

    weight: Tensor
    grad: Tensor
    momentum: Tensor
    whole: Tensor


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def _gathered(look: Tensor, whole: Tensor) -> Tensor:
    """Whole matrices: shards of a stack are that already, shards of one matrix are brought together."""
    if isinstance(whole, DTensor) and whole.ndim == 2:
        shape, stride = whole.shape, whole.stride()
        return DTensor.from_local(look, whole.device_mesh, whole.placements, shape=shape, stride=stride).full_tensor()
    return look


def _share(direction: Tensor, whole: Tensor) -> Tensor:
    """The rows of a whole matrix that this process holds."""
    if isinstance(whole, DTensor) and whole.ndim == 2:
        return distribute_tensor(direction, whole.device_mesh, whole.placements, src_data_rank=None).to_local()
    return direction


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

    `found_inf`, set before a step on a GPU: a float scalar on the device; where it is not 0 the step changes nothing, and
    the host need not know.
    """

    found_inf: Tensor | None = None

    def __init__(self, groups: list[dict[str, Any]], optim: Optim, *, fused: bool = False):
        muon = [g for g in groups if g["rule"] == "muon"]
        adamw = [g for g in groups if g["rule"] == "adamw"]
        self._rules: dict[str, Optimizer] = {}
        if muon:
            self._rules["muon"] = StackedMuon(muon, momentum=optim.momentum)
        if adamw:
            self._rules["adamw"] = AdamW(adamw, betas=optim.betas, eps=1e-10, fused=fused or None)
        super().__init__([g for rule in self._rules.values() for g in rule.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # as torch's own
        loss = _evaluated(closure)
        for name, rule in self._rules.items():
            rule.param_groups = [g for g in self.param_groups if g["rule"] == name]
            rule.state = self.state
            rule.found_inf = self.found_inf  # type: ignore[attr-defined]  # AdamW's fused form reads it
            rule.step()
        return loss


def _evaluated(closure: Callable[[], float] | None) -> float | None:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def build_optimizer(model: nn.Module, optim: Optim, *, fused: bool = False) -> MuonAdamW:
    """The recipe's optimiser over the model's parameters; every group keeps its full rate as `base_lr`.

    fused: AdamW as one kernel, which heeds `found_inf`: for GPUs, wherever the parameters are now.

    Hidden matrices decay, each on its own learning rate; vectors, gates, convolutions, embeddings and routers do not.
    """
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    hidden = {n for n, p in parameters.items() if _is_hidden(n, p)}
    rule, rate = ("muon", optim.matrix_lr) if optim.kind == "muon" else ("adamw", optim.lr)
    groups = [
        {"rule": rule, "params": [parameters[n] for n in parameters if n in hidden], "lr": rate}
        | {"base_lr": rate, "weight_decay": optim.weight_decay},
        {"rule": "adamw", "params": [parameters[n] for n in parameters if n not in hidden], "lr": optim.lr}
        | {"base_lr": optim.lr, "weight_decay": 0.0},
    ]
    return MuonAdamW([g for g in groups if g["params"]], optim, fused=fused)


def _is_hidden(name: str, parameter: Tensor) -> bool:
    matrices = parameter.ndim == 2 or name.endswith((".experts.w1", ".experts.w3", ".experts.w2"))
    return matrices and not name.endswith(NOT_HIDDEN)


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

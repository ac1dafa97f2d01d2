"""Muon for the hidden matrices, AdamW for the rest, and the learning rate as a function of the share of the run done."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from palimpsest.train.recipe import Optim, Schedule

Rule = Callable[[Tensor], Tensor]
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
        copies: for a parameter, the processes that hold copies of it. Each of them orthogonalises its share of the matrices
            and gives the others what came of it; processes that hold shards of a matrix do the same with whole ones.

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
        copies: Mapping[Any, dist.ProcessGroup] = MappingProxyType({}),
    ):
        self._copies = copies
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
                    if matrix.weight.numel() or (isinstance(p, DTensor) and p.ndim == 2):
                        copies = self._copies.get(p) or _shards(p)
                        shapes[p.shape[-2:], p.dtype, p.device, p.ndim == 2, copies].append(matrix)
            for (*_, others), matrices in shapes.items():
                size = max(1, self.MOST // max(1, max(m.whole.numel() for m in matrices)))
                for i in range(0, len(matrices), size):
                    self._update(matrices[i : i + size], group, others)
        return loss

    def _update(self, matrices: list[_Matrix], group: dict[str, Any], others: dist.ProcessGroup | None) -> None:
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
        stacked = torch.cat([look.flatten(0, -3) if look.ndim > 2 else look[None] for look in looks])
        stacked = stacked.to(torch.bfloat16 if stacked.is_cuda else stacked.dtype)
        rule = partial(orthogonalize, coefficients=group["ns_coefficients"], num_steps=group["ns_steps"])
        if others is None:
            directions = rule(stacked)
        elif _shards(wholes[0]) is None:
            directions = _shared_work(rule, stacked, others)
        else:
            directions = _whole_matrices(rule, stacked, wholes[0].shape[0], others)
        directions = directions.to(weights[0].dtype)
        if self.found_inf is not None:
            directions = torch.where(self.found_inf == 0, directions, 0)
        parts = directions.split([look.shape[:-2].numel() for look in looks])
        parts = [part.view(look.shape) for part, look in zip(parts, looks)]
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


def _shards(whole: Tensor) -> dist.ProcessGroup | None:
    """The processes that hold rows of one matrix; None if this one holds whole matrices, of a stack or alone."""
    if not isinstance(whole, DTensor) or whole.ndim > 2:
        return None
    return whole.device_mesh.get_group(whole.device_mesh.ndim - 1)  # the last: copies of shards lie along the first


def _shared_work(rule: Rule, matrices_NRC: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The rule on matrices that all processes of the group have: each does its share, and all get all."""
    N, P = len(matrices_NRC), group.size()
    each = -(-N // P)
    mine = matrices_NRC[each * group.rank() : each * (group.rank() + 1)]
    done = rule(_filled(mine, each)).contiguous()
    every = done.new_empty(P * each, *done.shape[1:])
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name since torch 2.13
    gather(every, done, group=group)
    return every[:N]


def _whole_matrices(rule: Rule, rows_NrC: Tensor, num_rows: int, group: dist.ProcessGroup) -> Tensor:
    """The rule on matrices of which each process of the group holds some rows: each does its share of whole matrices.

    Args:
        rows_NrC: this process's rows, those that torch.chunk gives it of num_rows.
    """
    (N, r, C), P = rows_NrC.shape, group.size()
    each, most = -(-N // P), -(-num_rows // P)
    padded = F.pad(rows_NrC, (0, 0, 0, most - r, 0, P * each - N))  # [P each, most, C]
    pieces = torch.empty_like(padded)  # of my matrices, a process after the other
    dist.all_to_all_single(pieces, padded, group=group)
    whole = pieces.view(P, each, most, C).transpose(0, 1).reshape(each, P * most, C)[:, :num_rows]
    done = F.pad(rule(whole), (0, 0, 0, P * most - num_rows)).view(each, P, most, C).transpose(0, 1).contiguous()
    back = torch.empty_like(done)
    dist.all_to_all_single(back, done, group=group)
    return back.view(P * each, most, C)[:N, :r]


def _filled(matrices: Tensor, count: int) -> Tensor:
    """With zeros, up to so many."""
    return F.pad(matrices, (0, 0, 0, 0, 0, count - len(matrices)))


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

    def __init__(
        self,
        groups: list[dict[str, Any]],
        optim: Optim,
        *,
        fused: bool = False,
        copies: Mapping[Any, dist.ProcessGroup] = MappingProxyType({}),
    ):
        muon = [g for g in groups if g["rule"] == "muon"]
        adamw = [g for g in groups if g["rule"] == "adamw"]
        self._rules: dict[str, Optimizer] = {}
        if muon:
            self._rules["muon"] = StackedMuon(muon, momentum=optim.momentum, copies=copies)
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


def build_optimizer(
    model: nn.Module,
    optim: Optim,
    *,
    fused: bool = False,
    copies: Mapping[Any, dist.ProcessGroup] = MappingProxyType({}),
) -> MuonAdamW:
    """The recipe's optimiser over the model's parameters; every group keeps its full rate as `base_lr`.

    Args:
        model: as `parallelize` left it, if there are several processes.
        optim: the recipe's part about it.
        fused: AdamW as one kernel, which heeds `found_inf`: for GPUs, wherever the parameters are now.
        copies: for a parameter, the processes that hold copies of it and share Muon's work.

    Hidden matrices decay, each on its own learning rate; vectors, gates, convolutions, embeddings and routers do not.
    """
    rule, rate = ("muon", optim.matrix_lr) if optim.kind == "muon" else ("adamw", optim.lr)
    groups: dict[tuple, dict[str, Any]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            hidden = _is_hidden(name, p)
            facts = (rule, rate, optim.weight_decay) if hidden else ("adamw", optim.lr, 0.0)
            mesh = p.device_mesh if isinstance(p, DTensor) else None  # a fused kernel takes tensors of one mesh
            group = dict(zip(("rule", "lr", "weight_decay"), facts)) | {"base_lr": facts[1], "params": []}
            groups.setdefault((not hidden, mesh), group)["params"].append(p)
    return MuonAdamW(
        [groups[key] for key in sorted(groups, key=lambda key: key[0])], optim, fused=fused, copies=copies
    )  # fmt: skip


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

"""Gradients as the mean over processes, and their norm, whatever the plan.

Copies: every gradient is a view of one of a few flat buffers, each summed by one all-reduce after the last part of a step.
Nothing of that is in the forward or the backward pass, so both are what one process runs, captured as one CUDA graph too.
Shards: FSDP2 has summed already. Experts that are dealt have met the tokens of all processes of their axis, so that their
gradients are summed over the others alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from palimpsest.layers.precision import float32
from palimpsest.ops.arguments import state_dtype
from palimpsest.parallel.dealt_experts import DealtExperts
from palimpsest.parallel.spread import Spread

LARGEST = 1 << 27  # numbers in one buffer


class Gradients:
    """The gradients of a model that `parallelize` has spread.

    Args:
        model: its parameters are where they stay.
        spread: what `parallelize` gave.
    """

    def __init__(self, model: nn.Module, spread: Spread):
        self._spread, self._dealt = spread, expert_parameters(model)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._flat: list[tuple[Tensor, dist.ProcessGroup | None]] = []
        self._views: dict[Tensor, Tensor] = {}
        if spread.mesh is not None and spread.plan.kind == "ddp":
            for group, parameters in self._buckets():
                flat = torch.zeros(
                    sum(p.numel() for p in parameters), dtype=parameters[0].dtype, device=parameters[0].device
                )
                self._flat.append((flat, group))
                for p, part in zip(parameters, flat.split([p.numel() for p in parameters])):
                    self._views[p] = part.view(p.shape)
            self.zero_()

    @property
    def keeps(self) -> bool:
        """Whether gradients stay in place between steps: zero them by `zero_`, and never by None."""
        return bool(self._flat)

    @torch.no_grad()
    def zero_(self) -> None:
        """Every gradient 0; where they are views of a buffer, they are so from here on."""
        for flat, _ in self._flat:
            flat.zero_()
        for p in self._parameters:
            p.grad = self._views.get(p)

    @torch.no_grad()
    def sum_(self) -> None:
        """Makes each gradient the mean over the processes. All of them call this after the last backward of a step."""
        if self._spread.mesh is None:
            return
        share = 1 / self._spread.mesh.size()
        for flat, group in self._flat:
            flat.mul_(share)
            if group is not None:
                dist.all_reduce(flat, group=group)
        if (
            not self._flat and self._spread.plan.expert > 1
        ):  # FSDP2's mean is over those alone that hold the same experts
            torch._foreach_mul_(
                [_local(p.grad) for p in self._dealt if p.grad is not None], 1 / self._spread.plan.expert
            )

    @torch.no_grad()
    def clip_(self, longest: float) -> Tensor:
        """The norm of all gradients together, and the gradients shortened to `longest`; the host does not wait."""
        squares = {kind: self._squares(kind) for kind in ("alike", "dealt")}
        if self._spread.mesh is not None:
            if self._spread.plan.kind != "ddp":
                group, same = self._spread.shards, self._spread.expert_shards
                if group is not None:
                    dist.all_reduce(squares["alike"], group=group)
                if same is not None:
                    dist.all_reduce(squares["dealt"], group=same)
            if (group := self._spread.group("expert")) is not None:
                dist.all_reduce(squares["dealt"], group=group)
        norm = (squares["alike"] + squares["dealt"]).sqrt()
        factor = (longest / (norm + 1e-6)).clamp(max=1.0)
        if self._flat:
            torch._foreach_mul_([flat for flat, _ in self._flat], factor)
        else:
            grads = [_local(p.grad) for p in self._parameters if p.grad is not None]
            torch._foreach_mul_(grads, factor.to(grads[0].dtype))
        return norm

    def _squares(self, kind: str) -> Tensor:
        wanted = [p for p in self._parameters if (p in self._dealt) == (kind == "dealt") and p.grad is not None]
        grads = [x for p in wanted if p.grad is not None and (x := _local(p.grad)).numel()]
        if not grads:
            first = self._parameters[0]
            return torch.zeros((), device=first.device, dtype=state_dtype(first.dtype))
        norms = torch._foreach_norm(grads)
        return torch.stack([float32(norm) for norm in norms]).square().sum()

    def _buckets(self) -> Iterator[tuple[dist.ProcessGroup | None, list[Tensor]]]:
        by_kind: dict[tuple[bool, torch.dtype], list[Tensor]] = defaultdict(list)
        for p in self._parameters:
            by_kind[p in self._dealt, p.dtype].append(p)
        for (dealt, _), parameters in by_kind.items():
            group = self._spread.same_experts if dealt else dist.group.WORLD
            bucket: list[Tensor] = []
            for p in parameters:
                if bucket and sum(x.numel() for x in bucket) + p.numel() > LARGEST:
                    yield group, bucket
                    bucket = []
                bucket.append(p)
            yield group, bucket


def expert_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The parameters of experts that are dealt to processes."""
    return {p for module in model.modules() if isinstance(module, DealtExperts) for p in module.parameters()}


def copies(model: nn.Module, spread: Spread) -> dict[nn.Parameter, dist.ProcessGroup]:
    """For each parameter the processes that hold copies of it and may share the work on it; absent where there are none."""
    if spread.mesh is None or spread.plan.kind != "ddp":
        return {}
    dealt = expert_parameters(model)
    found = {p: spread.same_experts if p in dealt else dist.group.WORLD for p in model.parameters()}
    return {p: group for p, group in found.items() if group is not None}


def _local(x: Tensor | None) -> Tensor:
    assert x is not None
    return x.to_local() if isinstance(x, DTensor) else x

"""A plan applied to a model. The order, written once:

    1  experts   each process keeps its own of every mixture; tokens go to them and come back      dealt_experts.py
    2  context   each process reads its stretch of every row; memories and latents are exchanged   context.py
    3  recompute, then compile: each layer, as it now is
    4  data      shards by FSDP2, layer by layer; copies need no wrapper: their gradients are summed after the step

`context.py` gives two functions to this file and to the training loop:

    split_context_(model, group)                           step 2, in place
    own_stretch(tokens, labels, cu_seqlens, group)         a batch of whole rows [B, T] -> this process's (tokens, labels,
                                                           cu_seqlens) and the number of its predictions

The model's loss is then the mean over the process's own predictions, as without context; the loop weighs processes by
their numbers of predictions, so that every gradient is the mean over all processes, whatever the plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from palimpsest.models.kimi_linear import KimiLinearForCausalLM
from palimpsest.parallel.dealt_experts import DealtExperts, deal_experts_
from palimpsest.parallel.plan import Plan


@dataclass(frozen=True)
class Spread:
    """What a process knows of the plan that it is part of.

    Attributes:
        plan: what was asked for.
        mesh: of the axes data, expert, context; None: this process is alone.
        alike_mesh: of all processes, by what they hold of all that is no expert: "copy", "shard".
        expert_mesh: of all processes, by what they hold of the experts: "expert", "copy", "shard".
    """

    plan: Plan
    mesh: DeviceMesh | None = None
    alike_mesh: DeviceMesh | None = None
    expert_mesh: DeviceMesh | None = None

    def group(self, axis: str) -> dist.ProcessGroup | None:
        """The processes along an axis that this one talks to; None if it is alone there."""
        return _group(self.mesh, axis)

    @property
    def rows(self) -> tuple[int, int]:
        """Of the portions that a step's rows are dealt in: this process's, from 0, and their number."""
        if self.mesh is None:
            return 0, 1
        data, expert = self.mesh["data"], self.mesh["expert"]
        return data.get_local_rank() * expert.size() + expert.get_local_rank(), data.size() * expert.size()

    @property
    def same_experts(self) -> dist.ProcessGroup | None:
        """Under "ddp", the processes that hold the same experts as this one; None if there is no other."""
        return _group(self.expert_mesh, "copy")

    @property
    def shards(self) -> dist.ProcessGroup | None:
        """The processes that one copy of what is no expert is spread over."""
        return _group(self.alike_mesh, "shard")

    @property
    def expert_shards(self) -> dist.ProcessGroup | None:
        """The processes that one copy of the same experts is spread over."""
        return _group(self.expert_mesh, "shard")


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh | None,
    plan: Plan,
    *,
    device: torch.device | None = None,
    recompute: bool = False,
    compile: bool = False,
) -> Spread:
    """Spreads a model over the processes of a mesh, in place. All processes call this, with the same model.

    Args:
        model: whole, in every process.
        mesh: as `make_mesh` makes it; None for a process alone.
        plan: the one that the mesh was made for.
        device: where it is to be; where it is, if None. Shards go there layer by layer.
        recompute: keep no activations inside layers, and compute them again for the gradient.
        compile: each layer by torch.compile.

    Raises:
        ValueError: the model cannot be spread so.

    >>> from palimpsest import KimiLinearConfig
    >>> parallelize(KimiLinearForCausalLM(KimiLinearConfig.tiny()), None, Plan()).rows
    (0, 1)
    """
    model = cast(KimiLinearForCausalLM, model)
    device = device or model.device
    spread = _spread(mesh, plan)
    if mesh is not None:
        plan.refuse(model.config, mesh.size())
    if (group := spread.group("expert")) is not None:
        deal_experts_(model, group)
    if (group := spread.group("context")) is not None:
        from palimpsest.parallel.context import split_context_

        split_context_(model, group)
    model.model.gradient_checkpointing = recompute
    sharded = mesh is not None and plan.kind != "ddp"
    if compile:
        _compile(model, sharded=sharded)
    if sharded:
        _shard(model, spread, device)
    model.to(device)
    return spread


def _spread(mesh: DeviceMesh | None, plan: Plan) -> Spread:
    if mesh is None or mesh.size() == 1:
        return Spread(plan)
    shard = plan.shard_size(mesh.size())
    ranks = mesh.mesh.cpu()
    alike = DeviceMesh(mesh.device_type, ranks.reshape(-1, shard), mesh_dim_names=("copy", "shard"))
    if plan.expert == 1:
        return Spread(plan, mesh, alike, None)
    same = ranks.transpose(0, 1).reshape(plan.expert, -1)  # [expert, data x context]
    shard = min(shard, same.shape[1])
    experts = DeviceMesh(
        mesh.device_type, same.reshape(plan.expert, -1, shard), mesh_dim_names=("expert", "copy", "shard")
    )  # fmt: skip
    return Spread(plan, mesh, alike, experts)


def _compile(model: KimiLinearForCausalLM, *, sharded: bool) -> None:
    if sharded:  # what FSDP2 hooks to a layer stays outside of what is compiled
        for layer in model.model.layers:
            layer.forward = torch.compile(layer.forward)
    else:
        model.compile_layers()
    for module in model.modules():
        if isinstance(module, DealtExperts):
            module.compiled = True


def _shard(model: KimiLinearForCausalLM, spread: Spread, device: torch.device) -> None:
    """FSDP2: a layer at a time is whole on the device. Shards keep their dtype; autocast lowers what may be lowered."""
    low = model.dtype in (torch.bfloat16, torch.float16)
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32 if low else None)
    alike, experts = _fsdp_mesh(spread.alike_mesh), _fsdp_mesh(spread.expert_mesh)
    for layer in model.model.layers:
        layer.to(device)
        for module in layer.modules():
            if isinstance(module, DealtExperts) and experts is not None:
                fully_shard(module, mesh=experts, mp_policy=policy)
        fully_shard(layer, mesh=alike, mp_policy=policy)
    model.to(device)
    fully_shard(model, mesh=alike, mp_policy=policy)


def _fsdp_mesh(mesh: DeviceMesh | None) -> DeviceMesh | None:
    if mesh is None:
        return None
    return mesh["shard"] if mesh["copy"].size() == 1 else mesh["copy", "shard"]


def _group(mesh: DeviceMesh | None, axis: str) -> dist.ProcessGroup | None:
    if mesh is None or mesh[axis].size() == 1:
        return None
    return mesh[axis].get_group()

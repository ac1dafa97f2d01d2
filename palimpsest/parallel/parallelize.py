"""A plan applied to a model. The order, written once:

    1  experts   each process keeps its own of every mixture; tokens go to them and come back      experts.py
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

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from palimpsest.parallel.plan import Plan


@dataclass(frozen=True)
class Spread:
    """What a process knows of the plan that it is part of.

    Attributes:
        plan: what was asked for.
        mesh: of the axes data, expert, context; None: this process is alone.
    """

    plan: Plan
    mesh: DeviceMesh | None

    def group(self, axis: str) -> dist.ProcessGroup | None:
        """The processes along an axis that this one talks to; None if it is alone there."""
        if self.mesh is None or self.mesh[axis].size() == 1:
            return None
        return self.mesh[axis].get_group()


def parallelize(model: nn.Module, mesh: DeviceMesh | None, plan: Plan) -> Spread:
    """Spreads a model over the processes of a mesh, in place. All processes call this, with the same model.

    Args:
        model: whole, in every process; on the process's device.
        mesh: as `make_mesh` makes it; None for a process alone.
        plan: the one that the mesh was made for.

    Raises:
        ValueError: the model cannot be spread so.
    """
    spread = Spread(plan, mesh)
    if (group := spread.group("context")) is not None:
        from palimpsest.parallel.context import split_context_

        split_context_(model, group)
    return spread

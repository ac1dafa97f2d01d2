"""A plan: how many processes along each axis, and what each axis means.

    axis      processes along it                        hold                   read
    data      differ in rows alone                      the same experts       other rows
    expert    share the experts of every mixture        other experts          other rows
    context   share the tokens of every row             the same experts       another stretch of the same rows

The job has data x expert x context processes. The axes stand in this order, the last one's neighbours on one host: what
context exchanges is waited for at every layer, what expert exchanges at every mixture, and data once a step.

What is no expert is held alike by all processes: as copies ("ddp"), in shards over all of them ("fsdp", FSDP2), or in
copies of shards ("hsdp"). Experts are held so among the processes that share them: data x context.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from palimpsest.checks import check, check_fields

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

AXES = ("data", "expert", "context")  # of the mesh, the slowest to vary first


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a model and its rows are spread over processes.

    Attributes:
        kind: "ddp": each process holds a copy; "fsdp": shards over all of them; "hsdp": copies of shards.
        data: processes that read other rows; None: as many as the others leave.
        expert: processes that the experts of each mixture are dealt to.
        context: processes that each row's tokens are dealt to.
        shard: of "hsdp", the processes that one copy is spread over; None: those of one host.

    Raises:
        ValueError: a number below 1.

    >>> Plan(data=2, context=2).sizes(4)
    {'data': 2, 'expert': 1, 'context': 2}
    """

    kind: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    data: int | None = None
    expert: int = 1
    context: int = 1
    shard: int | None = None

    def __post_init__(self):
        check_fields(self, "parallel.")
        for name in (*AXES, "shard"):
            value = getattr(self, name)
            check(value is None or value >= 1, f"parallel.{name} is {value}; expected at least 1")
        check(
            self.shard is None or self.kind == "hsdp",
            f"parallel.shard is of 'hsdp', and parallel.kind is {self.kind!r}",
        )

    def sizes(self, num_processes: int) -> dict[str, int]:
        """Processes along each axis of a job of so many.

        Raises:
            ValueError: they do not come to that number.
        """
        inner = self.expert * self.context
        data = self.data if self.data is not None else max(num_processes // inner, 1)
        product = data * inner
        if product != num_processes:
            change = (
                f"parallel.data={num_processes // inner}" if num_processes % inner == 0 else "other parallel fields"
            )
            raise ValueError(
                f"the plan needs parallel.data {data} x expert {self.expert} x context {self.context} = {product} processes "
                f"and the job has {num_processes}; start {product} (torchrun --nproc_per_node), or set {change}"
            )
        return {"data": data, "expert": self.expert, "context": self.context}

    def refuse(self, config: Any, num_processes: int) -> None:
        """Raises ValueError, in one sentence, where a model of this config cannot be spread so over so many processes."""
        self.sizes(num_processes)
        sparse = config.num_experts and any(map(config.is_sparse, range(config.num_hidden_layers)))
        if self.expert > 1 and not sparse:
            raise ValueError(f"parallel.expert is {self.expert} and the model has no mixture of experts; set it to 1")
        if self.expert > 1 and config.num_experts % self.expert:
            raise ValueError(
                f"parallel.expert is {self.expert}, which does not divide the model's {config.num_experts} experts; set one "
                f"of {', '.join(str(n) for n in range(2, config.num_experts + 1) if config.num_experts % n == 0)}"
            )
        if self.kind == "hsdp":
            shard = self.shard_size(num_processes)
            if num_processes % shard or (num_processes // self.expert) % shard:
                raise ValueError(
                    f"parallel.shard {shard} does not divide the {num_processes // self.expert} processes that hold the same "
                    f"experts of the job's {num_processes}; set one that does"
                )

    def shard_size(self, num_processes: int) -> int:
        """Processes that one copy of what is no expert is spread over: 1 for "ddp"."""
        if self.kind == "ddp":
            return 1
        if self.kind == "fsdp":
            return num_processes
        return self.shard or min(int(os.environ.get("LOCAL_WORLD_SIZE", num_processes)), num_processes)


def make_mesh(plan: Plan, device_type: str) -> DeviceMesh:
    """The mesh of this job's processes, with the axes' names; all processes call this, after torch.distributed has begun.

    Args:
        plan: what it is for.
        device_type: "cuda" or "cpu".

    Raises:
        ValueError: the job has another number of processes.
    """
    from torch.distributed import get_world_size
    from torch.distributed.device_mesh import init_device_mesh

    sizes = plan.sizes(get_world_size())
    mesh = init_device_mesh(device_type, tuple(sizes[axis] for axis in AXES), mesh_dim_names=AXES)
    assert mesh.size() == math.prod(sizes.values())
    return mesh

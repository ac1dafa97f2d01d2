"""What several processes share: the accelerator, and the few numbers on which they must agree."""

import torch
from accelerate import (
    Accelerator,
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    PartialState,
)
from accelerate.state import AcceleratorState, GradientState
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from palimpsest.train.recipe import Recipe


def start_accelerator(recipe: Recipe) -> Accelerator:
    """The accelerator of this process; several processes are started by `torchrun` or `accelerate launch`.

    Raises:
        ValueError: this machine cannot compute in the recipe's precision, or cannot shard.
    """
    # accelerate keeps one state per process; a second run in the same process may differ in precision or accumulation.
    AcceleratorState._reset_state()
    GradientState._reset_state()
    cpu = not torch.accelerator.is_available()  # said aloud: without it, processes on CPUs do not find each other
    here, plugin = PartialState(cpu=cpu), None
    if recipe.precision == "fp16" and cpu:
        raise ValueError("precision='fp16' needs a GPU; use bf16, or no for fp32")
    if recipe.parallel == "fsdp" and here.num_processes > 1:
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["DecoderLayer"],
            # Shards stay in their own dtype, and autocast lowers what may be lowered: gates and routers stay in fp32.
            mixed_precision_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32),
        )
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=recipe.precision,
        gradient_accumulation_steps=recipe.data.accumulate,
        fsdp_plugin=plugin,
        # Each process counts its own experts' tokens; their biases are moved alike in all.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    if (
        plugin is not None and cpu
    ):  # accelerate shards over GPUs alone; torch does over CPUs too, which shows it is right
        here.distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    return accelerator


def as_scalar(value: torch.Tensor | None) -> torch.Tensor:
    """A scalar tensor, gathered if it is sharded, 0 for none; the host does not wait for it. All processes call this."""
    if value is None:
        return torch.zeros(())
    return value.full_tensor() if isinstance(value, DTensor) else value


def agree(accelerator: Accelerator, *numbers: float) -> tuple[float, ...]:
    """The largest of each number over the processes: what all act on, so that none acts alone."""
    if accelerator.num_processes == 1:
        return numbers
    mine = torch.tensor(numbers, dtype=torch.float64, device=accelerator.device)
    torch.distributed.all_reduce(mine, op=torch.distributed.ReduceOp.MAX)
    return tuple(mine.tolist())


def total(accelerator: Accelerator, value: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over the processes."""
    if accelerator.num_processes == 1:
        return value
    value = value.to(accelerator.device, copy=True)
    torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.SUM)
    return value

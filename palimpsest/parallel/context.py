"""One sequence on several ranks, exactly: the door for models and operators, of the package and of others.

    split = split_sequence(tokens, group)                       # who holds what; the same call on every rank
    q, k, v, g, beta = (split.shard(x) for x in whole)          # or tensors that were made of a rank's own tokens
    output, state = kda(q, k, v, g, beta, split=split)          # every member of the family takes it
    loss = model(split.shard(ids), labels=split.shard(ids), split=split).loss

A part of a sequence is an affine map of the memory that enters it, so ranks exchange K x K and K x V numbers a head, never
tokens; attention gathers its latents and deals its heads. Gradients flow as on one rank: call backward on every rank.
See docs/how-to/long-context.md.
"""

from __future__ import annotations

from functools import wraps
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor, nn

from palimpsest.layers.latent_attention import MultiHeadLatentAttention
from palimpsest.layers.memory_layer import MemoryLayer
from palimpsest.models.kimi_linear import KimiLinearForCausalLM
from palimpsest.models.kimi_linear.model import check_mixers
from palimpsest.ops.cross_entropy import IGNORED
from palimpsest.ops.split import SequenceSplit, split_sequence

__all__ = ["SequenceSplit", "layout_of", "own_stretch", "share", "split_context_", "split_sequence"]


def layout_of(model: nn.Module, ranks: int) -> Literal["contiguous", "zigzag"]:
    """How a model's sequences are best laid over ranks.

    Args:
        model: any module.
        ranks: over so many.

    Returns:
        "zigzag" if a layer attends with fewer heads than ranks, for then each attends for its own tokens, and a late one costs
        more than an early one; otherwise "contiguous", of which memories send least.

    >>> from palimpsest import KimiLinearConfig, KimiLinearForCausalLM
    >>> model = KimiLinearForCausalLM(KimiLinearConfig.tiny("KM"))
    >>> layout_of(model, 2), layout_of(model, 64)
    ('contiguous', 'zigzag')
    """
    few = (m.num_heads < ranks for m in model.modules() if isinstance(m, MultiHeadLatentAttention))
    return "zigzag" if any(few) else "contiguous"


def share(
    tokens: Tensor,
    labels: Tensor,
    group: Any = None,
    *,
    cu_seqlens: Tensor | None = None,
    layout: Literal["contiguous", "zigzag"] = "contiguous",
) -> tuple[Tensor, Tensor, SequenceSplit]:
    """This rank's part of a batch that every rank of the group has.

    Args:
        tokens, labels: [B, T], the same on every rank.
        group: as `split_sequence`'s.
        cu_seqlens: [N + 1], borders of documents in them.
        layout: as `split_sequence`'s; see `layout_of`.

    Returns:
        tokens and labels [B, L] of this rank, and the split, for `model(tokens, labels=labels, split=split)`.

    Raises:
        ValueError: as `split_sequence`.

    >>> import torch
    >>> tokens, labels, split = share(torch.arange(6)[None], torch.arange(6)[None])
    >>> tokens.shape, split.size
    (torch.Size([1, 6]), 1)
    """
    split = split_sequence(tokens.shape[1], group, layout=layout, cu_seqlens=cu_seqlens)
    return split.shard(tokens), split.shard(labels), split


def split_context_(model: nn.Module, group: Any, layout: Literal["contiguous", "zigzag"] | None = None) -> None:
    """From now on, in training, every process of a group computes its own part of each batch of the model, in place.

    Every process calls the model with the same whole rows; its loss is then this process's share, the mean over the processes
    is that of the rows, and so are the means of the gradients. In evaluation the model is as it was.

    Args:
        model: its forward takes input_ids, labels, cu_seqlens and split, as KimiLinearForCausalLM's does.
        group: of the processes that share the tokens of each row.
        layout: as `split_sequence`'s; that of `layout_of` if None.

    Raises:
        ValueError: a layer of the model cannot run on a part of a sequence, or there is no memory among them.
    """
    if isinstance(model, KimiLinearForCausalLM):
        check_mixers(model.model.layers)
    if not any(isinstance(module, MemoryLayer) for module in model.modules()):
        raise ValueError(
            f"the model is a {type(model).__name__} without a memory layer, so there is no context to share; leave "
            "parallel.context at 1"
        )
    forward, chosen = model.forward, layout or layout_of(model, dist.get_world_size(group))

    @wraps(forward)
    def of_own_part(input_ids: Tensor, *, labels: Tensor | None = None, cu_seqlens: Tensor | None = None, **rest: Any):
        if not model.training or labels is None:
            return forward(input_ids, labels=labels, cu_seqlens=cu_seqlens, **rest)
        tokens, own_labels, split = share(input_ids, labels, group, cu_seqlens=cu_seqlens, layout=chosen)
        return forward(tokens, labels=own_labels, split=split, **rest)

    model.forward = of_own_part


def own_stretch(
    tokens: Tensor, labels: Tensor, cu_seqlens: Tensor | None, group: Any
) -> tuple[Tensor, Tensor, Tensor | None, float]:
    """What a training loop hands to a model of `split_context_`: the whole rows, of which the model takes its own part.

    Args:
        tokens, labels: [B, T]. cu_seqlens: borders of documents in them.
        group: of the processes that share the tokens.

    Returns:
        tokens, labels, cu_seqlens, and this process's share of the predictions, for a loop that weighs by their number.
    """
    wanted = labels != IGNORED
    wanted[:, 0] = False
    if cu_seqlens is not None:
        wanted[:, cu_seqlens[:-1].long().clamp(max=wanted.shape[1] - 1)] = False
    return tokens, labels, cu_seqlens, int(wanted.sum()) / dist.get_world_size(group)

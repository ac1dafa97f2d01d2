"""One sequence on several ranks, exactly: the door for models and operators, of the package and of others.

    split = split_sequence(tokens, group)                       # who holds what; the same call on every rank
    q, k, v, g, beta = (split.shard(x) for x in whole)          # or tensors that were made of a rank's own tokens
    output, state = kda(q, k, v, g, beta, split=split)          # every member of the family takes it
    loss = model(split.shard(ids), labels=split.shard(ids), split=split).loss

A part of a sequence is an affine map of the memory that enters it, so ranks exchange K x K and K x V numbers a head, never
tokens; attention gathers its latents. Gradients flow as on one rank: call backward on every rank. See docs/how-to/scale.md.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from palimpsest.layers.latent_attention import MultiHeadLatentAttention
from palimpsest.ops.split import SequenceSplit, split_sequence

__all__ = ["SequenceSplit", "layout_of", "share", "split_sequence"]


def layout_of(model: nn.Module) -> Literal["contiguous", "zigzag"]:
    """How a model's sequences are best laid over ranks: "zigzag" if any layer attends, for attention costs a late token more
    than an early one; "contiguous" if there are memories alone.

    Args:
        model: any module.

    Returns:
        A layout for `split_sequence`.

    >>> from palimpsest import KimiLinearConfig, KimiLinearForCausalLM
    >>> layout_of(KimiLinearForCausalLM(KimiLinearConfig.tiny("KM")))
    'zigzag'
    """
    attends = any(isinstance(module, MultiHeadLatentAttention) for module in model.modules())
    return "zigzag" if attends else "contiguous"


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

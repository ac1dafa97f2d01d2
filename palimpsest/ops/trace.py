"""Watch the memory at work: what it holds after each token has faded it, erased from it and written to it.

Slow and complete, in the arithmetic of the law, for the lab, the course and the explainer.
"""

from typing import NamedTuple

import torch
from torch import Tensor, einsum

from palimpsest.ops import arguments
from palimpsest.ops.arguments import state_dtype


class Trace(NamedTuple):
    """The stages of every token. B sequences, T tokens, H heads, K key channels, V value channels.

    Attributes:
        decayed: [B, T, H, K, V], the memory after decay.
        erased: [B, T, H, K, V], after erase.
        written: [B, T, H, K, V], after write: the memory that the token leaves.
        read: [B, T, H, V], what the token reads.
        held: [B, T, H, V], what the memory answered to the eraser before it erased.
    """

    decayed: Tensor
    erased: Tensor
    written: Tensor
    read: Tensor
    held: Tensor


def trace(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    state: Tensor | None = None,
    scale: float | None = None,
) -> Trace:
    """Trace KDA, one token at a time.

    Args:
        q, k: [B, T, H, K]. v: [B, T, H, V]: as many heads in q and k as in v.
        log_decay: [B, T, H, K], natural log, <= 0.
        beta: [B, T, H].
        state: [B, H, K, V], the memory before the first token; zeros if None.
        scale: multiplies q; 1 / sqrt(K) if None.

    Returns:
        A Trace: the memory after each stage of each token, T K V numbers a head and stage.

    Raises:
        ValueError: q has no tokens.

    >>> q = k = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2)
    >>> v, beta = torch.full((1, 1, 1, 2), 5.0), torch.ones(1, 1, 1)
    >>> log_decay = torch.tensor([1.0, 0.5]).log().view(1, 1, 1, 2)
    >>> memory = torch.tensor([[10.0, 10.0], [2.0, 2.0]]).view(1, 1, 2, 2)
    >>> stages = trace(q, k, v, log_decay, beta, state=memory)
    >>> [stage[0, 0, 0].tolist() for stage in stages[:3]]
    [[[10.0, 10.0], [1.0, 1.0]], [[10.0, 10.0], [0.0, 0.0]], [[10.0, 10.0], [5.0, 5.0]]]
    """
    arguments.check("trace", (q, k, v, log_decay, beta, state))
    _expect_one_head_each(q, v)
    wide = state_dtype(q.dtype)
    q, k, v, log_decay, beta = (x.to(wide) for x in (q, k, v, log_decay, beta[..., None]))
    q = q * arguments.scale_of(scale, q)
    return trace_memory(q, k, beta * k, beta * v, log_decay, state)


def trace_memory(
    q: Tensor, k: Tensor, erase: Tensor, write: Tensor, log_decay: Tensor, state: Tensor | None = None
) -> Trace:
    """Trace any member of the family by what it erases and writes. Arguments as reference.delta_memory."""
    arguments.check("trace_memory", (q, k, write, erase, log_decay, state))
    _expect_one_head_each(q, write)
    wide = state_dtype(q.dtype)
    q, k, erase, write, log_decay = (x.to(wide) for x in (q, k, erase, write, log_decay))
    state = None if state is None else state.to(wide)
    B, T, H, K = q.shape
    S_BHKV = write.new_zeros(B, H, K, write.shape[-1]) if state is None else state
    stages = []
    for q_BHK, k_BHK, e_BHK, w_BHV, g_BHK in zip(*(x.unbind(1) for x in (q, k, erase, write, log_decay))):
        decayed = g_BHK.exp()[..., None] * S_BHKV
        held = einsum("bhk,bhkv->bhv", e_BHK, decayed)
        erased = decayed - einsum("bhk,bhv->bhkv", k_BHK, held)
        S_BHKV = erased + einsum("bhk,bhv->bhkv", k_BHK, w_BHV)
        stages.append((decayed, erased, S_BHKV, einsum("bhk,bhkv->bhv", q_BHK, S_BHKV), held))
    if not stages:
        raise ValueError("q has no tokens; a trace needs at least one")
    return Trace(*(torch.stack(stage, 1) for stage in zip(*stages)))


def _expect_one_head_each(q: Tensor, v: Tensor) -> None:
    if q.shape[2] != v.shape[2]:
        raise ValueError(
            f"q has {q.shape[2]} heads and v {v.shape[2]}; repeat those of q and k: a trace takes one each"
        )

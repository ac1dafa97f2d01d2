"""Causal attention over a sequence that lies on several ranks.

The latents go to all: one short row a token for all heads (576 numbers in the released sizes), cheaper than keys and values.
By heads    with at least as many heads as ranks, each rank takes all tokens for some of the heads: queries are dealt by heads,
            outputs come back by tokens. All ranks work alike, whatever the layout, and each head is computed as on one rank.
By tokens   with more ranks than heads, each rank attends for its own tokens: the zigzag layout makes the work alike.

Letters  B sequences, T tokens of all, L of this rank, H heads, C channels of a key, V of a value, R + P of a latent; F tokens of
         a fragment, S tokens that it looks at: from where its first document starts to its own end.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from palimpsest.ops.split import Fragment, SequenceSplit, uncompiled

try:  # as in latent_attention.py
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None
_CAUSAL: dict[str, Any] = {"window_size": (-1, 0)}
if varlen_attn is not None and "is_causal" in inspect.signature(varlen_attn).parameters:
    _CAUSAL = {"is_causal": True}


@uncompiled
def attend_across(
    split: SequenceSplit,
    q: Tensor,
    latent: Tensor,
    keys_and_values: Callable[[Tensor, slice], tuple[Tensor, Tensor]],
    scale: float,
) -> Tensor:
    """What this rank's tokens read of all tokens before them in their documents.

    Args:
        q: [B, L, H, C]. latent: [B, L, R + P], of this rank's tokens.
        keys_and_values: ([B, S, R + P], some of the heads) -> their keys [B, S, H', C] and values [B, S, H', V].
        scale: multiplies the scores.

    Returns:
        [B, L, H, V].
    """
    latent, H = split.whole(latent), q.shape[2]
    if split.group is not None and split.size <= H:
        k, v = keys_and_values(latent, split.heads_of(split.rank, H))
        everything = SequenceSplit(split.tokens, split.documents, (((0, split.tokens),),), 0).mine[0]
        return split.to_tokens(attend_fragment(everything, split.to_heads(q), k, v, scale), H)
    if not split.mine:  # no token, but weights of which every rank has a gradient
        k, v = keys_and_values(latent[:, :1], slice(0, H))
        return (q[..., :1] + 0 * (k.sum() + v.sum())).expand(*q.shape[:3], v.shape[-1])
    first = min(f.pieces[0].document for f in split.mine)
    last = max(f.stop for f in split.mine)
    k, v = keys_and_values(latent[:, first:last], slice(0, H))
    outputs = []
    for f in split.mine:
        seen = slice(f.pieces[0].document - first, f.stop - first)
        outputs.append(attend_fragment(f, q[:, f.at : f.at + f.stop - f.start], k[:, seen], v[:, seen], scale))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)


def attend_fragment(f: Fragment, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """One fragment: of each of its pieces the last query sees all keys of its document so far, the one before all but one.

    Args:
        f: the fragment.
        q: [B, F, H, C]. k: [B, S, H, C]. v: [B, S, H, V].
        scale: multiplies the scores.

    Returns:
        [B, F, H, V].
    """
    if len(f.pieces) == 1 and not f.open:
        return _plain(q, k, v, None, scale)
    fits = v.shape[-1] <= q.shape[-1] and q.dtype in (torch.bfloat16, torch.float16)
    if q.is_cuda and fits and varlen_attn is not None:
        return _packed(f, q, k, v, scale)
    start, outputs = f.pieces[0].document, []
    for p in f.pieces:
        queries, seen = slice(p.start - f.start, p.stop - f.start), slice(p.document - start, p.stop - start)
        T, S = p.stop - p.start, p.stop - p.document
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T) if T < S else None
        outputs.append(_plain(q[:, queries], k[:, seen], v[:, seen], mask, scale))
    return torch.cat(outputs, 1)


def _plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    V = v.shape[-1]
    if q.device.type == "cpu":  # its fused kernel wants one head size
        v = F.pad(v, (0, max(0, q.shape[-1] - V)))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    return y[..., :V].transpose(1, 2)


def _packed(f: Fragment, q_BFHC: Tensor, k_BSHC: Tensor, v_BSHV: Tensor, scale: float) -> Tensor:
    (B, tokens), S, V = q_BFHC.shape[:2], k_BSHC.shape[1], v_BSHV.shape[-1]
    start = f.pieces[0].document
    of_q = [b * tokens + p.start - f.start for b in range(B) for p in f.pieces]
    of_k = [b * S + p.document - start for b in range(B) for p in f.pieces]
    borders_q = torch.tensor([*of_q, B * tokens], dtype=torch.int32).to(q_BFHC.device)
    borders_k = torch.tensor([*of_k, B * S], dtype=torch.int32).to(q_BFHC.device)
    most_q, most_k = max(p.stop - p.start for p in f.pieces), max(p.stop - p.document for p in f.pieces)
    v_BSHC = F.pad(v_BSHV, (0, q_BFHC.shape[-1] - V))  # the kernel wants one head size
    q, k, v = (x.flatten(0, 1) for x in (q_BFHC, k_BSHC, v_BSHC))
    assert varlen_attn is not None
    y = varlen_attn(q, k, v, borders_q, borders_k, most_q, most_k, scale=scale, **_CAUSAL)
    assert isinstance(y, Tensor)
    return y.unflatten(0, (B, tokens))[..., :V]

"""The law: the delta memory, one token at a time. Every other implementation answers to this file.

    S_t = (I - k_t erase_t^T) Diag(exp(log_decay_t)) S_{t-1} + k_t write_t^T
    o_t = S_t^T q_t

Letters  B sequences, T tokens, H heads, K key channels, V value channels.
Memory   S is a K x V matrix that answers a key with a value. It lives in the dtype it is given.
Units    log_decay is a natural logarithm and never positive.
Source   Kimi Linear, arXiv:2510.26692, with erase_t = beta_t k_t and write_t = beta_t v_t.
"""

import torch
from torch import Tensor, einsum


def delta_memory(
    q: Tensor, k: Tensor, erase: Tensor, write: Tensor, log_decay: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Read every token of a sequence against a memory that each token first edits.

    Args:
        q, k, erase, log_decay: [B, T, H, K].
        write: [B, T, H, V].
        state: the memory before the first token, [B, H, K, V].

    Returns:
        Outputs [B, T, H, V] and the memory after the last token, [B, H, K, V].
    """
    S_BHKV, outputs = state, [write[:, :0]]
    for q_BHK, k_BHK, e_BHK, w_BHV, g_BHK in zip(*(x.unbind(1) for x in (q, k, erase, write, log_decay))):
        S_BHKV = g_BHK.exp()[..., None] * S_BHKV
        held_BHV = einsum("bhk,bhkv->bhv", e_BHK, S_BHKV)
        S_BHKV = S_BHKV + einsum("bhk,bhv->bhkv", k_BHK, w_BHV - held_BHV)
        outputs.append(einsum("bhk,bhkv->bhv", q_BHK, S_BHKV)[:, None])
    return torch.cat(outputs, dim=1), S_BHKV


def dplr(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_decay: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The general diagonal-plus-low-rank memory that the paper compares with: a and b are free vectors.

        S_t = (Diag(exp(log_decay_t)) + b_t a_t^T) S_{t-1} + k_t v_t^T,    o_t = S_t^T q_t

    With a = exp(log_decay) * erase, b = -k and v = write it is `delta_memory`.

    Args:
        q, k, a, b, log_decay: [B, T, H, K]. Each a_t reads the memory before token t's decay.
        v: [B, T, H, V].
        state: [B, H, K, V].
    """
    S_BHKV, outputs = state, [v[:, :0]]
    for q_BHK, k_BHK, v_BHV, a_BHK, b_BHK, g_BHK in zip(*(x.unbind(1) for x in (q, k, v, a, b, log_decay))):
        held_BHV = einsum("bhk,bhkv->bhv", a_BHK, S_BHKV)
        S_BHKV = g_BHK.exp()[..., None] * S_BHKV
        S_BHKV = S_BHKV + einsum("bhk,bhv->bhkv", b_BHK, held_BHV) + einsum("bhk,bhv->bhkv", k_BHK, v_BHV)
        outputs.append(einsum("bhk,bhkv->bhv", q_BHK, S_BHKV)[:, None])
    return torch.cat(outputs, dim=1), S_BHKV


def softmax_lookup(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The soft dictionary that these memories replace: every token asks all that was written so far.

        o_t = sum_s softmax_s(q_t . key_s) value_s        s up to and including token t

    Args:
        q: [B, T, H, K], the last T tokens of the cache.
        keys, values: [B, S, H, K] and [B, S, H, V] with S >= T, the whole KV cache.
    """
    before, outputs = keys.shape[1] - q.shape[1], [values[:, :0]]
    for t, q_BHK in enumerate(q.unbind(1), start=before + 1):
        weights_BHS = einsum("bhk,bshk->bhs", q_BHK, keys[:, :t]).softmax(-1)
        outputs.append(einsum("bhs,bshv->bhv", weights_BHS, values[:, :t])[:, None])
    return torch.cat(outputs, dim=1)

"""The law in matrix products: the same memory, one chunk of tokens at a time. Plain PyTorch, any device, autograd.

Inside a chunk let S be the memory on entry and decay(j, i) the channel-wise product of the decays of tokens j+1..i.
What token i really adds, once it has erased what earlier tokens left, is row i of `v_new`. It solves a unit
triangular system, and the memory then needs only matrix products (the WY form of the paper, its section 3):

    (I + A) v_new = write - (erase decay(0, i)) S        A_ij = sum_c erase_ic k_jc decay_c(j, i),   j < i
    M = (I + A)^-1,  U = M write,  W = M (erase decay(0, i)),  v_new = U - W S
    o = (q decay(0, i)) S + P v_new                      P_ij = sum_c q_ic k_jc decay_c(j, i),       j <= i
    S <- Diag(decay(0, C)) S + (k decay(i, C))^T v_new

A, P, M and all decayed rows are built on one binary tree (`Block`, `merge`). Two neighbouring blocks of h tokens
meet at their border: rows of the later one carry the decay since the border, rows of the earlier one the decay up
to it, so every factor is a product of decays, at most 1. No exponent is ever a difference of sums, nothing
overflows or cancels, however fast the gates forget, and M comes from the same merge by blocked forward substitution.

A NaN reaches no other head, no other sequence and no earlier chunk; within its chunk the products carry it to earlier
outputs, too (0 times NaN is NaN). The backends `reference` and `cpu` keep causality for NaN token by token.

Letters as in reference.py; N chunks of C tokens, h tokens in a block.
Memory   O(segment) intermediates: a long sequence is cut into segments, and backward recomputes each from its state.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 32  # tokens; larger chunks only add operations on a CPU
SEGMENT = 262_144  # numbers in the widest tensor of a segment: they stay in cache, and bound what backward recomputes


def delta_memory(
    q: Tensor, k: Tensor, erase: Tensor, write: Tensor, log_decay: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """See reference.delta_memory: the same arguments, the same results."""
    return by_segments(_delta_segment, (q, k, erase, write, log_decay), state)


def dplr(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_decay: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """See reference.dplr: the same arguments, the same results."""
    return by_segments(_dplr_segment, (q, k, v, a, b, log_decay), state)


def softmax_lookup(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """See reference.softmax_lookup: all queries at once."""
    T, S = q.shape[1], keys.shape[1]
    seen_TS = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    q, keys, values = (x.transpose(1, 2) for x in (q, keys, values))
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(q, keys, values, attn_mask=seen_TS, scale=1.0).transpose(1, 2)


class Block(NamedTuple):
    """What a run of h tokens must know to be joined to its neighbour. All tensors are [..., blocks, h, *]."""

    reads: tuple[Tensor, ...]  # rows that read (q, erase), decayed since the block began
    keys: tuple[Tensor, ...]  # rows that are written (k), decayed until the block ends
    decay: Tensor  # product of all decays of the block, [..., blocks, K]
    scores: tuple[tuple[Tensor, ...], ...]  # scores[r][c]: reads[r] against keys[c] inside the block, [..., h, h]
    inverse: Tensor  # (I + A)^-1 inside the block


class Products(NamedTuple):
    """What a chunk knows before it meets the memory, in the letters above. All tensors are [B, H, N, C, *]."""

    A: Tensor  # [..., C, C], below the diagonal
    M: Tensor  # [..., C, C], (I + A)^-1
    W: Tensor  # [..., C, K]
    U: Tensor  # [..., C, V]
    P: Tensor  # [..., C, C], on and below the diagonal
    q: Tensor  # [..., C, K], decayed since the chunk began
    k: Tensor  # [..., C, K], decayed until the chunk ends
    decay: Tensor  # [..., K], of the whole chunk


def products(q: Tensor, k: Tensor, erase: Tensor, write: Tensor, log_decay: Tensor) -> Products:
    """The chunk's matrices. Arguments as reference.delta_memory, their tokens a power of two or a multiple of CHUNK."""
    q, k, erase, write, log_decay = (_chunks(x) for x in (q, k, erase, write, log_decay))
    decay = log_decay.exp()
    same_token = (q * k).sum(-1)[..., None, None]
    block = Block(
        reads=(_tokens(erase * decay), _tokens(q * decay)),
        keys=(_tokens(k),),
        decay=_flushed(decay),
        scores=((torch.zeros_like(same_token),), (same_token,)),
        inverse=torch.ones_like(same_token),
    )
    (erase, q), (k,), decay, ((A,), (P,)), M = _merged(block, sign=-1)
    return Products(A, M, M @ erase, M @ write, P, q, k, decay)


def _delta_segment(q, k, erase, write, log_decay, S_BHKV):
    T = q.shape[1]
    _, _, W, U, P, q, k, decay = products(q, k, erase, write, log_decay)
    states, v_new = [], []
    for U_n, W_n, k_n, decay_n in zip(*(x.unbind(2) for x in (U, W, k, decay[..., None]))):
        states.append(S_BHKV)
        v_new.append(U_n - W_n @ S_BHKV)
        S_BHKV = decay_n * S_BHKV + k_n.mT @ v_new[-1]
    output = q @ torch.stack(states, 2) + P @ torch.stack(v_new, 2)
    return _unchunked(output, T), S_BHKV


def _dplr_segment(q, k, v, a, b, log_decay, S_BHKV):
    """As above with two written rows, b (carrying `held`, what a reads) and k (carrying v):

    (I - A_ab) held = A_ak v + (a decay) S,    S <- Diag(decay) S + b^T held + k^T v
    """
    T = q.shape[1]
    q, k, v, a, b, log_decay = (_chunks(x) for x in (q, k, v, a, b, log_decay))
    decay = log_decay.exp()
    ones = torch.ones_like(decay[..., :1, None])
    block = Block(
        reads=(_tokens(a), _tokens(q * decay)),  # a reads the memory before its own token's decay
        keys=(_tokens(b), _tokens(k)),
        decay=_flushed(decay),
        scores=((0 * ones, 0 * ones), ((q * b).sum(-1)[..., None, None], (q * k).sum(-1)[..., None, None])),
        inverse=ones,
    )
    (a, q), (b, k), decay, ((_, A_ak), (P_b, P_k)), M = _merged(block, sign=1)
    U, W = M @ (A_ak @ v), M @ a

    states, held = [], []
    for U_n, W_n, b_n, k_n, v_n, decay_n in zip(*(x.unbind(2) for x in (U, W, b, k, v, decay[..., None]))):
        states.append(S_BHKV)
        held.append(U_n + W_n @ S_BHKV)
        S_BHKV = decay_n * S_BHKV + b_n.mT @ held[-1] + k_n.mT @ v_n
    output = q @ torch.stack(states, 2) + P_b @ torch.stack(held, 2) + P_k @ v
    return _unchunked(output, T), S_BHKV


def _merged(block: Block, sign: int) -> Block:
    """Join neighbours until one block is the whole chunk; then drop the block dimension."""
    while block.decay.shape[-2] > 1:
        block = merge(block, sign)
    reads, keys, scores = (x.squeeze(-3) for x in block.reads), (x.squeeze(-3) for x in block.keys), block.scores
    scores = tuple(tuple(x.squeeze(-3) for x in row) for row in scores)
    return Block(tuple(reads), tuple(keys), block.decay.squeeze(-2), scores, block.inverse.squeeze(-3))


def merge(block: Block, sign: int) -> Block:
    """Two blocks of h tokens become one of 2 h. reads[0] is the row whose scores against keys[0] make A.

    The inverse of [[I + A1, 0], [cross, I + A2]] is [[M1, 0], [-M2 cross M1, M2]]; sign is that of `cross` in it.
    """
    early_decay, late_decay = _halves(block.decay, -2)
    early_reads, late_reads = zip(*(_halves(x, -3) for x in block.reads))
    early_keys, late_keys = zip(*(_halves(x, -3) for x in block.keys))
    crosses = [[_cross(read, key) for key in early_keys] for read in late_reads]
    early_M, late_M = _halves(block.inverse, -3)
    ones = torch.ones_like(early_decay)
    since_border, until_border = torch.stack((ones, early_decay), -2), torch.stack((late_decay, ones), -2)
    return Block(
        reads=tuple(_decayed(x, since_border) for x in block.reads),
        keys=tuple(_decayed(x, until_border) for x in block.keys),
        decay=_flushed(early_decay * late_decay),
        scores=tuple(
            tuple(_lower(*_halves(score, -3), cross) for score, cross in zip(*row))
            for row in zip(block.scores, crosses)
        ),
        inverse=_lower(early_M, late_M, sign * (late_M @ crosses[0][0] @ early_M)),
    )


def _decayed(rows: Tensor, decay: Tensor) -> Tensor:
    return (rows.unflatten(-3, (-1, 2)) * decay[..., None, :]).flatten(-3, -2)


def _cross(reads: Tensor, keys: Tensor) -> Tensor:
    if reads.shape[-2] == 1:  # a product of single rows is a sum; as a matrix product it costs ten times more
        return (reads * keys).sum(-1, keepdim=True)
    return reads @ keys.mT


def _lower(early: Tensor, late: Tensor, cross: Tensor) -> Tensor:
    h = early.shape[-1]
    whole = early.new_zeros(*early.shape[:-2], 2, h, 2, h)
    whole[..., 0, :, 0, :], whole[..., 1, :, 1, :], whole[..., 1, :, 0, :] = early, late, cross
    return whole.flatten(-4, -3).flatten(-2, -1)


def _halves(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    early, late = x.unflatten(dim, (-1, 2)).unbind(dim)
    return early, late


def _tokens(x: Tensor) -> Tensor:
    return x[..., None, :]  # each token a block of one


def _chunks(x_BTHX: Tensor) -> Tensor:
    """[B, H, N, C, X]. A padding token has no decay, erases nothing and writes nothing: the memory does not see it."""
    T = x_BTHX.shape[1]
    chunk = CHUNK if T >= CHUNK else 1 << max(T - 1, 0).bit_length()
    if T % chunk or T == 0:
        x_BTHX = torch.nn.functional.pad(x_BTHX, (0, 0, 0, 0, 0, -T % chunk or T == 0))
    return x_BTHX.transpose(1, 2).unflatten(2, (-1, chunk))


def _unchunked(x_BHNCX: Tensor, T: int) -> Tensor:
    return x_BHNCX.flatten(2, 3).transpose(1, 2)[:, :T]


def _flushed(decay: Tensor) -> Tensor:
    """Flush denormals, as the hardware does when told to: they carry no accuracy and run 3 to 5 times slower."""
    return torch.nn.functional.threshold(decay, torch.finfo(decay.dtype).tiny, 0.0)


def by_segments(run, sequences: tuple[Tensor, ...], state: Tensor) -> tuple[Tensor, Tensor]:
    """Fold `run(*piece, state) -> (output, state)` over pieces of SEGMENT numbers; backward recomputes each piece."""
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (*sequences, state))
    T = sequences[0].shape[1]
    numbers = max(1, *(x.shape[0] * x.shape[2] * x.shape[3] for x in sequences))  # a token
    segment = max(1, SEGMENT // (numbers * CHUNK)) * CHUNK
    outputs = []
    for piece in zip(*(x.split(segment, dim=1) for x in sequences)):
        if needs_grad and segment < T:
            output, state = checkpoint(run, *piece, state, use_reentrant=False, preserve_rng_state=False)
        else:
            output, state = run(*piece, state)
        outputs.append(output)
    return torch.cat(outputs, 1), state

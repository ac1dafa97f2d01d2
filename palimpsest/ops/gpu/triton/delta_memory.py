"""The delta memory on a GPU: which kernels run in which order, on which workspaces.

forward    intra_chunk -> inter_chunk_fwd
backward   intra_chunk (again, nothing of it is kept) -> inter_chunk_fwd (memories only) -> inter_chunk_bwd -> scores -> gradient

intra_chunk and gradient exist twice: `by_blocks` chooses.

Letters  B sequences, T tokens, H key heads, HV value heads, K key channels, V value channels, N packed sequences.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from palimpsest.ops.gpu.triton.borders import borders_of
from palimpsest.ops.gpu.triton.configs import CHUNK, WIDE_CHUNK, config, padded
from palimpsest.ops.gpu.triton.gradient import gradient_kernel
from palimpsest.ops.gpu.triton.gradient_by_levels import gradient_by_levels_kernel
from palimpsest.ops.gpu.triton.inter_chunk_bwd import inter_chunk_bwd_kernel
from palimpsest.ops.gpu.triton.inter_chunk_fwd import inter_chunk_fwd_kernel
from palimpsest.ops.gpu.triton.intra_chunk import intra_chunk_kernel
from palimpsest.ops.gpu.triton.intra_chunk_by_levels import intra_chunk_by_levels_kernel
from palimpsest.ops.gpu.triton.one_sided import BLOCK
from palimpsest.ops.gpu.triton.scores import scores_kernel
from palimpsest.ops.gpu.workspace import MemoryArguments, runs_of


class Plan(NamedTuple):
    """What all launches of one call share."""

    T: int
    H: int
    HV: int
    K: int
    V: int
    sequences: int
    chunks: int  # an upper bound when packed: the true number is on the device
    C: int
    block_k: int
    wide: bool
    dtype: torch.dtype
    precision: str
    m_precision: str  # of the products of M, whose errors grow where keys repeat
    by_blocks: bool  # which kernels run inside a chunk: see `by_blocks`
    cu_seqlens: Tensor | None
    chunk_offsets: Tensor | None
    shared: dict  # constexpr arguments of every kernel

    def empty(self, *shape: int, dtype: torch.dtype | None = None, like: Tensor) -> Tensor:
        return torch.empty(self.chunks, self.HV, *shape, dtype=dtype or self.dtype, device=like.device)

    def block_v(self, settings: dict) -> int:
        """Takes the value columns of a tile out of a launch's settings: no more than there are."""
        return min(settings.pop("block_v"), padded(self.V, self.wide))


def by_blocks(x: MemoryArguments) -> bool:
    """Do intra_chunk.py and gradient.py serve the call, or the same by levels of the tree?

    In fp32 the levels are more accurate than the products of one_sided.py. Every form in which the faster kernels have not
    been judged on a GPU yet keeps the levels: calls from logits, erases that are vectors, packed sequences, key heads that
    share value heads, and heads of other than 128 channels.
    """
    judged = not x.gate and x.erase.ndim == 3 and not x.erase_before_decay and x.cu_seqlens is None
    return judged and x.q.dtype != torch.float32 and x.q.shape[2:] == x.v.shape[2:] and x.q.shape[3] == 128


def plan_of(x: MemoryArguments) -> Plan:
    q, v, cu_seqlens = x.q, x.v, x.cu_seqlens
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    wide = q.dtype == torch.float32 or K > 128
    C = WIDE_CHUNK if wide else CHUNK
    if cu_seqlens is None:
        sequences, chunks, offsets = B, B * triton.cdiv(T, C), None
    else:
        sequences = cu_seqlens.shape[0] - 1
        chunks = T // C + sequences
        cu_seqlens, offsets = borders_of(cu_seqlens, T, C, q.device)
    precision = "tf32x3" if q.dtype == torch.float32 else "tf32"
    m_precision = "tf32" if q.dtype == torch.bfloat16 else "tf32x3"
    inside = by_blocks(x)
    shared = dict(K=K, C=C, PACKED=cu_seqlens is not None, PRECISION=precision)
    block_k = padded(K, wide)
    return Plan(
        T, H, HV, K, V, sequences, chunks, C, block_k, wide, q.dtype, precision, m_precision, inside, cu_seqlens, offsets,
        shared,
    )  # fmt: skip


class Prepared(NamedTuple):
    """The workspaces that intra_chunk.py writes, in its letters."""

    E: Tensor  # [chunks, HV, C, K], as Q and W
    Q: Tensor
    W: Tensor
    P: Tensor  # [chunks, HV, C, C]
    D: Tensor  # [chunks, HV, K]
    M: Tensor | None  # [chunks, HV, C, C], for the backward
    norms: Tensor | None  # [chunks, HV, 2, C]: reciprocals of those of q and k, for the backward with a gate


def intra_chunk(plan: Plan, x: MemoryArguments, save: bool) -> Prepared:
    E, Q, W = (plan.empty(plan.C, plan.K, like=x.q) for _ in range(3))
    P = plan.empty(plan.C, plan.C, like=x.q)
    D = plan.empty(plan.K, dtype=torch.float32, like=x.q)
    M = plan.empty(plan.C, plan.C, like=x.q) if save else None
    norms = plan.empty(2, plan.C, dtype=torch.float32, like=x.q) if save and x.gate else None
    settings = config("intra_chunk" if plan.by_blocks else "intra_chunk_by_levels", plan.wide)
    inputs = x.q, x.k, x.erase, x.log_decay, x.A_log, x.dt_bias
    sizes = plan.cu_seqlens, plan.chunk_offsets, plan.T, plan.sequences, plan.H, plan.HV, x.scale, x.floor
    shared = dict(
        LEVELS=plan.C.bit_length() - 1, FROM_BETA=x.erase.ndim == 3, GATE=x.gate, ERASE_BEFORE_DECAY=x.erase_before_decay,
        SAVE=save, **plan.shared,
    )  # fmt: skip
    if plan.chunks and plan.by_blocks:
        block_k = min(settings.pop("block_k"), plan.block_k)
        intra_chunk_kernel[(plan.chunks * plan.HV,)](
            *inputs, E, Q, W, P, D, M, norms, *sizes,
            BLOCK_K=block_k, M_PRECISION=plan.m_precision, **shared, **settings,
        )  # fmt: skip
    elif plan.chunks:
        intra_chunk_by_levels_kernel[(plan.chunks * plan.HV,)](
            *inputs, E, Q, W, P, D, M, norms, *sizes, BLOCK_K=plan.block_k, **shared, **settings
        )
    return Prepared(E, Q, W, P, D, M, norms)


def inter_chunk_fwd(plan: Plan, x: MemoryArguments, prepared: Prepared, save: bool, out: Tensor | None = None):
    """The output, in `out` if given, and last state; or with save, the memory before each chunk [chunks, HV, V, K]."""
    E, Q, W, P, D, _, _ = prepared
    state_out = memories = None
    if save:
        memories = plan.empty(plan.V, plan.K, like=x.v)
    else:
        out, state_out = torch.empty_like(x.v) if out is None else out, torch.empty_like(x.state)
    settings = config("inter_chunk_fwd", plan.wide)
    block_v, stages = plan.block_v(settings), settings.pop("stages")
    if plan.sequences:
        inter_chunk_fwd_kernel[(plan.sequences * plan.HV, triton.cdiv(plan.V, block_v))](
            E, Q, W, P, D, x.v, x.erase, x.state, out, state_out, memories,
            plan.cu_seqlens, plan.chunk_offsets, plan.T, plan.HV,
            V=plan.V, BLOCK_K=plan.block_k, BLOCK_V=block_v, FROM_BETA=x.erase.ndim == 3, GATE=x.gate > 0, SAVE=save,
            STAGES=stages, **plan.shared, **settings,
        )  # fmt: skip
    return memories if save else (out, state_out)


def _readable(x: MemoryArguments) -> MemoryArguments:
    """Contiguous; a state that is not there as zeros."""
    state = x.new_state().zero_() if x.state is None else x.state.contiguous()
    q, k, v, log_decay, erase = (t.contiguous() for t in (x.q, x.k, x.v, x.log_decay, x.erase))
    return x._replace(q=q, k=k, v=v, log_decay=log_decay, erase=erase, state=state)


def forward(x: MemoryArguments) -> tuple[Tensor, Tensor]:
    """The output, and the last state."""
    x = _readable(x)
    plan = plan_of(x)
    prepared = intra_chunk(plan, x, save=False)
    return inter_chunk_fwd(plan, x, prepared, save=False)


def opened(x: MemoryArguments, rows: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See affine.Opened: of one preparation two passes, the second without values and from the identity.

    Args:
        rows: of the states, those that are open. Where sequences are packed, neighbours go in one launch.
    """
    x = _readable(x)
    plan = plan_of(x)
    prepared = intra_chunk(plan, x, save=False)
    out, state_out = inter_chunk_fwd(plan, x, prepared, save=False)
    values = x.q.new_zeros(*x.v.shape[:3], plan.K)
    reads, transitions = torch.empty_like(values), []
    for first, count, _ in runs_of(rows):
        part = plan._replace(sequences=count, V=plan.K)
        if plan.cu_seqlens is not None and plan.chunk_offsets is not None:
            # Copies lie on a 16-byte border, so that no row asks the compiler for another kernel.
            borders, offsets = (t[first : first + count + 1].clone() for t in (plan.cu_seqlens, plan.chunk_offsets))
            part = part._replace(cu_seqlens=borders, chunk_offsets=offsets)
        eye = torch.eye(plan.K, device=x.q.device).expand(count, plan.HV, plan.K, plan.K).contiguous()
        identity = x._replace(v=values, state=eye)
        transitions.append(inter_chunk_fwd(part, identity, prepared, save=False, out=reads)[1])
    return out, state_out, reads, torch.cat(transitions)


def backward(d_out: Tensor, d_state: Tensor | None, x: MemoryArguments) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, log_decay, erase, state, A_log, dt_bias; the last two empty without a gate."""
    x = _readable(x)
    d_out = d_out.to(x.v.dtype).contiguous()
    d_state = x.new_state().zero_() if d_state is None else d_state.contiguous()
    q, k, v, g, erase, A_log, dt_bias, gate = x.q, x.k, x.v, x.log_decay, x.erase, x.A_log, x.dt_bias, x.gate
    plan = plan_of(x)
    prepared = intra_chunk(plan, x, save=True)
    E, Q, W, P, D, M, norms = prepared
    memories = inter_chunk_fwd(plan, x, prepared, save=True)

    d_write, d_memories, d_state_in = torch.empty_like(v), torch.empty_like(memories), torch.empty_like(x.state)
    settings = config("inter_chunk_bwd", plan.wide)
    block_v, stages = plan.block_v(settings), settings.pop("stages")
    if plan.sequences:
        inter_chunk_bwd_kernel[(plan.sequences * plan.HV, triton.cdiv(plan.V, block_v))](
            E, Q, W, P, D, d_out, d_state, d_write, d_memories, d_state_in,
            plan.cu_seqlens, plan.chunk_offsets, plan.T, plan.HV,
            V=plan.V, BLOCK_K=plan.block_k, BLOCK_V=block_v, STAGES=stages, **plan.shared, **settings,
        )  # fmt: skip
    del prepared, Q, W, P

    from_beta = erase.ndim == 3
    v_new, dP, dA = plan.empty(plan.C, plan.V, like=q), torch.empty_like(M), torch.empty_like(M)
    settings = config("scores" if plan.by_blocks else "scores_by_levels", plan.wide)
    block_v = plan.block_v(settings)
    if plan.chunks:
        scores_kernel[(plan.chunks * plan.HV,)](
            E, M, v, erase, d_out, d_write, memories, v_new, dP, dA,
            plan.cu_seqlens, plan.chunk_offsets, plan.T, plan.sequences, plan.HV,
            V=plan.V, BLOCK_K=plan.block_k, BLOCK_V=block_v, FROM_BETA=from_beta, GATE=gate > 0, **plan.shared, **settings,
        )  # fmt: skip
    del E, M

    per_value_head = (*v.shape[:3], plan.K)
    dq, dk = (torch.empty(per_value_head, dtype=x.dtype, device=x.device) for x in (q, k))
    dg, d_erase, dv = torch.empty_like(g), torch.empty_like(erase), torch.empty_like(v) if from_beta else d_write
    dA_log = torch.zeros(plan.chunks, plan.HV, dtype=torch.float32, device=q.device) if gate else None
    d_bias = torch.zeros(plan.chunks, plan.HV, plan.K, dtype=torch.float32, device=q.device) if gate else None
    settings = config("gradient" if plan.by_blocks else "gradient_by_levels", plan.wide)
    block_v = plan.block_v(settings)
    shared = dict(
        V=plan.V, BLOCK_V=block_v, FROM_BETA=from_beta, GATE=gate, ERASE_BEFORE_DECAY=x.erase_before_decay,
        **plan.shared,
    )  # fmt: skip
    if plan.chunks and plan.by_blocks:
        dg_sums = dg if dg.dtype == torch.float32 else torch.empty_like(dg, dtype=torch.float32)
        border_sums = plan.empty(plan.C // BLOCK.value, plan.K, dtype=torch.float32, like=q)
        gradient_kernel[(plan.chunks * plan.HV,)](
            q, k, erase, g, A_log, dt_bias, v, norms, D, d_out, d_write, memories, d_memories, v_new, dP, dA,
            dq, dk, d_erase, dg_sums, border_sums, dg, dv, dA_log, d_bias,
            plan.cu_seqlens, plan.chunk_offsets, plan.T, plan.sequences, plan.H, plan.HV, x.scale, x.floor,
            BLOCK_K=plan.block_k, **shared, **settings,
        )  # fmt: skip
    elif plan.chunks:
        gradient_by_levels_kernel[(plan.chunks * plan.HV,)](
            q, k, erase, g, A_log, dt_bias, v, norms, d_out, d_write, memories, d_memories, v_new, dP, dA,
            dq, dk, d_erase, dg, dv, dA_log, d_bias,
            plan.cu_seqlens, plan.chunk_offsets, plan.T, plan.sequences, plan.H, plan.HV, x.scale, x.floor,
            BLOCK_K=min(settings.pop("block_k"), plan.block_k), LEVELS=plan.C.bit_length() - 1, **shared, **settings,
        )  # fmt: skip
    if plan.HV > plan.H:
        dq, dk = (x.unflatten(2, (plan.H, -1)).sum(3) for x in (dq, dk))
    none = q.new_empty(0)
    if gate:
        dA_log, d_bias = dA_log.sum(0).to(A_log.dtype), d_bias.sum(0).to(dt_bias.dtype)
    return dq, dk, dv, dg, d_erase, d_state_in, dA_log if gate else none, d_bias if gate else none

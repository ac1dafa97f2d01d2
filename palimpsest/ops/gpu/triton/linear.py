"""Linear attention on a GPU: nothing fades and nothing is erased, so a chunk knows what it adds without the memory.

sums      what each chunk of 256 tokens adds: the sum of c_j b_j^T over its tokens
running   the memory before each chunk (going back: after it), a running sum over chunks
reads     out_i = scale (S a_i + the sum over the chunk's j <= i of c_j (b_j . a_i)); going back, over j >= i

The output is a read of (q, k, v). Its gradients are reads, too: dq of (d_out, v, k) with S transposed; with R the running
sum of d_out_i q_i^T from the end, dk of (v, d_out, q) with R transposed, and dv of (k, q, d_out) with R.

S and R are kept in bf16 for bf16, otherwise in fp32: sums over a long sequence leave the range of fp16.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from palimpsest.ops.gpu.triton.borders import borders_of
from palimpsest.ops.gpu.triton.configs import config, padded
from palimpsest.ops.gpu.triton.tiles import find_chunk, find_sequence
from palimpsest.ops.gpu.workspace import LinearArguments

CHUNK = 256  # tokens


@triton.jit(do_not_specialize=["T", "N"])
def sums_kernel(
    b, c, sums, cu_seqlens, chunk_offsets, T, N, HB, HC, HV,
    DB: tl.constexpr, DC: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    chunk, head = tl.program_id(0) // HV, tl.program_id(0) % HV
    n, start, count = find_chunk(chunk, cu_seqlens, chunk_offsets, T, N, CHUNK, PACKED)
    t, d, e = tl.arange(0, BLOCK), tl.arange(0, BLOCK_B), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_B, in_C = d < DB, e < DC
    b_at = ((start + t)[:, None] * HB + head // (HV // HB)) * DB + d[None, :]
    c_at = ((start + t)[:, None] * HC + head // (HV // HC)) * DC + e[None, :]
    sum_CB = tl.zeros((BLOCK_C, BLOCK_B), tl.float32)
    for i in tl.range(0, tl.cdiv(count, BLOCK), num_stages=STAGES):
        in_T = (i * BLOCK + t < count)[:, None]
        b_TB = tl.load(b + b_at + i * BLOCK * HB * DB, mask=in_T & in_B[None, :], other=0.0)
        c_TC = tl.load(c + c_at + i * BLOCK * HC * DC, mask=in_T & in_C[None, :], other=0.0)
        sum_CB = tl.dot(tl.trans(c_TC), b_TB, sum_CB, input_precision=PRECISION)
    at = tl.program_id(0).to(tl.int64) * DB * DC + e[:, None] * DB + d[None, :]
    tl.store(sums + at, sum_CB, mask=in_C[:, None] & in_B[None, :])


@triton.jit(do_not_specialize=["T"])
def running_kernel(
    sums, state, memories, state_out, cu_seqlens, chunk_offsets, T, HV, scale,
    DB: tl.constexpr, DC: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, PACKED: tl.constexpr,
    BACK: tl.constexpr,
):  # fmt: skip
    SIZE: tl.constexpr = DB * DC
    n, head = tl.program_id(0) // HV, tl.program_id(0) % HV
    start, tokens, first = find_sequence(n, cu_seqlens, chunk_offsets, T, CHUNK, PACKED)
    x = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    here = tl.program_id(0).to(tl.int64) * SIZE + x % DB * DC + x // DB  # states lie [b, c]
    chunks = tl.cdiv(tokens, CHUNK)
    step = tl.full((), HV * SIZE, tl.int64)
    at = (first.to(tl.int64) * HV + head) * SIZE + x
    if BACK:
        at += (chunks - 1) * step
        step = -step
    run = tl.load(state + here, mask=x < SIZE, other=0.0) / scale
    for chunk in range(0, chunks, 4):  # four loads on their way at a time
        x0 = tl.load(sums + at, mask=x < SIZE, other=0.0)
        x1 = tl.load(sums + at + step, mask=(x < SIZE) & (chunk + 1 < chunks), other=0.0)
        x2 = tl.load(sums + at + 2 * step, mask=(x < SIZE) & (chunk + 2 < chunks), other=0.0)
        x3 = tl.load(sums + at + 3 * step, mask=(x < SIZE) & (chunk + 3 < chunks), other=0.0)
        tl.store(memories + at, run.to(memories.dtype.element_ty), mask=x < SIZE)
        run += x0
        tl.store(memories + at + step, run.to(memories.dtype.element_ty), mask=(x < SIZE) & (chunk + 1 < chunks))
        run += x1
        tl.store(memories + at + 2 * step, run.to(memories.dtype.element_ty), mask=(x < SIZE) & (chunk + 2 < chunks))
        run += x2
        tl.store(memories + at + 3 * step, run.to(memories.dtype.element_ty), mask=(x < SIZE) & (chunk + 3 < chunks))
        run += x3
        at += 4 * step
    tl.store(state_out + here, run * scale, mask=x < SIZE)


@triton.jit(do_not_specialize=["T", "N"])
def reads_kernel(
    a, b, c, memories, out, cu_seqlens, chunk_offsets, T, N, HA, HB, HC, HV, scale,
    DA: tl.constexpr, DC: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_C: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr, BACK: tl.constexpr,
    TRANSPOSED_MEMORY: tl.constexpr,
):  # fmt: skip
    chunk, head = tl.program_id(0) // HV, tl.program_id(0) % HV
    n, start, count = find_chunk(chunk, cu_seqlens, chunk_offsets, T, N, CHUNK, PACKED)
    t, d, e = tl.arange(0, BLOCK), tl.arange(0, BLOCK_A), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_A, in_C = d < DA, e < DC
    memory = memories + tl.program_id(0).to(tl.int64) * DA * DC
    if TRANSPOSED_MEMORY:
        memory += e[:, None] + d[None, :] * DC
    else:
        memory += e[:, None] * DA + d[None, :]
    S_CA = tl.load(memory, mask=in_C[:, None] & in_A[None, :], other=0.0).to(tl.float32)
    a_at = ((start + t)[:, None] * HA + head // (HV // HA)) * DA + d[None, :]
    b_at = ((start + t)[:, None] * HB + head // (HV // HB)) * DA + d[None, :]
    c_at = ((start + t)[:, None] * HC + head // (HV // HC)) * DC + e[None, :]
    out_at = ((start + t)[None, :] * HV + head) * DC + e[:, None]
    blocks = tl.cdiv(count, BLOCK)
    for step in tl.range(0, blocks, num_stages=STAGES):  # the memory goes over the blocks of a chunk
        if BACK:
            i, meet = blocks - 1 - step, t[:, None] >= t[None, :]
        else:
            i, meet = step, t[:, None] <= t[None, :]
        in_T = i * BLOCK + t < count
        a_TA = tl.load(a + a_at + i * BLOCK * HA * DA, mask=in_T[:, None] & in_A[None, :], other=0.0)
        b_TA = tl.load(b + b_at + i * BLOCK * HB * DA, mask=in_T[:, None] & in_A[None, :], other=0.0)
        c_CT = tl.trans(tl.load(c + c_at + i * BLOCK * HC * DC, mask=in_T[:, None] & in_C[None, :], other=0.0))
        a_AT = tl.trans(a_TA)
        P_TT = tl.where(meet, tl.dot(b_TA, a_AT, input_precision=PRECISION), 0.0)  # [written, read]
        o_CT = tl.dot(S_CA.to(memories.dtype.element_ty), a_AT.to(memories.dtype.element_ty), input_precision=PRECISION)
        o_CT = tl.dot(c_CT, P_TT.to(c_CT.dtype), o_CT, input_precision=PRECISION)
        S_CA = tl.dot(c_CT, b_TA, S_CA, input_precision=PRECISION)
        at = out + out_at + i * BLOCK * HV * DC
        tl.store(at, (o_CT * scale).to(out.dtype.element_ty), mask=in_C[:, None] & in_T[None, :])


class Plan(NamedTuple):
    """What all launches of one call share."""

    T: int
    HV: int
    sequences: int
    chunks: int  # an upper bound when packed: the true number is on the device
    cu_seqlens: Tensor | None
    chunk_offsets: Tensor | None
    precision: str
    dtype: torch.dtype  # of memories

    @property
    def constants(self) -> dict:
        return dict(CHUNK=CHUNK, PACKED=self.cu_seqlens is not None)


def plan_of(v: Tensor, cu_seqlens: Tensor | None) -> Plan:
    B, T, HV, _ = v.shape
    precision = "tf32x3" if v.dtype == torch.float32 else "tf32"
    dtype = torch.bfloat16 if v.dtype == torch.bfloat16 else torch.float32
    if cu_seqlens is None:
        return Plan(T, HV, B, B * triton.cdiv(T, CHUNK), None, None, precision, dtype)
    N = cu_seqlens.shape[0] - 1
    cu_seqlens, offsets = borders_of(cu_seqlens, T, CHUNK, v.device)
    return Plan(T, HV, N, T // CHUNK + N, cu_seqlens, offsets, precision, dtype)


def _is_wide(a: Tensor, c: Tensor) -> bool:
    return a.dtype == torch.float32 or max(a.shape[3], c.shape[3]) > 128


def _tiling(kernel: str, wide: bool, channels: int) -> dict:
    settings = config(kernel, wide)
    blocks = dict(BLOCK_C=min(settings.pop("block_c"), padded(channels, wide)), BLOCK=settings.pop("block"))
    return dict(**blocks, STAGES=settings.pop("stages"), **settings)


def memories_of(plan: Plan, b: Tensor, c: Tensor, state: Tensor, scale: float, back: bool) -> tuple[Tensor, Tensor]:
    """The running sum of c_j b_j^T before each chunk, or after it, and scale times that of all; from state / scale."""
    DB, DC = b.shape[3], c.shape[3]
    wide = _is_wide(b, c)
    sums = torch.empty(plan.chunks, plan.HV, DC, DB, dtype=torch.float32, device=b.device)
    memories, last = torch.empty_like(sums, dtype=plan.dtype), torch.empty_like(state)
    shared = plan.cu_seqlens, plan.chunk_offsets, plan.T
    if plan.chunks:
        tiling = _tiling("sums", wide, DC)
        sums_kernel[(plan.chunks * plan.HV, triton.cdiv(DC, tiling["BLOCK_C"]))](
            b, c, sums, *shared, plan.sequences, b.shape[2], c.shape[2], plan.HV, DB=DB, DC=DC, BLOCK_B=padded(DB, wide),
            PRECISION=plan.precision, **tiling, **plan.constants,
        )  # fmt: skip
    if plan.sequences:
        settings = config("running", wide)
        width = settings.pop("width")
        running_kernel[(plan.sequences * plan.HV, triton.cdiv(DB * DC, width))](
            sums, state, memories, last, *shared, plan.HV, scale, DB=DB, DC=DC, WIDTH=width, BACK=back, **settings,
            **plan.constants,
        )  # fmt: skip
    return memories, last


def reads(plan: Plan, a: Tensor, b: Tensor, c: Tensor, memories: Tensor, scale: float, back: bool, transposed: bool):
    """[tokens, HV, channels of c]; see the top of this file."""
    DA, DC = a.shape[3], c.shape[3]
    out = torch.empty(*a.shape[:2], plan.HV, DC, dtype=c.dtype, device=a.device)
    if plan.chunks:
        wide = _is_wide(a, c)
        tiling = _tiling("reads", wide, DC)
        reads_kernel[(plan.chunks * plan.HV, triton.cdiv(DC, tiling["BLOCK_C"]))](
            a, b, c, memories, out, plan.cu_seqlens, plan.chunk_offsets, plan.T, plan.sequences, a.shape[2], b.shape[2],
            c.shape[2], plan.HV, scale, DA=DA, DC=DC, BLOCK_A=padded(DA, wide), PRECISION=plan.precision, BACK=back,
            TRANSPOSED_MEMORY=transposed, **tiling, **plan.constants,
        )  # fmt: skip
    return out


def forward(x: LinearArguments) -> tuple[Tensor, Tensor]:
    """Output [B, T, HV, V] in v's dtype, and the last state."""
    q, k, v = (t.contiguous() for t in (x.q, x.k, x.v))
    state = x.new_state().zero_() if x.state is None else x.state.contiguous()
    plan = plan_of(v, x.cu_seqlens)
    memories, last = memories_of(plan, k, v, state, 1.0, back=False)
    return reads(plan, q, k, v, memories, x.scale, back=False, transposed=False), last


def backward(d_out: Tensor, d_state: Tensor | None, x: LinearArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and state."""
    scale = x.scale
    if scale == 0:  # nothing was read
        d_out, scale = torch.zeros_like(d_out), 1.0
    d_out, q, k, v = (t.contiguous() for t in (d_out.to(x.v.dtype), x.q, x.k, x.v))
    d_state, state = (x.new_state().zero_() if t is None else t.contiguous() for t in (d_state, x.state))
    plan = plan_of(v, x.cu_seqlens)
    memories, _ = memories_of(plan, k, v, state, 1.0, back=False)
    dq = reads(plan, d_out, v, k, memories, scale, back=False, transposed=True)
    ends, d_first = memories_of(plan, q, d_out, d_state, scale, back=True)
    dk = reads(plan, v, d_out, q, ends, scale, back=True, transposed=True)
    dv = reads(plan, k, q, d_out, ends, scale, back=True, transposed=False)
    if q.shape[2] < plan.HV:
        dq, dk = (t.unflatten(2, (q.shape[2], -1)).sum(3) for t in (dq, dk))
    return dq, dk, dv, d_first

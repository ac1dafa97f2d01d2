"""The delta memory on Hopper: which kernels run in which order, on which workspaces.

forward    intra -> chain_forward
backward   intra (again, nothing of it is kept) -> chain_both -> gradient

Letters  B sequences, T tokens, H key heads, HV value heads, K key channels, V value channels, N packed sequences.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from palimpsest.ops.cuda.launch import Kernel, kernel

C = 64  # tokens in a chunk
_INTRA, _CHAIN, _GRADIENT = "11P4i2f3i", "8P3i", "23P4i2f3i"
_SHARED = {  # bytes, by key channels; of chain also by groups, of gradient by value channels
    "intra": {64: 39296, 128: 56064},
    "chain": {(1, 64): 130048, (1, 128): 203776, (2, 64): 154624, (2, 128): 228352},
    "gradient": {64: 90416, 128: 114992},
}
TILE = {64: 33280, 128: 58112}  # bytes of what intra.cu leaves of a chunk: struct Tile of warp.cuh
MULTIPROCESSORS = 132
_SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16"}


class Plan(NamedTuple):
    """What all launches of one call share."""

    q: Tensor
    T: int
    H: int
    HV: int
    K: int
    V: int
    sequences: int
    chunks: int  # an upper bound when packed: the true number is on the device
    cu_seqlens: int
    chunk_offsets: int
    erase: int  # 0 strength, 1 vector, 2 vector that reads before its own decay
    keep: tuple  # tensors whose addresses are above


@cache
def _intra(dtype: torch.dtype, K: int, erase: int, gated: bool, device: int) -> Kernel:
    name = "intra_gated" if gated else "intra"
    return kernel(f"intra_{erase}_{_SHORT[dtype]}_{K}", name, _INTRA, 128, _SHARED["intra"][K], device)


@cache
def _chain(dtype: torch.dtype, K: int, walks: int, groups: int, device: int) -> Kernel:
    name, fields = f"chain_{'forward' if walks == 1 else 'both'}_{groups}", "4x".join([_CHAIN] * walks)
    return kernel(
        f"chain_{_SHORT[dtype]}_{K}", name, fields, (160, 384)[groups - 1], _SHARED["chain"][groups, K], device
    )


@cache
def _gradient(dtype: torch.dtype, K: int, V: int, erase: int, gated: bool, device: int) -> Kernel:
    name = f"gradient_{V}_gated" if gated else f"gradient_{V}"
    return kernel(f"gradient_{erase}_{_SHORT[dtype]}_{K}", name, _GRADIENT, 256, _SHARED["gradient"][V], device)


def plan_of(q: Tensor, v: Tensor, erase: Tensor, cu_seqlens: Tensor | None, exclusive: bool) -> Plan:
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    kind = 0 if erase.ndim == 3 else 2 if exclusive else 1
    if cu_seqlens is None:
        return Plan(q, T, H, HV, K, V, B, B * (-(-T // C)), 0, 0, kind, ())
    from palimpsest.ops.triton.packing import borders_of

    N = cu_seqlens.shape[0] - 1
    borders, offsets = borders_of(cu_seqlens, T, C, q.device)
    return Plan(q, T, H, HV, K, V, N, T // C + N, borders.data_ptr(), offsets.data_ptr(), kind, (borders, offsets))


class Tiles(NamedTuple):
    """The workspaces of intra.cu, in one allocation; addresses."""

    memory: Tensor
    tiles: int
    M: int
    norms: int


def intra(plan: Plan, k, g, erase, A_log, dt_bias, scale, floor, gate, save) -> Tiles:
    tiles = plan.chunks * plan.HV
    sizes = [TILE[plan.K], 2 * C * C * save, 8 * C * (save and gate > 0)]
    memory = torch.empty(tiles * sum(sizes), dtype=torch.uint8, device=k.device)
    at, addresses = memory.data_ptr(), []
    for size in sizes:
        addresses.append(at if size else 0)
        at += tiles * size
    result = Tiles(memory, *addresses)
    if tiles:
        _intra(plan.q.dtype, plan.K, plan.erase, gate > 0, plan.q.get_device()).launch(
            (tiles, 1),
            plan.q.data_ptr(), k.data_ptr(), erase.data_ptr(), g.data_ptr(), _at(A_log), _at(dt_bias),
            *result[1:], plan.cu_seqlens, plan.chunk_offsets, plan.T, plan.sequences, plan.H, plan.HV, scale, floor,
            gate, g.dtype == torch.float32, erase.dtype == torch.float32,
        )  # fmt: skip
    return result


def chain(plan: Plan, tiles: Tiles, *walks: tuple) -> None:
    """One walk forth, or the two of a backward side by side, each `rows, state, out, state_out, memories`.

    Two groups of warps share a head's tiles once one for each would be more than there are multiprocessors.
    """
    if not plan.sequences:
        return
    heads, parts = plan.sequences * plan.HV, plan.V // 64
    groups = 2 if parts == 2 and heads * parts * len(walks) > MULTIPROCESSORS else 1
    shared = plan.cu_seqlens, plan.chunk_offsets, plan.T, plan.HV, plan.V
    arguments = [x for walk in walks for x in (tiles.tiles, *map(_at, walk), *shared)]
    launch = _chain(plan.q.dtype, plan.K, len(walks), groups, plan.q.get_device()).launch
    launch((heads, parts // groups * len(walks)), *arguments)


def forward(q, k, v, log_decay, erase, state, scale, cu_seqlens, A_log, dt_bias, gate, floor, exclusive):
    """See ops/triton/register.py for the arguments."""
    q, k, v, g, erase, state, A_log, dt_bias = _readable(q, k, v, log_decay, erase, state, A_log, dt_bias)
    plan = plan_of(q, v, erase, cu_seqlens, exclusive)
    tiles = intra(plan, k, g, erase, A_log, dt_bias, scale, floor, gate, save=False)
    out, state_out = torch.empty_like(v), torch.empty_like(state)
    chain(plan, tiles, (v, state, out, state_out, None))
    return out, state_out


def backward(
    d_out, d_state, q, k, v, log_decay, erase, state, scale, cu_seqlens, A_log, dt_bias, gate, floor, exclusive
):
    """Gradients of q, k, v, log_decay, erase, state, A_log, dt_bias; the last two empty without a gate."""
    like = (log_decay, erase, A_log, dt_bias)
    q, k, v, g, erase, state, A_log, dt_bias = _readable(q, k, v, log_decay, erase, state, A_log, dt_bias)
    d_out, d_state = _aligned(d_out.to(v.dtype)), _aligned(d_state)
    plan = plan_of(q, v, erase, cu_seqlens, exclusive)
    tiles = intra(plan, k, g, erase, A_log, dt_bias, scale, floor, gate, save=True)
    memories = torch.empty(plan.chunks, plan.HV, plan.V, plan.K, dtype=q.dtype, device=q.device)
    dv = torch.empty_like(v)  # holds R = write - E S until each tile of it is read
    d_write, d_memories, d_state_in = torch.empty_like(v), torch.empty_like(memories), torch.empty_like(state)
    chain(plan, tiles, (v, state, dv, None, memories), (d_out, d_state, d_write, d_state_in, d_memories))

    dq, dk = (x.new_empty(*v.shape[:3], plan.K) for x in (q, k))
    dg, d_erase = torch.empty_like(g), torch.empty_like(erase)
    dA_log = d_bias = q.new_empty(0)
    if gate:  # chunks that a packed batch does not have add nothing
        dA_log = torch.zeros(plan.chunks, plan.HV, dtype=torch.float32, device=q.device)
        d_bias = torch.zeros(plan.chunks, plan.HV, 4, plan.K, dtype=torch.float32, device=q.device)
    if plan.chunks:
        _gradient(q.dtype, plan.K, plan.V, plan.erase, gate > 0, q.get_device()).launch(
            (plan.chunks * plan.HV, 1),
            q.data_ptr(), k.data_ptr(), erase.data_ptr(), g.data_ptr(), _at(A_log), _at(dt_bias), v.data_ptr(), tiles.norms,
            tiles.M, dv.data_ptr(), d_out.data_ptr(), d_write.data_ptr(), memories.data_ptr(), d_memories.data_ptr(),
            dq.data_ptr(), dk.data_ptr(), dv.data_ptr(), dg.data_ptr(), d_erase.data_ptr(), _at(dA_log), _at(d_bias),
            plan.cu_seqlens, plan.chunk_offsets, plan.T, plan.sequences, plan.H, plan.HV, scale, floor,
            gate, g.dtype == torch.float32, erase.dtype == torch.float32,
        )  # fmt: skip
    if plan.HV > plan.H:
        dq, dk = (x.unflatten(2, (plan.H, -1)).sum(3) for x in (dq, dk))
    if gate:
        dA_log, d_bias = dA_log.sum(0).to(like[2].dtype), d_bias.sum((0, 2)).to(like[3].dtype)
    return (
        dq,
        dk,
        d_write if plan.erase else dv,
        dg.to(like[0].dtype),
        d_erase.to(like[1].dtype),
        d_state_in,
        dA_log,
        d_bias,
    )


def _readable(q, k, v, log_decay, erase, state, A_log, dt_bias):
    """Contiguous, and in a dtype that the kernels read: gates in fp32 or q's dtype, parameters in fp32."""
    either = (q.dtype, torch.float32)
    if log_decay.dtype not in either:
        log_decay = log_decay.float()
    if erase.ndim == 4:
        erase = erase.to(q.dtype)
    elif erase.dtype not in either:
        erase = erase.float()
    if A_log is not None:
        A_log, dt_bias = _aligned(A_log.float()), _aligned(dt_bias.float())
    return *map(_aligned, (q, k, v, log_decay, erase, state)), A_log, dt_bias


def _aligned(x: Tensor) -> Tensor:
    """Contiguous from a 16-byte border on, as the kernels load."""
    if x.is_contiguous() and x.data_ptr() % 16 == 0:
        return x
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _at(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()

"""The delta memory on Hopper: which kernels run in which order, on which workspaces.

forward    intra_chunk -> inter_chunk; with few heads both at once, in one launch
opened     intra_chunk -> inter_chunk twice, side by side: a part of a longer sequence, see affine.py
backward   intra_chunk (again, nothing of it is kept) -> inter_chunk -> gradient

Letters  B sequences, T tokens, H key heads, HV value heads, K key channels, V value channels, N packed sequences.
"""

import itertools
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from palimpsest.ops.gpu.hopper.launch import Kernel, kernel
from palimpsest.ops.gpu.workspace import MemoryArguments, runs_of

C = 64  # tokens in a chunk
# The argument structures of the kernels, in the notation of Python's struct.
_INTRA_CHUNK, _INTER_CHUNK, _GRADIENT = "11P4i2f3i4x", "8P4i", "23P4i2f3i"
_FORWARD = _INTRA_CHUNK + _INTER_CHUNK + "P2i"
THREADS = {"intra_chunk": 128, "inter_chunk": 384, "forward": 384, "gradient": 256}
_SHARED = {  # bytes, by key channels; of inter_chunk also by groups, of gradient by value channels
    "intra_chunk": {64: 56320, 128: 72704},
    "inter_chunk": {(1, 64): 130048, (1, 128): 203776, (2, 64): 154624, (2, 128): 228352},
    "forward": {64: 168960, 128: 218112},
    "gradient": {64: 90416, 128: 114992},
}
TILE = {64: 33280, 128: 58112}  # bytes of what is prepared of a chunk: struct Tile of warp.cuh
FEW = 4 / 11  # of the multiprocessors: so many consumers leave enough of them to prepare chunks meanwhile
MANY = 700  # tiles; with fewer, waiting for the first ones costs more than a second launch
CHUNKS_AT_ONCE = THREADS["forward"] // THREADS["intra_chunk"]  # chunks at a time on a multiprocessor that prepares
_SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def load(dtype: torch.dtype, K: int, V: int, device: int) -> None:
    """Everything that KDA may ask for at these, whatever the length: which kernels run depends on it."""
    for gated in (False, True):
        _intra_chunk(dtype, K, 0, gated, device), _forward(dtype, K, 0, gated, device)
        _gradient(dtype, K, V, 0, gated, device)
    for groups in range(1, V // 64 + 1):
        for passes in (1, 2):
            _inter_chunk(dtype, K, groups, passes, device)


class Plan(NamedTuple):
    """What all launches of one call share."""

    call: MemoryArguments
    T: int
    H: int
    HV: int
    K: int
    V: int
    sequences: int
    chunks: int  # an upper bound when packed: the true number is on the device
    cu_seqlens: int
    chunk_offsets: int
    erase: int  # ERASE of the kernels: 0 from beta, 1 a vector, 2 a vector that reads before its own decay
    keep: tuple  # tensors whose addresses are above


def _kernel(
    file: str, kind: str, dtype: torch.dtype, K: int, shared: int, fields: str, name: str, device: int
) -> Kernel:
    return kernel(f"{file}{kind}_{_SHORT[dtype]}_{K}", name, fields, THREADS[file], shared, device)


@cache
def _intra_chunk(dtype: torch.dtype, K: int, erase: int, gated: bool, device: int) -> Kernel:
    name = "intra_chunk_gated" if gated else "intra_chunk"
    return _kernel("intra_chunk", f"_{erase}", dtype, K, _SHARED["intra_chunk"][K], _INTRA_CHUNK, name, device)


@cache
def _forward(dtype: torch.dtype, K: int, erase: int, gated: bool, device: int) -> Kernel:
    name = "forward_gated" if gated else "forward"
    return _kernel("forward", f"_{erase}", dtype, K, _SHARED["forward"][K], _FORWARD, name, device)


@cache
def _inter_chunk(dtype: torch.dtype, K: int, groups: int, passes: int, device: int) -> Kernel:
    name = f"inter_chunk_{'both' if passes == 2 else 'forward'}_{groups}"
    return _kernel("inter_chunk", "", dtype, K, _SHARED["inter_chunk"][groups, K], passes * _INTER_CHUNK, name, device)


@cache
def _gradient(dtype: torch.dtype, K: int, V: int, erase: int, gated: bool, device: int) -> Kernel:
    name = f"gradient_{V}_gated" if gated else f"gradient_{V}"
    return _kernel("gradient", f"_{erase}", dtype, K, _SHARED["gradient"][V], _GRADIENT, name, device)


@cache
def multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def plan_of(x: MemoryArguments) -> Plan:
    B, T, H, K = x.q.shape
    HV, V = x.v.shape[2:]
    kind = 0 if x.erase.ndim == 3 else 2 if x.erase_before_decay else 1
    if x.cu_seqlens is None:
        return Plan(x, T, H, HV, K, V, B, B * (-(-T // C)), 0, 0, kind, ())
    from palimpsest.ops.gpu.triton.borders import borders_of

    N = x.cu_seqlens.shape[0] - 1
    borders, offsets = borders_of(x.cu_seqlens, T, C, x.q.device)
    return Plan(x, T, H, HV, K, V, N, T // C + N, borders.data_ptr(), offsets.data_ptr(), kind, (borders, offsets))


class Tiles(NamedTuple):
    """What is prepared of all chunks, in one allocation; addresses."""

    memory: Tensor
    tiles: int
    M: int
    norms: int


def tiles_of(plan: Plan, save: bool) -> Tiles:
    tiles = plan.chunks * plan.HV
    sizes = [TILE[plan.K], 2 * C * C * save, 8 * C * (save and plan.call.gate > 0)]
    memory = torch.empty(tiles * sum(sizes), dtype=torch.uint8, device=plan.call.q.device)
    at, addresses = memory.data_ptr(), []
    for size in sizes:
        addresses.append(at if size else 0)
        at += tiles * size
    return Tiles(memory, *addresses)


def intra_chunk_arguments(plan: Plan, tiles: Tiles) -> tuple:
    """struct IntraChunkArguments."""
    x = plan.call
    return (
        x.q.data_ptr(), x.k.data_ptr(), x.erase.data_ptr(), x.log_decay.data_ptr(), _at(x.A_log), _at(x.dt_bias),
        tiles.tiles, tiles.M, tiles.norms,
        plan.cu_seqlens, plan.chunk_offsets, plan.T, plan.sequences, plan.H, plan.HV, x.scale, x.floor, x.gate,
        x.log_decay.dtype == torch.float32, x.erase.dtype == torch.float32,
    )  # fmt: skip


def inter_chunk_arguments(plan: Plan, tiles: Tiles, rows, state, out, state_out, memories) -> tuple:
    """struct InterChunkArguments."""
    tensors = map(_at, (rows, state, out, state_out, memories))
    return tiles.tiles, *tensors, plan.cu_seqlens, plan.chunk_offsets, plan.T, plan.sequences, plan.HV, plan.V


def intra_chunk(plan: Plan, arguments: tuple) -> None:
    if plan.chunks:
        x = plan.call
        launch = _intra_chunk(x.q.dtype, plan.K, plan.erase, x.gate > 0, x.q.get_device()).launch
        launch((plan.chunks * plan.HV, 1), *arguments)


def inter_chunk(plan: Plan, *arguments: tuple, beside: int = 0) -> None:
    """One pass over the chunks, or two side by side; `beside` others run meanwhile.

    Two groups of warps share a head's tiles once one for each would be more than there are multiprocessors.
    """
    if plan.sequences:
        q = plan.call.q
        tasks, parts, device = plan.sequences * plan.HV, plan.V // 64, q.get_device()
        groups = 2 if parts == 2 and tasks * parts * (len(arguments) + beside) > multiprocessors(device) else 1
        launch = _inter_chunk(q.dtype, plan.K, groups, len(arguments), device).launch
        launch((tasks, parts // groups * len(arguments)), *itertools.chain(*arguments))


def forward(x: MemoryArguments) -> tuple[Tensor, Tensor]:
    """The output, and the last state."""
    x = _readable(x)
    plan = plan_of(x)
    out, state_out = torch.empty_like(x.v), x.new_state()
    tiles, device = tiles_of(plan, save=False), x.q.get_device()
    intra = intra_chunk_arguments(plan, tiles)
    inter = inter_chunk_arguments(plan, tiles, x.v, x.state, out, state_out, None)
    consumers, count = plan.sequences * plan.HV * plan.V // 64, plan.chunks * plan.HV
    if consumers <= FEW * multiprocessors(device) and count >= MANY:  # the bits are the same either way
        producers = min(multiprocessors(device) - consumers, -(-count // CHUNKS_AT_ONCE))
        ready = torch.zeros(count + 2, dtype=torch.int32, device=x.q.device)
        launch = _forward(x.q.dtype, plan.K, plan.erase, x.gate > 0, device).launch
        launch((producers + consumers, 1), *intra, *inter, ready.data_ptr(), count, producers)
    else:
        intra_chunk(plan, intra)
        inter_chunk(plan, inter)
    return out, state_out


@cache
def _side_stream(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def opened(x: MemoryArguments, rows: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See affine.Opened: of one preparation two passes side by side, the second without values and from the identity.

    Args:
        rows: of the states, those that are open. Where sequences are packed, neighbours go in one launch.
    """
    x = _readable(x)
    plan = plan_of(x)
    out, state_out = torch.empty_like(x.v), x.new_state()
    tiles, device = tiles_of(plan, save=False), x.q.get_device()
    intra_chunk(plan, intra_chunk_arguments(plan, tiles))
    # The identity and the absence of values are written where the transitions and the reads will be: each number is read
    # before it is overwritten, by the same block.
    reads = x.q.new_zeros(*x.v.shape[:3], plan.K)
    transitions = torch.zeros(len(rows), plan.HV, plan.K, plan.K, dtype=torch.float32, device=x.q.device)
    transitions.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    main, side = torch.cuda.current_stream(device), _side_stream(device)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        for first, count, at in runs_of(rows):
            D = transitions[at : at + count]
            part = plan._replace(sequences=count, V=plan.K)
            if plan.cu_seqlens:
                part = part._replace(
                    cu_seqlens=plan.cu_seqlens + 4 * first, chunk_offsets=plan.chunk_offsets + 4 * first
                )
            inter_chunk(part, inter_chunk_arguments(part, tiles, reads, D, reads, D, None), beside=1)
    inter_chunk(plan, inter_chunk_arguments(plan, tiles, x.v, x.state, out, state_out, None), beside=1)
    main.wait_stream(side)
    return out, state_out, reads, transitions


def backward(d_out: Tensor, d_state: Tensor | None, given: MemoryArguments) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, log_decay, erase, state, A_log, dt_bias; the last two empty without a gate."""
    x = _readable(given)
    d_out, d_state = _aligned(d_out.to(x.v.dtype)), None if d_state is None else _aligned(d_state)
    q, k, v, g, erase = x.q, x.k, x.v, x.log_decay, x.erase
    plan = plan_of(x)
    tiles, device = tiles_of(plan, save=True), q.get_device()
    memories = torch.empty(plan.chunks, plan.HV, plan.V, plan.K, dtype=q.dtype, device=q.device)
    dv = torch.empty_like(v)  # holds R = write - E S until each tile of it is read
    d_write, d_memories, d_state_in = torch.empty_like(v), torch.empty_like(memories), x.new_state()
    intra_chunk(plan, intra_chunk_arguments(plan, tiles))
    save = inter_chunk_arguments(plan, tiles, v, x.state, dv, None, memories)
    reverse = inter_chunk_arguments(plan, tiles, d_out, d_state, d_write, d_state_in, d_memories)
    inter_chunk(plan, save, reverse)

    dq, dk = (t.new_empty(*v.shape[:3], plan.K) for t in (q, k))
    dg, d_erase = torch.empty_like(g), torch.empty_like(erase)
    dA_log = d_bias = q.new_empty(0)
    if x.gate:  # chunks that a packed batch does not have add nothing
        dA_log = torch.zeros(plan.chunks, plan.HV, dtype=torch.float32, device=q.device)
        d_bias = torch.zeros(plan.chunks, plan.HV, 4, plan.K, dtype=torch.float32, device=q.device)
    if plan.chunks:
        _gradient(q.dtype, plan.K, plan.V, plan.erase, x.gate > 0, device).launch(
            (plan.chunks * plan.HV, 1),
            q.data_ptr(), k.data_ptr(), erase.data_ptr(), g.data_ptr(), _at(x.A_log), _at(x.dt_bias), v.data_ptr(),
            tiles.norms, tiles.M, dv.data_ptr(), d_out.data_ptr(), d_write.data_ptr(), memories.data_ptr(),
            d_memories.data_ptr(), dq.data_ptr(), dk.data_ptr(), dv.data_ptr(), dg.data_ptr(), d_erase.data_ptr(),
            _at(dA_log), _at(d_bias), plan.cu_seqlens, plan.chunk_offsets, plan.T, plan.sequences, plan.H, plan.HV,
            x.scale, x.floor, x.gate, g.dtype == torch.float32, erase.dtype == torch.float32,
        )  # fmt: skip
    if plan.HV > plan.H:
        dq, dk = (t.unflatten(2, (plan.H, -1)).sum(3) for t in (dq, dk))
    if x.gate:
        dA_log, d_bias = dA_log.sum(0).to(given.A_log.dtype), d_bias.sum((0, 2)).to(given.dt_bias.dtype)
    d_v, d_log_decay, d_erase = (
        d_write if plan.erase else dv,
        dg.to(given.log_decay.dtype),
        d_erase.to(given.erase.dtype),
    )
    return dq, dk, d_v, d_log_decay, d_erase, d_state_in, dA_log, d_bias


def _readable(x: MemoryArguments) -> MemoryArguments:
    """Aligned, and in a dtype that the kernels read: gates in fp32 or q's dtype, parameters in fp32."""
    either = (x.q.dtype, torch.float32)
    log_decay = x.log_decay if x.log_decay.dtype in either else x.log_decay.float()
    erase = x.erase.to(x.q.dtype) if x.erase.ndim == 4 else x.erase if x.erase.dtype in either else x.erase.float()
    q, k, v, log_decay, erase = map(_aligned, (x.q, x.k, x.v, log_decay, erase))
    A_log, dt_bias = (None if p is None else _aligned(p.float()) for p in (x.A_log, x.dt_bias))
    state = None if x.state is None else _aligned(x.state)
    return x._replace(q=q, k=k, v=v, log_decay=log_decay, erase=erase, state=state, A_log=A_log, dt_bias=dt_bias)


def _aligned(x: Tensor) -> Tensor:
    """Contiguous from a 16-byte border on, as the kernels load."""
    if x.is_contiguous() and x.data_ptr() % 16 == 0:
        return x
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _at(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()

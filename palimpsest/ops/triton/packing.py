"""Where each packed sequence's chunks begin, found on the device: the host never waits for cu_seqlens."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["N"])
def chunk_offsets_kernel(cu_seqlens, chunk_offsets, N, C: tl.constexpr, BLOCK: tl.constexpr):
    tl.store(chunk_offsets, 0)
    before = 0
    for first in range(0, N, BLOCK):
        n = first + tl.arange(0, BLOCK)
        tokens = tl.load(cu_seqlens + n + 1, mask=n < N, other=0) - tl.load(cu_seqlens + n, mask=n < N, other=0)
        chunks = ((tokens + C - 1) // C).to(tl.int32)
        tl.store(chunk_offsets + n + 1, before + tl.cumsum(chunks, 0), mask=n < N)
        before += tl.sum(chunks, 0)


def chunk_offsets_of(cu_seqlens: Tensor, C: int) -> Tensor:
    """[N + 1] int32: the chunks before each sequence, and in all."""
    offsets = torch.empty(cu_seqlens.shape, dtype=torch.int32, device=cu_seqlens.device)
    chunk_offsets_kernel[(1,)](cu_seqlens, offsets, cu_seqlens.shape[0] - 1, C=C, BLOCK=1024, num_warps=4)
    return offsets

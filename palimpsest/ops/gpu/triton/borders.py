"""Where each packed sequence's chunks begin, found on the device: the host never waits for cu_seqlens."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["N", "T"], do_not_specialize_on_alignment=["cu_seqlens"])
def borders_kernel(cu_seqlens, borders, chunk_offsets, good, N, T, C: tl.constexpr, BLOCK: tl.constexpr):
    wrong = (tl.load(cu_seqlens) != 0).to(tl.int32) + (tl.load(cu_seqlens + N) != T).to(tl.int32)
    for first in range(0, N, BLOCK):
        n = first + tl.arange(0, BLOCK)
        tokens = tl.load(cu_seqlens + n + 1, mask=n < N, other=0) - tl.load(cu_seqlens + n, mask=n < N, other=0)
        wrong += tl.sum((tokens < 0).to(tl.int32), 0)
    keep = (wrong == 0).to(tl.int32)  # borders that make no sense become none at all: no kernel reads beyond a tensor
    tl.store(good, keep)
    tl.store(borders, 0)
    tl.store(chunk_offsets, 0)
    before = 0
    for first in range(0, N, BLOCK):
        n = first + tl.arange(0, BLOCK)
        start = tl.load(cu_seqlens + n, mask=n < N, other=0).to(tl.int32) * keep
        stop = tl.load(cu_seqlens + n + 1, mask=n < N, other=0).to(tl.int32) * keep
        chunks = (stop - start + C - 1) // C
        tl.store(borders + n + 1, stop, mask=n < N)
        tl.store(chunk_offsets + n + 1, before + tl.cumsum(chunks, 0), mask=n < N)
        before += tl.sum(chunks, 0)


def borders_of(cu_seqlens: Tensor, tokens: int, C: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cu_seqlens and the chunks before each sequence, [N + 1] int32 each, on `device`.

    Raises RuntimeError if cu_seqlens does not rise from 0 to `tokens`; on a GPU when the host next waits for it.
    """
    cu_seqlens = cu_seqlens.to(device)
    N = cu_seqlens.shape[0] - 1
    width = -(-(N + 1) // 4) * 4  # each from a 16-byte border on, so that no N asks the compiler for another kernel
    buffer = torch.empty(2 * width + 1, dtype=torch.int32, device=device)
    borders, offsets, good = buffer[: N + 1], buffer[width : width + N + 1], buffer[2 * width :]
    borders_kernel[(1,)](cu_seqlens.contiguous(), borders, offsets, good, N, tokens, C=C, BLOCK=1024, num_warps=4)
    torch._assert_async(good.view(torch.bool)[:1], f"cu_seqlens must rise from 0 to the number of tokens, {tokens}")
    return borders, offsets

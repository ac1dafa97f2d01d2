"""What a call makes before its kernels run, whichever tier they are of."""

import torch
from torch import Tensor


def new_state(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """An uninitialised memory for each sequence: [N, HV, K, V], fp32."""
    N = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return v.new_empty(N, v.shape[2], q.shape[3], v.shape[3], dtype=torch.float32)


def state_or_zeros(state: Tensor | None, q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The state, or an empty memory for each sequence."""
    return new_state(q, v, cu_seqlens).zero_() if state is None else state

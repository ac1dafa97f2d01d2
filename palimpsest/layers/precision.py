"""Tensors that stay in float32 when their model goes to half precision."""

import torch
from torch import nn

from palimpsest.ops.arguments import state_dtype


class Float32Tensors(nn.Module):
    """A module some of whose own tensors, named in `float32_names`, are never stored in less than float32.

    `.to(torch.bfloat16)`, `.half()` and the like pass them by; `.double()` and moves between devices do not. A decay in
    bfloat16 is off by 0.7 % a token, and what is off a token compounds.
    """

    float32_names: tuple[str, ...] = ()

    def _apply(self, fn, recurse=True):
        own = {**self._parameters, **self._buffers}
        kept = [own[name] for name in self.float32_names if own.get(name) is not None]
        kept += [tensor.grad for tensor in kept if tensor.grad is not None]

        def apply(tensor):
            moved = fn(tensor)
            narrowed = moved.dtype in (torch.bfloat16, torch.float16) and any(tensor is other for other in kept)
            return tensor.to(moved.device, torch.float32) if narrowed else moved

        # Children first and with fn itself: the wrapper is for this module's tensors alone.
        for child in self.children() if recurse else ():
            child._apply(fn)
        return super()._apply(apply, recurse=False)


def float32(x: torch.Tensor) -> torch.Tensor:
    """x as memories are kept: in float32, or in float64 if it is."""
    return x.to(state_dtype(x.dtype))

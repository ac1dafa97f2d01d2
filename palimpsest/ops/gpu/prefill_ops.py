"""The kernels between the products of a prompt as torch custom ops, palimpsest_gpu::*. Each checks what it is handed before
a kernel sees it; the kernels are imported when one first runs."""

import torch
from torch import Tensor

from palimpsest.ops.gpu.neighbours import on_their_device

_LIB = torch.library.Library("palimpsest_gpu", "FRAGMENT")
_LIB.define("gated_norm(Tensor x, Tensor gate, Tensor weight, float eps, bool silu) -> Tensor")
_LIB.define("swiglu(Tensor gate, Tensor up, Tensor? weight) -> Tensor")
_LIB.define("expert_sum(Tensor rows, Tensor back) -> Tensor")


WIDTHS = (torch.float32, torch.bfloat16, torch.float16)


def expect(name: str, x: Tensor, like: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    """Raise ValueError unless x is of the shape, of one of the dtypes, and where `like` is."""
    if tuple(x.shape) != tuple(shape) or x.dtype not in dtypes or x.device != like.device:
        kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(
            f"{name} is {x.dtype} of shape {tuple(x.shape)} on {x.device}; expected {kinds} of shape {tuple(shape)} on "
            f"{like.device}"
        )


def _gated_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, silu: bool) -> Tensor:
    if x.ndim < 2 or not x.shape[-1]:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected heads of channels, [..., H, K]")
    expect("gate", gate, x, (*x.shape[:-2], x.shape[-2] * x.shape[-1]), WIDTHS)
    expect("x", x, gate, tuple(x.shape), WIDTHS)
    expect("weight", weight, x, x.shape[-1:], WIDTHS)
    _whole(x=x, gate=gate, weight=weight)
    from palimpsest.ops.gpu.triton import gated_norm

    return gated_norm.gated_norm(x, gate, weight, eps, silu)


def _swiglu(gate: Tensor, up: Tensor, weight: Tensor | None) -> Tensor:
    expect("up", up, gate, tuple(gate.shape), (gate.dtype,))
    expect("gate", gate, up, tuple(gate.shape), WIDTHS)
    _whole(gate=gate, up=up)
    if weight is not None:
        expect("weight", weight, gate, gate.shape[:-1], (torch.float32,))
        _whole(weight=weight)
    from palimpsest.ops.gpu.triton import swiglu

    return swiglu.swiglu(gate, up, weight)


def _expert_sum(rows: Tensor, back: Tensor) -> Tensor:
    if rows.ndim != 2 or back.ndim != 2 or (back.numel() and not len(rows)):
        raise ValueError(f"rows has shape {tuple(rows.shape)} and back {tuple(back.shape)}; expected [M, D] and [N, k]")
    expect("rows", rows, back, tuple(rows.shape), WIDTHS)
    expect("back", back, rows, tuple(back.shape), (torch.int64,))
    _whole(rows=rows, back=back)
    from palimpsest.ops.gpu.triton import expert_sum

    return expert_sum.expert_sum(rows, back)


def _whole(**tensors: Tensor) -> None:
    for name, x in tensors.items():
        if not x.is_contiguous():
            raise ValueError(f"{name} has strides {x.stride()}; expected a contiguous tensor")


for _name, _run in (("gated_norm", _gated_norm), ("swiglu", _swiglu), ("expert_sum", _expert_sum)):
    for _key in ("CUDA", "CPU"):  # on a CPU the kernels run under Triton's interpreter: for tests
        _LIB.impl(_name, on_their_device(_run), _key)

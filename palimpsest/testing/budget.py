"""Error budgets that come from data, not from taste."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def budget(truth: Tensor, peer: Tensor, dtype: torch.dtype, factor: float = 2.0) -> float:
    """What an implementation may be wrong by: `factor` times an honest peer of its own dtype, plus one rounding.

    truth: the fp64 law. peer: the same mathematics done plainly in the dtype under test.
    """
    honest = (peer.double() - truth.double()).abs().max().item() if truth.numel() else 0.0
    largest = truth.abs().max().item() if truth.numel() else 0.0
    info = torch.finfo(dtype)
    return factor * honest + 2 * info.eps * largest + info.tiny  # below `tiny`, flushing to zero is no mistake


def assert_within_budget(name: str, actual: Tensor, truth: Tensor, peer: Tensor, factor: float = 2.0) -> None:
    """Fail if `actual` is further from the fp64 `truth` than `factor` times the honest `peer`; NaN always fails.

    >>> truth = torch.tensor([1 / 3], dtype=torch.float64)
    >>> assert_within_budget("third", truth.float(), truth, truth.float())
    """
    assert actual.shape == truth.shape, f"{name}: shape {tuple(actual.shape)}, the law gives {tuple(truth.shape)}"
    error = (actual.double() - truth.double()).abs().max().item() if truth.numel() else 0.0
    allowed = budget(truth, peer, actual.dtype, factor)
    assert error <= allowed, f"{name}: error {error:.2e} exceeds budget {allowed:.2e}"


class rounded_products(TorchDispatchMode):  # noqa: N801 - a context manager, read in a with statement
    """Within it, every matrix product rounds its operands to `dtype` and sums in fp32, as tensor cores do.

    The chunked form inside this context is the honest peer of a bf16 or fp16 kernel: it makes every rounding that
    such a kernel cannot avoid and no other. Not for backward on CUDA, which runs in threads of its own.
    """

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.mm):
            args = tuple(x.to(self.dtype).to(x.dtype) for x in args)
        return func(*args, **(kwargs or {}))

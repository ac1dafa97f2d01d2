"""Error budgets that come from data, not from taste.

An error is the root of the mean square over all entries, of several drawings where there are several: the largest entry of
a few thousand wanders by half from one drawing to the next.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

FACTOR = 2.0  # times the error of an honest peer


def pooled(drawings: Iterable[Iterable[Tensor]]) -> list[Tensor]:
    """The same results of several drawings as one vector each, in fp64 on the CPU.

    Args:
        drawings: of each, the same results in the same order.

    Returns:
        One vector a result.

    >>> [x.shape for x in pooled([(torch.ones(2, 3), torch.ones(4)), (torch.ones(2, 3), torch.ones(4))])]
    [torch.Size([12]), torch.Size([8])]
    """
    return [
        torch.cat([x.detach().cpu().double().flatten() for x in results]) for results in zip(*drawings, strict=True)
    ]


def rms(x: Tensor) -> float:
    """The root of the mean square of x; 0 of nothing.

    >>> rms(torch.tensor([3.0, -3.0]))
    3.0
    """
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


def budget(truth: Tensor, peer: Tensor, dtype: torch.dtype, factor: float = FACTOR) -> float:
    """What an implementation may be wrong by: `factor` times an honest peer of its own dtype, plus a rounding.

    The rounding is two units of fp32 and fp64, since a processor's exponential is off by as much, and half a unit of
    coarser dtypes, of which a rounded result is off by 0.29 in the mean.

    Args:
        truth: the fp64 law.
        peer: the same mathematics done plainly in the dtype under test.
        dtype: the dtype under test.
        factor: how much worse than the peer is allowed.

    Returns:
        The largest allowed root mean square of actual - truth.

    >>> truth = torch.tensor([1.0, 2.0], dtype=torch.float64)
    >>> f"{budget(truth, truth + 1e-3, torch.float32):.2e}"
    '2.00e-03'
    """
    info = torch.finfo(dtype)
    rounding = info.eps * (2 if info.bits >= 32 else 0.25)
    truth = truth.double().cpu()
    flushed = torch.finfo(torch.float32).tiny  # below it, zero is no mistake
    return factor * rms(peer.double().cpu() - truth) + rounding * rms(truth) + flushed


def assert_within_budget(
    name: str, actual: Tensor, truth: Tensor, peer: Tensor, dtype: torch.dtype | None = None
) -> None:
    """Fail if `actual` is further from the fp64 `truth` than twice the honest `peer`; NaN always fails.

    Args:
        name: of what is compared, for the message.
        actual, truth, peer: of one shape: a result, the fp64 law's, and the honest peer's.
        dtype: the dtype under test; that of `actual` if None.

    Raises:
        AssertionError: with the error and the budget.

    >>> truth = torch.tensor([1 / 3], dtype=torch.float64)
    >>> assert_within_budget("third", truth.float(), truth, truth.float())
    """
    assert actual.shape == truth.shape, f"{name}: shape {tuple(actual.shape)}, the law gives {tuple(truth.shape)}"
    error, allowed = rms(actual.double().cpu() - truth.double().cpu()), budget(truth, peer, dtype or actual.dtype)
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

"""What stands beside the memory in a layer, as torch custom ops: grouped products, short convolutions, cross entropy.

Knows torch alone: the kernels are imported when one first runs. Each op holds what it is handed to its rows in
ops/arguments.py before a kernel sees it; values that address memory, such as the ends of groups, are clamped in the kernels.
"""

import torch
from torch import Tensor

from palimpsest.ops.arguments import fit

_LIB = torch.library.Library("palimpsest_gpu", "FRAGMENT")
_LIB.define("grouped_product(Tensor rows, Tensor matrices, Tensor ends) -> Tensor")
_LIB.define("grouped_outer(Tensor left, Tensor right, Tensor ends) -> Tensor")
_LIB.define("row_losses_(Tensor(a!) logits, Tensor targets, int ignore, bool gradient) -> Tensor")
_LIB.define(
    "short_conv(Tensor[] xs, Tensor[] weights, Tensor[] states, Tensor? ages, Tensor? rows) -> Tensor[]",
)
_LIB.define(
    "short_conv_backward(Tensor[] xs, Tensor[] weights, Tensor[] states, Tensor? ages, Tensor? rows, Tensor[] dys)"
    " -> (Tensor[], Tensor[])",
)
LAUNCH = 2**31  # what 32 bits of a kernel can count: rows, and the numbers of one matrix


def _countable(name: str, x: Tensor, numbers: int) -> None:
    if len(x) >= LAUNCH or numbers >= LAUNCH:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; that is more than one launch can count: cut it")


def _grouped_product(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    fit("gpu_grouped_product", (matrices, rows, ends))
    _countable("rows", rows, 0)
    _countable(
        "matrices", matrices, max(matrices.stride(1) * matrices.shape[1], matrices.stride(2) * matrices.shape[2])
    )
    from palimpsest.ops.gpu.triton import grouped

    return grouped.product(rows, matrices, ends.contiguous())


def _grouped_outer(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    fit("gpu_grouped_outer", (left, right, ends))
    _countable("left", left, left.shape[1])
    _countable("right", right, right.shape[1])
    from palimpsest.ops.gpu.triton import grouped

    return grouped.outer(left, right, ends.contiguous())


def _row_losses_(logits: Tensor, targets: Tensor, ignore: int, gradient: bool) -> Tensor:
    N, V = (fit("gpu_row_losses_", (logits, targets))[letter] for letter in "NV")
    _countable("logits", logits, V)
    if logits.stride(1) != 1 or (N > 1 and logits.stride(0) < V):  # they are written over
        raise ValueError(f"logits has strides {logits.stride()} and shape {(N, V)}; expected rows that lie whole")
    from palimpsest.ops.gpu.triton import cross_entropy

    return cross_entropy.row_losses_(logits, targets.contiguous(), ignore, gradient)


def _check_streams(xs, weights, states, ages, rows) -> None:
    if not 1 <= len(xs) <= 3 or len(weights) != len(xs) or len(states) not in (0, len(xs)):
        raise ValueError(
            f"{len(xs)} streams with {len(weights)} weights and {len(states)} states; expected 1 to 3 of each"
        )
    sizes: dict[str, int] = {}
    for i, (x, weight) in enumerate(zip(xs, weights)):
        if x.dtype != xs[0].dtype or (states and states[i].dtype != states[0].dtype):
            raise ValueError(
                f"x {i} is {x.dtype} and x 0 {xs[0].dtype}; expected one dtype for all, and one for states"
            )
        found = fit("gpu_short_conv", (x, weight, states[i] if states else None, ages, rows), **sizes)
        sizes = {letter: found[letter] for letter in "BTWM" if letter in found}
        B, T, D = (found[letter] for letter in "BTD")
        whole = x.stride(2) == 1 and x.stride(1) >= D and (B == 1 or x.stride(0) == T * x.stride(1))
        if T and not whole:
            raise ValueError(f"x {i} has strides {x.stride()}; expected whole rows")
        if T >= LAUNCH // 2 or D * found["W"] >= LAUNCH:
            raise ValueError(f"x {i} has shape {tuple(x.shape)}; that is more than one launch can count: cut it")
    B, M = sizes["B"], sizes.get("M")
    if (ages is None) != (rows is None) or (ages is None and M not in (None, B)) or (ages is not None and B != 1):
        raise ValueError("ages and rows come together, for one row of packed sequences; states then have a row each")
    if ages is not None and M == 0 and sizes["T"]:
        raise ValueError("states have no row; packed sequences have a row each")


def _short_conv(xs, weights, states, ages, rows):
    _check_streams(xs, weights, states, ages, rows)
    from palimpsest.ops.gpu.triton import short_conv

    return short_conv.forward(xs, weights, states, ages, rows)


def _short_conv_backward(xs, weights, states, ages, rows, dys):
    _check_streams(xs, weights, states, ages, rows)
    for i, (dy, x) in enumerate(zip(dys, xs)):
        if dy.shape != x.shape or dy.device != x.device or not dy.is_floating_point() or dy.layout != torch.strided:
            shape = tuple(dy.shape)
            raise ValueError(
                f"dy {i} is {dy.dtype} of shape {shape} on {dy.device}; expected floating {tuple(x.shape)}"
            )
    if len(dys) != len(xs):
        raise ValueError(f"there are {len(dys)} dys and {len(xs)} xs; expected as many")
    dys = [dy.to(x.dtype).contiguous() for dy, x in zip(dys, xs)]
    from palimpsest.ops.gpu.triton import short_conv

    return short_conv.backward(xs, weights, states, ages, rows, dys)


def on_their_device(run):
    """A launch goes to the current device, which need not be that of the tensors."""

    def there(first, *rest):
        x = first if isinstance(first, Tensor) else next(iter(first), None)
        if x is None or not x.is_cuda or x.get_device() == torch.cuda.current_device():
            return run(first, *rest)
        with torch.cuda.device(x.device):
            return run(first, *rest)

    return there


_empty = lambda tensors: [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors]
_OPS = {
    "grouped_product": (_grouped_product, lambda rows, matrices, ends: rows.new_empty(len(rows), matrices.shape[1])),
    "grouped_outer": (
        _grouped_outer,
        lambda left, right, ends: left.new_empty(len(ends), left.shape[1], right.shape[1]),
    ),
    "row_losses_": (
        _row_losses_,
        lambda logits, targets, ignore, gradient: targets.new_empty(targets.shape, dtype=torch.float32),
    ),
    "short_conv": (_short_conv, lambda xs, *rest: _empty(xs)),
    "short_conv_backward": (_short_conv_backward, lambda xs, weights, *rest: (_empty(xs), _empty(weights))),
}
for _name, (_run, _fake) in _OPS.items():
    for _key in ("CUDA", "CPU"):  # on a CPU the kernels run under Triton's interpreter: for tests
        _LIB.impl(_name, on_their_device(_run), _key)
    torch.library.register_fake(f"palimpsest_gpu::{_name}", _fake, lib=_LIB)

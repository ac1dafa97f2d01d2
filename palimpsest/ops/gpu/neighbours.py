"""What stands beside the memory in a layer, as torch custom ops: grouped products, short convolutions, cross entropy.

Knows torch alone: the kernels are imported when one first runs. Each op checks what it is handed before a kernel sees it.
"""

import torch
from torch import Tensor

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
WIDTHS = (torch.float32, torch.bfloat16, torch.float16)


def _expect(name: str, x: Tensor, like: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    if tuple(x.shape) != shape or x.dtype not in dtypes or x.device != like.device:
        kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(
            f"{name} is {x.dtype} of shape {tuple(x.shape)} on {x.device}; expected {kinds} of shape {shape} on {like.device}"
        )


def _grouped_product(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    E, B, A = matrices.shape
    _expect("rows", rows, matrices, (rows.shape[0], A), WIDTHS)
    _expect("matrices", matrices, rows, (E, B, A), (rows.dtype,))
    _expect("ends", ends, rows, (E,), (torch.int32,))
    from palimpsest.ops.gpu.triton import grouped

    return grouped.product(rows, matrices, ends.contiguous())


def _grouped_outer(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    M, A = left.shape
    _expect("left", left, right, (M, A), WIDTHS)
    _expect("right", right, left, (M, right.shape[-1]), (left.dtype,))
    _expect("ends", ends, left, (len(ends),), (torch.int32,))
    from palimpsest.ops.gpu.triton import grouped

    return grouped.outer(left, right, ends.contiguous())


def _row_losses_(logits: Tensor, targets: Tensor, ignore: int, gradient: bool) -> Tensor:
    N, V = logits.shape
    _expect("logits", logits, targets, (N, V), WIDTHS)
    _expect("targets", targets, logits, (N,), (torch.int64,))
    if V == 0 or logits.stride(1) != 1:
        raise ValueError(f"logits has strides {logits.stride()} and shape {(N, V)}; expected rows that lie whole")
    from palimpsest.ops.gpu.triton import cross_entropy

    return cross_entropy.row_losses_(logits, targets.contiguous(), ignore, gradient)


def _check_streams(xs, weights, states, ages, rows) -> None:
    if not 1 <= len(xs) <= 3 or len(weights) != len(xs) or len(states) not in (0, len(xs)):
        raise ValueError(
            f"{len(xs)} streams with {len(weights)} weights and {len(states)} states; expected 1 to 3 of each"
        )
    B, T, _ = xs[0].shape
    W = weights[0].shape[-1]
    N = states[0].shape[0] if states else B
    for i, (x, weight) in enumerate(zip(xs, weights)):
        D = x.shape[-1]
        _expect(f"x {i}", x, xs[0], (B, T, D), WIDTHS if i == 0 else (xs[0].dtype,))
        _expect(f"weight {i}", weight, x, (D, W), WIDTHS)
        if states:
            _expect(f"state {i}", states[i], x, (N, D, W - 1), (states[0].dtype,))
            if not states[i].is_contiguous():
                raise ValueError(f"state {i} is not contiguous; expected [N, D, W - 1] as it lies in memory")
        whole = x.stride(2) == 1 and (B == 1 or x.stride(0) == T * x.stride(1))
        if T and D and not (whole and weight.is_contiguous()):
            raise ValueError(f"x {i} has strides {x.stride()} and its weight {weight.stride()}; expected whole rows")
    if (ages is None) != (rows is None) or (ages is None and states and N != B) or (ages is not None and B != 1):
        raise ValueError("ages and rows come together, for one row of packed sequences; states then have a row each")
    for name, x in (("ages", ages), ("rows", rows)):
        if x is not None:
            _expect(name, x, xs[0], (T,), (torch.int32,))


def _short_conv(xs, weights, states, ages, rows):
    _check_streams(xs, weights, states, ages, rows)
    from palimpsest.ops.gpu.triton import short_conv

    return short_conv.forward(xs, weights, states, ages, rows)


def _short_conv_backward(xs, weights, states, ages, rows, dys):
    _check_streams(xs, weights, states, ages, rows)
    dys = [dy.to(x.dtype).contiguous() for dy, x in zip(dys, xs)]
    for i, (dy, x) in enumerate(zip(dys, xs)):
        _expect(f"dy {i}", dy, x, tuple(x.shape), (x.dtype,))
    from palimpsest.ops.gpu.triton import short_conv

    return short_conv.backward(xs, weights, states, ages, rows, dys)


def _on_their_device(run):
    """A launch goes to the current device, which need not be that of the tensors."""

    def there(first, *rest):
        x = first if isinstance(first, Tensor) else first[0]
        if not x.is_cuda or x.get_device() == torch.cuda.current_device():
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
        _LIB.impl(_name, _on_their_device(_run), _key)
    torch.library.register_fake(f"palimpsest_gpu::{_name}", _fake, lib=_LIB)

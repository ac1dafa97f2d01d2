"""What every operator takes, in one table, and `check`, which holds a call to it before a kernel sees an address.

A row is an argument: its name, its shape in letters, and the dtypes that it may have. The public functions have rows, and
so has every door of a kernel (`cpu_forward`, `gpu_step` ...). A kernel's door checks again, since the torch operators
behind it can be called by anybody. What stands beside the memory in a layer has its rows in BESIDE: there letters take
their sizes from the shapes, and `fit` holds a call to them.

Letters  B sequences, T tokens, H key heads, HV value heads, K key channels, V value channels; N memories, B of them or one
         for each packed sequence; P memories that a backward pass starts from.
Cost     some 2 microseconds for a call like one that was right before; the first of its kind is walked through, row by row.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from palimpsest.ops.packing import check_cu_seqlens

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
C_READS = (torch.bfloat16, torch.float32)
GPU_READS = (torch.bfloat16, torch.float16, torch.float32)
Q = "the dtype of q"
NUMBERS = "numbers "
MEMORY = "the dtype of a memory"  # fp64 where q is, otherwise fp32


class Row(NamedTuple):
    """One argument."""

    name: str
    shape: str  # letters, or sums and products of them; "numbers HV K" is H V times K numbers in any shape
    dtypes: tuple[torch.dtype, ...] | str = FLOATS  # or Q, or MEMORY; in BESIDE "the dtype of" any row
    optional: bool = False
    in_place: bool = False  # it is edited, so it must be in order as it lies: a copy would not do
    in_order: bool = False  # the kernel reads it as it lies


class Table(NamedTuple):
    """The arguments of one operator, q first and the values third, and what its kernel can hold."""

    rows: tuple[Row, ...]
    letters: str = (
        "B T H K HV V N P HV*K"  # the shape of q, the last two sizes of the values, and what follows from them
    )
    q_dtypes: tuple[torch.dtype, ...] = FLOATS
    key_channels: float = math.inf
    value_channels: float = math.inf
    on: str = ""  # the kind of device whose addresses the kernel can read


def _rows(*more: Row, memory: bool = True) -> tuple[Row, ...]:
    rows = (Row("q", "B T H K", Q), Row("k", "B T H K", Q), Row("v", "B T HV V", Q), *more)
    return (*rows, Row("state", "N HV K V", MEMORY, optional=True)) if memory else rows


_DECAY, _BETA = Row("log_decay", "B T HV K"), Row("beta", "B T HV")
_LOGITS = Row("decay_logits", "B T HV K"), Row("beta_logits", "B T HV")
_PARAMETERS = Row("A_log", "numbers HV"), Row("dt_bias", "numbers HV*K")
_STEP = (
    *(Row("q", "B H K", Q), Row("k", "B H K", Q), Row("v", "B HV V", Q), Row("log_decay", "B HV K"), Row("beta", "B HV")),
    Row("state", "B HV K V", MEMORY, in_place=True),
)  # fmt: skip
_ONE_TOKEN = "B H K HV V N P HV*K"

_F32 = (torch.float32,)
_C = (
    Row("q", "B T H K", C_READS), Row("k", "B T H K", C_READS), Row("value", "B T HV V", C_READS),
    Row("log_decay", "B T HV K", C_READS), Row("erase", "B T HV K", C_READS, optional=True),
    Row("beta", "B T HV", C_READS, optional=True), Row("state", "N HV K V", _F32),
    Row("A_log", "HV", _F32, optional=True), Row("dt_bias", "HV K", _F32, optional=True),
)  # fmt: skip
_C_BACKWARD = (
    Row("d_out", "B T HV V", C_READS),
    Row("d_end_state", "N HV K V", _F32),
    Row("checkpoints", "P HV K V", _F32),
)
_C_HOLDS: dict[str, Any] = {"q_dtypes": C_READS, "key_channels": 256, "on": "cpu"}

_GPU_PARAMETERS = Row("A_log", "HV", optional=True), Row("dt_bias", "HV K", optional=True)
_GPU = _rows(_DECAY, Row("erase", "B T HV")) + _GPU_PARAMETERS
_GPU_VECTORS = _rows(_DECAY, Row("erase", "B T HV K")) + _GPU_PARAMETERS
_GPU_BACKWARD = Row("d_out", "B T HV V"), Row("d_state", "N HV K V", MEMORY, optional=True)
_GPU_HOLDS: dict[str, Any] = {"q_dtypes": GPU_READS, "key_channels": 256, "value_channels": 256}

TABLES: dict[str, Table] = {
    # the public functions
    "kda": Table(_rows(_DECAY, _BETA)),
    "gdn2": Table(_rows(_DECAY, Row("erase_gate", "B T HV K"), Row("write_gate", "B T HV V"))),
    "gated_delta": Table(_rows(Row("log_decay", "B T HV"), _BETA)),
    "delta_rule": Table(_rows(_BETA)),
    "gated_linear_attention": Table(_rows(_DECAY)),
    "linear_attention": Table(_rows()),
    "dplr": Table(_rows(Row("a", "B T HV K"), Row("b", "B T HV K"), _DECAY)),
    "softmax_lookup": Table(_rows(memory=False)),
    "kda_from_logits": Table(_rows(*_LOGITS)),
    "kda_from_logits, gated": Table(_rows(*_LOGITS, *_PARAMETERS)),
    "trace": Table(_rows(_DECAY, _BETA)),
    "trace_memory": Table(
        (Row("q", "B T H K"), Row("k", "B T H K"), Row("write", "B T HV V"), Row("erase", "B T HV K"), _DECAY)
        + (Row("state", "B HV K V", optional=True),)
    ),
    "kda_step_": Table(_STEP, _ONE_TOKEN),
    # the doors of kernels
    "cpu_forward": Table(_C, **_C_HOLDS),
    "cpu_backward": Table(_C + _C_BACKWARD, **_C_HOLDS),
    "cpu_step": Table(_STEP, _ONE_TOKEN, GPU_READS, key_channels=256, on="cpu"),
    "gpu_delta_memory": Table(_GPU, **_GPU_HOLDS),
    "gpu_delta_memory, vectors": Table(_GPU_VECTORS, **_GPU_HOLDS),
    "gpu_delta_memory_backward": Table(_GPU + _GPU_BACKWARD, **_GPU_HOLDS),
    "gpu_delta_memory_backward, vectors": Table(_GPU_VECTORS + _GPU_BACKWARD, **_GPU_HOLDS),
    "gpu_linear_memory": Table(_rows(), **_GPU_HOLDS),
    "gpu_linear_memory_backward": Table(_rows() + _GPU_BACKWARD, **_GPU_HOLDS),
    "gpu_step": Table(_STEP, _ONE_TOKEN, **_GPU_HOLDS),
    "gpu_steps": Table(
        (*_rows(_DECAY, _BETA, memory=False), Row("state", "B HV K V", MEMORY, in_place=True)), **_GPU_HOLDS
    ),
}


# ---- what stands beside the memory: experts, convolutions, the loss, and the functions of one decoded token ----

_WHOLE, _I64, _I32 = (torch.int32, torch.int64), (torch.int64,), (torch.int32,)
X = "the dtype of x"
MAY_BE_EMPTY = set("BTNMJ")  # letters of which there may be none


def _in_order(*rows: Row) -> tuple[Row, ...]:
    return tuple(row._replace(in_order=True) for row in rows)


def _layer(q, others, weight, weights, norm, parameters, memory) -> tuple[Row, ...]:
    """Of `memory_layer_step_`, by the dtypes of its rows."""
    return (
        Row("q", "B H*K", q), Row("k", "B H*K", others), Row("v", "B H*K", others),
        *(Row(f"weights[{i}]", "H*K 1 W", weights if i else weight) for i in range(3)),
        *(Row(f"windows[{i}]", "B H*K W-1", others, in_place=True) for i in range(3)),
        Row("decay_logits", "B H*K", others), Row("A_log", "numbers H", parameters),
        Row("dt_bias", "numbers H*K", parameters), Row("beta_logits", "B H", others),
        Row("gate_logits", "B H*K", others), Row("norm", "K", norm), Row("state", "B H K K", memory, in_place=True),
    )  # fmt: skip


def _experts(x, others, weights) -> tuple[Row, ...]:
    """Of `experts`, by the dtypes of its rows."""
    mlp = Row("gate", "E W D", others), Row("up", "E W D", others), Row("down", "E D W", others)
    shared = Row("shared[0]", "S D", others), Row("shared[1]", "S D", others), Row("shared[2]", "D S", others)
    given = Row("x", "N D", x), Row("chosen", "N k", _I64), Row("weights", "N k", weights)
    return (*given, *mlp, *(row._replace(optional=True) for row in shared))


def _latent(q, norm, others=Q) -> tuple[Row, ...]:
    """Of `latent_layer_step_`, by the dtypes of its rows."""
    return (
        Row("q", "B O", q), Row("latent", "B C", others), Row("norm", "R", norm), Row("weights", "H X R", others),
        Row("rows", "B S C", others, in_place=True), Row("length", "B", _I64, in_place=True),
    )  # fmt: skip


BESIDE: dict[str, tuple[Row, ...]] = {
    "run_experts": (
        Row("x", "N D"), Row("experts", "N k", _WHOLE), Row("weights", "N k"),
        Row("w1", "E I D"), Row("w3", "E I D"), Row("w2", "E D I"),
    ),
    "cross_entropy_sum": (Row("hidden", "N D"), Row("head", "V D"), Row("targets", "N", _I64)),
    "short_conv": (Row("x", "B T D"), Row("weight", "D 1 W", X), Row("state", "M D W-1", X, optional=True)),
    "short_convs": (Row("x", "B T D"), Row("weight", "D 1 W"), Row("state", "M D W-1", optional=True)),
    "short_conv_step_": (Row("x", "B D"), Row("weight", "D 1 W"), Row("state", "B D W-1")),
    "project": (Row("x", "N D"), Row("weight", "O D")),
    "add_norm": (Row("x", "N D"), Row("parts", "N J D"), Row("weight", "D")),
    "memory_layer_step_": _layer(FLOATS, Q, FLOATS, FLOATS, FLOATS, FLOATS, MEMORY),
    "latent_step": (Row("q", "B T H C"), Row("rows", "B S C", Q), Row("length", "B", _I64)),
    "latent_layer_step_": _latent(FLOATS, FLOATS),
    "route": (Row("logits", "N E"), Row("bias", "E")),
    "experts": _experts(FLOATS, X, FLOATS),
    # the doors of kernels
    "gpu_grouped_product": (Row("matrices", "E B A", GPU_READS), Row("rows", "M A", "the dtype of matrices"))
    + (Row("ends", "E", _I32),),
    "gpu_grouped_outer": (Row("left", "M A", GPU_READS), Row("right", "M B", "the dtype of left"), Row("ends", "E", _I32)),
    "gpu_row_losses_": (Row("logits", "N V", GPU_READS), Row("targets", "N", _I64)),
    "gpu_short_conv": (
        Row("x", "B T D", GPU_READS), Row("weight", "D W", GPU_READS, in_order=True),
        Row("state", "M D W-1", GPU_READS, optional=True, in_order=True), Row("ages", "T", _I32, optional=True, in_order=True),
        Row("rows", "T", _I32, optional=True, in_order=True),
    ),
    "gpu_project": _in_order(Row("x", "N D", GPU_READS), Row("weight", "O D", X)),
    "gpu_add_norm": _in_order(Row("x", "N D", GPU_READS), Row("parts", "N J D"), Row("weight", "D")),
    "gpu_memory_layer_step_": _in_order(*_layer(GPU_READS, Q, Q, Q, FLOATS, _F32, _F32)),
    "gpu_latent_step": _in_order(Row("q", "B T H C", GPU_READS), Row("rows", "B S C", Q), Row("length", "B", _I64)),
    "gpu_latent_layer_step_": _in_order(*_latent(GPU_READS, FLOATS)),
    "gpu_route": _in_order(Row("logits", "N E", _F32), Row("bias", "E", _F32)),
    "gpu_experts": _in_order(*_experts(GPU_READS, X, _F32)),
    "cpu_project": _in_order(Row("x", "N D", _F32), Row("weight", "O D", _F32)),
    "cpu_add_norm": _in_order(Row("x", "N D", _F32), Row("parts", "N J D", _F32), Row("weight", "D", _F32)),
    "cpu_memory_layer_step_": _in_order(
        *_layer(C_READS, Q, C_READS, "the dtype of weights[0]", "the dtype of weights[0]", _F32, _F32)
    ),
    "cpu_route": _in_order(Row("logits", "N E", _F32), Row("bias", "E", _F32)),
    "cpu_experts": _in_order(*_experts(_F32, _F32, _F32)),
}  # fmt: skip


def _dtypes(row: Row, q_dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    if isinstance(row.dtypes, tuple):
        return row.dtypes
    return (q_dtype,) if row.dtypes == Q else (state_dtype(q_dtype),)


def expect_floats(name: str, x: Tensor, device: torch.device | None = None) -> None:
    """Raise unless x is a dense tensor of real floating point numbers, on this device if one is given."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is {_kind(x)}; it must be a torch.Tensor")
    if x.dtype not in FLOATS or x.layout is not torch.strided:
        raise ValueError(f"{name} is {x.dtype} with the layout {x.layout}; it must be dense, and {_or(FLOATS)}")
    if device is not None and x.device != device:
        raise ValueError(f"{name} is on {x.device}; it must be on {device}, as the others")


def scale_of(scale: float | None, q: Tensor) -> float:
    """What multiplies q: 1 / sqrt(K) if None; a TypeError or ValueError unless it is a finite number."""
    if scale is None:
        return q.shape[-1] ** -0.5 if q.shape[-1] else 1.0  # no channels are refused elsewhere
    if not isinstance(scale, (int, float, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"scale is a {type(scale).__name__}; it must be a number: multiply q by a tensor yourself")
    if isinstance(scale, float) and not math.isfinite(scale):
        raise ValueError(f"scale is {scale}; it must be a finite number")
    return scale


def _kind(x) -> str:
    return "None" if x is None else f"a {type(x).__name__}"


def state_dtype(q_dtype: torch.dtype) -> torch.dtype:
    """The dtype of memories, and of what must not be rounded on its way to them: fp64 stays, all else is fp32.

    >>> state_dtype(torch.bfloat16), state_dtype(torch.float64)
    (torch.float32, torch.float64)
    """
    return torch.float64 if q_dtype == torch.float64 else torch.float32


_RIGHT: set[tuple] = set()  # what calls were, in all that `_walk` reads, when they were found right
_MOST = 4096


def check(op: str, tensors: Sequence[Tensor | None], cu_seqlens: Tensor | None = None, kept: int = 0) -> None:
    """Raise unless the tensors, in the order of the table's rows, are what `op` may be given.

    cu_seqlens: the borders of packed sequences. kept: P, the memories that a backward pass starts from.

    Raises:
        TypeError: an argument is no tensor. ValueError: a shape, dtype, device or layout. Both name the argument.

    >>> q = k = v = torch.zeros(1, 3, 2, 4)
    >>> check("linear_attention", (q, k, v[:, :2], None))
    Traceback (most recent call last):
    ValueError: v has shape (1, 2, 2, 4); q and v ask for (1, 3, 2, 4)
    """
    if torch.compiler.is_compiling():  # a compiler reads the plain form
        return _walk(op, tensors, cu_seqlens, kept)
    borders = None if cu_seqlens is None else getattr(cu_seqlens, "shape", None)
    try:
        call: tuple[Any, ...] = (
            op,
            kept,
            borders,
            *[None if x is None else (x.shape, x.dtype, x.device, x.layout) for x in tensors],
        )
        known = call in _RIGHT
    except (AttributeError, TypeError):  # not a tensor; or a shape that is still a symbol
        return _walk(op, tensors, cu_seqlens, kept)
    if not known or (op in _IN_PLACE and not _is_ordered(tensors[_IN_PLACE[op]])):
        _walk(op, tensors, cu_seqlens, kept)
        if len(_RIGHT) >= _MOST:
            _RIGHT.clear()
        _RIGHT.add(call)
    elif cu_seqlens is not None:
        q = tensors[0]
        assert q is not None  # a call that is known to be right
        check_cu_seqlens(cu_seqlens, q.shape[0], q.shape[1], q.device)


_IN_PLACE = {op: i for op, table in TABLES.items() for i, row in enumerate(table.rows) if row.in_place}


def _is_ordered(x) -> bool:
    return x.is_contiguous() and not x.is_neg()


def _walk(op: str, tensors: Sequence[Tensor | None], cu_seqlens: Tensor | None, kept: int) -> None:
    """Row by row: raise what is wrong, the most telling fault first."""
    table = TABLES[op]
    named: dict[str, Any] = dict(zip((row.name for row in table.rows), tensors, strict=True))
    for row in table.rows:
        x = named[row.name]
        if not isinstance(x, Tensor) and not (x is None and row.optional):
            raise TypeError(f"{row.name} is {_kind(x)}; it must be a torch.Tensor")
        if x is not None:
            _expect_dense(row, x)
    q_row, _, v_row, *_ = table.rows
    q, v = named[q_row.name], named[v_row.name]
    q_letters, v_letters = q_row.shape.split(), v_row.shape.split()
    if q.ndim != len(q_letters) or v.ndim != len(v_letters):
        raise ValueError(
            f"q has shape {_shape(q)} and {v_row.name} {_shape(v)}; "
            f"they must be [{', '.join(q_letters)}] and [{', '.join(v_letters)}]"
        )
    sizes = dict(zip(table.letters.split(), (*q.shape, *v.shape[-2:])))
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, sizes["B"], sizes["T"], q.device)
    H, K, HV, V = (sizes[letter] for letter in ("H", "K", "HV", "V"))
    sizes.update({"N": sizes["B"] if cu_seqlens is None else len(cu_seqlens) - 1, "P": kept, "HV*K": HV * K})

    for row in table.rows[1:3]:
        _expect_shape(row, named[row.name], sizes)
    _expect_heads(v_row, H, HV)
    if K < 1 or V < 1:
        raise ValueError(f"q has {K} channels a head and {v_row.name} has {V}; both must have at least one")
    if table.key_channels < K or table.value_channels < V:
        most = f"{table.key_channels} and {table.value_channels}"
        raise ValueError(f"q has {K} channels a head and {v_row.name} has {V}; {op} holds at most {most}")
    if table.on and q.device.type != table.on:
        raise ValueError(f"q is on {q.device}; {op} reads tensors on the {table.on}")
    if q.dtype not in table.q_dtypes:
        raise ValueError(f"q is {q.dtype}; it must be {_or(table.q_dtypes)}")
    for row in table.rows:
        x = named[row.name]
        if x is None:
            continue
        allowed = _dtypes(row, q.dtype)
        if row.dtypes == Q and x.dtype != q.dtype:
            raise ValueError(f"{row.name} is {x.dtype} and q is {q.dtype}; q, k and v must share one floating dtype")
        _expect_shape(row, x, sizes)
        if row.dtypes == MEMORY and x.dtype not in allowed:
            raise ValueError(
                f"{row.name} is {x.dtype}; with v in {q.dtype} it must be {_or(allowed)}: use {row.name}.to(...)"
            )
        if x.dtype not in allowed:
            raise ValueError(f"{row.name} is {x.dtype}; it must be {_or(allowed)}")
        _expect_device(row, x, "q", q)
        _expect_order(row, x)


def _expect_dense(row: Row, x: Tensor) -> None:
    if x.layout != torch.strided:
        raise ValueError(f"{row.name} has the layout {x.layout}; pass a dense tensor: {row.name}.to_dense()")


def _expect_heads(v_row: Row, H: int, HV: int) -> None:
    if H < 1 or HV < 1 or HV % H:
        raise ValueError(f"{v_row.name} has {HV} heads and q has {H}; the heads of v must be a multiple of those of q")


def _expect_device(row: Row, x: Tensor, name: str, first: Tensor) -> None:
    if x.device != first.device:
        raise ValueError(f"{row.name} is on {x.device} and {name} on {first.device}; move all of them to one device")


def _expect_order(row: Row, x: Tensor) -> None:
    if not (row.in_place or row.in_order):
        return
    keep = "it is edited in place, so pass {} and keep that" if row.in_place else "pass {}"
    if not x.is_contiguous():
        raise ValueError(f"{row.name} is not contiguous; {keep.format(f'{row.name}.contiguous()')}")
    if not torch.compiler.is_compiling() and x.is_neg():
        raise ValueError(f"{row.name} is a view yet to be negated; {keep.format(f'{row.name}.resolve_neg()')}")


def _expect_shape(row: Row, x: Tensor, sizes: dict[str, int]) -> None:
    shape = tuple(sizes[letter] for letter in row.shape.removeprefix(NUMBERS).split())
    if row.shape.startswith(NUMBERS):
        if x.numel() != shape[0]:
            raise ValueError(
                f"{row.name} has {x.numel()} numbers, its shape is {_shape(x)}; q and v ask for {shape[0]}"
            )
    elif tuple(x.shape) != shape:
        raise ValueError(f"{row.name} has shape {_shape(x)}; q and v ask for {shape}")


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def _or(dtypes: tuple[torch.dtype, ...]) -> str:
    *most, last = map(str, dtypes)
    return f"{', '.join(most)} or {last}" if most else last


# ---- calls beside the memory ----

_FITTED: dict[tuple, dict[str, int]] = {}  # letters of calls that were found right, as _RIGHT
_LIE = {op: [i for i, row in enumerate(rows) if row.in_order or row.in_place] for op, rows in BESIDE.items()}


def fit(op: str, tensors: Sequence[Tensor | None], **sizes: int) -> dict[str, int]:
    """Every letter's size, if the tensors are what BESIDE says of `op`, in the order of its rows.

    sizes: letters that are known before.

    Raises:
        TypeError: an argument is no tensor. ValueError: a shape, dtype, device or layout. Both name the argument.

    >>> fit("project", (torch.zeros(1, 3), torch.zeros(5, 3)))
    {'N': 1, 'D': 3, 'O': 5}
    >>> fit("project", (torch.zeros(1, 3), torch.zeros(5, 4)))
    Traceback (most recent call last):
    ValueError: weight is torch.float32 of shape (5, 4); expected bfloat16, float16, float32 or float64 of shape [O, D], D = 3
    """
    if torch.compiler.is_compiling():
        return _walk_beside(op, tensors, sizes)
    try:
        call: tuple[Any, ...] = (
            op,
            *sizes.items(),
            *[None if x is None else (x.shape, x.dtype, x.device, x.layout) for x in tensors],
        )
        known = _FITTED.get(call)
    except (AttributeError, TypeError):  # not a tensor; or a shape that is still a symbol
        return _walk_beside(op, tensors, sizes)
    if known is not None:
        for i in _LIE[op]:
            x = tensors[i]
            if x is not None and (not x.is_contiguous() or x.is_neg()):
                break
        else:
            return known
    found = _walk_beside(op, tensors, sizes)
    if len(_FITTED) >= _MOST:
        _FITTED.clear()
    _FITTED[call] = found
    return found


def fits(op: str, tensors: Sequence[Tensor | None], **sizes: int) -> dict[str, int] | None:
    """As `fit`, and None where that raises: for a kernel beside which another form stands, which then says what is wrong."""
    try:
        return fit(op, tensors, **sizes)
    except (TypeError, ValueError):
        return None


def _walk_beside(op: str, tensors: Sequence[Tensor | None], sizes: dict[str, int]) -> dict[str, int]:
    rows, sizes = BESIDE[op], dict(sizes)
    given: list[tuple[Row, Any]] = [
        (row, x) for row, x in zip(rows, tensors, strict=True) if x is not None or not row.optional
    ]
    named, source = {row.name: x for row, x in given}, dict[str, str]()
    for row, x in given:
        if not isinstance(x, Tensor):
            raise TypeError(f"{row.name} is {_kind(x)}; it must be a torch.Tensor")
        _expect_dense(row, x)
    leading, *others = given
    for row, x in (
        leading,
        *sorted(others, key=lambda pair: -pair[1].ndim),
    ):  # who has most dimensions says what they are
        letters = row.shape.split()
        for letter, size in zip(letters, x.shape) if len(letters) == x.ndim else ():
            if letter.isalpha() and letter not in sizes:
                sizes[letter], source[letter] = size, row.name
    for row, x in given:
        _expect_letters(row, x, sizes, source, _dtypes_beside(row, named))
        _expect_device(row, x, leading[0].name, leading[1])
        _expect_order(row, x)
    return sizes


def _expect_letters(
    row: Row, x: Tensor, sizes: dict[str, int], source: dict[str, str], dtypes: tuple[torch.dtype, ...]
):
    letters, many = row.shape.removeprefix(NUMBERS).split(), row.shape.startswith(NUMBERS)
    wanted = [_size(letter, sizes) for letter in letters]
    if x.dtype not in dtypes or ([x.numel()] if many else list(x.shape)) != wanted:
        others = [
            f", {letter} = {size}"
            for letter, size in zip(letters, wanted)
            if size is not None and not letter.isdigit() and source.get(letter) != row.name
        ]
        raise ValueError(
            f"{row.name} is {x.dtype} of shape {_shape(x)}; expected {_or(dtypes).replace('torch.', '')} of shape "
            f"{NUMBERS if many else ''}[{', '.join(letters)}]{''.join(others)}"
        )
    for letter in letters:
        if letter.isalpha() and letter not in MAY_BE_EMPTY and not sizes[letter]:
            raise ValueError(
                f"{row.name} has shape {_shape(x)} for [{', '.join(letters)}]; {letter} must be at least 1"
            )


def _dtypes_beside(row: Row, named: dict[str, Any]) -> tuple[torch.dtype, ...]:
    if isinstance(row.dtypes, tuple):
        return row.dtypes
    if row.dtypes == MEMORY:
        return (state_dtype(named["q"].dtype),)
    return (named[row.dtypes.removeprefix("the dtype of ")].dtype,)


def _size(letters: str, sizes: dict[str, int]) -> int | None:
    """The value of "W-1" or "H*K"; None where a letter is not known."""
    total = 0
    for term in letters.replace("-", "+-").split("+"):
        product = 1
        for factor in term.removeprefix("-").split("*"):
            if not factor.isdigit() and factor not in sizes:
                return None
            product *= int(factor) if factor.isdigit() else sizes[factor]
        total += -product if term.startswith("-") else product
    return total


# ---- what letters cannot say ----


def chosen_experts(k: int, E: int) -> None:
    """Raise unless k of E experts can be chosen."""
    if not isinstance(k, int) or not 1 <= k <= E:
        raise ValueError(f"k is {k}; it must be from 1 to the {E} experts")


def latent_values(value_dim: int, C: int) -> None:
    """Raise unless the first value_dim of a row's C channels can be its value."""
    if not isinstance(value_dim, int) or not 1 <= value_dim <= C:
        raise ValueError(f"value_dim is {value_dim}; it must be from 1 to the {C} channels of a row")


def latent_channels(sizes: dict[str, int]) -> None:
    """Raise unless q [B, O], weights [H, X, R] and rows [B, S, C] leave a head keys, values and a row of room."""
    O, H, X, R, S, C = (sizes[letter] for letter in "OHXRSC")
    P = C - R
    N = O // H - P
    if P < 0 or not 1 <= N < X or not S or O != H * (N + P):
        raise ValueError(
            f"q has {O} channels for {H} heads, weights {X} and {R} and rows {S} of {C}: that leaves {P} position, {N} key and "
            f"{X - N} value channels a head and {S} rows of room; expected 0, 1, 1 and 1 at least"
        )

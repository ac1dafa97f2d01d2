"""The compiled kernels as torch operators, and as the backend "cpu".

    palimpsest::cpu_forward, cpu_backward    whole sequences: the core, KDA, and KDA from logits, with gradients
    palimpsest::cpu_step                     one token, the state edited in place

They are custom operators with fakes, so torch.compile(fullgraph=True) sees through them. Nothing is compiled before
the first call that needs it.
"""

import ctypes
import functools
from ctypes import c_double, c_int64, c_void_p

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from palimpsest.ops import arguments
from palimpsest.ops.backends import NO_TRANSFORMS, Backend, Problem, linear_by_core
from palimpsest.ops.cpu import jit
from palimpsest.ops.packing import borders

SEGMENT = 64  # tokens between checkpoints, as in delta_memory.c
MAX_K = 256
GATES = ("none", "softplus", "sigmoid")


class Array(ctypes.Structure):
    _fields_ = (("data", c_void_p), ("bf16", c_int64))


class Call(ctypes.Structure):
    """`Call` of delta_memory.c, field for field."""

    _fields_ = (
        *((name, c_int64) for name in ("sequences", "key_heads", "value_heads", "K", "V", "threads")),
        ("cu", ctypes.POINTER(c_int64)),
        ("scale", c_double),
        *((name, Array) for name in ("q", "k", "value", "log_decay", "erase", "beta")),
        ("gate", c_int64),
        ("floor", c_double),
        *((name, c_void_p) for name in ("A_log", "dt_bias", "state")),
        ("out", Array),
        *((name, c_void_p) for name in ("end_state", "checkpoints")),
        ("d_out", Array),
        ("d_end_state", c_void_p),
        *((name, Array) for name in ("d_q", "d_k", "d_value", "d_log_decay", "d_erase", "d_beta")),
        *((name, c_void_p) for name in ("d_state", "d_A_log", "d_dt_bias")),
    )


@torch.library.custom_op("palimpsest::cpu_forward", mutates_args=(), device_types="cpu")
def forward(
    q: Tensor, k: Tensor, value: Tensor, log_decay: Tensor, erase: Tensor | None, beta: Tensor | None,
    state: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, cu_seqlens: Tensor | None,
    scale: float, gate: str, floor: float, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Output, final state, and the states that backward starts from: with keep, one in 64 tokens."""
    inputs = (q, k, value, log_decay, erase, beta, state, A_log, dt_bias)
    _check_call("cpu_forward", inputs, cu_seqlens, gate)
    inputs = _contiguous(*inputs)
    out, end_state, checkpoints = _new_results(value, state, keep)
    call = _call(inputs, cu_seqlens, scale, gate, floor)
    call.out, call.end_state = _array(out), end_state.data_ptr()
    call.checkpoints = checkpoints.data_ptr() if keep else None
    _check(jit.library().delta_memory_forward(ctypes.byref(call)))
    return out, end_state, checkpoints


@forward.register_fake
def _(q, k, value, log_decay, erase, beta, state, A_log, dt_bias, cu_seqlens, scale, gate, floor, keep):
    _check_call("cpu_forward", (q, k, value, log_decay, erase, beta, state, A_log, dt_bias), cu_seqlens, gate)
    return _new_results(value, state, keep)


@torch.library.custom_op("palimpsest::cpu_backward", mutates_args=(), device_types="cpu")
def backward(
    d_out: Tensor, d_end_state: Tensor, checkpoints: Tensor,
    q: Tensor, k: Tensor, value: Tensor, log_decay: Tensor, erase: Tensor | None, beta: Tensor | None,
    state: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, cu_seqlens: Tensor | None,
    scale: float, gate: str, floor: float,
) -> list[Tensor]:  # fmt: skip
    """Gradients of q, k, value, log_decay, erase or beta, state and, with a gate, of A_log and dt_bias by sequence."""
    inputs = (q, k, value, log_decay, erase, beta, state, A_log, dt_bias)
    _check_call("cpu_backward", inputs, cu_seqlens, gate, (d_out, d_end_state, checkpoints))
    inputs, checkpoints = _contiguous(*inputs), checkpoints.contiguous()
    gradients = _new_gradients(*inputs)
    d_out, d_end_state = d_out.contiguous(), d_end_state.contiguous()
    call = _call(inputs, cu_seqlens, scale, gate, floor)
    call.d_out, call.d_end_state, call.checkpoints = _array(d_out), d_end_state.data_ptr(), checkpoints.data_ptr()
    given = iter(gradients)
    d_q, d_k, d_value, d_log_decay, d_erase, d_beta, d_state, d_A_log, d_dt_bias = (
        None if x is None else next(given) for x in inputs
    )
    call.d_q, call.d_k, call.d_value, call.d_log_decay = (_array(x) for x in (d_q, d_k, d_value, d_log_decay))
    call.d_erase, call.d_beta, call.d_state = _array(d_erase), _array(d_beta), _pointer(d_state)
    call.d_A_log, call.d_dt_bias = _pointer(d_A_log), _pointer(d_dt_bias)
    _check(jit.library().delta_memory_backward(ctypes.byref(call)))
    return gradients


@backward.register_fake
def _(
    d_out, d_end_state, checkpoints, q, k, value, log_decay, erase, beta, state, A_log, dt_bias, cu_seqlens,
    scale, gate, floor,
):  # fmt: skip
    inputs = (q, k, value, log_decay, erase, beta, state, A_log, dt_bias)
    _check_call("cpu_backward", inputs, cu_seqlens, gate, (d_out, d_end_state, checkpoints))
    return _new_gradients(q, k, value, log_decay, erase, beta, state, A_log, dt_bias)


def _refuse_second_derivative(ctx, *gradients):
    raise NotImplementedError(
        "the CPU kernel has first derivatives only, and the gradient of its gradient was asked for; call with "
        "backend='chunked'"
    )


backward.register_autograd(_refuse_second_derivative)


def _save(ctx, inputs, output):
    *tensors, ctx.scale, ctx.gate, ctx.floor, _ = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(False)


def _gradients(ctx, d_out, d_end_state, _):
    *tensors, checkpoints = ctx.saved_tensors
    q, k, value, log_decay, erase, beta, state, A_log, dt_bias, cu_seqlens = tensors
    d_out = torch.zeros_like(value) if d_out is None else d_out.to(value.dtype)
    d_end_state = torch.zeros_like(state) if d_end_state is None else d_end_state
    gradients = iter(backward(d_out, d_end_state, checkpoints, *tensors, ctx.scale, ctx.gate, ctx.floor))
    of_tensors = [None if x is None else next(gradients) for x in (q, k, value, log_decay, erase, beta, state)]
    of_parameters = [None if x is None else next(gradients).sum(0) for x in (A_log, dt_bias)]  # shared by all sequences
    return *of_tensors, *of_parameters, *[None] * 5  # cu_seqlens, scale, gate, floor, keep


forward.register_autograd(_gradients, setup_context=_save)


@torch.library.custom_op("palimpsest::cpu_step", mutates_args=("state",), device_types="cpu")
def _step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor, scale: float) -> Tensor:
    return _step_now(q, k, v, log_decay, beta, state, scale)


@_step.register_fake
def _(q, k, v, log_decay, beta, state, scale):
    arguments.check("cpu_step", (q, k, v, log_decay, beta, state))
    return torch.empty_like(_supported(v))


def _step_now(q, k, v, log_decay, beta, state, scale):
    tensors = (q, k, v, log_decay, beta, state)
    arguments.check("cpu_step", tensors)
    for x in tensors:
        if x.is_neg():  # a view that says "times -1": torch works it out on the way to an operator
            return _step(*tensors, scale)
    readable = arguments.C_READS
    q, k, v, log_decay, beta = [(x if x.dtype in readable else x.float()).contiguous() for x in tensors[:5]]
    B, HV, K, V = state.shape
    out = torch.empty_like(v)
    bf16 = 0
    for i, x in enumerate((q, k, v, log_decay, beta)):
        bf16 |= (x.dtype is torch.bfloat16) << i
    addresses = (
        q.data_ptr(), k.data_ptr(), v.data_ptr(), log_decay.data_ptr(), beta.data_ptr(), state.data_ptr(), out.data_ptr()
    )  # fmt: skip
    if B and not all(addresses):
        raise ValueError(GONE)
    _step_function()(B, q.shape[1], HV, K, V, torch.get_num_threads(), bf16, scale, *addresses)
    return out


@functools.cache
def _step_function():
    function = jit.library().delta_memory_step
    function.argtypes = [c_int64] * 7 + [c_double] + [c_void_p] * 7
    function.restype = None
    return function


# ---- the backend's run functions: see palimpsest.ops.backends.Backend ----


def core(q, k, erase, write, log_decay, state, scale, cu_seqlens):
    return _run(q, k, write, log_decay, erase, None, state, scale, cu_seqlens)


def kda(q, k, v, log_decay, beta, state, scale, cu_seqlens):
    return _run(q, k, v, log_decay, None, beta, state, scale, cu_seqlens)


def kda_from_logits(q, k, v, decay_logits, beta_logits, gate, state, scale, cu_seqlens):
    return _run(q, k, v, decay_logits, None, beta_logits, state, scale, cu_seqlens, gate)


def step(q, k, v, log_decay, beta, state, scale):
    if torch.compiler.is_compiling():
        return _step(q, k, v, log_decay, beta, state, scale).to(v.dtype)
    out = _step_now(q, k, v, log_decay, beta, state, scale)  # an operator's dispatch costs as much as the step
    if not state.is_inference():
        increment_version(state)  # as the operator does: autograd sees that a tensor which it has kept was edited
    return out if out.dtype is v.dtype else out.to(v.dtype)  # asking costs a tenth of what `to` does


def _run(q, k, value, log_decay, erase, beta, state, scale, cu_seqlens, gate=None):
    dtype, (_, _, HV, _) = value.dtype, value.shape
    q, k, value, log_decay = (_supported(x) for x in (q, k, value, log_decay))
    erase, beta = (None if x is None else _supported(x) for x in (erase, beta))
    if erase is not None and erase.shape[2] != HV:
        erase = erase.repeat_interleave(HV // erase.shape[2], dim=2)
    A_log = dt_bias = None
    if gate is not None:
        A_log, dt_bias = gate.A_log.float().reshape(HV), gate.dt_bias.float().reshape(HV, q.shape[3])
    tensors = (q, k, value, log_decay, erase, beta, state, A_log, dt_bias)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    kind, floor = ("none", 0.0) if gate is None else (gate.name, float(getattr(gate, "floor", 0.0)))
    out, state, _ = forward(*tensors, cu_seqlens, float(scale), kind, floor, keep)
    return out.to(dtype), state


def _check_call(op: str, inputs, cu_seqlens, gate: str, gradients=()) -> None:
    """The operators' own door: they can be called by anybody."""
    q, _, _, _, erase, beta, state, A_log, dt_bias = inputs
    kept = 0
    if gradients and isinstance(q, Tensor) and isinstance(state, Tensor) and q.ndim == state.ndim == 4:
        kept = _kept(q, state)
    arguments.check(op, (*inputs, *gradients), cu_seqlens, kept)
    if (erase is None) == (beta is None):
        raise ValueError("erase and beta came both, or neither; give one of them")
    if gate not in GATES:
        raise ValueError(f"gate is {gate!r}; it must be one of {', '.join(GATES)}")
    gated = gate != "none"
    if (A_log is not None) != gated or (dt_bias is not None) != gated or (gated and beta is None):
        raise ValueError(
            f"gate is {gate!r}: a gate needs A_log, dt_bias and beta, and without one there is no A_log, dt_bias"
        )


def _kept(q: Tensor, state: Tensor) -> int:
    """Memories that backward starts from: one in 64 tokens, and every sequence may end in a segment of its own."""
    return q.shape[0] * q.shape[1] // SEGMENT + state.shape[0]


def _supported(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.bfloat16) else x.float()


def _call(inputs, cu_seqlens, scale, gate, floor) -> Call:
    q, k, value, log_decay, erase, beta, state, A_log, dt_bias = inputs
    B, T, H, K = q.shape
    HV, V = value.shape[2:]
    ends = [n * T for n in range(B + 1)] if cu_seqlens is None else borders(cu_seqlens, T)
    N = len(ends) - 1
    return Call(
        N, H, HV, K, V, torch.get_num_threads(), (c_int64 * (N + 1))(*ends), scale,
        _array(q), _array(k), _array(value), _array(log_decay), _array(erase), _array(beta),
        GATES.index(gate), floor, _pointer(A_log), _pointer(dt_bias), _pointer(state),
    )  # fmt: skip


def _array(tensor: Tensor | None) -> Array:
    return Array(None, 0) if tensor is None else Array(_pointer(tensor), tensor.dtype is torch.bfloat16)


GONE = "a tensor has no memory behind its shape any more: its storage was freed, or resized to nothing"


def _pointer(tensor: Tensor | None) -> int | None:
    if tensor is None:
        return None
    address = tensor.data_ptr()
    if not address and tensor.numel():
        raise ValueError(GONE)
    return address


def _contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)


def _new_results(value, state, keep):
    checkpoints = state.new_empty(_kept(value, state) if keep else 0, *state.shape[1:])
    return value.new_empty(value.shape), state.new_empty(state.shape), checkpoints


def _new_gradients(q, k, value, log_decay, erase, beta, state, A_log, dt_bias):
    inputs = (q, k, value, log_decay, erase, beta, state)
    gradients = [x.new_empty(x.shape) for x in inputs if x is not None]
    parameters = (x for x in (A_log, dt_bias) if x is not None)
    return gradients + [x.new_empty(state.shape[0], *x.shape) for x in parameters]


def _check(status: int) -> None:
    if status:
        raise MemoryError("the CPU kernel found no memory for its scratch space, about 1 MB a thread")


def refuses(problem: Problem) -> str | None:
    if problem.device != "cpu":
        return f"needs tensors on the CPU, and these are on {problem.device}"
    if problem.transformed:
        return NO_TRANSFORMS
    if problem.dtype == torch.float64:
        return "computes in fp32, and these tensors are fp64"
    if problem.key_dim > MAX_K:
        return f"holds at most {MAX_K} key channels, and these are {problem.key_dim}"
    return jit.refusal()


CPU = Backend(
    "cpu", refuses, core=core, kda=kda, kda_from_logits=kda_from_logits, linear=linear_by_core(core), step=step,
    facts=jit.facts,
)  # fmt: skip

"""The GPU kernels as torch custom ops, and as backends. Knows torch alone: a tier is imported when a kernel first runs."""

from dataclasses import replace
from functools import wraps
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from palimpsest.ops.arguments import check
from palimpsest.ops.backends import NO_TRANSFORMS, Backend, Problem, Segments
from palimpsest.ops.gates import SigmoidDecay
from palimpsest.ops.gpu.workspace import LinearArguments, MemoryArguments, schema

_LIB = torch.library.Library("palimpsest_gpu", "DEF")
_LIB.define(f"delta_memory({schema(MemoryArguments)}) -> (Tensor, Tensor)")
_LIB.define(
    f"delta_memory_backward(Tensor d_out, Tensor? d_state, {schema(MemoryArguments)})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_LIB.define(f"linear_memory({schema(LinearArguments)}) -> (Tensor, Tensor)")
_LIB.define(
    f"linear_memory_backward(Tensor d_out, Tensor? d_state, {schema(LinearArguments)}) -> (Tensor, Tensor, Tensor, Tensor)"
)
_LIB.define(
    "step_(Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor beta, Tensor(a!) state, float scale) -> Tensor"
)


def _on_the_device_of_its_tensors(run):
    """A launch goes to the current device, which need not be that of the tensors."""

    @wraps(run)
    def there(x: Tensor, *rest):
        if not x.is_cuda or x.get_device() == torch.cuda.current_device():
            return run(x, *rest)
        with torch.cuda.device(x.device):
            return run(x, *rest)

    return there


def _delta_memory(hopper: bool):
    """The tier's kernels."""
    if hopper:
        from palimpsest.ops.gpu.hopper import delta_memory
    else:
        from palimpsest.ops.gpu.triton import delta_memory
    return delta_memory


@_on_the_device_of_its_tensors
def _forward(*arguments):
    x = MemoryArguments(*arguments)
    _check_memory(x)
    return _delta_memory(x.hopper).forward(x)


@_on_the_device_of_its_tensors
def _backward(d_out, d_state, *arguments):
    x = MemoryArguments(*arguments)
    _check_memory(x, d_out, d_state)
    return _delta_memory(x.hopper).backward(d_out, d_state, x)


@_on_the_device_of_its_tensors
def _linear_forward(*arguments):
    x = LinearArguments(*arguments)
    _check_linear(x)
    from palimpsest.ops.gpu.triton import linear

    return linear.forward(x)


@_on_the_device_of_its_tensors
def _linear_backward(d_out, d_state, *arguments):
    x = LinearArguments(*arguments)
    _check_linear(x, d_out, d_state)
    from palimpsest.ops.gpu.triton import linear

    return linear.backward(d_out, d_state, x)


@_on_the_device_of_its_tensors
def _step_(q, k, v, log_decay, beta, state, scale):
    check("gpu_step", (q, k, v, log_decay, beta, state))
    from palimpsest.ops.gpu.triton import step

    return step.step_(q, k, v, log_decay, beta, state, scale)


def _check_memory(x: MemoryArguments, *gradients: Tensor | None) -> None:
    """The operators' own door: they can be called by anybody."""
    op = "gpu_delta_memory_backward" if gradients else "gpu_delta_memory"
    vectors = isinstance(x.erase, Tensor) and x.erase.ndim == 4
    inputs = (x.q, x.k, x.v, x.log_decay, x.erase, x.state, x.A_log, x.dt_bias)
    check(f"{op}, vectors" if vectors else op, (*inputs, *gradients), x.cu_seqlens)
    gated = x.gate != 0
    if x.gate not in (0, 1, 2) or (x.A_log is not None) != gated or (x.dt_bias is not None) != gated:
        raise ValueError(f"gate is {x.gate}; it must be 0, without A_log and dt_bias, or 1 or 2, with both")
    if (vectors and gated) or (x.erase_before_decay and not vectors):
        raise ValueError("a gate needs beta, erase [B, T, HV], and erase_before_decay a vector, erase [B, T, HV, K]")
    if x.hopper and x.q.device.type == "cpu":
        raise ValueError("q is on the CPU; the Hopper kernels read tensors on a GPU")
    if x.hopper and (x.q.dtype not in (torch.bfloat16, torch.float16) or {x.q.shape[3], x.v.shape[3]} - {64, 128}):
        raise ValueError(
            f"q is {x.q.dtype} with {x.q.shape[3]} channels a head and v has {x.v.shape[3]}; "
            "the Hopper kernels take torch.bfloat16 or torch.float16, and 64 or 128"
        )
    _check_launch(x.q, x.v, x.cu_seqlens)


def _check_linear(x: LinearArguments, *gradients: Tensor | None) -> None:
    op = "gpu_linear_memory_backward" if gradients else "gpu_linear_memory"
    check(op, (x.q, x.k, x.v, x.state, *gradients), x.cu_seqlens)
    _check_launch(x.q, x.v, x.cu_seqlens)


LAUNCH = 2**31  # what a launch can count: blocks, tokens, and the numbers of one chunk


def _check_launch(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> None:
    """Addresses are 64 bits wide in every kernel; these are not."""
    (B, T, _, K), (HV, V) = q.shape, v.shape[2:]
    chunks = B * T // 32 + (B if cu_seqlens is None else cu_seqlens.shape[0])
    if T >= LAUNCH // 2 or chunks * HV >= LAUNCH or 256 * HV * max(K, V) >= LAUNCH:
        raise ValueError(
            f"q has shape {tuple(q.shape)} and v {tuple(v.shape)}; that is more than one launch can count: "
            "cut the batch, the heads or the sequence, and carry the state over"
        )


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _fake_forward(*arguments):
    x = MemoryArguments(*arguments)
    _check_memory(x)
    return _like(x.v), x.new_state()


def _fake_backward(d_out, d_state, *arguments):
    x = MemoryArguments(*arguments)
    _check_memory(x, d_out, d_state)
    of_parameters = (x.q.new_empty(0) if p is None else _like(p) for p in (x.A_log, x.dt_bias))
    return *map(_like, (x.q, x.k, x.v, x.log_decay, x.erase)), x.new_state(), *of_parameters


def _fake_linear(*arguments):
    x = LinearArguments(*arguments)
    _check_linear(x)
    return _like(x.v), x.new_state()


def _fake_linear_backward(d_out, d_state, *arguments):
    x = LinearArguments(*arguments)
    _check_linear(x, d_out, d_state)
    return *map(_like, (x.q, x.k, x.v)), x.new_state()


def _fake_step(q, k, v, log_decay, beta, state, scale):
    check("gpu_step", (q, k, v, log_decay, beta, state))
    return _like(v)


def _save(ctx, kind, inputs):
    """Keep a call's arguments for its backward: tensors as autograd wants them kept, the rest as they are."""
    ctx.set_materialize_grads(False)  # a last state that nobody used has no gradient, rather than zeros
    arguments = kind(*inputs)
    ctx.tensors = [name for name, x in arguments._asdict().items() if isinstance(x, Tensor)]
    ctx.save_for_backward(*(getattr(arguments, name) for name in ctx.tensors))
    ctx.arguments = arguments._replace(**dict.fromkeys(ctx.tensors))


def _saved(ctx):
    return ctx.arguments._replace(**dict(zip(ctx.tensors, ctx.saved_tensors)))


def _setup_context(ctx, inputs, output):
    _save(ctx, MemoryArguments, inputs)


def _gradients(ctx, d_out, d_state):
    x = _saved(ctx)
    d_out = torch.zeros_like(x.v) if d_out is None else d_out
    all_gradients = _memory_backward(d_out, d_state, *x)
    d_q, d_k, d_v, d_log_decay, d_erase, d_first, d_A_log, d_dt_bias = all_gradients
    gradients = dict(
        q=d_q, k=d_k, v=d_v, log_decay=d_log_decay, erase=d_erase,
        state=None if x.state is None else d_first,
        A_log=None if x.A_log is None else d_A_log,
        dt_bias=None if x.dt_bias is None else d_dt_bias,
    )  # fmt: skip
    return tuple(gradients.get(name) for name in MemoryArguments._fields)


def _setup_linear(ctx, inputs, output):
    _save(ctx, LinearArguments, inputs)


def _linear_gradients(ctx, d_out, d_state):
    x = _saved(ctx)
    d_out = torch.zeros_like(x.v) if d_out is None else d_out
    d_q, d_k, d_v, d_first = _linear_memory_backward(d_out, d_state, *x)
    gradients = dict(q=d_q, k=d_k, v=d_v, state=None if x.state is None else d_first)
    return tuple(gradients.get(name) for name in LinearArguments._fields)


for _key in ("CUDA", "CPU"):  # on a CPU the kernels run under Triton's interpreter: for tests
    _LIB.impl("delta_memory", _forward, _key)
    _LIB.impl("delta_memory_backward", _backward, _key)
    _LIB.impl("linear_memory", _linear_forward, _key)
    _LIB.impl("linear_memory_backward", _linear_backward, _key)
    _LIB.impl("step_", _step_, _key)
_FAKES = {
    "delta_memory": _fake_forward,
    "delta_memory_backward": _fake_backward,
    "linear_memory": _fake_linear,
    "linear_memory_backward": _fake_linear_backward,
    "step_": _fake_step,
}
for _name, _fake in _FAKES.items():
    torch.library.register_fake(f"palimpsest_gpu::{_name}", _fake, lib=_LIB)
torch.library.register_autograd("palimpsest_gpu::delta_memory", _gradients, setup_context=_setup_context, lib=_LIB)
torch.library.register_autograd(
    "palimpsest_gpu::linear_memory", _linear_gradients, setup_context=_setup_linear, lib=_LIB
)


def _refuse_second_derivative(ctx, *gradients):
    raise NotImplementedError(
        "the GPU kernels have first derivatives only, and the gradient of their gradient was asked for; call with "
        "backend='chunked'"
    )


for _name in ("delta_memory_backward", "linear_memory_backward"):
    torch.library.register_autograd(f"palimpsest_gpu::{_name}", _refuse_second_derivative, lib=_LIB)


_PLAIN = {Tensor, torch.nn.Parameter, type(None), int, float, bool}


def _direct(function, op, setup=None, gradients=None):
    """`op`, without its dispatch where nobody needs it: a third of the host's time of a call, half of it with gradients."""
    with_gradients = op
    if setup is not None:
        rules: dict[str, Any] = dict(forward=function, setup_context=setup, backward=gradients)
        rules = {name: staticmethod(rule) for name, rule in rules.items()}
        with_gradients = type("Direct", (torch.autograd.Function,), rules).apply

    def run(*arguments):
        if torch.compiler.is_compiling():
            return op(*arguments)
        for x in arguments:
            if type(x) not in _PLAIN or (isinstance(x, Tensor) and x.is_neg()):  # torch negates those views on the way
                return op(*arguments)
        if not torch.is_grad_enabled():
            return function(*arguments)
        if any(isinstance(x, Tensor) and x.requires_grad for x in arguments):
            return with_gradients(*arguments)
        with torch.no_grad():
            return function(*arguments)

    return run


_memory_backward = _direct(_backward, torch.ops.palimpsest_gpu.delta_memory_backward)
_linear_memory_backward = _direct(_linear_backward, torch.ops.palimpsest_gpu.linear_memory_backward)


_GATED = 5  # place of the gate among the arguments of kda_from_logits


def _arguments(hopper: bool, op: str, given: tuple) -> MemoryArguments:
    """What a backend's function of this name is given, as the operator takes it."""
    if op == "core":
        q, k, erase, write, log_decay, *rest = given
        return _memory_arguments(q, k, write, log_decay, erase.to(k.dtype), *rest, hopper=hopper)
    if op == "kda_from_logits":
        return _memory_arguments(*given[:_GATED], *given[_GATED + 1 :], gate=given[_GATED], hopper=hopper)
    return _memory_arguments(*given, hopper=hopper)


def _memory_arguments(
    q, k, v, log_decay, erase, state, scale, cu_seqlens, gate=None, erase_before_decay=False, *, hopper
) -> MemoryArguments:
    A_log = dt_bias = None
    kind, floor = 0, 0.0
    if gate is not None:
        H, K = log_decay.shape[2:]
        A_log, dt_bias = gate.A_log.reshape(H), gate.dt_bias.reshape(H, K)
        kind, floor = (2, gate.floor) if isinstance(gate, SigmoidDecay) else (1, 0.0)
    return MemoryArguments(
        q, k, v, log_decay, erase, state, scale, cu_seqlens, A_log=A_log, dt_bias=dt_bias, gate=kind, floor=floor,
        erase_before_decay=erase_before_decay, hopper=hopper,
    )  # fmt: skip


def _segments(hopper: bool) -> Segments:
    """A part of a longer sequence: one preparation for all that is asked of it, and the backward without a forward."""

    @_on_the_device_of_its_tensors
    def opened(_q, rows, x):
        _check_memory(x)
        return _delta_memory(hopper).opened(x, rows)

    def gradients(op, d_out, d_state, given):
        x = _arguments(hopper, op, given)
        d_q, d_k, d_v, d_log_decay, d_erase, d_first, d_A_log, d_dt_bias = _memory_backward(d_out, d_state, *x)
        d_first = None if x.state is None else d_first
        if op == "core":
            return d_first, d_q, d_k, d_erase, d_v, d_log_decay
        parameters = []
        if op == "kda_from_logits":
            gate = given[_GATED]
            parameters = [d_A_log.view(gate.A_log.shape), d_dt_bias.view(gate.dt_bias.shape)]
        return d_first, d_q, d_k, d_v, d_log_decay, d_erase, *parameters

    def open_(op, given, rows):
        x = _arguments(hopper, op, given)
        return opened(x.q, rows, x)

    return Segments(("core", "kda", "kda_from_logits"), open_, gradients)


def _family(name: str, refuses, hopper: bool) -> Backend:
    apply = _direct(_forward, torch.ops.palimpsest_gpu.delta_memory, _setup_context, _gradients)

    def core(*given):
        return apply(*_arguments(hopper, "core", given))

    def kda(*given):
        return apply(*_arguments(hopper, "kda", given))

    def kda_from_logits(*given):
        return apply(*_arguments(hopper, "kda_from_logits", given))

    def dplr(q, k, v, a, b, log_decay, state, scale, cu_seqlens):
        """A token of DPLR is two of the core: b written with what a reads, then k with v and no decay."""
        heads = v.shape[2]
        q, k = (x.repeat_interleave(heads // x.shape[2], 2) for x in (q, k))
        zeros = torch.zeros_like

        def pairs(first, second):
            return torch.stack((first, second), 2).flatten(1, 2)

        x = _memory_arguments(
            pairs(zeros(q), q), pairs(b.to(k.dtype), k), pairs(zeros(v), v), pairs(log_decay, zeros(log_decay)),
            pairs(-a.to(k.dtype), zeros(k)), state, scale, None if cu_seqlens is None else 2 * cu_seqlens,
            erase_before_decay=True, hopper=hopper,
        )  # fmt: skip
        output, state = apply(*x)
        return output[:, 1::2], state

    return Backend(
        name, refuses, core=core, kda=kda, kda_from_logits=kda_from_logits, dplr=dplr, starts_empty=True,
        segments=_segments(hopper),
    )  # fmt: skip


_HAS_TRITON = find_spec("triton") is not None  # asked once: torch.compile would trace the question


def _refuses(problem: Problem) -> str | None:
    if problem.device != "cuda":
        return f"needs a CUDA device; the tensors are on {problem.device}"
    if problem.transformed:
        return NO_TRANSFORMS
    if problem.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"has no kernel for {problem.dtype}; use bfloat16, float16 or float32"
    if problem.key_dim > 256 or problem.value_dim > 256:
        return f"holds at most 256 channels a head; these have {problem.key_dim} and {problem.value_dim}"
    if problem.capability and problem.capability < (8, 0):
        return f"needs compute capability 8.0 or later; this GPU has {problem.capability[0]}.{problem.capability[1]}"
    if not _HAS_TRITON:
        return "needs Triton: pip install palimpsest-kda[triton]"
    return None


def _refuses_hopper(problem: Problem) -> str | None:
    if problem.device != "cuda" or problem.capability != (9, 0):
        return "needs a Hopper GPU (compute capability 9.0)"
    if problem.transformed:
        return NO_TRANSFORMS
    if problem.dtype not in (torch.bfloat16, torch.float16):
        return f"multiplies in bfloat16 or float16; the tensors are {problem.dtype}"
    if problem.key_dim not in (64, 128) or problem.value_dim not in (64, 128):
        return f"is built for 64 or 128 channels a head; these have {problem.key_dim} and {problem.value_dim}"
    if problem.packed and not _HAS_TRITON:
        return "needs Triton for packed sequences: pip install palimpsest-kda[triton]"
    return None


TRITON = replace(
    _family("triton", _refuses, hopper=False),
    linear=_direct(_linear_forward, torch.ops.palimpsest_gpu.linear_memory, _setup_linear, _linear_gradients),
    step=_direct(_step_, torch.ops.palimpsest_gpu.step_),
)
HOPPER = _family("hopper", _refuses_hopper, hopper=True)

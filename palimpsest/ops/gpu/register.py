"""The GPU kernels as torch custom ops, and as backends. Knows torch alone: Triton is imported when a kernel first runs.

One op serves the whole family. `erase` [B, T, HV] is KDA's strength (erase = beta k, write = beta v);
`erase` [B, T, HV, K] is a vector, and then v is what is written. With a gate, log_decay holds logits, beta is a logit
and q, k are normalised inside. `exclusive`: erase reads the memory before its own token's decay.
"""

from functools import cache, wraps
from importlib.util import find_spec

import torch
from torch import Tensor

from palimpsest.ops.backends import Backend, Problem
from palimpsest.ops.gates import SigmoidDecay
from palimpsest.ops.gpu.workspace import new_state, state_or_zeros

_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor erase, Tensor? state, float scale, Tensor? cu_seqlens, "
    "Tensor? A_log, Tensor? dt_bias, int gate, float floor, bool exclusive, bool hopper"
)
_LIB = torch.library.Library("palimpsest_gpu", "DEF")
_LIB.define(f"delta_memory({_ARGUMENTS}) -> (Tensor, Tensor)")
_LIB.define(
    f"delta_memory_backward(Tensor d_out, Tensor? d_state, {_ARGUMENTS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_LIB.define(
    "linear_memory(Tensor q, Tensor k, Tensor v, Tensor? state, float scale, Tensor? cu_seqlens) -> (Tensor, Tensor)"
)
_LIB.define(
    "linear_memory_backward(Tensor d_out, Tensor? d_state, Tensor q, Tensor k, Tensor v, Tensor? state, float scale, "
    "Tensor? cu_seqlens) -> (Tensor, Tensor, Tensor, Tensor)"
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


@_on_the_device_of_its_tensors
def _forward(*arguments):
    *arguments, hopper = arguments
    q, k, v, log_decay, erase, state, _, cu_seqlens, A_log, dt_bias, *_ = arguments
    _expect_one_device("q k v log_decay erase state A_log dt_bias", q, k, v, log_decay, erase, state, A_log, dt_bias)
    if hopper:
        from palimpsest.ops.gpu.hopper import delta_memory
    else:
        from palimpsest.ops.gpu.triton import delta_memory

        arguments[5] = state_or_zeros(state, q, v, cu_seqlens)
    return delta_memory.forward(*arguments)


@_on_the_device_of_its_tensors
def _backward(*arguments):
    *arguments, hopper = arguments
    if hopper:
        from palimpsest.ops.gpu.hopper import delta_memory
    else:
        from palimpsest.ops.gpu.triton import delta_memory

        q, v, cu_seqlens = arguments[2], arguments[4], arguments[9]
        arguments[1], arguments[7] = (state_or_zeros(arguments[x], q, v, cu_seqlens) for x in (1, 7))  # d_state, state
    return delta_memory.backward(*arguments)


@_on_the_device_of_its_tensors
def _linear_forward(q, k, v, state, scale, cu_seqlens):
    _expect_one_device("q k v state", q, k, v, state)
    from palimpsest.ops.gpu.triton import linear

    return linear.forward(q, k, v, state_or_zeros(state, q, v, cu_seqlens), scale, cu_seqlens)


@_on_the_device_of_its_tensors
def _linear_backward(d_out, d_state, q, k, v, state, scale, cu_seqlens):
    from palimpsest.ops.gpu.triton import linear

    d_state, state = (state_or_zeros(x, q, v, cu_seqlens) for x in (d_state, state))
    return linear.backward(d_out, d_state, q, k, v, state, scale, cu_seqlens)


@_on_the_device_of_its_tensors
def _step_(q, k, v, log_decay, beta, state, scale):
    _expect_one_device("q k v log_decay beta state", q, k, v, log_decay, beta, state)
    from palimpsest.ops.gpu.triton import step

    return step.step_(q, k, v, log_decay, beta, state, scale)


def _expect_one_device(names: str, *tensors: Tensor | None) -> None:
    """A kernel that is handed an address of another device faults; say it before."""
    q = tensors[0]
    assert q is not None
    index = q.get_device()
    for at, x in enumerate(tensors):
        if x is not None and x.get_device() != index:
            name = names.split()[at]
            raise ValueError(f"{name} is on {x.device} and q on {q.device}; move all of them to one device")


def _fake_forward(q, k, v, log_decay, erase, state, scale, cu_seqlens, *rest):
    return v.new_empty(v.shape), new_state(q, v, cu_seqlens)


def _fake_backward(d_out, d_state, q, k, v, log_decay, erase, state, scale, cu_seqlens, A_log, dt_bias, *rest):
    nothing = q.new_empty(0)
    parameters = (nothing if x is None else x.new_empty(x.shape) for x in (A_log, dt_bias))
    return *(x.new_empty(x.shape) for x in (q, k, v, log_decay, erase)), new_state(q, v, cu_seqlens), *parameters


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # a last state that nobody used has no gradient, rather than zeros
    ctx.save_for_backward(*inputs[:6], *inputs[7:10])
    ctx.scale, ctx.rest = inputs[6], inputs[10:]


def _autograd_backward(ctx, d_out, d_state):
    *sequences, state, cu_seqlens, A_log, dt_bias = ctx.saved_tensors
    d_out = torch.zeros_like(sequences[2]) if d_out is None else d_out
    grads = torch.ops.palimpsest_gpu.delta_memory_backward(
        d_out, d_state, *sequences, state, ctx.scale, cu_seqlens, A_log, dt_bias, *ctx.rest
    )
    d_first = None if state is None else grads[5]
    parameters = grads[6:] if A_log is not None else (None, None)
    return *grads[:5], d_first, None, None, *parameters, None, None, None, None


def _setup_linear(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:4], inputs[5])
    ctx.scale = inputs[4]


def _linear_gradients(ctx, d_out, d_state):
    q, k, v, state, cu_seqlens = ctx.saved_tensors
    d_out = torch.zeros_like(v) if d_out is None else d_out
    grads = torch.ops.palimpsest_gpu.linear_memory_backward(d_out, d_state, q, k, v, state, ctx.scale, cu_seqlens)
    return *grads[:3], None if state is None else grads[3], None, None


for _key in ("CUDA", "CPU"):  # on a CPU the kernels run under Triton's interpreter: for tests
    _LIB.impl("delta_memory", _forward, _key)
    _LIB.impl("delta_memory_backward", _backward, _key)
    _LIB.impl("linear_memory", _linear_forward, _key)
    _LIB.impl("linear_memory_backward", _linear_backward, _key)
    _LIB.impl("step_", _step_, _key)
torch.library.register_fake("palimpsest_gpu::delta_memory", _fake_forward, lib=_LIB)
torch.library.register_fake("palimpsest_gpu::delta_memory_backward", _fake_backward, lib=_LIB)
torch.library.register_fake(
    "palimpsest_gpu::linear_memory",
    lambda q, k, v, state, scale, cu_seqlens: (v.new_empty(v.shape), new_state(q, v, cu_seqlens)),
    lib=_LIB,
)
torch.library.register_fake(
    "palimpsest_gpu::linear_memory_backward",
    lambda d_out, d_state, q, k, v, state, scale, cu_seqlens: (
        *(x.new_empty(x.shape) for x in (q, k, v)),
        new_state(q, v, cu_seqlens),
    ),
    lib=_LIB,
)
torch.library.register_autograd(
    "palimpsest_gpu::linear_memory", _linear_gradients, setup_context=_setup_linear, lib=_LIB
)
torch.library.register_fake("palimpsest_gpu::step_", lambda q, k, v, *rest: v.new_empty(v.shape), lib=_LIB)
torch.library.register_autograd(
    "palimpsest_gpu::delta_memory", _autograd_backward, setup_context=_setup_context, lib=_LIB
)


_PLAIN = {Tensor, torch.nn.Parameter, type(None), int, float, bool}


def _direct(function, op, setup=None, gradients=None):
    """`op`, without its dispatch where nobody needs it: a third of the host's time of a call, half of it with gradients."""
    with_gradients = op
    if setup:
        rules = dict(forward=function, setup_context=setup, backward=gradients)
        rules = {name: staticmethod(rule) for name, rule in rules.items()}
        with_gradients = type("Direct", (torch.autograd.Function,), rules).apply

    def run(*arguments):
        for x in arguments:
            if type(x) not in _PLAIN:
                return op(*arguments)
        if torch.compiler.is_compiling():
            return op(*arguments)
        if not torch.is_grad_enabled():
            return function(*arguments)
        if any(isinstance(x, Tensor) and x.requires_grad for x in arguments):
            return with_gradients(*arguments)
        with torch.no_grad():
            return function(*arguments)

    return run


def _family(name: str, refuses, hopper: bool) -> Backend:
    run = _direct(_forward, torch.ops.palimpsest_gpu.delta_memory, _setup_context, _autograd_backward)

    def core(q, k, erase, write, log_decay, state, scale, cu_seqlens):
        return run(
            q, k, write, log_decay, erase.to(k.dtype), state, scale, cu_seqlens, None, None, 0, 0.0, False, hopper
        )

    def kda(q, k, v, log_decay, beta, state, scale, cu_seqlens):
        return run(q, k, v, log_decay, beta, state, scale, cu_seqlens, None, None, 0, 0.0, False, hopper)

    def kda_from_logits(q, k, v, decay_logits, beta_logits, gate, state, scale, cu_seqlens):
        H, K = decay_logits.shape[2:]
        kind, floor = (2, gate.floor) if isinstance(gate, SigmoidDecay) else (1, 0.0)
        A_log, dt_bias = gate.A_log.reshape(H), gate.dt_bias.reshape(H, K)
        return run(
            q, k, v, decay_logits, beta_logits, state, scale, cu_seqlens, A_log, dt_bias, kind, floor, False, hopper
        )

    def dplr(q, k, v, a, b, log_decay, state, scale, cu_seqlens):
        """A token of DPLR is two of the core: b written with what a reads, then k with v and no decay."""
        heads = v.shape[2]
        q, k = (x.repeat_interleave(heads // x.shape[2], 2) for x in (q, k))
        zeros = torch.zeros_like

        def pairs(first, second):
            return torch.stack((first, second), 2).flatten(1, 2)

        output, state = run(
            pairs(zeros(q), q), pairs(b.to(k.dtype), k), pairs(zeros(v), v), pairs(log_decay, zeros(log_decay)),
            pairs(-a.to(k.dtype), zeros(k)), state, scale, None if cu_seqlens is None else 2 * cu_seqlens,
            None, None, 0, 0.0, True, hopper,
        )  # fmt: skip
        return output[:, 1::2], state

    return Backend(
        name,
        refuses,
        core=core,
        kda=kda,
        kda_from_logits=kda_from_logits,
        dplr=dplr,
        linear=_direct(_linear_forward, torch.ops.palimpsest_gpu.linear_memory, _setup_linear, _linear_gradients),
        step=_direct(_step_, torch.ops.palimpsest_gpu.step_),
        starts_empty=True,
    )


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _refuses(problem: Problem) -> str | None:
    if problem.device != "cuda":
        return f"needs a CUDA device; the tensors are on {problem.device}"
    if problem.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"has no kernel for {problem.dtype}; use bfloat16, float16 or float32"
    if problem.key_dim > 256 or problem.value_dim > 256:
        return f"holds at most 256 channels a head; these have {problem.key_dim} and {problem.value_dim}"
    if problem.capability and problem.capability < (8, 0):
        return f"needs compute capability 8.0 or later; this GPU has {problem.capability[0]}.{problem.capability[1]}"
    if not _has_triton():
        return "needs Triton: pip install palimpsest-kda[triton]"
    return None


def _refuses_hopper(problem: Problem) -> str | None:
    if problem.device != "cuda" or problem.capability != (9, 0):
        return "needs a Hopper GPU (compute capability 9.0)"
    if problem.dtype not in (torch.bfloat16, torch.float16):
        return f"multiplies in bfloat16 or float16; the tensors are {problem.dtype}"
    if problem.key_dim not in (64, 128) or problem.value_dim not in (64, 128):
        return f"is built for 64 or 128 channels a head; these have {problem.key_dim} and {problem.value_dim}"
    if (problem.packed or problem.op == "step" or problem.variant == "linear_attention") and not _has_triton():
        return "needs Triton for packed sequences, steps and linear attention: pip install palimpsest-kda[triton]"
    return None


TRITON = _family("triton", _refuses, hopper=False)
HOPPER = _family("hopper", _refuses_hopper, hopper=True)

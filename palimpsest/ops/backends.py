"""Which implementation runs, and why. A backend states its limits as a sentence; nothing here guesses."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.autograd import forward_ad

Op = Literal["core", "kda", "kda_from_logits", "dplr", "linear", "step", "lookup"]
_WORDS: dict[Op, str] = {  # of a refusal
    "core": "the core of the family",
    "kda": "KDA",
    "kda_from_logits": "KDA from logits",
    "dplr": "DPLR",
    "linear": "linear attention",
    "step": "a single step",
    "lookup": "softmax attention",
}


class Problem(NamedTuple):
    """The facts of one call that a backend may depend on. An option that is not a field here does not exist.

    Attributes:
        op: which of a backend's functions is asked for.
        variant: the public function that was called.
        device: the kind of device, "cpu" or "cuda".
        dtype: of q, k and v.
        key_dim, value_dim: channels a head.
        tokens: of the longest sequence, or of all packed ones together.
        sequences: in the batch, or packed.
        heads, value_heads: of q and k; of v.
        packed: by cu_seqlens.
        needs_grad: an argument wants a gradient.
        gate: of kda_from_logits: "softplus" or "sigmoid".
        capability: of a CUDA device.
        transformed: by torch.func (grad, jvp, vmap ...), or within a level of forward-mode derivatives.
    """

    op: Op
    variant: str
    device: str
    dtype: torch.dtype
    key_dim: int
    value_dim: int
    tokens: int
    sequences: int
    heads: int
    value_heads: int
    packed: bool = False
    needs_grad: bool = False
    gate: str = "none"
    capability: tuple[int, int] | None = None
    transformed: bool = False


class Segments(NamedTuple):
    """What a backend may do better than by its plain functions for a sequence in fragments; see affine.py.

    Both take the name of an op and what the function of that name takes, as one tuple.

    Attributes:
        ops: for which ops.
        opened: (op, arguments, rows) -> affine.Opened of the same arguments; `rows` of the states are open.
        gradients: (op, d_output, d_state or None, arguments) -> the gradients of the state and of each tensor, without a
            forward; of a gate's A_log and dt_bias last.
    """

    ops: tuple[Op, ...]
    opened: Callable
    gradients: Callable


@dataclass(frozen=True)
class Backend:
    """A set of implementations under one name, one a field of `Op`; None where it has none, and then it refuses.

    Every run function gets checked tensors: heads as the caller gave them (q and k may have fewer than v), state None
    only where the backend `starts_empty`, scale a number, cu_seqlens int or None. It returns (output in v's dtype, state
    in fp32, or fp64 for fp64 inputs) and is differentiable. `step` edits its state in place and returns the output alone;
    it takes microseconds, so it alone checks for itself what it gets: `arguments.check("kda_step_", ...)`.

        core(q, k, erase, write, log_decay, state, scale, cu_seqlens)
        kda(q, k, v, log_decay, beta, state, scale, cu_seqlens)
        kda_from_logits(q, k, v, decay_logits, beta_logits, gate, state, scale, cu_seqlens)
        dplr(q, k, v, a, b, log_decay, state, scale, cu_seqlens)
        linear(q, k, v, state, scale, cu_seqlens); `linear_by_core` makes it of a core
        step(q, k, v, log_decay, beta, state, scale)
        lookup(q, k, v, keys, values, scale, cu_seqlens) -> output

    Attributes:
        name: what `backend=` calls it.
        refuses: the reason why it cannot take a problem, as the rest of "it ..."; None if it can.
        core, kda, kda_from_logits, dplr, linear, step, lookup: the run functions above.
        starts_empty: sequences without a state come as None; otherwise as zeros.
        facts: what a user may want to know of its kernels on this machine, such as where they are kept.
        segments: see `Segments`; None if it has nothing better.
    """

    name: str
    refuses: Callable[[Problem], str | None]
    core: Callable | None = None
    kda: Callable | None = None
    kda_from_logits: Callable | None = None
    dplr: Callable | None = None
    linear: Callable | None = None
    step: Callable | None = None
    lookup: Callable | None = None
    starts_empty: bool = False
    facts: Callable[[], dict[str, str]] | None = None
    segments: Segments | None = None

    def refusal(self, problem: Problem) -> str | None:
        """Why this backend cannot take the problem, as a sentence; None if it can."""
        if getattr(self, problem.op) is None:
            return f"has no kernel for {_WORDS[problem.op]}"
        return self.refuses(problem)


def linear_by_core(core: Callable) -> Callable:
    """The run function of linear attention for a backend that has none but the core: no decay, nothing erased."""

    def linear(q, k, v, state, scale, cu_seqlens):
        zeros = v.new_zeros(1, 1, 1, 1).expand(*v.shape[:3], q.shape[-1])
        return core(q, k, zeros.to(k.dtype), v, zeros, state, scale, cu_seqlens)

    return linear


def within_a_transform() -> bool:
    """Whether torch.func, or a level of dual numbers, stands around this call: a kernel knows neither tangents nor batches."""
    if forward_ad._current_level >= 0:
        return True
    return not torch.compiler.is_compiling() and _functorch.peek_interpreter_stack() is not None


NO_TRANSFORMS = "has no rule for torch.func (grad, jvp, vmap ...) and forward-mode derivatives"

_BACKENDS: list[Backend] = []  # fastest first


def register(backend: Backend, *, first: bool = False) -> None:
    """Add a backend; "auto" tries them in order of registration.

    Args:
        backend: with a name of its own.
        first: try it before all others.

    Raises:
        ValueError: the name is taken.
    """
    if backend.name in names():
        raise ValueError(f"backend {backend.name!r} is registered already; give yours another name")
    _BACKENDS.insert(0 if first else len(_BACKENDS), backend)


def names() -> tuple[str, ...]:
    """The registered backends, in the order in which "auto" tries them."""
    return tuple(backend.name for backend in _BACKENDS)


def choose(problem: Problem, name: str = "auto") -> Backend:
    """Return the named backend, or with "auto" the first that does not refuse. A name never falls back.

    Args:
        problem: the facts of the call.
        name: "auto", or one of `names()`.

    Returns:
        The backend, which has the problem's op and does not refuse.

    Raises:
        ValueError: the name is unknown, or the named backend refuses; the message says why and what would run.
    """
    if name == "auto":
        return next(backend for backend in _BACKENDS if backend.refusal(problem) is None)
    for backend in _BACKENDS:
        if backend.name == name:
            if reason := backend.refusal(problem):
                able = ", ".join(b.name for b in _BACKENDS if b.refusal(problem) is None)
                raise ValueError(f"backend {name!r} cannot run this call: it {reason}; {able} can")
            return backend
    raise ValueError(f"backend {name!r} is unknown; this machine has {', '.join(names())}")


def explain(problem: Problem) -> str:
    """One line per backend: what it says to this call. The first "ok" is what "auto" runs.

    >>> problem = Problem("kda", "kda", "cpu", torch.float64, 64, 64, 128, sequences=1, heads=4, value_heads=4)
    >>> answers = dict(line.split(maxsplit=1) for line in explain(problem).splitlines())
    >>> answers["chunked"], answers["triton"]
    ('ok', 'needs a CUDA device; the tensors are on cpu')
    """
    return "\n".join(f"{backend.name:10} {backend.refusal(problem) or 'ok'}" for backend in _BACKENDS)


def facts() -> dict[str, dict[str, str]]:
    """What each backend has to say of its kernels on this machine, such as where they are kept; those with nothing are left out.

    >>> "reference" in facts()
    False
    """
    return {backend.name: backend.facts() for backend in _BACKENDS if backend.facts is not None}

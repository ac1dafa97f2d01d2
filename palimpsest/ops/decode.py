"""One token through a layer, as a few functions that a GPU runs as one launch each: what decoding consists of.

    project               several projections of a few rows
    add_norm              the residual stream takes up what a layer adds, normalised for the next
    memory_layer_step_    KDA between its projections
    latent_step           latent attention over a cache with room
    latent_layer_step_    latent attention between its projections
    route, experts        a mixture of experts that reads the chosen experts' weights alone

Each is a few lines of plain PyTorch here, the law of its kernel. No function looks at numbers on the host or makes a
shape that depends on them, so a CUDA graph holds them all. Nothing here has a gradient.

Letters  B sequences (or N tokens, one each), D channels, H heads, K channels of a head, E experts, k of them a token.
Forms    "torch", "triton" and "cpu" by name, or "auto": triton where `refusal` has nothing against it, cpu where there is a
         compiled function that takes the tensors. A name never falls back.
"""

from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from palimpsest.ops.arguments import chosen_experts, fit, latent_channels, latent_values, state_dtype
from palimpsest.ops.backends import within_a_transform
from palimpsest.ops.experts import spoil_unknown
from palimpsest.ops.gates import SigmoidDecay, SoftplusDecay, l2norm

Form = Literal["auto", "torch", "triton", "cpu"]
FORMS = "auto", "torch", "triton", "cpu"
ON_CPU: dict[
    str, Callable
] = {}  # compiled functions, by the name of what they compute; None says: not for these tensors
GATHERED_PAIRS = 16
MOST_CHANNELS = 256  # of a head whose memory a multiprocessor holds
MOST_COMPILED = 4  # tokens that the compiled functions of a CPU take at once
MOST_TOKENS = 64  # beyond, products of whole matrices are faster


def refusal(x: Tensor, most: int | None = None) -> str | None:
    """Why the kernels cannot take x, of `most` rows at most, as a sentence; None if they can."""
    if not x.is_cuda:
        return f"needs a CUDA device; the tensors are on {x.device}"
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"has no kernel for {x.dtype}; use bfloat16, float16 or float32"
    if most is not None and len(x) > most:
        return f"is for {most} tokens at most; these are {len(x)}"
    if torch.is_grad_enabled() and x.requires_grad:
        return "has no gradient; enter torch.no_grad()"
    if torch.is_autocast_enabled("cuda"):
        return "knows no autocast; convert the model instead"
    if _capability(x.get_device()) < (8, 0):
        return "needs compute capability 8.0 or later"
    if not _has_triton():
        return "needs Triton: pip install palimpsest-kda[triton]"
    return None


def fused(x: Tensor, form: Form = "auto", most: int | None = None) -> bool:
    """Whether the kernels run a call on x, of `most` rows at most.

    Raises:
        ValueError: the form is unknown, or named and refused.
    """
    if form not in FORMS:
        raise ValueError(f"form is {form!r}; choose one of {', '.join(map(repr, FORMS))}")
    if not isinstance(x, Tensor):
        raise TypeError(
            f"the first argument is a {type(x).__name__}; it must be a torch.Tensor, as all that have numbers"
        )
    if form in ("torch", "cpu"):
        return False
    if form == "triton" and not x.is_cuda:  # Triton's interpreter
        return True
    reason = refusal(x, most)
    if form == "triton" and reason:
        raise ValueError(f"form 'triton' cannot run this call: it {reason}; 'torch' can")
    return reason is None


def compiled(x: Tensor, form: Form = "auto") -> bool:
    """Whether a call on x is for the compiled functions of a CPU, which have no gradient."""
    if not x.is_cpu or form not in ("auto", "cpu") or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return not within_a_transform()  # tangents and batches of torch.func go through torch


def project(
    xs: list[Tensor], weights: list[Tensor], *, dtype: torch.dtype | None = None, form: Form = "auto"
) -> list[Tensor]:
    """x_i W_i^T for a few rows.

    Args:
        xs: [N, D] each, the same tensor as often as it is projected.
        weights: [O_i, D] each.
        dtype: of the results; that of xs if None. Sums are fp32 in any case.

    Returns:
        [N, O_i] each.

    >>> project([torch.ones(1, 2)] * 2, [torch.ones(1, 2), torch.ones(3, 2)])[1]
    tensor([[2., 2., 2.]])
    """
    if not xs or len(xs) != len(weights):
        raise ValueError(f"there are {len(xs)} xs and {len(weights)} weights; expected as many, one at least")
    if fused(xs[0], form, MOST_TOKENS):
        return torch.ops.palimpsest_gpu.project(xs, weights, dtype or xs[0].dtype)
    if (ys := _on_cpu("project", xs[0], form, xs, weights, dtype or xs[0].dtype)) is not None:
        return ys
    sizes: dict[str, int] = {}
    for x, weight in zip(xs, weights):
        found = fit("project", (x, weight), **sizes)
        sizes = {letter: found[letter] for letter in "ND"}
        if dtype is None and weight.dtype != x.dtype:
            raise ValueError(
                f"weight is {weight.dtype} and x is {x.dtype}; give them one dtype, or name that of the results"
            )
    if dtype is not None and dtype != xs[0].dtype:
        return [F.linear(x.to(dtype), w.to(dtype)) for x, w in zip(xs, weights, strict=True)]
    return [F.linear(x, w) for x, w in zip(xs, weights, strict=True)]


def add_norm(x: Tensor, parts: Tensor, weight: Tensor, eps: float, *, form: Form = "auto") -> tuple[Tensor, Tensor]:
    """The sum of the residual stream and what a layer gives, and its RMSNorm.

    Args:
        x: [N, D].
        parts: [N, J, D], J things to add.
        weight: [D].

    Returns:
        both [N, D] in x's dtype; the norm is that of the rounded sum.

    >>> add_norm(torch.ones(1, 2), torch.ones(1, 3, 2), torch.ones(2), 0.0)
    (tensor([[4., 4.]]), tensor([[1., 1.]]))
    """
    if fused(x, form):
        return torch.ops.palimpsest_gpu.add_norm(x, parts, weight, eps)
    if (sums := _on_cpu("add_norm", x, form, x, parts, weight, eps)) is not None:
        return sums
    fit("add_norm", (x, parts, weight))
    x = (_wide(x) + _wide(parts).sum(1)).to(x.dtype)
    return x, F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


def memory_layer_step_(
    q: Tensor, k: Tensor, v: Tensor, weights: list[Tensor], windows: list[Tensor], decay_logits: Tensor,
    decay: SoftplusDecay | SigmoidDecay, beta_logits: Tensor, gate_logits: Tensor, norm: Tensor, state: Tensor, *,
    eps: float = 1e-5, beta_max: float = 1.0, silu_gate: bool = False, form: Form = "auto",
) -> Tensor:  # fmt: skip
    """One token through a KDA layer, from its projections in to its projection out.

    Args:
        q, k, v, decay_logits, gate_logits: [B, D], D = H K, as projected.
        weights: of the three convolutions, [D, 1, W] each, W >= 2.
        windows: their last W - 1 inputs, [B, D, W - 1] each; moved on in place.
        decay: the gate of the decay, with its parameters.
        beta_logits: [B, H].
        norm: [K], the weight of the norm on the way out; eps within its root.
        state: [B, H, K, K], fp32 (fp64 in fp64), contiguous; rewritten in place.
        silu_gate: the output is gated by silu, otherwise by sigmoid.

    Returns:
        [B, D] in q's dtype.
    """
    if len(weights) != 3 or len(windows) != 3:
        raise ValueError(f"there are {len(weights)} weights and {len(windows)} windows; expected three, for q, k and v")
    given = q, k, v, decay_logits, gate_logits, *weights, state
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in given):
        raise RuntimeError(
            "memory_layer_step_ edits the state in place and has no gradient; run whole sequences, or enter torch.no_grad()"
        )
    kind, floor = (2, decay.floor) if isinstance(decay, SigmoidDecay) else (1, 0.0)
    arguments = (
        q, k, v, weights, windows, decay_logits, decay.A_log, decay.dt_bias, beta_logits, gate_logits, norm, state,
        eps, beta_max, kind, floor, silu_gate,
    )  # fmt: skip
    fits = form == "triton" or not isinstance(state, Tensor) or state.shape[-1:] <= (MOST_CHANNELS,)
    if fused(q, form) and fits:
        return torch.ops.palimpsest_gpu.memory_layer_step_(*arguments)
    if (y := _on_cpu("memory_layer_step_", q, form, *arguments)) is not None:
        return y
    A_log, dt_bias = decay.A_log, decay.dt_bias
    rows = q, k, v, *weights, *windows, decay_logits, A_log, dt_bias, beta_logits, gate_logits, norm, state
    sizes = fit("memory_layer_step_", rows)
    B, H, K = (sizes[letter] for letter in "BHK")
    wide = state.dtype
    heads = []
    for x, weight, window in zip((q, k, v), weights, windows, strict=True):
        taps = torch.cat((window, x[..., None]), -1)
        window.copy_(taps[..., 1:])
        heads.append(F.silu((taps * weight[:, 0].to(wide)).sum(-1)).view(B, H, K))
    q, k, v = l2norm(heads[0]), l2norm(heads[1]), heads[2]
    log_decay = decay(decay_logits.view(B, H, K)).to(wide)
    beta = beta_max * beta_logits.to(wide).sigmoid()
    state.mul_(log_decay.exp()[..., None])
    v_new = (v - torch.einsum("bhk,bhkv->bhv", k, state)) * beta[..., None]
    state.add_(k[..., None] * v_new[..., None, :])
    y = F.rms_norm(torch.einsum("bhk,bhkv->bhv", q, state) * K**-0.5, (K,), norm.to(wide), eps)
    gate = gate_logits.to(wide).view(B, H, K)
    return (y * (F.silu(gate) if silu_gate else gate.sigmoid())).to(gate_logits.dtype).flatten(1)


def latent_step(q: Tensor, rows: Tensor, length: Tensor, *, value_dim: int, form: Form = "auto") -> Tensor:
    """Every head of the newest tokens reads the cached rows up to its own token.

        read_t = sum_s softmax_s(q_t . row_s) value_s        s < length - T + 1 + t; value_s: the first R channels of row_s

    Args:
        q: [B, T, H, C], scaled; T newest tokens, one or a few.
        rows: [B, S, C], S rows of room, finite everywhere.
        length: [B], int64, rows filled, those of the T tokens included; at least T.
        value_dim: R.

    Returns:
        [B, T, H, R] in q's dtype.

    >>> rows = torch.tensor([[[1.0, 0.0], [3.0, 0.0], [9.0, 9.0]]])
    >>> latent_step(torch.zeros(1, 1, 1, 2), rows, torch.tensor([2]), value_dim=1)
    tensor([[[[2.]]]])
    """
    if fused(q, form):
        return torch.ops.palimpsest_gpu.latent_step(q.contiguous(), rows, length, value_dim)
    sizes = fit("latent_step", (q, rows, length))
    latent_values(value_dim, sizes["C"])
    T, S = sizes["T"], sizes["S"]
    scores = _wide(torch.einsum("bthc,bsc->bths", q, rows))
    until_BT = length[:, None] + torch.arange(1 - T, 1, device=q.device)
    hidden_BTS = torch.arange(S, device=q.device) >= until_BT[..., None]
    weights = scores.masked_fill(hidden_BTS[:, :, None], -torch.inf).softmax(-1).to(rows.dtype)
    return torch.einsum("bths,bsr->bthr", weights, rows[..., :value_dim])


def latent_layer_step_(
    q: Tensor, latent: Tensor, norm: Tensor, weights: Tensor, rows: Tensor, length: Tensor, *, eps: float = 1e-6,
    form: Form = "auto",
) -> Tensor:  # fmt: skip
    """One token through a latent attention layer without positions, from its projections in to its projection out.

    Args:
        q: [B, H (N + P)], as projected.
        latent: [B, R + P], as projected; its first R channels are still to be normalised.
        norm: [R], the weight of that norm; eps within its root.
        weights: [H, N + V, R], keys and values of each head from the latent, contiguous.
        rows: [B, S, R + P], the cache with its room, finite everywhere; the new row is written in place.
        length: [B], int64, rows filled before; one more afterwards. Below 0 the first row is overwritten, beyond S the last.

    Returns:
        [B, H V] in q's dtype.
    """
    if fused(q, form):
        return torch.ops.palimpsest_gpu.latent_layer_step_(q, latent, norm, weights, rows, length, eps)
    sizes = fit("latent_layer_step_", (q, latent, norm, weights, rows, length))
    latent_channels(sizes)
    B, S, C, H, R = (sizes[letter] for letter in "BSCHR")
    q = q.view(B, H, -1)
    N = q.shape[-1] - (C - R)
    new = torch.cat((F.rms_norm(latent[:, :R], (R,), norm.to(latent.dtype), eps), latent[:, R:]), -1)
    rows.index_put_((torch.arange(B, device=q.device), length.clamp(0, S - 1)), new)
    length.add_(1)
    against = torch.cat((torch.einsum("bhn,hnr->bhr", q[..., :N], weights[:, :N]), q[..., N:]), -1)
    against = against * q.shape[-1] ** -0.5
    read = latent_step(against[:, None], rows, length, value_dim=R, form=form)[:, 0]
    return torch.einsum("bhr,hvr->bhv", read, weights[:, N:]).flatten(1)


def route(
    logits: Tensor, bias: Tensor, k: int, *, scaling: float, renormalize: bool = True, biased: bool = False,
    form: Form = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The k experts of each token and their weights; see layers/moe.py, `Router`, for one group of experts.

    Args:
        logits: [N, E], fp32.
        bias: [E], fp32, takes part in the choice; with `biased` in the weights, too.

    Returns:
        [N, k] int64 and [N, k] fp32.
    """
    if fused(logits, form):
        return torch.ops.palimpsest_gpu.route(logits, bias, k, scaling, renormalize, biased)
    if (chosen := _on_cpu("route", logits, form, logits, bias, k, scaling, renormalize, biased)) is not None:
        return chosen
    chosen_experts(k, fit("route", (logits, bias))["E"])
    scores = logits.sigmoid()
    experts = (scores + bias).topk(k, dim=-1).indices
    weights = (scores + bias if biased else scores).gather(1, experts)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return experts, weights * scaling


def experts(
    x: Tensor, chosen: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor, *,
    shared: Sequence[Tensor] = (), form: Form = "auto",
) -> Tensor:  # fmt: skip
    """A few tokens through the experts chosen for them: down(silu(gate x) * up x).

    Args:
        x: [N, D].
        chosen: [N, k], int64, which experts; one that there is not gives NaN. weights: [N, k], fp32, how much of each.
        gate, up: [E, W, D]; down: [E, D, W].
        shared: the three matrices of the MLP that every token goes through, [S, D], [S, D], [D, S], or none.

    Returns:
        [N, k, D], or [N, k + 1, D] with shared, fp32 (fp64 in fp64): parts, to be added up.
    """
    if len(shared) not in (0, 3) or any(matrix is None for matrix in shared):
        raise ValueError(f"shared holds {len(shared)} matrices; expected gate, up and down, or none")
    if fused(x, form, MOST_TOKENS):
        return torch.ops.palimpsest_gpu.experts_step(x, chosen, weights, gate, up, down, list(shared))
    if (parts := _on_cpu("experts", x, form, x, chosen, weights, gate, up, down, list(shared))) is not None:
        return parts
    fit("experts", (x, chosen, weights, gate, up, down, *(shared or (None,) * 3)))
    chosen, weights = spoil_unknown(chosen, weights, len(gate))
    column = x[:, None, :, None]
    h = F.silu(gate[chosen] @ column) * (up[chosen] @ column)
    parts = [_wide(down[chosen] @ h)[..., 0] * weights[..., None]]
    if shared:
        s_gate, s_up, s_down = shared
        parts.append(_wide(F.linear(F.silu(F.linear(x, s_gate)) * F.linear(x, s_up), s_down))[:, None])
    return torch.cat(parts, 1)


def gathers(x: Tensor, k: int) -> bool:
    """Whether `experts` suits x [N, D] with k experts a token: the kernels, or on a CPU so few pairs that gathering their
    weights costs less than sorting tokens by expert."""
    return fused(x, most=MOST_TOKENS) or (x.device.type == "cpu" and len(x) * k <= GATHERED_PAIRS)


def _on_cpu(name: str, x: Tensor, form: Form, *arguments):
    """What the compiled function gives, None if there is none for these tensors.

    Raises:
        ValueError: "cpu" was named and there is none.
    """
    outputs = ON_CPU[name](*arguments) if compiled(x, form) else None
    if outputs is None and form == "cpu":
        raise ValueError(f"form 'cpu' cannot run {name} on {x.dtype} on {x.device}; 'torch' can")
    return outputs


def _wide(x: Tensor) -> Tensor:
    return x.to(state_dtype(x.dtype))


@cache
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None

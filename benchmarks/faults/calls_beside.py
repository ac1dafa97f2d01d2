"""Calls of what stands beside the memory in a layer: experts, convolutions, the loss, and the functions of one token.

As in bad_calls.py: each call must give the law's number or a sentence. Where a function names an expert, or a length, that
there is not, its documentation says what comes; the law here says the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.faults import Campaign, Trial
from benchmarks.faults.bad_calls import Arguments, Draw, Function, conv_law, mean, outcome, sized, spoiled
from palimpsest.ops import decode, gates
from palimpsest.ops.cross_entropy import IGNORED, cross_entropy_sum
from palimpsest.ops.experts import run_experts
from palimpsest.ops.short_conv import short_convs


def whole(x: Any, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...] = (torch.int64,)) -> Tensor:
    """x, if it is whole numbers of this shape on a CPU."""
    mean(isinstance(x, Tensor) and x.dtype in dtypes and x.layout == torch.strided, "whole numbers")
    mean(tuple(x.shape) == shape and x.device.type == "cpu", "their shape")
    return x


# ---- laws ----


def mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return (F.silu(x @ gate.mT) * (x @ up.mT)) @ down.mT


def run_experts_law(a: Arguments, dtype: torch.dtype):
    s = sized(a, {"x": "N D", "weights": "N k", "w1": "E I D", "w3": "E I D", "w2": "E D I"})
    chosen = whole(a["experts"], (s["N"], s["k"]), (torch.int32, torch.int64))
    mean(not chosen.numel() or 0 <= int(chosen.min()) <= int(chosen.max()) < s["E"], "experts")
    x, weights, w1, w3, w2 = (a[name].to(dtype) for name in ("x", "weights", "w1", "w3", "w2"))
    y = torch.zeros(s["N"], s["D"], dtype=dtype)
    for e in range(s["E"]):
        y += (weights * (chosen == e)).sum(1, keepdim=True) * mlp(x, w1[e], w3[e], w2[e])
    return y, chosen.flatten().long().bincount(minlength=s["E"])


def cross_entropy_law(a: Arguments, dtype: torch.dtype):
    s = sized(a, {"hidden": "N D", "head": "V D"})
    targets = whole(a["targets"], (s["N"],))
    real = targets[targets != IGNORED]
    mean(s["V"] and (not len(real) or 0 <= int(real.min()) <= int(real.max()) < s["V"]), "targets")
    logits = a["hidden"].to(dtype) @ a["head"].to(dtype).mT
    return (F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum"),)


def short_convs_law(a: Arguments, dtype: torch.dtype):
    results = []
    mean(isinstance(a["x0"], Tensor) and isinstance(a["x1"], Tensor) and a["x0"].ndim == 3, "tensors")
    mean(a["x0"].shape[:2] == a["x1"].shape[:2], "streams of other sizes")
    for i in "01":
        one = {"x": a[f"x{i}"], "weight": a[f"weight{i}"], "state": a[f"state{i}"], "cu_seqlens": a["cu_seqlens"]}
        results.append(conv_law(one, dtype, one_dtype=False))
    return (*(F.silu(y) for y, _ in results), *(state for _, state in results))


def project_law(a: Arguments, dtype: torch.dtype):
    sized(a, {"x": "N D", "weight": "O D"})
    return (a["x"].to(dtype) @ a["weight"].to(dtype).mT,)


def add_norm_law(a: Arguments, dtype: torch.dtype):
    sized(a, {"x": "N D", "parts": "N J D", "weight": "D"})
    x = (
        (a["x"].to(dtype) + a["parts"].to(dtype).sum(1)).to(a["x"].dtype).to(dtype)
    )  # a value of x's dtype, by definition
    return x, x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * a["weight"].to(dtype)


def memory_layer_law(a: Arguments, dtype: torch.dtype):
    names = {name: "B D" for name in ("q", "k", "v", "decay_logits", "gate_logits")}
    s = sized(a, {**names, "beta_logits": "B H", "norm": "K", "state": "B H K L"})
    mean(s["K"] == s["L"] and s["D"] == s["H"] * s["K"] and a["state"].is_contiguous(), "the state")
    mean(a["state"].dtype == (torch.float64 if a["q"].dtype == torch.float64 else torch.float32), "the state")
    B, H, K = s["B"], s["H"], s["K"]
    windows, heads = [], []
    for x in "qkv":
        conv = {"x": a[x][:, None], "weight": a[f"{x}_weight"], "state": a[f"{x}_window"]}
        y, window = conv_law({**conv, "cu_seqlens": None}, dtype, one_dtype=False)
        heads.append(F.silu(y[:, 0]).view(B, H, K))
        windows.append(window)
    A_log, dt_bias = a["A_log"], a["dt_bias"]
    for x, numbers in ((A_log, H), (dt_bias, H * K)):
        mean(
            isinstance(x, Tensor) and x.is_floating_point() and x.numel() == numbers and x.device.type == "cpu", "gate"
        )
        mean(x.layout == torch.strided and x.dtype.itemsize > 1, "gate")
    q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in heads[:2])
    t = a["decay_logits"].to(dtype).view(B, H, K) + dt_bias.to(dtype).reshape(H, K)
    decay = (-A_log.to(dtype).reshape(H, 1).exp() * F.softplus(t)).exp()
    beta = a["beta_logits"].to(dtype).sigmoid()
    state = a["state"].to(dtype) * decay[..., None]
    fresh = (heads[2] - torch.einsum("bhk,bhkv->bhv", k, state)) * beta[..., None]
    state = state + k[..., None] * fresh[..., None, :]
    y = torch.einsum("bhk,bhkv->bhv", q, state) * K**-0.5
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5) * a["norm"].to(dtype)
    return (y * a["gate_logits"].to(dtype).view(B, H, K).sigmoid()).flatten(1), state


def latent_read(q: Tensor, rows: Tensor, length: Tensor, value_dim: int) -> Tensor:
    """q [B, T, H, C] reads rows [B, S, C] up to its own."""
    T, S = q.shape[1], rows.shape[1]
    until = length[:, None] + torch.arange(1 - T, 1)
    hidden = torch.arange(S) >= until[..., None]
    scores = torch.einsum("bthc,bsc->bths", q, rows).masked_fill(hidden[:, :, None], -torch.inf)
    return torch.einsum("bths,bsr->bthr", scores.softmax(-1), rows[..., :value_dim])


def latent_step_law(a: Arguments, dtype: torch.dtype):
    s = sized(a, {"q": "B T H C", "rows": "B S C"})
    value_dim = a["value_dim"]
    mean(isinstance(value_dim, int) and 1 <= value_dim <= s["C"] and s["S"], "value_dim")
    length = whole(a["length"], (s["B"],))
    return (latent_read(a["q"].to(dtype), a["rows"].to(dtype), length, value_dim),)


def latent_layer_law(a: Arguments, dtype: torch.dtype):
    s = sized(a, {"q": "B O", "latent": "B C", "norm": "R", "weights": "H X R", "rows": "B S C"})
    length = whole(a["length"], (s["B"],)).clamp(0, s["S"] - 1)
    H, R, P = s["H"], s["R"], s["C"] - s["R"]
    mean(P >= 0 and s["S"] and H and s["O"] % H == 0, "sizes")
    N = s["O"] // H - P
    mean(1 <= N < s["X"], "sizes")
    q, latent, weights = (a[x].to(dtype) for x in ("q", "latent", "weights"))
    unit = latent[:, :R] * torch.rsqrt(latent[:, :R].square().mean(-1, keepdim=True) + 1e-6) * a["norm"].to(dtype)
    rows = a["rows"].to(dtype).clone()
    rows[torch.arange(s["B"]), length] = torch.cat((unit, latent[:, R:]), -1)
    q = q.view(s["B"], H, N + P)
    against = torch.cat((torch.einsum("bhn,hnr->bhr", q[..., :N], weights[:, :N]), q[..., N:]), -1) * (N + P) ** -0.5
    read = latent_read(against[:, None], rows, a["length"] + 1, R)[:, 0]
    return torch.einsum("bhr,hvr->bhv", read, weights[:, N:]).flatten(1), rows


def route_law(a: Arguments, dtype: torch.dtype):
    s = sized(a, {"logits": "N E", "bias": "E"})
    mean(isinstance(a["k"], int) and 1 <= a["k"] <= s["E"], "k")
    scores = a["logits"].to(dtype).sigmoid()
    chosen = (scores + a["bias"].to(dtype)).topk(a["k"], -1).indices
    weights = scores.gather(1, chosen)
    return (weights / (weights.sum(-1, keepdim=True) + 1e-20) * 2.4,)


def experts_law(a: Arguments, dtype: torch.dtype):
    shapes = {"x": "N D", "weights": "N k", "gate": "E W D", "up": "E W D", "down": "E D W"}
    s = sized(a, {**shapes, "shared_gate": "S D", "shared_up": "S D", "shared_down": "D S"})
    chosen = whole(a["chosen"], (s["N"], s["k"]))
    x, parts = a["x"].to(dtype), torch.full((s["N"], s["k"] + 1, s["D"]), torch.nan, dtype=dtype)
    for n in range(s["N"]):
        for j, e in enumerate(chosen[n].tolist()):
            if 0 <= e < s["E"]:
                y = mlp(x[n], *(a[name][e].to(dtype) for name in ("gate", "up", "down")))
                parts[n, j] = a["weights"][n, j].to(dtype) * y
    parts[:, -1] = mlp(x, *(a[f"shared_{name}"].to(dtype) for name in ("gate", "up", "down")))
    return (parts,)


# ---- right arguments; N tokens are B, D is K, experts are four ----


def new(d: Draw, *shape: int) -> Tensor:
    return torch.randn(shape, generator=d.rng, dtype=torch.float64).to(d.dtype)


def chosen_of(d: Draw, E: int) -> Tensor:
    return (
        torch.stack([torch.randperm(E, generator=d.rng)[:2] for _ in range(d.B)]) if d.B else torch.zeros(0, 2).long()
    )


def run_experts_draw(d: Draw) -> Arguments:
    I, D = d.V + 1, d.K
    given = {"x": new(d, d.B, D), "experts": chosen_of(d, 4), "weights": new(d, d.B, 2).to(d.memory)}
    return {**given, "w1": new(d, 4, I, D), "w3": new(d, 4, I, D), "w2": new(d, 4, D, I)}


def cross_entropy_draw(d: Draw) -> Arguments:
    targets = torch.randint(9, (d.B * d.T,), generator=d.rng)
    targets[::3] = IGNORED
    return {"hidden": new(d, d.B * d.T, d.K), "head": new(d, 9, d.K), "targets": targets}


def short_convs_draw(d: Draw) -> Arguments:
    a: Arguments = {}
    for i, D in enumerate((d.K, d.K + d.V)):
        a |= {f"x{i}": new(d, d.B, d.T, D), f"weight{i}": new(d, D, 1, 3), f"state{i}": new(d, d.N, D, 2)}
    return {**a, "cu_seqlens": None if d.borders is None else torch.tensor(d.borders)}


def memory_layer_draw(d: Draw) -> Arguments:
    B, H, K = d.B, d.H, d.K
    a = {name: new(d, B, H * K) for name in ("q", "k", "v", "decay_logits", "gate_logits")}
    a |= {f"{x}_weight": new(d, H * K, 1, 4) for x in "qkv"} | {f"{x}_window": new(d, B, H * K, 3) for x in "qkv"}
    a |= {"A_log": new(d, H), "dt_bias": new(d, H * K), "beta_logits": new(d, B, H), "norm": new(d, K)}
    return {**a, "state": new(d, B, H, K, K).to(d.memory)}


def latent_step_draw(d: Draw) -> Arguments:
    length = torch.randint(2, 8, (d.B,), generator=d.rng)
    return {"q": new(d, d.B, 2, d.H, d.K + 1), "rows": new(d, d.B, 7, d.K + 1), "length": length, "value_dim": d.K}


def latent_layer_draw(d: Draw) -> Arguments:
    R, P, N = d.K, d.V, 5
    a = {
        "q": new(d, d.B, d.H * (N + P)),
        "latent": new(d, d.B, R + P),
        "norm": new(d, R),
        "weights": new(d, d.H, N + 4, R),
    }
    return {**a, "rows": new(d, d.B, 7, R + P), "length": torch.randint(7, (d.B,), generator=d.rng)}


def experts_draw(d: Draw) -> Arguments:
    W, D, S = d.V + 1, d.K, 5
    a = {"x": new(d, d.B, D), "chosen": chosen_of(d, 4), "weights": new(d, d.B, 2).to(d.memory)}
    a |= {"gate": new(d, 4, W, D), "up": new(d, 4, W, D), "down": new(d, 4, D, W)}
    return {**a, "shared_gate": new(d, S, D), "shared_up": new(d, S, D), "shared_down": new(d, D, S)}


# ---- calls ----


def call_short_convs(a: Arguments):
    xs, weights, states = ([a[f"{name}{i}"] for i in (0, 1)] for name in ("x", "weight", "state"))
    ys, after = short_convs(
        xs, weights, states=None if states[0] is states[1] is None else states, cu_seqlens=a["cu_seqlens"]
    )
    return (*ys, *after)


def call_memory_layer(a: Arguments):
    decay = gates.SoftplusDecay(a["A_log"], a["dt_bias"])
    weights, windows = ([a[f"{x}_{name}"] for x in "qkv"] for name in ("weight", "window"))
    y = decode.memory_layer_step_(
        a["q"], a["k"], a["v"], weights, [x.clone() if isinstance(x, Tensor) else x for x in windows], a["decay_logits"],
        decay, a["beta_logits"], a["gate_logits"], a["norm"], a["state"],
    )  # fmt: skip
    return y, a["state"]


def call_latent_layer(a: Arguments):
    length = a["length"].clone() if isinstance(a["length"], Tensor) else a["length"]
    y = decode.latent_layer_step_(*(a[x] for x in ("q", "latent", "norm", "weights", "rows")), length)
    return y, a["rows"]


def call_experts(a: Arguments):
    shared = [a[f"shared_{name}"] for name in ("gate", "up", "down")]
    return (decode.experts(*(a[x] for x in ("x", "chosen", "weights", "gate", "up", "down")), shared=shared),)


def without_gradients(call: Callable) -> Callable:
    """A decoded token has none; the compiled functions are for then."""
    return torch.no_grad()(call)


def _function(call: Callable, law: Callable, draw: Callable, edits: str = "", like: str = "") -> Function:
    more = {"rounds": True, "like": like} if like else {}
    return Function(call, law, draw, edits=edits, has_backends=False, roundings=32, **more)


def call_run_experts(a: Arguments):
    y, load = run_experts(*(a[x] for x in ("x", "experts", "weights", "w1", "w3", "w2")))
    return y, load.double()


FUNCTIONS_BESIDE: dict[str, Function] = {
    "run_experts": _function(
        call_run_experts, run_experts_law, run_experts_draw, like="x"
    ),
    "cross_entropy_sum": _function(
        lambda a: (cross_entropy_sum(a["hidden"], a["head"], a["targets"]),), cross_entropy_law, cross_entropy_draw,
        like="hidden",
    ),
    "short_convs": _function(call_short_convs, short_convs_law, short_convs_draw),
    "decode.project": _function(
        without_gradients(lambda a: tuple(decode.project([a["x"]], [a["weight"]]))), project_law,
        lambda d: {"x": new(d, d.B, d.K), "weight": new(d, 5, d.K)},
    ),
    "decode.add_norm": _function(
        without_gradients(lambda a: decode.add_norm(a["x"], a["parts"], a["weight"], 1e-5)), add_norm_law,
        lambda d: {"x": new(d, d.B, d.K), "parts": new(d, d.B, 2, d.K), "weight": new(d, d.K)},
    ),
    "decode.memory_layer_step_": _function(
        without_gradients(call_memory_layer), memory_layer_law, memory_layer_draw, edits="state"
    ),
    "decode.latent_step": _function(
        without_gradients(lambda a: (decode.latent_step(a["q"], a["rows"], a["length"], value_dim=a["value_dim"]),)),
        latent_step_law, latent_step_draw,
    ),
    "decode.latent_layer_step_": _function(
        without_gradients(call_latent_layer), latent_layer_law, latent_layer_draw, edits="rows"
    ),
    "decode.route": _function(
        without_gradients(lambda a: decode.route(a["logits"], a["bias"], a["k"], scaling=2.4)[1:]), route_law,
        lambda d: {"logits": new(d, d.B, 6), "bias": new(d, 6) / 9, "k": 2},
    ),
    "decode.experts": _function(without_gradients(call_experts), experts_law, experts_draw, like="x"),
}  # fmt: skip

FAR = (-1, 4, 9, 2**15, 2**16 + 1, 2**31, 2**32 + 1, 2**63 - 1, -(2**63))


def spoiled_beside(a: Arguments) -> Iterator[tuple[str, str, Any]]:
    """Every argument in every wrong way, and numbers that name what there is not."""
    yield from spoiled(a)
    for name in ("experts", "chosen", "targets", "length"):
        x = a.get(name)
        for far in FAR if isinstance(x, Tensor) and x.numel() else ():
            other = x.clone()
            other.view(-1)[-1] = far
            yield f"{name} of {far}", name, other
    for name in ("k", "value_dim"):
        for other in (0, -1, 7, 2**40, 1.0, "2", None) if name in a else ():
            yield f"{name} of {other!r}", name, other


DRAWS = {"fp32": Draw(), "bf16": Draw(dtype=torch.bfloat16, seed=1), "fp64": Draw(B=3, dtype=torch.float64, seed=2)}


def bad_calls_beside(folder: Path | None = None) -> Iterator[Trial]:
    """Every function, every argument, every way in which it can be wrong."""
    for name, function in FUNCTIONS_BESIDE.items():
        for drawn, draw in DRAWS.items():
            right = function.draw(draw)
            yield Trial(f"{name}, {drawn}", lambda name=name, a=right: outcome(name, a, functions=FUNCTIONS_BESIDE))
            for what, changed, value in spoiled_beside(right):
                a = {**right, changed: value}
                yield Trial(
                    f"{name}, {drawn}: {what}", lambda name=name, a=a: outcome(name, a, functions=FUNCTIONS_BESIDE)
                )


CAMPAIGNS = [
    Campaign(
        "bad calls beside the memory",
        "the same to experts, convolutions, the loss and the functions of one decoded token, and experts, targets and "
        "lengths that there are not",
        bad_calls_beside,
    ),
]

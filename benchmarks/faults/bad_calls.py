"""Calls of the memory's functions, drawn right and wrong: each must give the law's number, or a sentence.

`Function.law` says in fp64, and without the library's own checks, what a call means: it raises where a call means nothing.
A call that is answered must be one with a meaning, and the answer within its error budget; a call that is refused must be
refused by a ValueError or a TypeError that can be read. What a step edits in place stays as it was when it is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import palimpsest
from benchmarks.faults import Campaign, Trial, unreadable
from palimpsest.ops import backends, gates, reference
from palimpsest.ops.arguments import TABLES
from palimpsest.ops.cpu import register
from palimpsest.ops.short_conv import short_conv, short_conv_step_
from palimpsest.ops.trace import trace
from palimpsest.testing.budget import budget, rms

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
Arguments = dict[str, Any]


class MeaninglessError(Exception):
    """What a law says of arguments that it has no answer to."""


# ---- what a call means, in fp64 and in a few lines ----


def mean(condition: Any, what: str) -> None:
    if not condition:
        raise MeaninglessError(what)


def sized(a: Arguments, shapes: dict[str, str]) -> dict[str, int]:
    """The letters' sizes, if every tensor has its shape in them, is real, dense and beside the others."""
    sizes: dict[str, int] = {}
    devices = set()
    for name, letters in shapes.items():
        x = a[name]
        if x is None and name == "state":
            continue
        mean(isinstance(x, Tensor) and x.layout == torch.strided, f"{name} is no dense tensor")
        mean(x.dtype in FLOATS and x.ndim == len(letters.split()), f"{name} has a wrong dtype or rank")
        devices.add(x.device)
        for letter, size in zip(letters.split(), x.shape):
            mean(sizes.setdefault(letter, size) == size, f"{letter} of {name}")
    mean(devices == {torch.device("cpu")}, "devices")
    return sizes


def pieces(a: Arguments, B: int, T: int) -> list[tuple[int, int, int]]:
    """(row, first token, last token) of every sequence."""
    cu_seqlens = a.get("cu_seqlens")
    if cu_seqlens is None:
        return [(b, 0, T) for b in range(B)]
    mean(isinstance(cu_seqlens, Tensor) and cu_seqlens.dtype in (torch.int32, torch.int64), "cu_seqlens")
    mean(cu_seqlens.ndim == 1 and cu_seqlens.device.type == "cpu" and len(cu_seqlens) > 1 and B == 1, "cu_seqlens")
    ends = cu_seqlens.tolist()
    mean(ends[0] == 0 and ends[-1] == T and ends == sorted(ends), "borders")
    return [(0, start, stop) for start, stop in zip(ends, ends[1:])]


def remember(a: Arguments, dtype: torch.dtype, sequences, law=reference.delta_memory):
    """The law over every sequence by itself. q comes first, what is written has V channels, all have HV heads."""
    q, v = sequences[0], sequences[-1]
    B, T, HV, K = q.shape
    V = v.shape[-1]
    runs = pieces(a, B, T)
    given = a["scale"]
    mean(given is None or (isinstance(given, (int, float)) and math.isfinite(given)), "scale")
    scale = K**-0.5 if given is None else given
    state = torch.zeros(len(runs), HV, K, V, dtype=dtype) if a["state"] is None else a["state"].to(dtype)
    mean(state.shape == (len(runs), HV, K, V), "state")
    q, *rest, v = sequences
    output, ends = torch.zeros(B, T, HV, V, dtype=dtype), []
    for n, (b, start, stop) in enumerate(runs):
        at = lambda x: x[b : b + 1, start:stop].to(dtype)  # noqa: B023
        order = (at(q) * scale, *map(at, rest))
        o, end = law(*order[:3], at(v), *order[3:], state[n : n + 1])
        output[b, start:stop] = o[0]
        ends.append(end)
    return output, torch.cat(ends) if ends else state


def grouped(a: Arguments, shapes: dict[str, str]):
    """q, k and v, with q and k repeated for the heads of v, and the sizes."""
    s = sized(a, {"q": "B T H K", "k": "B T H K", "v": "B T G V", **shapes})
    mean(a["q"].dtype == a["k"].dtype == a["v"].dtype, "one dtype")
    mean(s["H"] and s["G"] and s["G"] % s["H"] == 0 and s["K"] and s["V"], "heads and channels")
    if a["state"] is not None:
        wide = torch.float64 if a["q"].dtype == torch.float64 else torch.float32
        mean(isinstance(a["state"], Tensor) and a["state"].dtype == wide and a["state"].device.type == "cpu", "state")
        mean(a["state"].layout == torch.strided and a["state"].ndim == 4, "state")
    q, k = (a[name].repeat_interleave(s["G"] // s["H"], 2) for name in ("q", "k"))
    return q, k, a["v"], s


def decays(a: Arguments, name: str = "log_decay") -> Tensor:
    mean(not a.get("check") or bool((a[name] <= 0).all()), "a decay above 1")
    return a[name]


def kda_law(a: Arguments, dtype: torch.dtype):
    q, k, v, _ = grouped(a, {"log_decay": "B T G K", "beta": "B T G"})
    beta = a["beta"].to(dtype)[..., None]
    return remember(a, dtype, (q, k, beta * k.to(dtype), decays(a), beta * v.to(dtype)))


def gdn2_law(a: Arguments, dtype: torch.dtype):
    q, k, v, _ = grouped(a, {"log_decay": "B T G K", "erase_gate": "B T G K", "write_gate": "B T G V"})
    erase, write = a["erase_gate"].to(dtype) * k.to(dtype), a["write_gate"].to(dtype) * v.to(dtype)
    # the products are values of q's dtype, by definition
    return remember(a, dtype, (q, k, erase.to(q.dtype), decays(a), write.to(q.dtype)))


def gated_delta_law(a: Arguments, dtype: torch.dtype):
    q, k, v, s = grouped(a, {"log_decay": "B T G", "beta": "B T G"})
    beta = a["beta"].to(dtype)[..., None]
    decay = decays(a)[..., None].expand(-1, -1, -1, s["K"])
    return remember(a, dtype, (q, k, beta * k.to(dtype), decay, beta * v.to(dtype)))


def delta_rule_law(a: Arguments, dtype: torch.dtype):
    q, k, v, _ = grouped(a, {"beta": "B T G"})
    beta = a["beta"].to(dtype)[..., None]
    return remember(a, dtype, (q, k, beta * k.to(dtype), torch.zeros_like(k), beta * v.to(dtype)))


def gated_linear_law(a: Arguments, dtype: torch.dtype):
    q, k, v, _ = grouped(a, {"log_decay": "B T G K"})
    return remember(a, dtype, (q, k, torch.zeros_like(k), decays(a), v))


def linear_law(a: Arguments, dtype: torch.dtype):
    grouped(a, {})
    mean(callable(a["feature_map"]), "feature_map")
    mapped = dict(a)
    for name in ("q", "k"):
        mapped[name] = a["feature_map"](a[name])
        mean(isinstance(mapped[name], Tensor) and mapped[name].shape[:3] == a[name].shape[:3], "feature_map")
        mean(mapped[name].dtype in FLOATS, "feature_map")
        mapped[name] = mapped[name].to(a["v"].dtype)
    q, k, v, _ = grouped(mapped, {})
    mean(k.shape == q.shape, "feature_map")
    if a["normalise"]:
        v = torch.cat((v, torch.ones_like(v[..., :1])), -1)
    output, state = remember(a, dtype, (q, k, torch.zeros_like(k), torch.zeros_like(k), v))
    if a["normalise"]:
        # the sum of weights is a value of v's dtype, by definition
        output = output[..., :-1].to(v.dtype).to(dtype) / output[..., -1:].to(v.dtype).to(dtype)
    return output, state


def dplr_law(a: Arguments, dtype: torch.dtype):
    q, k, v, _ = grouped(a, dict.fromkeys(("a", "b", "log_decay"), "B T G K"))
    law = lambda q, k, a_, v, b, decay, S: reference.dplr(q, k, v, a_, b, decay, S)
    return remember(a, dtype, (q, k, a["a"], a["b"], decays(a), v), law)


def lookup_law(a: Arguments, dtype: torch.dtype):
    stateless = {**a, "state": None}
    q, k, v, s = grouped(stateless, {})
    runs = pieces(a, s["B"], s["T"])
    mean(a["scale"] is None or (isinstance(a["scale"], (int, float)) and math.isfinite(a["scale"])), "scale")
    scale = s["K"] ** -0.5 if a["scale"] is None else a["scale"]
    keys, values = a["k"], a["v"]
    if a["state"] is not None:
        mean(isinstance(a["state"], (tuple, list)) and len(a["state"]) == 2 and a.get("cu_seqlens") is None, "state")
        past = dict(zip(("keys", "values"), a["state"]))
        sized(
            {**past, "q": a["q"], "v": a["v"]}, {"q": "B T H K", "v": "B T G V", "keys": "B S H K", "values": "B S G V"}
        )
        mean(past["keys"].dtype == past["values"].dtype == a["q"].dtype, "dtype of the state")
        keys, values = torch.cat((past["keys"], keys), 1), torch.cat((past["values"], values), 1)
    S = keys.shape[1] - s["T"]
    wide = keys.repeat_interleave(s["G"] // s["H"], 2)
    output = torch.zeros(v.shape, dtype=dtype)
    for b, start, stop in runs:
        at = lambda x, first: x[b : b + 1, first : stop + S].to(dtype)  # noqa: B023
        first = start if S == 0 else 0
        output[b, start:stop] = reference.softmax_lookup(at(q * 1.0, start) * scale if S == 0 else q[b : b + 1].to(dtype) * scale,
                                                         at(wide, first), at(values, first))[0]  # fmt: skip
    return output, keys, values


def log_decays(gate: Any, logits: Tensor, dtype: torch.dtype) -> Tensor:
    """The two gates from their definitions."""
    if not isinstance(gate, (gates.SoftplusDecay, gates.SigmoidDecay)):
        mean(callable(gate), "gate")
        return gate(logits)
    H, K = logits.shape[-2:]
    for x, numbers in ((gate.A_log, H), (gate.dt_bias, H * K)):
        mean(isinstance(x, Tensor) and x.dtype in FLOATS and x.numel() == numbers, "a gate's parameter")
        mean(x.device == logits.device and x.layout == torch.strided, "a gate's parameter")
    rate = gate.A_log.to(dtype).reshape(H, 1).exp()
    t = logits.to(dtype) + gate.dt_bias.to(dtype).reshape(H, K)
    if isinstance(gate, gates.SigmoidDecay):
        return gate.floor * torch.sigmoid(rate * t)
    return -rate * torch.nn.functional.softplus(t)


def from_logits_law(a: Arguments, dtype: torch.dtype):
    rounded = dtype == torch.float32  # the honest peer keeps q and k of unit length in their own dtype
    q, k, v, _ = grouped(a, {"decay_logits": "B T G K", "beta_logits": "B T G"})
    mean(isinstance(a["beta_max"], (int, float)) and 0 < a["beta_max"] < math.inf, "beta_max")
    decay = log_decays(a["gate"], a["decay_logits"], dtype)
    mean(isinstance(decay, Tensor) and decay.shape == a["decay_logits"].shape and decay.is_floating_point(), "gate")
    unit = lambda x: x.to(dtype) * torch.rsqrt(x.to(dtype).square().sum(-1, keepdim=True) + 1e-6)
    beta = a["beta_max"] * a["beta_logits"].to(dtype).sigmoid()[..., None]
    if rounded:
        q, k = unit(q).to(q.dtype), unit(k).to(k.dtype)
        return remember(a, dtype, (q, k, beta * k.to(dtype), decay, beta * v.to(dtype)))
    return remember(a, dtype, (unit(q), unit(k), beta * unit(k), decay, beta * v.to(dtype)))


def step_law(a: Arguments, dtype: torch.dtype):
    state = a["state"]
    mean(isinstance(state, Tensor), "state")
    one = {name: a[name] for name in ("q", "k", "v", "log_decay", "beta")}
    mean(all(isinstance(x, Tensor) for x in one.values()) and state.is_contiguous(), "tensors")
    whole = {**a, **{name: x[:, None] if x.ndim else x for name, x in one.items()}, "cu_seqlens": None, "check": False}
    output, after = kda_law(whole, dtype)
    return output[:, 0], after


def conv_law(a: Arguments, dtype: torch.dtype, one_dtype: bool = True):
    s = sized(a, {"x": "B T D", "weight": "D O W"})
    mean(s["O"] == 1 and s["W"] > 0, "weight")
    runs = pieces(a, s["B"], s["T"])
    past = s["W"] - 1
    state = torch.zeros(len(runs), s["D"], past) if a["state"] is None else a["state"]
    sized({"x": a["x"], "state": state}, {"x": "B T D", "state": "N D P"})
    mean(state.shape == (len(runs), s["D"], past), "state")
    mean(
        not one_dtype or a["x"].dtype == a["weight"].dtype == (a["x"] if a["state"] is None else state).dtype, "dtypes"
    )
    y, ends = torch.zeros(a["x"].shape, dtype=dtype), []
    for n, (b, start, stop) in enumerate(runs):
        whole = torch.cat((state[n].to(dtype).mT, a["x"][b, start:stop].to(dtype)))
        for w in range(s["W"]):
            y[b, start:stop] += whole[w : w + stop - start] * a["weight"][:, 0, w].to(dtype)
        ends.append(whole[len(whole) - past :].mT)
    return y, torch.stack(ends) if ends else state


def conv_step_law(a: Arguments, dtype: torch.dtype):
    mean(isinstance(a["x"], Tensor) and isinstance(a["state"], Tensor), "tensors")
    y, after = conv_law(
        {**a, "x": a["x"][:, None] if a["x"].ndim else a["x"], "cu_seqlens": None}, dtype, one_dtype=False
    )
    return y[:, 0], after


def trace_law(a: Arguments, dtype: torch.dtype):
    mean(isinstance(a["q"], Tensor) and isinstance(a["v"], Tensor) and a["q"].ndim == a["v"].ndim == 4, "tensors")
    mean(a["q"].shape[2] == a["v"].shape[2] and a["q"].shape[1] > 0, "heads, tokens")
    if a["state"] is not None:
        mean(isinstance(a["state"], Tensor), "state")
        wide = torch.float64 if a["q"].dtype == torch.float64 else torch.float32
        mean(a["state"].dtype == wide, "state")
    return kda_law({**a, "cu_seqlens": None, "check": False}, dtype)[:1]


# ---- the functions, and right arguments of them ----


@dataclass(frozen=True)
class Function:
    """A public function."""

    call: Callable
    law: Callable[[Arguments, torch.dtype], tuple]
    draw: Callable[[Draw], Arguments]
    edits: str = ""  # the argument that is edited in place
    has_backends: bool = True
    rounds: bool = False  # something in between is a value of the dtype of `like`
    like: str = "q"
    roundings: int = 1  # to the result's dtype, on the way


@dataclass(frozen=True)
class Draw:
    """Sizes, a dtype, and a source of numbers."""

    B: int = 2
    T: int = 5
    H: int = 2
    G: int = 4  # heads of v
    K: int = 6
    V: int = 3
    dtype: torch.dtype = torch.float32
    gate_dtype: torch.dtype = torch.float32
    borders: tuple[int, ...] | None = None
    with_state: bool = True
    seed: int = 0
    rng: torch.Generator = field(default_factory=torch.Generator, compare=False)

    def __post_init__(self):
        self.rng.manual_seed(self.seed)

    def tensor(self, letters: str, dtype: torch.dtype | None = None) -> Tensor:
        shape = [getattr(self, x) if x != "N" else self.N for x in letters.split()]
        return torch.randn(shape, generator=self.rng, dtype=torch.float64).to(dtype or self.dtype)

    @property
    def N(self) -> int:  # noqa: N802
        return self.B if self.borders is None else len(self.borders) - 1

    @property
    def memory(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def qkv(self, extra_column: int = 0) -> Arguments:
        q, k = self.tensor("B T H K"), torch.nn.functional.normalize(self.tensor("B T H K"), dim=-1)
        state = self.tensor("N G K V", self.memory) if self.with_state else None
        if state is not None and extra_column:
            state = torch.cat((state, 2 + state[..., :1].abs()), -1)
        cu_seqlens = None if self.borders is None else torch.tensor(self.borders, dtype=torch.int32)
        rest = {"state": state, "scale": None, "cu_seqlens": cu_seqlens, "backend": "auto"}
        return {"q": q, "k": k, "v": self.tensor("B T G V"), **rest}

    def decay(self, letters: str = "B T G K") -> Tensor:
        return -self.tensor(letters, self.gate_dtype).abs()

    def beta(self, letters: str = "B T G") -> Tensor:
        return self.tensor(letters, self.gate_dtype).sigmoid()


def _step_draw(d: Draw) -> Arguments:
    q, k = d.tensor("B H K"), torch.nn.functional.normalize(d.tensor("B H K"), dim=-1)
    rest = {"state": d.tensor("B G K V", d.memory), "scale": None, "backend": "auto"}
    return {"q": q, "k": k, "v": d.tensor("B G V"), "log_decay": d.decay("B G K"), "beta": d.beta("B G"), **rest}


def _lookup_draw(d: Draw) -> Arguments:
    a = d.qkv()
    packed = d.borders is not None
    a["state"] = (d.tensor("B T H K"), d.tensor("B T G V")) if d.with_state and not packed else None
    return a


def _trace_draw(d: Draw) -> Arguments:
    a = _memory(log_decay="B T G K", beta="B T G")(replace(d, G=d.H, borders=None))
    return {name: x for name, x in a.items() if name not in ("cu_seqlens", "backend")}


def _conv_draw(d: Draw) -> Arguments:
    cu_seqlens = None if d.borders is None else torch.tensor(d.borders)
    state = d.tensor("N K V") if d.with_state else None  # V + 1 taps
    weight = torch.cat((d.tensor("K V"), d.tensor("K H")[:, :1]), 1)[:, None]
    return {"x": d.tensor("B T K"), "weight": weight, "state": state, "cu_seqlens": cu_seqlens}


def _gated(kind):
    def draw(d: Draw) -> Arguments:
        a = d.qkv()
        backend = a.pop("backend")
        gate = kind(d.tensor("G", d.gate_dtype), d.tensor("G K", d.gate_dtype))
        logits = {"decay_logits": 3 * d.tensor("B T G K"), "beta_logits": d.tensor("B T G")}
        return {**a, **logits, "gate": gate, "beta_max": 1.0, "backend": backend}

    return draw


def _memory(**gate_rows: str):
    def draw(d: Draw) -> Arguments:
        a = d.qkv()
        for name, letters in gate_rows.items():
            a[name] = d.decay(letters) if name == "log_decay" else 0.5 * d.beta(letters)
        return a

    return draw


def features(x: Tensor) -> Tensor:
    """Twice as many channels as there were, above zero, in steps that every dtype holds."""
    return torch.cat((x.relu(), (-x).relu()), -1) + 1


def _dplr_draw(d: Draw) -> Arguments:
    """a and b of unit length and any sign: with others the memory grows at each token, out of what half precision holds."""
    drawn = _memory(log_decay="B T G K")(d)
    return drawn | {name: torch.nn.functional.normalize(d.tensor("B T G K"), dim=-1) for name in ("a", "b")}


def _kwargs(function, *positional: str):
    return lambda a: function(*(a[x] for x in positional), **{n: x for n, x in a.items() if n not in positional})


p = palimpsest
FUNCTIONS: dict[str, Function] = {
    "kda": Function(_kwargs(p.kda, "q", "k", "v", "log_decay", "beta"), kda_law, _memory(log_decay="B T G K", beta="B T G")),
    "gdn2": Function(
        _kwargs(p.gdn2, "q", "k", "v", "log_decay", "erase_gate", "write_gate"), gdn2_law,
        _memory(log_decay="B T G K", erase_gate="B T G K", write_gate="B T G V"),
    ),
    "gated_delta": Function(
        _kwargs(p.gated_delta, "q", "k", "v", "log_decay", "beta"), gated_delta_law,
        _memory(log_decay="B T G", beta="B T G"),
    ),
    "delta_rule": Function(_kwargs(p.delta_rule, "q", "k", "v", "beta"), delta_rule_law, _memory(beta="B T G")),
    "gated_linear_attention": Function(
        _kwargs(p.gated_linear_attention, "q", "k", "v", "log_decay"), gated_linear_law, _memory(log_decay="B T G K")
    ),
    "linear_attention": Function(
        _kwargs(p.linear_attention, "q", "k", "v"), linear_law,
        lambda d: {**d.qkv(), "state": None, "feature_map": features, "normalise": True},
        rounds=True,
    ),
    "linear_attention, plain": Function(
        _kwargs(p.linear_attention, "q", "k", "v"), linear_law,
        lambda d: {**d.qkv(), "feature_map": torch.nn.functional.relu, "normalise": False},
    ),
    "dplr": Function(
        _kwargs(p.dplr, "q", "k", "v", "a", "b", "log_decay"), dplr_law, _dplr_draw
    ),
    "softmax_lookup": Function(_kwargs(p.softmax_lookup, "q", "k", "v"), lookup_law, _lookup_draw, rounds=True, roundings=4),
    "kda_from_logits": Function(
        _kwargs(p.kda_from_logits, "q", "k", "v", "decay_logits", "beta_logits"), from_logits_law,
        _gated(gates.SoftplusDecay), rounds=True,
    ),
    "kda_from_logits, sigmoid": Function(
        _kwargs(p.kda_from_logits, "q", "k", "v", "decay_logits", "beta_logits"), from_logits_law,
        _gated(gates.SigmoidDecay), rounds=True,
    ),
    "kda_step_": Function(
        lambda a: (p.kda_step_(*(a[x] for x in ("q", "k", "v", "log_decay", "beta", "state")), scale=a["scale"],
                               backend=a["backend"]), a["state"]),
        step_law, _step_draw, edits="state",
    ),
    "short_conv": Function(_kwargs(short_conv, "x", "weight"), conv_law, _conv_draw, has_backends=False, roundings=8),
    "short_conv_step_": Function(
        lambda a: (short_conv_step_(a["x"], a["weight"], a["state"]), a["state"]), conv_step_law,
        lambda d: {"x": d.tensor("B K"), "weight": torch.cat((d.tensor("K V"), d.tensor("K H")[:, :1]), 1)[:, None],
                   "state": d.tensor("B K V")},
        edits="state", has_backends=False, roundings=8,
    ),
    "trace": Function(
        lambda a: (trace(*(a[x] for x in ("q", "k", "v", "log_decay", "beta")), state=a["state"], scale=a["scale"]).read,),
        trace_law, _trace_draw, has_backends=False,
    ),
}  # fmt: skip


# ---- what comes of a call ----


def outcome(
    name: str, arguments: Arguments, device: str = "cpu", functions: dict[str, Function] = FUNCTIONS
) -> str | None:
    """None if the call gave the law's numbers or a sentence; else what it did instead.

    device: where the call is made. A GPU multiplies in the dtype of its inputs, and its numbers are judged elsewhere, within
    the budget of that: here they must be near.
    """
    function = functions[name]
    if device != "cpu":
        return _outcome_on(device, function, arguments)
    given, edited = dict(arguments), arguments.get(function.edits)
    if isinstance(edited, Tensor) and edited.is_contiguous() and _is_plain(edited):
        given[function.edits] = edited.clone()
    elif _is_plain(edited):
        arguments = {**arguments, function.edits: edited.clone()}
    before, after = arguments.get(function.edits), given.get(function.edits)
    try:
        results = [x for part in function.call(given) for x in (part if isinstance(part, tuple) else (part,))]
    except (ValueError, TypeError) as error:
        if _is_plain(before) and not torch.equal(after, before):
            return "was refused after the state had been edited"
        return unreadable(error)
    except Exception as error:
        own = (
            "kda_step_ edits the state in place and has no gradient",
            "unsupported operation: more than one element of",
        )
        if str(error).startswith(own):  # a RuntimeError, as torch's own of its in-place functions
            return None
        return f"ended in a trace: {type(error).__name__}: {str(error)[:300]}"
    if any(x.device.type == "meta" for x in results):
        tensors = [x for x in arguments.values() if isinstance(x, Tensor)]
        every = all(x.device.type == "meta" for x in tensors)
        return None if every else "answered with shapes alone, though some tensors had numbers"
    if name == "kda_step_" and not edited.is_contiguous():
        return "was answered, though no kernel can edit such a state"
    try:
        truth, peer = (function.law(arguments, dtype) for dtype in (torch.float64, torch.float32))
    except MeaninglessError as error:
        return f"was answered, but it has no meaning: {error}"
    for i, (actual, t, honest) in enumerate(zip(results, truth, peer, strict=True)):
        if actual.shape != t.shape:
            return f"result {i} has shape {tuple(actual.shape)}, the law's has {tuple(t.shape)}"
        if i and not function.edits and _shares_memory(actual, arguments.values()):
            return f"result {i} is an argument itself, or a view of one"
        if wrong := _off(
            actual, t, honest, arguments[function.like].dtype if function.rounds else actual.dtype, function.roundings
        ):
            return f"result {i} {wrong}"
    return None


def _outcome_on(device: str, function: Function, arguments: Arguments) -> str | None:
    try:
        results = function.call({name: _moved(x, device) for name, x in arguments.items()})
        results = [x.cpu() for part in results for x in (part if isinstance(part, tuple) else (part,))]
    except (ValueError, TypeError) as error:
        return unreadable(error)
    except Exception as error:
        own = str(error).startswith("kda_step_ edits the state in place and has no gradient")
        return None if own else f"ended in a trace: {type(error).__name__}: {str(error)[:300]}"
    try:
        truth = function.law(arguments, torch.float64)
    except MeaninglessError as error:
        return f"was answered, but it has no meaning: {error}"
    for i, (actual, t) in enumerate(zip(results, truth, strict=True)):
        near = 1e-4 if arguments["q"].dtype == torch.float32 else 5e-2
        if actual.shape != t.shape:
            return f"result {i} has shape {tuple(actual.shape)}, the law's has {tuple(t.shape)}"
        actual, t = (torch.where(t.isfinite(), x.double(), 0.0) for x in (actual, t))
        if not rms(actual - t) <= near * rms(t) + 1e-6:
            return f"result {i} is off by {rms(actual - t):.1e} of {rms(t):.1e}"
    return None


def _moved(x: Any, device: str) -> Any:
    """x on another device, with its strides; what is on meta or sparse stays wrong there."""
    if isinstance(x, Tensor) and x.device.type == "cpu":
        return x.detach().to(device).requires_grad_(x.requires_grad)
    if isinstance(x, tuple):
        return tuple(_moved(part, device) for part in x)
    if isinstance(x, (gates.SoftplusDecay, gates.SigmoidDecay)):
        return replace(x, A_log=_moved(x.A_log, device), dt_bias=_moved(x.dt_bias, device))
    return x


def _off(actual: Tensor, truth: Tensor, honest: Tensor, dtype: torch.dtype, roundings: int) -> str | None:
    finite = truth.isfinite()
    if (actual.isnan() & finite).any():
        return "is NaN where the law is finite"
    actual, truth, honest = (torch.where(finite, x.detach().double(), 0.0) for x in (actual, truth, honest))
    few = roundings * torch.finfo(dtype).eps / 4 + 2e-6  # the mean of a few roundings wanders
    error, allowed = rms(actual - truth), budget(truth, honest, dtype) + few * rms(truth)
    return None if error <= allowed else f"is off by {error:.1e} of {allowed:.1e}"


def _is_plain(x: Any) -> bool:
    return isinstance(x, Tensor) and x.device.type == "cpu" and x.layout == torch.strided


def _shares_memory(x: Tensor, others: Any) -> bool:
    return bool(x.numel()) and any(
        isinstance(y, Tensor) and y.device == x.device and y.layout == torch.strided
        and y.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        for y in others
    )  # fmt: skip


# ---- wrong ones: one thing of a right call is changed ----


class Spoiled(NamedTuple):
    """One changed argument of a call; some changes leave it right."""

    what: str
    name: str
    value: Any


def spoiled(a: Arguments) -> Iterator[Spoiled]:
    """Every argument in every wrong way that there is for its kind."""
    for name, x in a.items():
        for what, other in _others(name, x):
            yield Spoiled(f"{name} {what}", name, other)


def _others(name: str, x: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(x, (gates.SoftplusDecay, gates.SigmoidDecay)):
        yield from (
            ("of no kind", 3),
            ("None", None),
            ("a name", "softplus"),
            ("that returns nothing", lambda logits: None),
        )
        yield from (
            ("that sums", lambda logits: logits.sum(-1)),
            ("that doubles", lambda logits: torch.cat((logits,) * 2, -1)),
        )
        yield from (("a function", lambda logits: -logits.abs()), ("of integers", lambda logits: -logits.abs().long()))
        for parameter in ("A_log", "dt_bias"):
            for what, other in _tensors(parameter, getattr(x, parameter)):
                yield f"{parameter} {what}", type(x)(**{**vars(x), parameter: other})
    elif name == "cu_seqlens":
        yield from _borders(x)
    elif isinstance(x, Tensor):
        yield from _tensors(name, x)
    elif isinstance(x, tuple):
        yield from (("of one", x[:1]), ("of three", (*x, x[0])), ("a tensor", x[0]), ("turned", x[::-1]), ("empty", ()))
        yield from ((f"part {i} {what}", (*x[:i], y, *x[i + 1 :])) for i in (0, 1) for what, y in _tensors(name, x[i]))
    elif name == "scale":
        wrong = ("x", float("nan"), float("inf"), 1j, [1.0], torch.tensor(0.5), torch.rand(5), b"1", {})
        yield from ((repr(y)[:20], y) for y in (*wrong, 0.0, -2, 1e3, True))
    elif name == "backend":
        yield from (
            (repr(y), y) for y in ("fastest", "", None, 3, "CPU", ["cpu"], "hopper", "triton", *backends.names())
        )
    elif name == "beta_max":
        yield from (
            (repr(y)[:20], y) for y in (0.0, -1, float("nan"), float("inf"), "2", None, torch.ones(1), 2.0, 1, 1.5)
        )
    elif name == "feature_map":
        wrong = {
            "None": None, "3": 3, "a name": "elu", "to nothing": lambda x: None, "to a list": lambda x: x.tolist(),
            "to fewer tokens": lambda x: x[:, 1:], "to more tokens": lambda x: torch.cat((x, x), 1),
            "to one head": lambda x: x[:, :, :1], "to more heads": lambda x: torch.cat((x, x), 2),
            "to one sequence": lambda x: x[:1].exp(), "to no channels": lambda x: x[..., :0], "to sums": lambda x: x.sum(-1),
            "to whole numbers": lambda x: x.long(), "to complex": lambda x: x.to(torch.complex64),
            "to meta": lambda x: x.to("meta"), "to sparse": lambda x: x.to_sparse(), "to doubles": lambda x: x.double().exp(),
            "to halves": lambda x: x.abs().bfloat16(), "to one channel": lambda x: x[..., :1].exp(),
            "to ninety": lambda x: x.exp().repeat(1, 1, 1, 15), "to a view": lambda x: x.exp().mT.contiguous().mT,
            "to three hundred": lambda x: x.exp().repeat(1, 1, 1, 50),
        }  # fmt: skip
        yield from wrong.items()
    if x is None and name == "state":
        yield from (("3", 3), ("a list", [[1.0]]), ("a scalar", torch.tensor(1.0)), ("empty", torch.zeros(0)))


def _tensors(name: str, x: Tensor) -> Iterator[tuple[str, Any]]:
    """In a wrong shape, dtype, layout or place, or no tensor at all."""
    for d in range(x.ndim):
        at = f"dimension {d}"
        yield f"one more before {d}", x.unsqueeze(d)
        if not x.shape[d]:
            continue
        yield f"{at} longer by one", torch.cat((x, x.narrow(d, 0, 1)), d)
        yield f"{at} doubled", torch.cat((x, x), d)
        yield f"{at} of size one", x.narrow(d, 0, 1)
        yield f"{at} empty", x.narrow(d, 0, 0)
        if x.shape[d] > 2:
            yield f"{at} shorter by one", x.narrow(d, 0, x.shape[d] - 1)
        yield f"{at} taken out", x.select(d, 0)
        if d:
            yield f"{at} and the one before turned", x.transpose(d - 1, d)
            yield f"{at} and the one before joined", x.flatten(d - 1, d)
    yield "one more at the end", x.unsqueeze(-1)
    yield "a scalar", x.sum()
    yield "flat", x.reshape(-1)
    yield "flat and short", x.reshape(-1)[:-1]
    yield "without memory", torch.zeros(0)
    for dtype in (torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn, *FLOATS):
        if dtype != x.dtype:
            yield f"in {str(dtype).removeprefix('torch.')}", x.to(dtype)
    yield "on meta", x.to("meta")
    yield "sparse", x.to_sparse()
    yield from (
        ("None", None),
        ("a number", 1.0),
        ("a name", name),
        ("a list", x.float().tolist()),
        ("an object", object()),
    )
    yield "an array", x.float().numpy()
    # right, though not as they mostly come
    yield "strided", torch.stack((x, x), -1)[..., 0]
    yield "at an odd offset", torch.cat((x.reshape(-1)[:1], x.reshape(-1)))[1:].view(x.shape)
    yield "negated as a view", torch._neg_view(-x)
    yield "conjugated and negated", torch.complex(x.double() * 0, -x.double()).conj().imag.to(x.dtype)
    yield "a parameter", torch.nn.Parameter(x.clone(), requires_grad=x.is_floating_point())
    yield "expanded", x[:1].expand(x.shape) if x.numel() else x


def _borders(x: Tensor | None) -> Iterator[tuple[str, Any]]:
    if x is None:
        yield from (("for a batch", torch.tensor([0, 5])), ("a list", [0, 5]), ("3", 3), ("text", "0 5"))
        return
    T = int(x[-1])
    wrong = {
        "short": [0, 2, T - 1], "long": [0, 2, T + 1], "far": [0, 2**31 - 1], "late": [1, T], "back": [0, 4, 2, T], "one": [0],
        "negative": [0, -1, T], "none": [], "huge": [0, 2**62, T], "right": [0, 1, T], "with empty ones": [0, 0, 3, 3, T, T],
        "whole": [0, T],
    }  # fmt: skip
    yield from ((what, torch.tensor(ends, dtype=torch.int64)) for what, ends in wrong.items())
    yield from ((f"in {dtype}", x.to(dtype)) for dtype in (torch.float32, torch.int16, torch.int64, torch.bool))
    yield from (("a list", x.tolist()), ("an array", x.numpy()), ("of two dimensions", x[None]), ("a scalar", x[-1]))
    yield from (("on meta", x.to("meta")), ("strided", torch.stack((x, x), -1)[:, 0]), ("a number", 3), ("text", "0 5"))


# ---- the kernels' own operators, which anybody can call ----

SIZES = {"B": 2, "T": 70, "H": 2, "K": 6, "HV": 4, "V": 3, "N": 2, "P": 2 * 70 // 64 + 2, "HV*K": 24}


def _of_table(op: str, device: str = "cpu", **none: None) -> dict[str, Tensor | None]:
    """Right arguments of an operator's table, by name."""
    rng = torch.Generator().manual_seed(0)
    found: dict[str, Tensor | None] = {}
    for row in TABLES[op].rows:
        shape = [SIZES[letter] for letter in row.shape.split()]
        x = -torch.rand(shape, generator=rng) / 4
        found[row.name] = None if row.name in none else x.to(device)
    return found


def _cpu_forward(a: dict[str, Any], gate: str = "none") -> tuple:
    return register.forward(*(a[row.name] for row in TABLES["cpu_forward"].rows), None, 1.0, gate, -5.0, True)


def _cpu_backward(a: dict[str, Any], gate: str = "none") -> tuple:
    inputs = (a[row.name] for row in TABLES["cpu_forward"].rows)
    return tuple(register.backward(a["d_out"], a["d_end_state"], a["checkpoints"], *inputs, None, 1.0, gate, -5.0))


def _cpu_step(a: dict[str, Any]) -> tuple:
    state = a["state"].clone() if _is_plain(a["state"]) and a["state"].is_contiguous() else a["state"]
    return register.step(*(a[name] for name in ("q", "k", "v", "log_decay", "beta")), state, 1.0), state


def _gpu_memory(a: dict[str, Any], gate: int = 0, before: bool = False, hopper: bool = False) -> tuple:
    first = (a[name] for name in ("q", "k", "v", "log_decay", "erase", "state"))
    rest = (1.0, None, a["A_log"], a["dt_bias"], gate, -5.0, before, hopper)
    if "d_out" in a:
        return torch.ops.palimpsest_gpu.delta_memory_backward(a["d_out"], a["d_state"], *first, *rest)
    return torch.ops.palimpsest_gpu.delta_memory(*first, *rest)


def _gpu_linear(a: dict[str, Any]) -> tuple:
    first = (a[name] for name in ("q", "k", "v", "state"))
    if "d_out" in a:
        return torch.ops.palimpsest_gpu.linear_memory_backward(a["d_out"], a["d_state"], *first, 1.0, None)
    return torch.ops.palimpsest_gpu.linear_memory(*first, 1.0, None)


def _gpu_step(a: dict[str, Any]) -> tuple:
    return (torch.ops.palimpsest_gpu.step_(*(a[row.name] for row in TABLES["gpu_step"].rows), 1.0),)


NO_GATE = {"A_log": None, "dt_bias": None}
DOORS: dict[str, tuple[Callable, dict[str, Any]]] = {  # on a CPU the GPU's operators get tensors without numbers
    "cpu_forward of KDA": (_cpu_forward, _of_table("cpu_forward", erase=None, **NO_GATE)),
    "cpu_forward of the core": (_cpu_forward, _of_table("cpu_forward", beta=None, **NO_GATE)),
    "cpu_forward of logits": (lambda a: _cpu_forward(a, "sigmoid"), _of_table("cpu_forward", erase=None)),
    "cpu_backward of KDA": (_cpu_backward, _of_table("cpu_backward", erase=None, **NO_GATE)),
    "cpu_backward of logits": (lambda a: _cpu_backward(a, "softplus"), _of_table("cpu_backward", erase=None)),
    "cpu_step": (_cpu_step, _of_table("cpu_step")),
    "gpu delta_memory": (_gpu_memory, _of_table("gpu_delta_memory", "meta", **NO_GATE)),
    "gpu delta_memory of logits": (lambda a: _gpu_memory(a, 1), _of_table("gpu_delta_memory", "meta")),
    "gpu delta_memory of vectors": (_gpu_memory, _of_table("gpu_delta_memory, vectors", "meta", **NO_GATE)),
    "gpu delta_memory_backward": (lambda a: _gpu_memory(a, 2), _of_table("gpu_delta_memory_backward", "meta")),
    "gpu linear_memory": (_gpu_linear, _of_table("gpu_linear_memory", "meta")),
    "gpu linear_memory_backward": (_gpu_linear, _of_table("gpu_linear_memory_backward", "meta")),
    "gpu step_": (_gpu_step, _of_table("gpu_step", "meta")),
}


def at_the_door(call: Callable, right: dict[str, Any], changed: str, what: str, other: Any) -> str | None:
    """None if an operator refuses the changed argument in a sentence, or if it reads the same numbers in it."""
    try:
        results = call({**right, changed: other})
    except (ValueError, TypeError) as error:
        return unreadable(error)
    except RuntimeError as error:  # torch's own, before any of ours: no tensor where the operator's schema has one
        own = (
            "Expected a value of type" in str(error)
            or "Could not run" in str(error)
            or "no implementation" in str(error)
        )
        return None if own else f"ended in a trace: {type(error).__name__}: {str(error)[:300]}"
    same = isinstance(other, Tensor) and isinstance(right[changed], Tensor) and other.shape == right[changed].shape
    if other is None and changed in ("state", "d_state"):
        return None  # nothing held, and nothing asked, before
    if not same:
        return "was answered"
    if other.device.type == "meta":
        return None
    expected = call({**right, changed: torch.clone(other.resolve_neg()).contiguous()})
    equal = all(torch.equal(x, y) or (x != x).any() for x, y in zip(results, expected, strict=True))
    return None if equal else "gave other numbers than for the same numbers in order"


# ---- campaigns ----

DRAWS = {
    "two sequences": (Draw(), ("auto", "reference")),
    "packed": (Draw(B=1, T=9, borders=(0, 2, 2, 9), seed=1), ("auto", "chunked")),
    "bf16 without a state": (Draw(dtype=torch.bfloat16, with_state=False, seed=2), ("auto",)),
}


def bad_calls(folder: Path | None = None) -> Iterator[Trial]:
    """Every function, every argument, every way in which it can be wrong."""
    for name, function in FUNCTIONS.items():
        for drawn, (draw, on) in DRAWS.items():
            for backend in on if function.has_backends else ("",):
                right = function.draw(draw)
                if backend:
                    right["backend"] = backend
                yield Trial(f"{name}, {drawn}, {backend}", lambda name=name, a=right: outcome(name, a))
                for what, changed, value in spoiled(right):
                    run = lambda name=name, a=right, x=changed, value=value: outcome(name, {**a, x: value})
                    yield Trial(f"{name}, {drawn}, {backend}: {what}", run)


def bad_operator_calls(folder: Path | None = None) -> Iterator[Trial]:
    """Every operator, every tensor."""
    for door, (call, right) in DOORS.items():
        for changed, x in right.items():
            like = x if x is not None else torch.zeros(2, 70, 4, 6)
            numbers = torch.zeros(like.shape) if like.device.type == "meta" else like
            for what, other in _tensors(changed, numbers):
                if like.device.type == "meta" and isinstance(other, Tensor) and other.layout == torch.strided:
                    other = numbers if what == "on meta" else other.to("meta")
                if (x is None and other is None) or (door, what) == (
                    "gpu delta_memory of vectors",
                    "dimension 3 taken out",
                ):
                    continue  # right calls: nothing was changed, and a strength in place of a vector
                run = lambda a=(call, right, changed, what, other): at_the_door(*a)
                yield Trial(f"{door}: {changed} {what}", run)


CAMPAIGNS = [
    Campaign(
        "bad calls of the memory's functions",
        "one argument of a call is changed: its shape, dtype, device, layout, strides, kind or value, on every backend; "
        "survived is the law's number or a sentence",
        bad_calls,
    ),
    Campaign(
        "bad calls of the kernels' operators",
        "the same to the operators behind them, `torch.ops.palimpsest...`, which any code can call without the functions",
        bad_operator_calls,
    ),
]

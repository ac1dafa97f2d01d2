"""What a layer or a small model costs against the length of its context: time a token, time of a prompt, bytes kept.

Letters  B sequences, S tokens held, H heads, K channels of a head, D hidden channels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palimpsest.checks import check, check_fields
from palimpsest.lab.framework.experiment import Progress, Row
from palimpsest.lab.model_variants import ModelVariant
from palimpsest.layers.kimi_delta_attention import KimiDeltaAttention
from palimpsest.layers.latent_attention import MultiHeadLatentAttention
from palimpsest.layers.layer_state import KDAState, LatentState
from palimpsest.layers.options import MixerOptions
from palimpsest.models.kimi_linear import KimiLinearConfig, KimiLinearForCausalLM
from palimpsest.models.kimi_linear.mixers import is_full_attention
from palimpsest.models.kimi_linear.model_state import ModelState
from palimpsest.ops import backends
from palimpsest.ops.gates import l2norm
from palimpsest.ops.variants import dplr, kda

LAYERS = ("kda", "gdn", "mla", "softmax")
ROUND = 0.5  # seconds of measuring at one context, about
PIECE = 1 << 17  # tokens of a prompt that a memory layer reads at once, carrying its state: activations stay bounded


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Of a layer: D, H and K; latent and positions, the widths of a latent row."""

    hidden_size: int
    heads: int
    head_dim: int
    latent: int
    positions: int


SMALL = Shape(hidden_size=256, heads=2, head_dim=128, latent=128, positions=32)
LARGE = Shape(hidden_size=2304, heads=32, head_dim=128, latent=512, positions=64)  # Kimi-Linear-48B-A3B's layers


class SoftmaxAttention(nn.Module):
    """Softmax attention with a cache of every head's keys and values, as most models have it: the yardstick."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape, D = shape, shape.heads * shape.head_dim
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(shape.hidden_size, D, bias=False) for _ in range(3))
        self.o_proj = nn.Linear(D, shape.hidden_size, bias=False)

    def forward(self, x: Tensor, cache: tuple[Tensor, Tensor, int] | None = None):
        """x [B, T, D]; cache: keys and values [B, H, room, K] and how many of them are filled."""
        q, k, v = (
            p(x).unflatten(-1, (self.shape.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        if cache is None:
            y, cache = F.scaled_dot_product_attention(q, k, v, is_causal=True), (k, v, x.shape[1])
        else:
            keys, values, filled = cache
            end = filled + x.shape[1]
            keys[:, :, filled:end], values[:, :, filled:end] = k, v
            y, cache = F.scaled_dot_product_attention(q, keys[:, :, :end], values[:, :, :end]), (keys, values, end)
        return self.o_proj(y.transpose(1, 2).flatten(2)), cache


@dataclass(frozen=True, kw_only=True)
class _Timed:
    """What the points that take times have in common."""

    what: ClassVar[str]
    operations: ClassVar[tuple[str, ...]] = ()  # that may stand in place of a layer
    layer: str
    shape: Shape = SMALL
    contexts: tuple[int, ...] = (1024, 4096)
    rounds: int = 3

    def label(self) -> Row:
        return {"what": self.what, "layer": self.layer, "hidden_size": self.shape.hidden_size}

    def to_dict(self) -> Row:
        return {"kind": self.what, "what": self.what, **vars(self), "shape": asdict(self.shape)}

    def prepare(self) -> None:
        check_fields(self, f"{self.what}: ")
        known = (*LAYERS, *self.operations)
        check(
            self.layer in known or self.layer.isupper(),
            f"layer {self.layer!r} is unknown; choose one of {', '.join(known)}, or a pattern such as KKKM",
        )
        if self.layer.isupper():
            ModelVariant(self.layer, self.layer)
        _check_contexts(self.contexts)
        check(self.rounds >= 1, f"{self.what}: rounds is {self.rounds}; give at least 1")


def _check_contexts(contexts: tuple[int, ...]) -> None:
    check(min(contexts, default=0) >= 1, f"cost: contexts are {contexts}; give at least one of 1 token or more")


@dataclass(frozen=True, kw_only=True)
class Decode(_Timed):
    """A point: the time of one more token when so many are held, and the bytes that hold them.

    Contexts are measured in turn, round after round, and the fastest round counts: what else the machine does then
    slows all of them alike.

    Attributes:
        layer: "kda", "gdn", "mla", "softmax", or a pattern of capital letters for a small model of such layers.
        shape: of the layer. contexts: tokens held. rounds, steps: of the measurement. batch_size: B.
    """

    what: ClassVar[str] = "decode"
    rounds: int = 5
    steps: int = 20
    batch_size: int = 1

    def prepare(self) -> None:
        super().prepare()
        for name in ("steps", "batch_size"):
            check(getattr(self, name) >= 1, f"decode: {name} is {getattr(self, name)}; give at least 1")

    def work(self) -> float:
        return 1.0 + sum(self.contexts) / 1e6

    def bytes_needed(self) -> int:
        s, layers = self.shape, len(self.layer) if self.layer.isupper() else 1
        row = 2 * s.heads * s.head_dim if self.layer == "softmax" else s.latent + s.positions
        held = 0 if self.layer in ("kda", "gdn") else 2 * self.batch_size * layers * row * sum(self.contexts)
        return int(1.3 * held) + 64 * layers * s.hidden_size**2 * 4

    @torch.inference_mode()
    def run(self, device: str, progress: Progress, unfinished: Path | None = None) -> Row:
        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        make = _model_stepper if self.layer.isupper() else _layer_stepper
        torch.manual_seed(0)
        step, held = make(self.layer, self.shape, self.contexts, self.batch_size, device, dtype)
        best = dict.fromkeys(self.contexts, math.inf)
        spread: dict[int, list[float]] = {context: [] for context in self.contexts}
        counts = dict.fromkeys(self.contexts, min(self.steps, 3))
        for round_ in range(-2, self.rounds):  # the first warms up and compiles, the second tells how many steps fit
            for context in self.contexts:
                seconds = timed(lambda context=context: step(context), counts[context], device)
                if round_ == -1:
                    counts[context] = max(min(self.steps, round(ROUND / seconds)), 1)
                if round_ >= 0:
                    best[context] = min(best[context], seconds)
                    spread[context].append(seconds)
                share = (round_ + 2) / (self.rounds + 2)
                progress(share, f"{context:,} tokens: {1e3 * seconds:.3g} ms a token")
        rows = [
            {
                "context": c,
                "milliseconds": 1e3 * best[c],
                "median_milliseconds": 1e3 * median(spread[c]),
                "state_bytes": held[c],
            }
            for c in self.contexts
        ]
        return {"rows": rows}


@dataclass(frozen=True, kw_only=True)
class Prefill(_Timed):
    """A point: the time to read a prompt, and on a GPU the memory that takes at most, against its length.

    Attributes as of Decode, and layer may be an operation alone, "op kda" or "op dplr"; backend: of the operation.
    """

    what: ClassVar[str] = "prefill"
    operations: ClassVar[tuple[str, ...]] = ("op kda", "op dplr")
    backend: str = "auto"

    def prepare(self) -> None:
        super().prepare()
        known = ("auto", *backends.names())
        check(self.backend in known, f"prefill: backend is {self.backend!r}; choose one of {', '.join(known)}")

    def work(self) -> float:
        return sum(self.contexts) / 2000 * self.shape.hidden_size / 256

    def bytes_needed(self) -> int:
        longest, s = max(self.contexts), self.shape
        at_once = min(longest, PIECE) if self.layer in ("kda", "gdn") else longest
        return 60 * at_once * s.heads * s.head_dim + 4 * longest * s.hidden_size

    @torch.inference_mode()
    def run(self, device: str, progress: Progress, unfinished: Path | None = None) -> Row:
        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        torch.manual_seed(0)
        kind = self._op if self.layer.startswith("op ") else self._model if self.layer.isupper() else self._layer
        call, cuda = kind(device, dtype), device.startswith("cuda")
        best, peak = dict.fromkeys(self.contexts, math.inf), {}
        for round_ in range(self.rounds + 1):
            for i, context in enumerate(list(best)):
                if round_ > 1 and best[context] > 10 * ROUND:  # measured once, which is enough
                    continue
                try:
                    if cuda:
                        torch.cuda.reset_peak_memory_stats(device)
                    seconds = timed(call(context), 1, device)
                    if cuda:
                        peak[context] = {"peak_bytes": torch.cuda.max_memory_allocated(device)}
                except torch.OutOfMemoryError:  # the longer ones would too; the report shows how far it went
                    best = {c: b for c, b in best.items() if c < context}
                    break
                if round_:
                    best[context] = min(best[context], seconds)
                share = (round_ + (i + 1) / len(self.contexts)) / (self.rounds + 1)
                progress(min(share, 1.0), f"{context:,} tokens: {1e3 * seconds:.3g} ms")
        return {"rows": [{"context": c, "milliseconds": 1e3 * b, **peak.get(c, {})} for c, b in best.items()]}

    def _model(self, device: str, dtype: torch.dtype) -> Callable[[int], Callable[[], Any]]:
        model = KimiLinearForCausalLM(model_config(self.layer, self.shape)).to(device, dtype).eval()

        def prepare(context: int) -> Callable[[], Any]:
            tokens = torch.zeros(1, context, dtype=torch.long, device=device)
            return lambda: model(tokens, last_only=True)

        return prepare

    def _layer(self, device: str, dtype: torch.dtype) -> Callable[[int], Callable[[], Any]]:
        layer = _build_layer(self.layer, self.shape).to(device, dtype)

        def prepare(context: int) -> Callable[[], Any]:
            x = torch.randn(1, context, self.shape.hidden_size, device=device, dtype=dtype)

            def read() -> None:
                state = None
                for piece in x.split(PIECE, dim=1):
                    state = layer(piece, state)[1]

            return read if self.layer in ("kda", "gdn") else lambda: layer(x)

        return prepare

    def _op(self, device: str, dtype: torch.dtype) -> Callable[[int], Callable[[], Any]]:
        H, K = self.shape.heads, self.shape.head_dim

        def prepare(context: int) -> Callable[[], Any]:
            q, k, v = (torch.randn(1, context, H, K, device=device, dtype=dtype) for _ in range(3))
            q, k = l2norm(q), l2norm(k)
            log_decay = -torch.rand(1, context, H, K, device=device) * 0.1
            beta = torch.rand(1, context, H, device=device)
            if self.layer == "op kda":
                return lambda: kda(q, k, v, log_decay, beta, backend=self.backend)
            a, b = (log_decay.exp() * k).to(dtype), (-beta[..., None] * k).to(dtype)
            write = (beta[..., None] * v).to(dtype)
            return lambda: dplr(q, k, write, a, b, log_decay, backend=self.backend)

        return prepare


def timed(call: Callable[[], Any], count: int, device: str) -> float:
    """Seconds a call, over `count` of them."""
    wait = (lambda: torch.cuda.synchronize(device)) if device.startswith("cuda") else (lambda: None)
    wait()
    began = time.perf_counter()
    for _ in range(count):
        call()
    wait()
    return (time.perf_counter() - began) / count


def _build_layer(name: str, shape: Shape) -> nn.Module:
    if name == "softmax":
        return SoftmaxAttention(shape)
    if name == "mla":
        return MultiHeadLatentAttention(
            shape.hidden_size, shape.heads, kv_lora_rank=shape.latent, qk_nope_head_dim=shape.head_dim,
            qk_rope_head_dim=shape.positions, v_head_dim=shape.head_dim,
        )  # fmt: skip
    options = MixerOptions(decay="head") if name == "gdn" else MixerOptions()
    return KimiDeltaAttention(shape.hidden_size, shape.heads, shape.head_dim, options=options)


def _memory(shape: Shape, B: int, device: str, dtype: torch.dtype) -> KDAState:
    D = shape.heads * shape.head_dim
    memory = torch.randn(B, shape.heads, shape.head_dim, shape.head_dim, device=device)
    return KDAState(memory, tuple(torch.randn(B, D, 3, device=device, dtype=dtype) for _ in range(3)))


def _latents(shape: Shape, B: int, S: int, device: str, dtype: torch.dtype) -> LatentState:
    """S latents, with room behind them already, as after the first of many steps."""
    row = torch.randn(B, 1, shape.latent + shape.positions, device=device, dtype=dtype)
    return LatentState(row.expand(B, S - 1, -1)).append(row)


def _layer_stepper(name: str, shape: Shape, contexts: tuple[int, ...], B: int, device: str, dtype: torch.dtype):
    """A function that reads one token after so many others, again and again; and the bytes that hold them."""
    layer: Any = _build_layer(name, shape).to(device, dtype)
    x = torch.randn(B, shape.hidden_size, device=device, dtype=dtype)
    states: dict[int, Any] = {}
    held: dict[int, int] = {}
    for S in contexts:
        if name in ("kda", "gdn"):
            state = states[S] = _memory(shape, B, device, dtype)
            held[S] = sum(t.nbytes for t in (state.memory, *state.conv))
        elif name == "mla":
            states[S] = _latents(shape, B, S, device, dtype)
            held[S] = states[S].latent.nbytes
        else:
            room = lambda S=S: torch.randn(B, shape.heads, S + 1, shape.head_dim, device=device, dtype=dtype)
            states[S] = (room(), room(), S)
            held[S] = sum(t[:, :, :S].nbytes for t in states[S][:2])

    def step(S: int) -> None:
        if name == "softmax":
            layer(x[:, None], states[S])
        else:
            states[S] = layer.step_(x, states[S])[1]

    return step, held


def _model_stepper(pattern: str, shape: Shape, contexts: tuple[int, ...], B: int, device: str, dtype: torch.dtype):
    config = model_config(pattern, shape)
    model = KimiLinearForCausalLM(config).to(device, dtype).eval()
    token = torch.zeros(B, dtype=torch.long, device=device)
    states = {}
    for S in contexts:
        layers = tuple(
            _latents(shape, B, S, device, dtype) if is_full_attention(kind) else _memory(shape, B, device, dtype)
            for kind in config.layer_types
        )
        states[S] = ModelState(layers, torch.full((B,), S, device=device))
    held = {S: state.nbytes for S, state in states.items()}

    def step(S: int) -> None:
        states[S] = model.step_(token, states[S])[1]

    return step, held


def model_config(pattern: str, shape: Shape) -> KimiLinearConfig:
    """A small model of layers of this shape."""
    return KimiLinearConfig.tiny(
        pattern, hidden_size=shape.hidden_size, intermediate_size=2 * shape.hidden_size,
        linear_num_heads=shape.heads, linear_head_dim=shape.head_dim, num_attention_heads=shape.heads,
        kv_lora_rank=shape.latent, qk_nope_head_dim=shape.head_dim, qk_rope_head_dim=shape.positions,
        v_head_dim=shape.head_dim, num_experts=0,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Cache:
    """A point: the bytes that a model's state takes after so many tokens, of tensors that are really made.

    Attributes: pattern, of the layers; shape; contexts. Latents in bfloat16, memories in float32.
    """

    pattern: str
    shape: Shape = LARGE
    contexts: tuple[int, ...] = (4096, 1 << 20)

    def label(self) -> Row:
        return {"what": "cache", "layer": self.pattern, "hidden_size": self.shape.hidden_size}

    def to_dict(self) -> Row:
        return {"kind": "cache", **vars(self), "shape": asdict(self.shape)}

    def prepare(self) -> None:
        check_fields(self, "cache: ")
        ModelVariant(self.pattern, self.pattern)
        _check_contexts(self.contexts)

    def work(self) -> float:
        return 1.0

    def bytes_needed(self) -> int:
        return 2 * len(self.pattern) * max(self.contexts) * (self.shape.latent + self.shape.positions)

    def run(self, device: str, progress: Progress, unfinished: Path | None = None) -> Row:
        config = model_config(self.pattern, self.shape)
        rows = []
        for S in self.contexts:
            empty = ModelState.empty(config, device=device, dtype=torch.bfloat16)
            layers = tuple(
                LatentState(torch.empty(1, S, layer.latent.shape[-1], device=device, dtype=torch.bfloat16))
                if isinstance(layer, LatentState)
                else layer
                for layer in empty.layers
            )
            rows.append({"context": S, "state_bytes": ModelState(layers, torch.full((1,), S)).nbytes})
            progress(len(rows) / len(self.contexts), "")
        return {"rows": rows}

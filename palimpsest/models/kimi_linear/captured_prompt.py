"""A piece of a prompt as a few CUDA graphs: for so few tokens the host would set the pace, launch by launch.

Recorded is everything but attention over the context, which grows from piece to piece: from the embedding, or from what one
latent layer has read, to the queries and latents of the next, or to the last norm. Pieces have the same length until the
last, and servers see one length again and again; a shape is recorded when it comes for the third time.

Letters  B sequences, T tokens, D hidden channels, H heads, V value channels of a head.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from palimpsest.layers.kimi_delta_attention import KimiDeltaAttention
from palimpsest.layers.latent_attention import MultiHeadLatentAttention
from palimpsest.layers.layer_state import KDAState, LatentState
from palimpsest.layers.linears import is_plain
from palimpsest.models.kimi_linear.unchanged import Parts

if TYPE_CHECKING:
    from palimpsest.models.kimi_linear.model import DecoderLayer, KimiLinearModel

MOST_TOKENS = 4096  # of all sequences; with more, a GPU takes longer than the host
FEWEST_TOKENS = 256  # with fewer, the next piece is soon another length
SEEN_BEFORE = 2  # times that a shape is read launch by launch first
MOST_SHAPES = 2  # recorded at a time; each keeps its activations


@dataclass
class Stretch:
    """What is recorded as one graph.

    Attributes:
        left: the latent layer that it finishes; None for the first.
        layers: the memory layers after it, with their places.
        entered: the latent layer that it begins, with its place; None for the last.
        read: [B, T, H, V], what `left` has read, written before each replay.
        stream: [B, T, D], the residual stream at its end, normalised in the last.
        after: the states of `layers`.
        q, latent: of `entered`.
        replay: runs it.
    """

    left: DecoderLayer | None
    layers: list[tuple[int, DecoderLayer]] = field(default_factory=list)
    entered: tuple[int, DecoderLayer] | None = None
    read: Any = None
    stream: Any = None
    after: list[KDAState] = field(default_factory=list)
    q: Tensor | None = None
    latent: Tensor | None = None
    replay: Callable[[], None] = lambda: None


@dataclass
class Recording:
    """One shape: its inputs at fixed addresses, and the stretches in order."""

    ids: Tensor
    states: dict[int, KDAState]  # by the place of their layer
    stretches: list[Stretch]


class CapturedPrompt:
    """The recordings of a model, made anew when a weight has moved.

    A model fits that is made of the released layers without positions, with plain projections that nobody watches. For
    others, for shapes outside MOST_TOKENS and FEWEST_TOKENS, and while another thread is at it, `run` gives None.
    """

    def __init__(self) -> None:
        self._recordings: dict[tuple, Recording] = {}
        self._seen: Counter = Counter()
        self._parts: Parts | None = None
        self._fits = False
        self._busy = Lock()
        self._done: Any = None  # with what was read last, on whichever stream

    def __reduce__(self):  # graphs hold addresses: a copy of the model makes its own
        return CapturedPrompt, ()

    def run(self, model: KimiLinearModel, ids: Tensor, states: tuple) -> tuple[Tensor, tuple] | None:
        """The hidden states [B, T, D] after the last norm and the states of the layers after ids [B, T]."""
        if not FEWEST_TOKENS <= ids.numel() <= MOST_TOKENS or not _may_capture(model, ids):
            return None
        if not self._busy.acquire(blocking=False):
            return None
        try:
            return self._run(model, ids, states)
        finally:
            self._busy.release()

    def _run(self, model: KimiLinearModel, ids: Tensor, states: tuple) -> tuple[Tensor, tuple] | None:
        key = tuple(ids.shape)
        self._seen[key] += 1
        if self._seen[key] <= SEEN_BEFORE:
            return None
        if self._parts is None or not self._parts.unchanged():
            self._recordings, self._parts = {}, Parts.of(model)
            self._fits = _fits(model, self._parts)
        if not self._fits or not all(map(_plain_state, states)):
            return None
        if key not in self._recordings:
            if len(self._recordings) == MOST_SHAPES:
                self._recordings.pop(next(iter(self._recordings)))
            with torch.inference_mode(False), torch.no_grad():
                self._recordings[key] = _record(model, ids, states)
        recording = self._recordings[key]
        if any(states[i].form() != held.form() for i, held in recording.states.items()):
            return None
        if self._done is not None:
            torch.cuda.current_stream(ids.device).wait_event(self._done)
        found = _replay(recording, ids, states)
        if ids.is_cuda:
            self._done = torch.cuda.current_stream(ids.device).record_event()
        return found


def _may_capture(model: KimiLinearModel, ids: Tensor) -> bool:
    if not ids.is_cuda or torch.is_grad_enabled() or model.training or torch.is_autocast_enabled("cuda"):
        return False
    return not torch.compiler.is_compiling() and not torch.cuda.is_current_stream_capturing()


def _fits(model: KimiLinearModel, parts: Parts) -> bool:
    def known(layer: Any) -> bool:
        mixer = layer.self_attn
        latent = type(mixer) is MultiHeadLatentAttention and mixer.rope is None
        return layer._compiled_call_impl is None and (latent or type(mixer) is KimiDeltaAttention)

    return not parts.watched and all(map(is_plain, parts.linears())) and all(map(known, model.layers))


def _plain_state(state: Any) -> bool:
    return isinstance(state, KDAState) or (isinstance(state, LatentState) and state.valid is None)


def _record(model: KimiLinearModel, ids: Tensor, states: tuple) -> Recording:
    own = lambda x: x.clone(memory_format=torch.contiguous_format)
    held = {i: state.map(own) for i, state in enumerate(states) if isinstance(state, KDAState)}
    recording = Recording(own(ids), held, _stretches(model))
    capture, before = _capturing(ids.device), None
    for stretch in recording.stretches:
        if stretch.left is not None:
            mixer = stretch.left.self_attn
            shape = *ids.shape, mixer.num_heads, mixer.V
            stretch.read = torch.zeros(shape, dtype=model.norm.weight.dtype, device=ids.device)
        stretch.replay = capture(lambda s=stretch, b=before: _walk(model, recording, s, b))
        before = stretch
    return recording


def _stretches(model: KimiLinearModel) -> list[Stretch]:
    found = [Stretch(None)]
    for i, layer in enumerate(cast("list[DecoderLayer]", model.layers)):
        if isinstance(layer.self_attn, MultiHeadLatentAttention):
            found[-1].entered = i, layer
            found.append(Stretch(layer))
        else:
            found[-1].layers.append((i, layer))
    return found


def _walk(model: KimiLinearModel, recording: Recording, stretch: Stretch, before: Stretch | None) -> None:
    """What a stretch computes; its results are left in it."""
    if stretch.left is None or before is None:
        x = model.embed_tokens(recording.ids)
    else:
        x = before.stream + stretch.left.self_attn.o_proj(stretch.read.flatten(-2))
        x = x + stretch.left._channel_mixer(stretch.left.post_attention_layernorm(x))
    after = []
    for i, layer in stretch.layers:
        x, state = layer(x, recording.states[i])
        after.append(state)
    stretch.after = after
    if stretch.entered is None:
        stretch.stream = model.norm(x)
        return
    _, layer = stretch.entered
    stretch.stream = x
    no_positions = recording.ids  # which these layers do not look at
    stretch.q, stretch.latent = layer.self_attn._project(layer.input_layernorm(x), no_positions)


def _replay(recording: Recording, ids: Tensor, states: tuple) -> tuple[Tensor, tuple]:
    recording.ids.copy_(ids)
    _copy([(mine, states[i]) for i, mine in recording.states.items()])
    after, fresh = list(states), []
    for stretch, following in zip(recording.stretches, [*recording.stretches[1:], None]):
        stretch.replay()
        for (i, _), state in zip(stretch.layers, stretch.after):
            after[i] = state.map(torch.empty_like)
            fresh.append((after[i], state))
        if stretch.entered is not None and following is not None:
            i, layer = stretch.entered
            after[i] = states[i].append(stretch.latent)
            following.read.copy_(layer.self_attn.attend(stretch.q, after[i]))
    _copy(fresh)
    return recording.stretches[-1].stream.clone(), tuple(after)


def _copy(pairs: list[tuple[KDAState, KDAState]]) -> None:
    """Each first of a pair becomes the second: one launch a dtype."""
    kinds: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for into, of in pairs:
        for a, b in zip(into.tensors().values(), of.tensors().values(), strict=True):
            to, since = kinds.setdefault(a.dtype, ([], []))
            to.append(a)
            since.append(b)
    for to, since in kinds.values():
        torch._foreach_copy_(to, since)


def _capturing(device: torch.device) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """What makes graphs that share their memory: each is run once before, so that libraries and kernels have what they
    make at first use, and once after, so that the next begins with real numbers."""
    pool, side = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def capture(body: Callable[[], None]) -> Callable[[], None]:
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            body()
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                body()
            finally:
                graph.capture_end()
            graph.replay()
        current.wait_stream(side)
        return graph.replay

    return capture

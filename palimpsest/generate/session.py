"""Decoding at fixed addresses: a token is chosen and read without the host, which only learns which one it was.

Two CUDA graphs a token: `choose` (logits to token) and `read` (token to logits). The token is copied to the host between
the two, so that the host writes text, looks for stop strings and launches the next pair while the device still reads:
it is never ahead of a decision, and the device never waits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from palimpsest.generate.decode_state import DecodeState
from palimpsest.generate.sampling import Sampling, as_int64, choose_tokens
from palimpsest.layers.latent_cache import LatentCache
from palimpsest.layers.layer_state import LatentState, LayerState
from palimpsest.models.kimi_linear.model import KimiLinearForCausalLM
from palimpsest.models.kimi_linear.model_state import ModelState


class DecodeSession:
    """Sequences that go on together, one token a call of `step_`. Made from a value, gives values back.

    Args:
        start: where the sequences stand; not changed.
        sampling: how tokens are chosen.
        seeds: one a sequence.
        capacity: tokens that a sequence may come to have, those of start included.
        graph: run as CUDA graphs.

    Raises:
        ValueError: a graph on a CPU, no room, or a layer whose state is not stepped in place.

    >>> from palimpsest.generate import prefill
    >>> from palimpsest.models.kimi_linear import KimiLinearConfig
    >>> model = KimiLinearForCausalLM(KimiLinearConfig.tiny()).eval()
    >>> with torch.no_grad():
    ...     session = DecodeSession(model, prefill(model, [[1, 2, 3]]), Sampling(), [0], capacity=8, graph=False)
    ...     session.step_()
    >>> len(session.tokens()), session.value([0]).state.position
    (1, tensor([4]))
    """

    def __init__(
        self,
        model: KimiLinearForCausalLM,
        start: DecodeState,
        sampling: Sampling,
        seeds: Sequence[int],
        *,
        capacity: int,
        graph: bool,
    ):
        device = start.state.device
        if graph and device.type != "cuda":
            raise ValueError(f"graph is True and the model is on {device}; a CUDA graph needs a GPU: leave graph out")
        positions = start.state.position.tolist()
        if capacity <= max(positions):
            raise ValueError(f"capacity is {capacity} and a sequence has {max(positions)} tokens; give room for more")
        loose = [layer.kind for layer in start.state.layers if not (layer.in_place or isinstance(layer, LatentState))]
        if loose:
            raise ValueError(
                f"a layer's state, {loose[0]!r}, is made anew by each step, so it has no address that stays; leave graph out"
            )
        self.capacity, self.steps, self._longest = capacity, 0, max(positions)
        self._model, self._sampling = model, sampling
        grows = [type(x).__name__ for x in start.state.layers if not fits_a_session(x)]
        if grows:
            raise ValueError(
                f"states of kind {grows[0]} are not stepped in place; decode without a session: graph=False"
            )
        self._lengths = [
            layer.num_tokens().tolist() if isinstance(layer, LatentState) else [] for layer in start.state.layers
        ]
        self._layers = tuple(
            LatentCache.of(layer, capacity) if isinstance(layer, LatentState) else layer.map(_own)
            for layer in start.state.layers
        )
        self._seeds = torch.tensor([as_int64(seed) for seed in seeds], device=device)
        self._position, self._logits, self._seen = (
            start.state.position.clone(),
            start.logits.clone(),
            start.seen.clone(),
        )
        self._token = torch.zeros_like(self._position)
        self._told = torch.zeros_like(self._position)  # the token, -1 after logits that are not finite
        self._heard = torch.zeros(self._told.shape, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._arrived = torch.cuda.Event() if device.type == "cuda" else None
        self._choose, self._read = self._choose_, self._read_
        if graph:
            self._choose, self._read = (_captured(body) for body in (self._choose_, self._read_))
            self._load_(start)  # the steps have run, too

    @property
    def batch_size(self) -> int:
        return len(self._position)

    def step_(self) -> None:
        """Choose a token for each sequence and read it; returns at once on a GPU.

        Raises:
            ValueError: a sequence has as many tokens as there is room for.
        """
        if self._longest + self.steps >= self.capacity:
            raise ValueError(
                f"a sequence has {self._longest + self.steps} tokens and capacity is {self.capacity}; go on in a new "
                "session with room for more, from value()"
            )
        self._choose()
        self._heard.copy_(self._told, non_blocking=True)
        if self._arrived is not None:
            self._arrived.record()
        self._read()
        self.steps += 1

    def tokens(self) -> list[int]:
        """What the last step chose, as soon as it is known; -1 where the logits were not finite."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._heard.tolist()

    def value(self, rows: Sequence[int]) -> DecodeState:
        """Some of the sequences as they stand now, a copy."""
        index = torch.tensor(list(rows), device=self._token.device)
        layers = []
        for layer, lengths in zip(self._layers, self._lengths):
            if isinstance(layer, LatentCache):
                layers.append(layer.value(rows, [lengths[row] + self.steps for row in rows]))
            else:
                layers.append(layer.select(index))
        state = ModelState(tuple(layers), self._position[index])
        return DecodeState(state, self._logits[index], self._seen[index])

    def _choose_(self) -> None:
        finite_B = self._logits.isfinite().all(-1)
        chosen_B = choose_tokens(
            self._logits, self._sampling, seeds=self._seeds, positions=self._position, seen=self._seen
        )
        self._token.copy_(chosen_B.clamp(0, self._logits.shape[-1] - 1))  # NaN chooses beyond the vocabulary
        self._told.copy_(torch.where(finite_B, self._token, -1))
        self._seen.scatter_(1, self._token[:, None], True)

    def _read_(self) -> None:
        x, _ = self._model.model.step_layers_(self._token, self._layers)
        self._logits.copy_(self._model.lm_head(x))
        self._position.add_(1)

    def _load_(self, start: DecodeState) -> None:
        for layer, before in zip(self._layers, start.state.layers, strict=True):
            if isinstance(layer, LatentCache):
                assert isinstance(before, LatentState)
                layer.load_(before)
            else:
                for mine, its in zip(layer.tensors().values(), before.tensors().values(), strict=True):
                    mine.copy_(its)
        self._position.copy_(start.state.position)
        self._logits.copy_(start.logits)
        self._seen.copy_(start.seen)


def _own(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def fits_a_session(layer: LayerState) -> bool:
    """Whether the steps of a layer leave its state where it is, or could."""
    return isinstance(layer, LatentState) or layer.in_place


def _captured(body: Callable[[], None]) -> Callable[[], None]:
    """body as a CUDA graph: run once, so that libraries and kernels have what they make at first use, then recorded."""
    graph, current, side = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        body()
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            body()
        finally:
            graph.capture_end()
    current.wait_stream(side)
    return graph.replay

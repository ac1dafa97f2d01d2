"""What a whole model remembers between calls.

Letters as in layers/layer_state.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from palimpsest.layers.layer_state import LayerState
from palimpsest.models.kimi_linear.config import KimiLinearConfig
from palimpsest.models.kimi_linear.mixers import MIXERS, Mixer, make_mixer


@dataclass(frozen=True)
class ModelState:
    """One state a layer, and how many tokens each sequence has been through.

    Attributes:
        layers: the states, first layer first.
        position: [B], int64, tokens seen; padding is not a token.
    """

    layers: tuple[LayerState, ...]
    position: Tensor

    @classmethod
    def empty(
        cls,
        config: KimiLinearConfig,
        batch_size: int = 1,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> ModelState:
        """The state before the first token.

        Args:
            config: the model's.
            batch_size: sequences.
            device, dtype: the model's; memories are float32 whatever dtype says, and float64 where it says float64.
        """
        layers = (
            _mixer_on_meta(MIXERS[name], config, i).empty_state(batch_size, device=device, dtype=dtype)
            for i, name in enumerate(config.layer_types)
        )
        return cls(tuple(layers), torch.zeros(batch_size, device=device, dtype=torch.int64))

    @property
    def batch_size(self) -> int:
        """Sequences."""
        return self.position.shape[0]

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.position.device

    def snapshot(self) -> ModelState:
        """A copy to keep before steps in place, `model.step_`.

        A forward pass never changes the state it is given, so there keeping a state needs no copy. Latent caches are
        shared with the copy: no step rewrites a row of theirs.
        """
        return ModelState(tuple(layer.copy() for layer in self.layers), self.position)

    def select(self, rows: Sequence[int]) -> ModelState:
        """The state of some sequences, in the order given; a sequence may occur more than once. Always a copy.

        >>> state = ModelState.empty(KimiLinearConfig.tiny(), batch_size=2)
        >>> state.select([1, 1, 0]).batch_size
        3
        """
        rows = list(rows)
        if not rows or not all(0 <= row < self.batch_size for row in rows):
            raise ValueError(f"rows is {rows}; expected sequences from 0 to {self.batch_size - 1}, at least one")
        index = torch.tensor(rows, device=self.device)
        layers = tuple(layer.select(index) for layer in self.layers)
        return ModelState(layers, self.position.index_select(0, index))

    def fork(self, count: int) -> ModelState:
        """Each sequence `count` times, its copies side by side: one prompt, many continuations.

        >>> ModelState.empty(KimiLinearConfig.tiny()).fork(4).batch_size
        4
        """
        if count < 1:
            raise ValueError(f"count is {count}; a fork has at least 1 copy of each sequence")
        return self.select([row for row in range(self.batch_size) for _ in range(count)])

    @staticmethod
    def join(states: Sequence[ModelState]) -> ModelState:
        """The sequences of several states of one model as one batch.

        >>> state = ModelState.empty(KimiLinearConfig.tiny(), batch_size=2)
        >>> ModelState.join([state.select([0]), state.select([1])]).same(state)
        True
        """
        if not states:
            raise ValueError("states is empty; join needs at least one state")
        for state in states[1:]:
            if problem := state.differs(states[0]):
                raise ValueError(f"the states to join are not of one model: {problem}")
        layers = tuple(type(layers[0]).join(layers) for layers in zip(*(state.layers for state in states)))
        return ModelState(layers, torch.cat([state.position for state in states]))

    def to(self, device: torch.device | str) -> ModelState:
        """The state on another device; data types stay, since memories are float32 by contract."""
        return self._map(lambda x: x.to(device))

    def same(self, other: ModelState) -> bool:
        """Equal to the bit: positions, layers, shapes, types and every number."""
        if self.differs(other) or not self.position.equal(other.position):
            return False
        return all(a.equal(b) for a, b in zip(self.tensors().values(), other.tensors().values(), strict=True))

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name, such as "layers.0.memory"; what a saved state holds."""
        named: dict[str, Tensor] = {"position": self.position}
        for i, layer in enumerate(self.layers):
            named |= {f"layers.{i}.{name}": tensor for name, tensor in layer.tensors().items()}
        return named

    def account(self) -> tuple[LayerBytes, ...]:
        """The bytes of each layer, and how many more each token of each sequence adds.

        >>> state = ModelState.empty(KimiLinearConfig.tiny("KM"))
        >>> [(a.kind, a.memory, a.bytes_per_token) for a in state.account()]
        [('kda', 2048, 0), ('latent', 0, 160)]
        """
        return tuple(LayerBytes(i, layer.kind, **layer.account()) for i, layer in enumerate(self.layers))

    @property
    def nbytes(self) -> int:
        """Bytes of all layers, without what caches have spare."""
        return sum(layer.total for layer in self.account())

    def nonfinite(self) -> tuple[NonFinite, ...]:
        """Where numbers are infinite or NaN: for each sequence that has any, its first layer and first head there."""
        if self._all_finite():  # the common case: few launches, and one number leaves the device
            return ()
        finite = [layer.finite() for layer in self.layers]  # [B, heads] each
        bad_LB = torch.stack([~finite_BH.all(1) for finite_BH in finite])
        if not bad_LB.any():  # only what counts for none, such as padding
            return ()
        places = []
        for row in bad_LB.any(0).nonzero().flatten().tolist():
            layer = int(bad_LB[:, row].int().argmax())
            heads = finite[layer][row]
            places.append(NonFinite(row, layer, int(heads.int().argmin()) if self.layers[layer].in_heads else None))
        return tuple(places)

    def _all_finite(self) -> bool:
        """Whether every number is: the largest of each tensor is infinite or NaN if any of its numbers is."""
        kinds: dict[torch.dtype, list[Tensor]] = {}
        for layer in self.layers:
            for x in layer.tensors().values():
                if x.numel() and x.is_floating_point():
                    kinds.setdefault(x.dtype, []).append(x)
        largest = [n.float() for kind in kinds.values() for n in torch._foreach_norm(kind, math.inf)]
        return not largest or bool(torch.stack(largest).isfinite().all())

    def _map(self, change: Callable[[Tensor], Tensor]) -> ModelState:
        return ModelState(tuple(layer.map(change) for layer in self.layers), change(self.position))

    def differs(self, other: ModelState) -> str | None:
        """Why the two cannot be states of one model; None if they can."""
        if len(self.layers) != len(other.layers):
            return f"one has {len(self.layers)} layers, another {len(other.layers)}"
        for i, (a, b) in enumerate(zip(self.layers, other.layers)):
            if a.form() != b.form():
                return f"layer {i} is {a.form()} in one and {b.form()} in another"
        return None


@dataclass(frozen=True)
class LayerBytes:
    """What one layer holds, in bytes.

    Attributes:
        layer, kind: its place (from 0), and "kda" for a memory, "latent", or what the state of another layer calls itself.
        memory, windows, latent: the matrix memory or what else has one size, the convolution windows, the latent cache.
        spare: reserved behind the latent cache for tokens to come; not part of the total.
        bytes_per_token: what each further token of each sequence adds; 0 for a memory.
    """

    layer: int
    kind: str
    memory: int = 0
    windows: int = 0
    latent: int = 0
    spare: int = 0
    bytes_per_token: int = 0

    @property
    def total(self) -> int:
        return self.memory + self.windows + self.latent


class NonFinite(NamedTuple):
    """Where a state is not finite: a sequence, its first such layer, the first head there (a latent cache has none)."""

    sequence: int
    layer: int
    head: int | None


@lru_cache(maxsize=512)
def _mixer_on_meta(mixer: Mixer, config: KimiLinearConfig, index: int) -> Any:
    """A layer without numbers, to ask for its empty state."""
    with torch.device("meta"):
        return make_mixer(config, index)

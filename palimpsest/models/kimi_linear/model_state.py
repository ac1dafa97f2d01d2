"""What a whole model remembers between calls.

Letters as in layers/layer_state.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from palimpsest.layers.layer_state import KDAState, LatentState
from palimpsest.models.kimi_linear.config import KimiLinearConfig
from palimpsest.ops.arguments import state_dtype

if TYPE_CHECKING:
    from palimpsest.models.kimi_linear.model import KimiLinearForCausalLM


@dataclass(frozen=True)
class ModelState:
    """One state a layer, and how many tokens each sequence has been through.

    Attributes:
        layers: the states, first layer first.
        position: [B], int64, tokens seen; padding is not a token.
    """

    layers: tuple[KDAState | LatentState, ...]
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
        memory_dtype = state_dtype(dtype)
        H, K = config.linear_num_heads, config.linear_head_dim
        window = (batch_size, H * K, config.short_conv_kernel_size - 1)
        layers: list[KDAState | LatentState] = []
        for layer_type in config.layer_types:
            if layer_type in config.LATENT_TYPES:
                width = config.kv_lora_rank + config.qk_rope_head_dim
                layers.append(LatentState(torch.empty(batch_size, 0, width, device=device, dtype=dtype)))
            else:
                memory = torch.zeros(batch_size, H, K, K, device=device, dtype=memory_dtype)
                windows = 3 if config.mixer_options.conv else 0
                conv = tuple(torch.zeros(window, device=device, dtype=dtype) for _ in range(windows))
                layers.append(KDAState(memory, conv))
        return cls(tuple(layers), torch.zeros(batch_size, device=device, dtype=torch.int64))

    @property
    def batch_size(self) -> int:
        return self.position.shape[0]

    @property
    def device(self) -> torch.device:
        return self.position.device

    def snapshot(self) -> ModelState:
        """A copy to keep before steps in place, `model.step_`.

        A forward pass never changes the state it is given, so there keeping a state needs no copy. Latent caches are
        shared with the copy: no step rewrites a row of theirs.
        """
        layers = (_mapped(layer, Tensor.clone) if isinstance(layer, KDAState) else layer for layer in self.layers)
        return ModelState(tuple(layers), self.position)

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
        picked = self._map(lambda x: x.index_select(0, index))
        return replace(picked, layers=tuple(map(_without_gaps, picked.layers)))

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
        layers = tuple(_joined(layers) for layers in zip(*(state.layers for state in states)))
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
            if isinstance(layer, KDAState):
                named[f"layers.{i}.memory"] = layer.memory
                named |= {f"layers.{i}.conv.{j}": window for j, window in enumerate(layer.conv)}
            else:
                named[f"layers.{i}.latent"] = layer.latent
                named[f"layers.{i}.valid"] = _valid(layer)
        return named

    def account(self) -> tuple[LayerBytes, ...]:
        """The bytes of each layer, and how many more each token of each sequence adds.

        >>> state = ModelState.empty(KimiLinearConfig.tiny("KM"))
        >>> [(a.kind, a.memory, a.bytes_per_token) for a in state.account()]
        [('kda', 2048, 0), ('latent', 0, 160)]
        """
        rows = []
        for i, layer in enumerate(self.layers):
            if isinstance(layer, KDAState):
                rows.append(LayerBytes(i, "kda", layer.memory.nbytes, sum(w.nbytes for w in layer.conv), 0, 0, 0))
            else:
                size = layer.latent.nbytes + (0 if layer.valid is None else layer.valid.nbytes)
                spare = 0 if layer.buffer is None else layer.buffer.rows.nbytes - layer.latent.nbytes
                per_token = layer.latent.shape[-1] * layer.latent.element_size()
                rows.append(LayerBytes(i, "latent", 0, 0, size, spare, per_token))
        return tuple(rows)

    @property
    def nbytes(self) -> int:
        """Bytes of all layers, without what caches have spare."""
        return sum(layer.total for layer in self.account())

    def nonfinite(self) -> tuple[NonFinite, ...]:
        """Where numbers are infinite or NaN: for each sequence that has any, its first layer and first head there."""
        bad_LB = torch.stack([~_finite_heads(layer).flatten(1).all(1) for layer in self.layers])
        if not bad_LB.any():  # the common case: one number leaves the device
            return ()
        found = []
        for row in bad_LB.any(0).nonzero().flatten().tolist():
            layer = int(bad_LB[:, row].int().argmax())
            is_memory = isinstance(self.layers[layer], KDAState)
            heads = _finite_heads(self.layers[layer])[row]
            found.append(NonFinite(row, layer, int(heads.int().argmin()) if is_memory else None))
        return tuple(found)

    def save(self, path: str | Path, model: KimiLinearForCausalLM) -> None:
        """Write the state to a file; see `state_file.save_state`."""
        from palimpsest.models.kimi_linear.state_file import save_state

        save_state(path, self, model)

    @staticmethod
    def load(path: str | Path, model: KimiLinearForCausalLM) -> ModelState:
        """Read the state of a file for the model that it belongs to; see `state_file.load_state`."""
        from palimpsest.models.kimi_linear.state_file import load_state

        return load_state(path, model)

    def _map(self, change: Callable[[Tensor], Tensor]) -> ModelState:
        return ModelState(tuple(_mapped(layer, change) for layer in self.layers), change(self.position))

    def differs(self, other: ModelState) -> str | None:
        """Why the two cannot be states of one model; None if they can."""
        if len(self.layers) != len(other.layers):
            return f"one has {len(self.layers)} layers, another {len(other.layers)}"
        for i, (a, b) in enumerate(zip(self.layers, other.layers)):
            if _form(a) != _form(b):
                return f"layer {i} is {_form(a)} in one and {_form(b)} in another"
        return None


@dataclass(frozen=True)
class LayerBytes:
    """What one layer holds, in bytes.

    Attributes:
        layer, kind: its place (from 0), and "kda" or "latent".
        memory, windows, latent: the matrix memory, the convolution windows, the latent cache.
        spare: reserved behind the latent cache for tokens to come; not part of the total.
        bytes_per_token: what each further token of each sequence adds; 0 for a memory.
    """

    layer: int
    kind: str
    memory: int
    windows: int
    latent: int
    spare: int
    bytes_per_token: int

    @property
    def total(self) -> int:
        return self.memory + self.windows + self.latent


class NonFinite(NamedTuple):
    """Where a state is not finite: a sequence, its first such layer, the first head there (a latent cache has none)."""

    sequence: int
    layer: int
    head: int | None


def _mapped(layer: KDAState | LatentState, change: Callable[[Tensor], Tensor]) -> KDAState | LatentState:
    if isinstance(layer, KDAState):
        return KDAState(change(layer.memory), tuple(change(window) for window in layer.conv))
    return LatentState(change(layer.latent), None if layer.valid is None else change(layer.valid))


def _form(layer: KDAState | LatentState) -> str:
    """Kind, shape without the batch and without tokens, and type: what must agree between states of one model."""
    if isinstance(layer, KDAState):
        windows = "".join(f", a window {tuple(x.shape[1:])} {_type(x)}" for x in layer.conv)
        return f"a memory {tuple(layer.memory.shape[1:])} {_type(layer.memory)}{windows}"
    return f"a latent cache of width {layer.latent.shape[-1]} {_type(layer.latent)}"


def _type(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _valid(layer: LatentState) -> Tensor:
    return torch.ones_like(layer.latent[..., 0], dtype=torch.bool) if layer.valid is None else layer.valid


def _without_gaps(layer: KDAState | LatentState) -> KDAState | LatentState:
    return layer if isinstance(layer, KDAState) or layer.valid is None else LatentState.of_rows(layer.rows())


def _joined(layers: Sequence[KDAState | LatentState]) -> KDAState | LatentState:
    if memories := [layer for layer in layers if isinstance(layer, KDAState)]:
        windows = zip(*(layer.conv for layer in memories))
        return KDAState(torch.cat([layer.memory for layer in memories]), tuple(torch.cat(parts) for parts in windows))
    return LatentState.of_rows([row for layer in layers if isinstance(layer, LatentState) for row in layer.rows()])


def _finite_heads(layer: KDAState | LatentState) -> Tensor:
    """[B, H] for a memory and its windows, [B, 1] for a latent cache, whose padding does not count."""
    if isinstance(layer, LatentState):
        return (layer.latent.isfinite().all(-1) | ~_valid(layer)).all(-1, keepdim=True)
    finite_BH = layer.memory.isfinite().flatten(2).all(-1)
    for window in layer.conv:
        finite_BH &= window.unflatten(1, (layer.memory.shape[1], -1)).isfinite().flatten(2).all(-1)
    return finite_BH

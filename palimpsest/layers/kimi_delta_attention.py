"""Kimi Delta Attention: the memory layer of the delta rule, its decay a channel, a head, constant or none.

Letters as in memory_layer.py. Source: Kimi Linear, arXiv:2510.26692.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from palimpsest.layers.layer_state import KDAState
from palimpsest.layers.linears import apply_linears
from palimpsest.layers.memory_layer import MemoryLayer, linear
from palimpsest.ops.decode import memory_layer_step_
from palimpsest.ops.gates import l2norm
from palimpsest.ops.split import SequenceSplit
from palimpsest.ops.variants import gated_delta, kda, kda_from_logits, kda_step_


class RecurrenceInputs(NamedTuple):
    """The arguments of `kda` and `trace`, as a layer makes them."""

    q: Tensor  # [B, T, H, K]
    k: Tensor  # [B, T, H, K]
    v: Tensor  # [B, T, H, K]
    log_decay: Tensor  # [B, T, H, K], fp32
    beta: Tensor  # [B, T, H], fp32


class KimiDeltaAttention(MemoryLayer):
    """A memory that erases and writes with one strength beta a head and token.

    Args as MemoryLayer: hidden_size, num_heads, head_dim, conv_size, norm_eps, options. With `options.decay` "head" this
    is Gated DeltaNet, with "none" DeltaNet.

    >>> layer = KimiDeltaAttention(64, num_heads=2, head_dim=16)
    >>> y, state = layer(torch.randn(3, 10, 64))
    >>> y.shape, state.memory.shape, state.conv[0].shape
    (torch.Size([3, 10, 64]), torch.Size([3, 2, 16, 16]), torch.Size([3, 32, 3]))
    >>> y, state = layer(torch.randn(3, 1, 64), state)
    """

    def add_gates(self) -> None:
        """The projection to beta."""
        self.b_proj = linear(self.hidden_size, self.num_heads)

    def remember(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        memory: Tensor | None,
        cu_seqlens: Tensor | None = None,
        split: SequenceSplit | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As MemoryLayer.remember: one operator from logits for the released layer."""
        options = self.options
        if options.decay == "channel" and options.qk_norm:
            logits = self._decay_logits(x), self.b_proj(x)
            return kda_from_logits(
                q, k, v, *logits, gate=self._gate(), beta_max=options.beta_max, state=memory, cu_seqlens=cu_seqlens,
                split=split,
            )  # fmt: skip
        if options.qk_norm:
            q, k = l2norm(q), l2norm(k)
        log_decay, beta = self._log_decay(x), self._beta(x)
        if options.decay == "head":
            return gated_delta(q, k, v, log_decay[..., 0], beta, state=memory, cu_seqlens=cu_seqlens, split=split)
        return kda(q, k, v, log_decay.expand_as(k), beta, state=memory, cu_seqlens=cu_seqlens, split=split)

    def remember_step_(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
        """As MemoryLayer.remember_step_."""
        log_decay, beta = self._log_decay(x), self._beta(x)
        if mask is not None:
            log_decay, beta = log_decay * mask[:, None, None], beta * mask[:, None]
        if self.options.qk_norm:
            q, k = l2norm(q), l2norm(k)
        return kda_step_(q, k, v, log_decay.expand_as(k), beta, memory)

    @property
    def _steps_whole(self) -> bool:
        """Whether the layer is made of what `memory_layer_step_` does at once: the released one is."""
        o = self.options
        return (o.decay, o.gate_rank) == ("channel", "low") and (
            o.conv and o.qk_norm and o.output_gate != "none" and self.q_conv1d.weight.shape[-1] > 1
        )

    def _step_whole_(self, x: Tensor, state: KDAState) -> Tensor:
        inward = (self.q_proj, self.k_proj, self.v_proj, self.f_a_proj, self.g_a_proj, self.b_proj)
        q, k, v, decay, gate, beta = apply_linears([x] * 6, inward)
        decay, gate = apply_linears([decay, gate], [self.f_b_proj, self.g_b_proj])
        y = memory_layer_step_(
            q, k, v, [conv.weight for conv in (self.q_conv1d, self.k_conv1d, self.v_conv1d)], list(state.conv),
            decay, self._gate(), beta, gate, self.o_norm.weight, state.memory,
            eps=self.o_norm.eps, beta_max=self.options.beta_max, silu_gate=self.options.output_gate == "silu",
        )  # fmt: skip
        return apply_linears([y], [self.o_proj])[0]

    def recurrence_inputs(self, x: Tensor, state: KDAState | None = None) -> RecurrenceInputs:
        """What the layer tells its memory about each token, for those who want to watch: `trace(*layer.recurrence_inputs(x))`.

        Args:
            x: [B, T, hidden_size].
            state: what came before; nothing if None.

        >>> KimiDeltaAttention(64, num_heads=2, head_dim=16).recurrence_inputs(torch.randn(1, 5, 64)).k.shape
        torch.Size([1, 5, 2, 16])
        """
        (q_BTHK, k_BTHK, v_BTHK), _ = self._streams(x, state)
        if self.options.qk_norm:
            q_BTHK, k_BTHK = l2norm(q_BTHK), l2norm(k_BTHK)
        return RecurrenceInputs(q_BTHK, k_BTHK, v_BTHK, self._log_decay(x).expand_as(k_BTHK), self._beta(x))

"""Kimi Delta Attention: projections, short convolutions, gates, the memory, and a gated way out.

Letters  B sequences, T tokens, N packed documents, H heads, K channels of a head (of key and value alike), D = H K.
Numbers  beta and the decay are computed in float32, the memory is kept in it, whatever the dtype of the weights.
Source   Kimi Linear, arXiv:2510.26692; parameter names, shapes and numerics are the released checkpoint's.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palimpsest.layers.layer_state import KDAState
from palimpsest.layers.linears import apply_linears
from palimpsest.layers.norms import RMSNorm
from palimpsest.layers.options import OFFICIAL, MixerOptions
from palimpsest.layers.padding import check_input, check_rows, check_sizes, dtype_of, pack, unpack
from palimpsest.layers.precision import Float32Tensors, float32
from palimpsest.layers.short_conv import ShortConvolution
from palimpsest.ops.decode import memory_layer_step_
from palimpsest.ops.gates import SigmoidDecay, SoftplusDecay, l2norm
from palimpsest.ops.short_conv import short_convs
from palimpsest.ops.variants import gated_delta, gated_linear_attention, gdn2, kda, kda_from_logits, kda_step_


class RecurrenceInputs(NamedTuple):
    """The arguments of `kda` and `trace`, as a layer makes them."""

    q: Tensor  # [B, T, H, K]
    k: Tensor  # [B, T, H, K]
    v: Tensor  # [B, T, H, K]
    log_decay: Tensor  # [B, T, H, K], fp32
    beta: Tensor  # [B, T, H], fp32


class KimiDeltaAttention(Float32Tensors):
    """One memory layer.

    Args:
        hidden_size: channels in and out.
        num_heads, head_dim: H and K; each head has a K x K memory.
        conv_size: width W of the short convolutions.
        norm_eps: of the norm on the way out.
        options: what the layer is made of; the default is the released layer.

    >>> layer = KimiDeltaAttention(64, num_heads=2, head_dim=16)
    >>> y, state = layer(torch.randn(3, 10, 64))
    >>> y.shape, state.memory.shape, state.conv[0].shape
    (torch.Size([3, 10, 64]), torch.Size([3, 2, 16, 16]), torch.Size([3, 32, 3]))
    >>> y, state = layer(torch.randn(3, 1, 64), state)
    """

    float32_names = ("A_log", "dt_bias")

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int = 128,
        *,
        conv_size: int = 4,
        norm_eps: float = 1e-5,
        options: MixerOptions = OFFICIAL,
    ):
        super().__init__()
        check_sizes(hidden_size=hidden_size, num_heads=num_heads, head_dim=head_dim, conv_size=conv_size)
        self.hidden_size, self.conv_size = hidden_size, conv_size
        self.num_heads, self.head_dim, self.options = num_heads, head_dim, options
        D, H, K = num_heads * head_dim, num_heads, head_dim
        linear = lambda inputs, outputs: nn.Linear(inputs, outputs, bias=False)

        self.q_proj, self.k_proj, self.v_proj = (linear(hidden_size, D) for _ in range(3))
        if options.conv:
            self.q_conv1d, self.k_conv1d, self.v_conv1d = (ShortConvolution(D, conv_size) for _ in range(3))

        if options.decay != "none":
            rates = H if options.decay == "head" else D
            self.A_log = nn.Parameter(torch.empty(1, 1, H, 1, dtype=torch.float32))
            self.dt_bias = nn.Parameter(torch.empty(rates, dtype=torch.float32))
        if options.decay == "channel" and options.gate_rank == "low":
            self.f_a_proj, self.f_b_proj = linear(hidden_size, K), linear(K, D)
        elif options.decay in ("channel", "head"):
            self.f_proj = linear(hidden_size, D if options.decay == "channel" else H)

        if options.rule in ("delta", "write"):
            self.b_proj = linear(hidden_size, H)
        elif options.rule == "gdn2":
            self.e_proj, self.w_proj = linear(hidden_size, D), linear(hidden_size, D)

        if options.output_gate != "none":
            self.g_a_proj, self.g_b_proj = linear(hidden_size, K), linear(K, D)
        self.o_norm = RMSNorm(K, norm_eps)
        self.o_proj = linear(D, hidden_size)
        self.reset_decay()

    def reset_decay(self) -> None:
        """Start the decays at random as the released code does: rates from 1 to 16, steps from 1e-3 to 1e-1.

        The bounded gate starts at rate 1: within its sigmoid a larger one leaves no gradient.
        """
        if self.options.decay == "none":
            return
        with torch.no_grad():
            if self.options.gate == "softplus":
                self.A_log.uniform_(1, 16).log_()
            else:
                self.A_log.zero_()
            step = self.dt_bias.uniform_(math.log(1e-3), math.log(1e-1)).exp().clamp(min=1e-4)
            self.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus

    def forward(
        self,
        x: Tensor,
        state: KDAState | None = None,
        *,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, KDAState]:
        """Many tokens. The state given is not touched.

        Args:
            x: [B, T, hidden_size].
            state: what came before; nothing if None.
            mask: [B, T], True for a token, False for padding, on any side. Padding leaves no trace in the state.
            cu_seqlens: [N + 1], borders of N documents packed end to end in a batch of 1; states then have N rows.

        Returns:
            y [B, T, hidden_size], zero where mask is False, and the state after the last token.
        """
        check_input(x, self.hidden_size, dtype=dtype_of(self.q_proj))
        check_rows(x[..., 0], mask, cu_seqlens)
        self._check_state(state, len(x) if cu_seqlens is None else len(cu_seqlens) - 1)
        if mask is not None:
            packed, cu_seqlens = pack(x, mask)
            y, after = self.forward(packed, state, cu_seqlens=cu_seqlens)
            return unpack(y, mask), after

        (q_BTHK, k_BTHK, v_BTHK), windows = self._streams(x, state, cu_seqlens)
        memory = None if state is None else state.memory
        output_BTHK, memory = self._remember(x, q_BTHK, k_BTHK, v_BTHK, memory, cu_seqlens)
        return self._way_out(x, output_BTHK), KDAState(memory, windows)

    def step_(self, x: Tensor, state: KDAState, mask: Tensor | None = None) -> tuple[Tensor, KDAState]:
        """One token a sequence; the state's tensors are rewritten in place and belong to the caller alone.

        Args:
            x: [B, hidden_size].
            state: updated in place.
            mask: [B], False leaves that sequence's state as it is; its output means nothing.

        Returns:
            y [B, hidden_size], and the same state.

        Raises:
            RuntimeError: a gradient is asked for; nothing was rewritten.
        """
        check_input(x, self.hidden_size, step=True, dtype=dtype_of(self.q_proj))  # all before anything is rewritten
        check_rows(x[..., 0], mask, None)
        self._check_state(state, len(x), step=True)
        if torch.is_grad_enabled() and any(t.requires_grad for t in (x, state.memory, *state.conv, *self.parameters())):
            raise RuntimeError(
                "step_ edits the state in place and has no gradient; call forward, or enter torch.no_grad()"
            )
        if mask is None and self._steps_whole:
            return self._step_whole_(x, state), state
        H, K = self.num_heads, self.head_dim
        held = None if mask is None else [window.clone() for window in state.conv]
        streams = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        if self.options.conv:
            convs = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
            streams = [conv.step_(s, window) for conv, s, window in zip(convs, streams, state.conv)]
        else:
            streams = [F.silu(s) for s in streams]
        q_BHK, k_BHK, v_BHK = (s.unflatten(-1, (H, K)) for s in streams)

        if mask is not None and held is not None:
            for window, before in zip(state.conv, held):
                window.copy_(torch.where(mask[:, None, None], window, before))

        if self.options.rule == "delta":
            log_decay_BHK, beta_BH = self._log_decay(x), self._beta(x)
            if mask is not None:
                log_decay_BHK, beta_BH = log_decay_BHK * mask[:, None, None], beta_BH * mask[:, None]
            if self.options.qk_norm:
                q_BHK, k_BHK = l2norm(q_BHK), l2norm(k_BHK)
            output_BHK = kda_step_(q_BHK, k_BHK, v_BHK, log_decay_BHK.expand_as(k_BHK), beta_BH, state.memory)
        else:
            output_B1HK, memory = self._remember(
                x[:, None], q_BHK[:, None], k_BHK[:, None], v_BHK[:, None], state.memory
            )
            state.memory.copy_(memory if mask is None else torch.where(mask[:, None, None, None], memory, state.memory))
            output_BHK = output_B1HK[:, 0]
        return self._way_out(x, output_BHK), state

    @property
    def _steps_whole(self) -> bool:
        """Whether the layer is made of what `memory_layer_step_` does at once: the released one is."""
        o = self.options
        return (o.rule, o.decay, o.gate_rank) == ("delta", "channel", "low") and (
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

        Raises:
            ValueError: the layer's rule is not the delta rule, so it has no beta.

        >>> KimiDeltaAttention(64, num_heads=2, head_dim=16).recurrence_inputs(torch.randn(1, 5, 64)).k.shape
        torch.Size([1, 5, 2, 16])
        """
        if self.options.rule != "delta":
            raise ValueError(
                f"the layer's rule is {self.options.rule!r}; only a layer of the delta rule has these edits"
            )
        (q_BTHK, k_BTHK, v_BTHK), _ = self._streams(x, state)
        if self.options.qk_norm:
            q_BTHK, k_BTHK = l2norm(q_BTHK), l2norm(k_BTHK)
        return RecurrenceInputs(q_BTHK, k_BTHK, v_BTHK, self._log_decay(x).expand_as(k_BTHK), self._beta(x))

    def _check_state(self, state: KDAState | None, rows: int, *, step: bool = False) -> None:
        if state is None and not step:
            return
        if not isinstance(state, KDAState):
            raise ValueError(f"state is a {type(state).__name__}; a memory layer continues a KDAState")
        H, K = self.num_heads, self.head_dim
        if tuple(state.memory.shape) != (rows, H, K, K):
            raise ValueError(
                f"the memory of the state has shape {tuple(state.memory.shape)}; expected {(rows, H, K, K)}"
            )
        windows, window = 3 if self.options.conv else 0, (rows, H * K, self.conv_size - 1)
        if [tuple(x.shape) for x in state.conv] != [window] * windows:
            raise ValueError(
                f"the state has convolution windows of shapes {[tuple(x.shape) for x in state.conv]}; "
                f"expected {windows} of {window}"
            )

    def _streams(self, x: Tensor, state: KDAState | None, cu_seqlens: Tensor | None = None):
        """q, k and v as [B, T, H, K], through their convolutions, and the windows that these leave."""
        streams = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        windows: tuple[Tensor, ...] = ()
        if self.options.conv:
            weights = [conv.weight for conv in (self.q_conv1d, self.k_conv1d, self.v_conv1d)]
            before = None if state is None else state.conv
            streams, after = short_convs(streams, weights, states=before, cu_seqlens=cu_seqlens)
            windows = tuple(after)
        else:
            streams = [F.silu(s) for s in streams]
        return [s.unflatten(-1, (self.num_heads, self.head_dim)) for s in streams], windows

    def _remember(self, x, q, k, v, memory, cu_seqlens=None):
        options, rest = self.options, {"state": memory, "cu_seqlens": cu_seqlens}
        if options.rule == "delta" and options.decay == "channel" and options.qk_norm:
            logits = self._decay_logits(x), self.b_proj(x)
            return kda_from_logits(q, k, v, *logits, gate=self._gate(), beta_max=options.beta_max, **rest)

        if options.qk_norm:
            q, k = l2norm(q), l2norm(k)
        log_decay = self._log_decay(x)
        if options.rule == "delta" and options.decay == "head":
            return gated_delta(q, k, v, log_decay[..., 0], self._beta(x), **rest)
        log_decay = log_decay.expand_as(k)
        if options.rule == "delta":
            return kda(q, k, v, log_decay, self._beta(x), **rest)
        if options.rule == "gdn2":
            erase_gate, write_gate = (
                float32(p(x)).sigmoid().unflatten(-1, (self.num_heads, self.head_dim))
                for p in (self.e_proj, self.w_proj)
            )
            return gdn2(q, k, v, log_decay, erase_gate, write_gate, **rest)
        if options.rule == "write":
            v = (v * self._beta(x)[..., None]).to(v.dtype)
        return gated_linear_attention(q, k, v, log_decay, **rest)

    def _way_out(self, x: Tensor, output: Tensor) -> Tensor:
        """Each head at its own scale, gated, and back to the hidden size."""
        y = self.o_norm(float32(output))
        if self.options.output_gate != "none":
            gate = float32(self.g_b_proj(self.g_a_proj(x))).view_as(y)
            y = y * (gate.sigmoid() if self.options.output_gate == "sigmoid" else F.silu(gate))
        return self.o_proj(y.to(x.dtype).flatten(-2))

    def _decay_logits(self, x: Tensor) -> Tensor:
        """[..., H, K], or [..., H, 1] for one rate a head."""
        if self.options.decay == "constant":
            logits = x.new_zeros(*x.shape[:-1], self.num_heads * self.head_dim)
        elif hasattr(self, "f_proj"):
            logits = self.f_proj(x)
        else:
            logits = self.f_b_proj(self.f_a_proj(x))
        return logits.unflatten(-1, (self.num_heads, -1))

    def _gate(self):
        if self.options.gate == "softplus":
            return SoftplusDecay(self.A_log, self.dt_bias)
        return SigmoidDecay(self.A_log, self.dt_bias, self.options.floor)

    def _log_decay(self, x: Tensor) -> Tensor:
        if self.options.decay == "none":
            return float32(x).new_zeros(*x.shape[:-1], self.num_heads, 1)
        return self._gate()(self._decay_logits(x))

    def _beta(self, x: Tensor) -> Tensor:
        return self.options.beta_max * float32(self.b_proj(x)).sigmoid()

    def extra_repr(self) -> str:
        changes = "".join(f", {name}={value!r}" for name, value in self.options.changes().items())
        return f"heads={self.num_heads}, head_dim={self.head_dim}{changes}"

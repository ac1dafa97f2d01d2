"""What the memory layers share: projections, short convolutions, a decay, the memory, and a gated way out.

Letters  B sequences, T tokens, N packed documents, H heads, K channels of a head (of key and value alike), D = H K,
         n erase-and-write sub-steps a token, 1 but for Gated DeltaProduct.
Numbers  Strengths and the decay are computed in float32, the memory is kept in it, whatever the dtype of the weights.
Source   Kimi Linear, arXiv:2510.26692; parameter names, shapes and numerics are the released checkpoint's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palimpsest.layers.layer_state import KDAState
from palimpsest.layers.norms import RMSNorm
from palimpsest.layers.options import OFFICIAL, MixerOptions
from palimpsest.layers.padding import check_input, check_rows, check_sizes, check_split, dtype_of, pack, unpack
from palimpsest.layers.precision import Float32Tensors, float32
from palimpsest.layers.short_conv import ShortConvolution
from palimpsest.ops.arguments import state_dtype
from palimpsest.ops.gates import SigmoidDecay, SoftplusDecay
from palimpsest.ops.prefill import gated_norm, suits
from palimpsest.ops.short_conv import short_convs
from palimpsest.ops.split import SequenceSplit


class MemoryLayer(Float32Tensors):
    """The base of a memory layer. A subclass makes the projections of its gates in `add_gates` and says what a token does
    to the memory in `remember`; that alone gives forward, step and states.

    Args:
        hidden_size: channels in and out.
        num_heads, head_dim: H and K; each head has a K x K memory.
        conv_size: width W of the short convolutions.
        norm_eps: of the norm on the way out.
        options: what the layer is made of; the default is the released layer.
    """

    float32_names = ("A_log", "dt_bias")
    sub_steps = 1  # n

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

        widths = self._stream_widths()
        self.q_proj, self.k_proj, self.v_proj = (linear(hidden_size, width) for width in widths)
        if options.conv:
            self.q_conv1d, self.k_conv1d, self.v_conv1d = (ShortConvolution(width, conv_size) for width in widths)

        if options.decay != "none":
            rates = H if options.decay == "head" else D
            self.A_log = nn.Parameter(torch.empty(1, 1, H, 1, dtype=torch.float32))
            self.dt_bias = nn.Parameter(torch.empty(rates, dtype=torch.float32))
        if options.decay == "channel" and options.gate_rank == "low":
            self.f_a_proj, self.f_b_proj = linear(hidden_size, K), linear(K, D)
        elif options.decay in ("channel", "head"):
            self.f_proj = linear(hidden_size, D if options.decay == "channel" else H)

        self.add_gates()
        if options.output_gate != "none":
            self.g_a_proj, self.g_b_proj = linear(hidden_size, K), linear(K, D)
        self.o_norm = RMSNorm(K, norm_eps)
        self.o_proj = linear(D, hidden_size)
        self.reset_decay()

    def add_gates(self) -> None:
        """Make the projections of the gates."""

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
        """What many tokens do to the memory and read from it.

        Args:
            x: [B, T, hidden_size], for the gates. q, k, v: [B, T, H, K]; k and v [B, T, n, H, K] where n is not 1.
            memory: [B, H, K, K] or [N, H, K, K], not to be changed; zeros if None.
            cu_seqlens, split: as forward's.

        Returns:
            What is read, [B, T, H, K], and the memory afterwards.
        """
        raise NotImplementedError

    def remember_step_(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
        """As `remember` for one token a sequence, without the dimension T, against a memory that is rewritten in place.

        Where mask [B] is False the memory stays as it is.
        """
        output, after = self.remember(x[:, None], q[:, None], k[:, None], v[:, None], memory)
        memory.copy_(after if mask is None else torch.where(mask[:, None, None, None], after, memory))
        return output[:, 0]

    def empty_state(
        self, batch_size: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> KDAState:
        """The state before the first token; its memory is float32 whatever dtype says, float64 where it says float64."""
        H, K = self.num_heads, self.head_dim
        windows = [torch.zeros(shape, device=device, dtype=dtype) for shape in self._window_shapes(batch_size)]
        return KDAState(torch.zeros(batch_size, H, K, K, device=device, dtype=state_dtype(dtype)), tuple(windows))

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
        split: SequenceSplit | None = None,
    ) -> tuple[Tensor, KDAState]:
        """Many tokens. The state given is not touched.

        Args:
            x: [B, T, hidden_size].
            state: what came before; nothing if None.
            mask: [B, T], True for a token, False for padding, on any side. Padding leaves no trace in the state.
            cu_seqlens: [N + 1], borders of N documents packed end to end in a batch of 1; states then have N rows.
            split: x is this rank's part of a sequence that lies on several; alone, and states then have one row a piece of
                a document on this rank. See `parallel.context`.

        Returns:
            y [B, T, hidden_size], zero where mask is False, and the state after the last token.
        """
        check_input(x, self.hidden_size, dtype=dtype_of(self.q_proj))
        check_rows(x[..., 0], mask, cu_seqlens)
        check_split(split, mask, cu_seqlens)
        rows = len(x) if cu_seqlens is None else len(cu_seqlens) - 1
        self._check_state(state, rows if split is None else len(x) * len(split.pieces))
        if mask is not None:
            packed, cu_seqlens = pack(x, mask)
            y, after = self.forward(packed, state, cu_seqlens=cu_seqlens)
            return unpack(y, mask), after

        streams, windows = self._streams(x, state, cu_seqlens, split)
        memory = None if state is None else state.memory
        more = {} if split is None else {"split": split}  # a layer from outside may not know of it
        output_BTHK, memory = self.remember(x, *streams, memory, cu_seqlens, **more)
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
        in_order = all(x.is_contiguous() for x in (state.memory, *state.conv))  # as those that the layer makes are
        if mask is None and in_order and self._steps_whole:
            return self._step_whole_(x, state), state
        held = None if mask is None else [window.clone() for window in state.conv]
        streams = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        if self.options.conv:
            convs = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
            streams = [conv.step_(s, window) for conv, s, window in zip(convs, streams, state.conv)]
        else:
            streams = [F.silu(s) for s in streams]
        if mask is not None and held is not None:
            for window, before in zip(state.conv, held):
                window.copy_(torch.where(mask[:, None, None], window, before))

        output_BHK = self.remember_step_(x, *self._in_heads(streams), state.memory, mask)
        return self._way_out(x, output_BHK), state

    @property
    def _steps_whole(self) -> bool:
        """Whether `_step_whole_` can take a step at once."""
        return False

    def _step_whole_(self, x: Tensor, state: KDAState) -> Tensor:
        raise NotImplementedError

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
        windows, expected = [tuple(x.shape) for x in state.conv], self._window_shapes(rows)
        if windows != expected:
            raise ValueError(f"the state has convolution windows of shapes {windows}; expected {expected}")

    def _stream_widths(self) -> tuple[int, int, int]:
        """Channels of q, k and v."""
        D = self.num_heads * self.head_dim
        return D, self.sub_steps * D, self.sub_steps * D

    def _window_shapes(self, rows: int) -> list[tuple[int, int, int]]:
        return [(rows, width, self.conv_size - 1) for width in self._stream_widths() if self.options.conv]

    def _in_heads(self, streams: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """q [..., H, K], and k and v [..., H, K] or, for more sub-steps than one, [..., n, H, K]."""
        heads, n = (self.num_heads, self.head_dim), self.sub_steps
        q, k, v = streams
        sizes = heads if n == 1 else (n, *heads)
        return q.unflatten(-1, heads), k.unflatten(-1, sizes), v.unflatten(-1, sizes)

    def _streams(
        self,
        x: Tensor,
        state: KDAState | None,
        cu_seqlens: Tensor | None = None,
        split: SequenceSplit | None = None,
    ):
        """q, k and v in heads, through their convolutions, and the windows that these leave."""
        streams = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        windows: tuple[Tensor, ...] = ()
        if self.options.conv:
            weights = [conv.weight for conv in (self.q_conv1d, self.k_conv1d, self.v_conv1d)]
            before = None if state is None else state.conv
            if split is None:
                streams, after = short_convs(streams, weights, states=before, cu_seqlens=cu_seqlens)
            else:
                streams, after = split.convolve(short_convs, streams, weights, before)
            windows = tuple(after)
        else:
            streams = [F.silu(s) for s in streams]
        return self._in_heads(streams), windows

    def _way_out(self, x: Tensor, output: Tensor) -> Tensor:
        """Each head at its own scale, gated, and back to the hidden size."""
        if self.options.output_gate != "none" and suits(x) and type(self.o_norm) is RMSNorm:
            logits, norm, silu = self.g_b_proj(self.g_a_proj(x)), self.o_norm, self.options.output_gate == "silu"
            return self.o_proj(gated_norm(output, logits, norm.weight, norm.eps, silu=silu).to(x.dtype))
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
        return self.options.beta_max * float32(self.b_proj(x)).sigmoid()  # type: ignore[operator]  # add_gates makes it

    def extra_repr(self) -> str:
        changes = "".join(f", {name}={value!r}" for name, value in self.options.changes().items())
        return f"heads={self.num_heads}, head_dim={self.head_dim}{changes}"


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A projection as the released layers have it, without bias."""
    return nn.Linear(inputs, outputs, bias=False)

"""Multi-head latent attention: softmax attention whose cache is one short row a token.

Letters  B sequences, T new tokens, S tokens held (the new ones included), H heads, N key channels from the latent,
         P position channels shared by all heads, V value channels, R latent channels.
Two ways to the same numbers: *expanded* builds every head's keys and values from the latents and attends as usual;
*absorbed* moves that projection to the query and to the output, so that one latent is key and value of all heads.
Source   DeepSeek-V2, arXiv:2405.04434; without positions as in Kimi Linear, arXiv:2510.26692.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, einsum, nn

from palimpsest.layers.latent_cache import LatentCache
from palimpsest.layers.layer_state import LatentState
from palimpsest.layers.linears import apply_linears
from palimpsest.layers.norms import RMSNorm
from palimpsest.layers.padding import check_input, check_rows, check_sizes, check_split, dtype_of, pack, unpack
from palimpsest.layers.precision import float32
from palimpsest.layers.split_attention import attend_across
from palimpsest.ops.decode import latent_layer_step_, latent_step
from palimpsest.ops.packing import borders, watch_borders
from palimpsest.ops.split import SequenceSplit

try:  # torch has attention over packed documents from 2.10 on, and asked for its causal form in another way then
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None
CAUSAL: dict[str, Any] = {"window_size": (-1, 0)}
if varlen_attn is not None and "is_causal" in inspect.signature(varlen_attn).parameters:
    CAUSAL = {"is_causal": True}

ABSORB_UP_TO = (
    128  # tokens: absorbing costs R - N more products a pair and head, expanding N + V times R once a held token
)


class MultiHeadLatentAttention(nn.Module):
    """One latent attention layer.

    Args:
        hidden_size: channels in and out.
        num_heads: H.
        kv_lora_rank: R. qk_nope_head_dim: N. qk_rope_head_dim: P. v_head_dim: V.
        rope: base of rotary positions on the P channels, such as 10000.0; None, as released: no positions.

    >>> layer = MultiHeadLatentAttention(64, 2, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16)
    >>> y, state = layer(torch.randn(3, 10, 64))
    >>> y.shape, state.latent.shape
    (torch.Size([3, 10, 64]), torch.Size([3, 10, 40]))
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        kv_lora_rank: int = 512,
        qk_nope_head_dim: int = 128,
        qk_rope_head_dim: int = 64,
        v_head_dim: int = 128,
        rope: float | None = None,
    ):
        super().__init__()
        check_sizes(hidden_size=hidden_size, num_heads=num_heads, kv_lora_rank=kv_lora_rank, v_head_dim=v_head_dim)
        check_sizes(0, qk_nope_head_dim=qk_nope_head_dim, qk_rope_head_dim=qk_rope_head_dim)
        self.hidden_size, self.num_heads, self.rope = hidden_size, num_heads, rope
        self.R, self.N, self.P, self.V = kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim
        linear = lambda inputs, outputs: nn.Linear(inputs, outputs, bias=False)
        self.q_proj = linear(hidden_size, num_heads * (self.N + self.P))
        self.kv_a_proj_with_mqa = linear(hidden_size, self.R + self.P)
        self.kv_a_layernorm = RMSNorm(self.R, 1e-6)  # not the model's eps: the released code leaves this at its default
        self.kv_b_proj = linear(self.R, num_heads * (self.N + self.V))
        self.o_proj = linear(num_heads * self.V, hidden_size)

    def forward(
        self,
        x: Tensor,
        state: LatentState | None = None,
        *,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, LatentState]:
        """Many tokens. The state given stays as it is.

        Args and return as KimiDeltaAttention.forward; without a mask every token is one.
        """
        check_input(x, self.hidden_size, dtype=dtype_of(self.q_proj))
        check_rows(x[..., 0], mask, cu_seqlens)
        self._check_state(state, len(x) if cu_seqlens is None else None)
        if mask is not None:
            packed, cu_seqlens = pack(x, mask)
            y, after = self.forward(packed, state, cu_seqlens=cu_seqlens)
            return unpack(y, mask), after
        if cu_seqlens is not None:
            return self._documents(x, state, borders(cu_seqlens, x.shape[1]))

        start_B = x.new_zeros(x.shape[0], dtype=torch.long) if state is None else state.num_tokens()
        q_BTHC, latent_BTC = self._project(x, start_B[:, None] + torch.arange(x.shape[1], device=x.device))
        state = LatentState(latent_BTC) if state is None else state.append(latent_BTC)
        return self.o_proj(self.attend(q_BTHC, state).flatten(-2)), state

    def attend(self, q_BTHC: Tensor, state: LatentState) -> Tensor:
        """What the newest T tokens of each sequence read, [B, T, H, V]; the state holds them, too.

        Args:
            q_BTHC: their queries, [B, T, H, N + P], rotated if this layer has positions.
        """
        (B, T), S = q_BTHC.shape[:2], state.latent.shape[1]
        if T < S and T > ABSORB_UP_TO and self._runs_packed(q_BTHC):
            starts_N = torch.arange(B + 1, device=q_BTHC.device, dtype=torch.int32) * T
            return self._packed(q_BTHC.flatten(0, 1), state, starts_N, T).unflatten(0, (B, T))
        read = self._absorbed if T < S and T <= ABSORB_UP_TO else self._expanded
        return read(q_BTHC, state.latent, state.valid)

    def without_state(
        self, x: Tensor, *, cu_seqlens: Tensor | None = None, split: SequenceSplit | None = None
    ) -> Tensor:
        """The output of `forward` alone, where nobody continues: in training. On a GPU the host is not waited for.

        Args:
            x, cu_seqlens: as forward's; borders on a GPU that do not rise from 0 to T raise at the next wait.
            split: x is this rank's part of a sequence that lies on several, without cu_seqlens. Latents go to every rank.

        Returns:
            y [B, T, hidden_size].
        """
        if split is not None:
            check_input(x, self.hidden_size, dtype=dtype_of(self.q_proj))
            check_split(split, None, cu_seqlens)
            q_BTHC, latent_BTC = self._project(x, split.positions(x.device)[None])
            y_BTHV = attend_across(split, q_BTHC, latent_BTC, self._keys_and_values_of, self.scale)
            return self.o_proj(y_BTHV.flatten(-2))
        if cu_seqlens is None or not x.is_cuda:
            return self.forward(x, cu_seqlens=cu_seqlens)[0]
        check_rows(x[..., 0], None, cu_seqlens)
        starts_N = cu_seqlens.to(x.device)
        watch_borders(starts_N, x.shape[1])
        starts_N = starts_N.clamp(0, x.shape[1]).int()
        starts_N = starts_N.cummax(0).values  # whatever they are, no kernel reads beyond the tokens
        tokens_T = torch.arange(x.shape[1], device=x.device, dtype=torch.int32)
        position_T = tokens_T - starts_N[torch.bucketize(tokens_T, starts_N, right=True) - 1]
        q_1THC, latent_1TC = self._project(x, position_T[None])
        if not self._runs_packed(q_1THC):
            return self.forward(x, cu_seqlens=cu_seqlens)[0]
        k_1THC, v_1THV = self._keys_and_values(latent_1TC)
        v_THC = F.pad(v_1THV[0], (0, self.N + self.P - self.V))  # the kernel wants one head size
        borders_N = starts_N, x.shape[1]  # that none is longer than all tokens is known without looking
        y_THC = _varlen(q_1THC[0], k_1THC[0], v_THC, borders_N, borders_N, self.scale)
        return self.o_proj(y_THC[None, ..., : self.V].flatten(-2))

    def step_(
        self, x: Tensor, state: LatentState | LatentCache, mask: Tensor | None = None
    ) -> tuple[Tensor, LatentState | LatentCache]:
        """One token a sequence, [B, hidden_size]; where mask [B] is False it is not kept and its output void.

        A `LatentCache` is rewritten in place, without a wait for the device.
        """
        check_input(x, self.hidden_size, step=True, dtype=dtype_of(self.q_proj))
        check_rows(x[..., 0], mask, None)
        if isinstance(state, LatentCache):
            q_BX, latent_BC = apply_linears([x, x], [self.q_proj, self.kv_a_proj_with_mqa])
            if self.rope is None and mask is None:
                y_BX = latent_layer_step_(
                    q_BX, latent_BC, self.kv_a_layernorm.weight, self._head_weights(), state.rows, state.length,
                    eps=self.kv_a_layernorm.eps,
                )  # fmt: skip
                return apply_linears([y_BX], [self.o_proj])[0], state
            q_BTHC, latent_BTC = self._positioned(q_BX[:, None], latent_BC[:, None], state.length[:, None])
            state.append_(latent_BTC[:, 0], mask)
            read_BTHR = latent_step(self._to_latent(q_BTHC), state.rows, state.length, value_dim=self.R)
            return apply_linears([self._from_latent(read_BTHR).flatten(1)], [self.o_proj])[0], state
        q_BTHC, latent_BTC = self._project(x[:, None], state.num_tokens()[:, None])
        state = state.append(latent_BTC, None if mask is None else mask[:, None])
        return self.o_proj(self._absorbed(q_BTHC, state.latent, state.valid).flatten(-2))[:, 0], state

    def empty_state(
        self, batch_size: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> LatentState:
        """The state before the first token."""
        return LatentState(torch.empty(batch_size, 0, self.R + self.P, device=device, dtype=dtype))

    def _check_state(self, state: LatentState | None, rows: int | None) -> None:
        if state is None:
            return
        if not isinstance(state, LatentState):
            raise ValueError(f"state is a {type(state).__name__}; a latent attention layer continues a LatentState")
        shape, width = tuple(state.latent.shape), self.R + self.P
        if len(shape) != 3 or shape[-1] != width or rows not in (None, shape[0]):
            raise ValueError(
                f"the latent of the state has shape {shape}; expected [{rows or 'documents'}, tokens, {width}]"
            )
        if state.valid is not None and (tuple(state.valid.shape) != shape[:2] or state.valid.dtype != torch.bool):
            raise ValueError(
                f"valid of the state is {state.valid.dtype} of shape {tuple(state.valid.shape)}; "
                f"expected torch.bool of shape {shape[:2]}"
            )

    def _documents(self, x: Tensor, state: LatentState | None, ends: list[int]) -> tuple[Tensor, LatentState]:
        """Packed documents, each attending to itself and to what its own row of the state holds."""
        if state is not None and len(state.latent) != len(ends) - 1:
            raise ValueError(
                f"state has {len(state.latent)} rows and cu_seqlens {len(ends) - 1} documents; give one row a document"
            )
        starts_N, tokens_T = torch.tensor(ends, device=x.device), torch.arange(x.shape[1], device=x.device)
        document_T = torch.bucketize(tokens_T, starts_N, right=True) - 1
        position_T = tokens_T - starts_N[document_T]
        if state is not None:
            position_T = position_T + state.num_tokens()[document_T]
        q_1THC, latent_1TC = self._project(x, position_T[None])
        after = LatentState.of_packed(latent_1TC[0], ends)
        if state is not None:
            after = state.append(after.latent, after.valid)
        if self._runs_packed(q_1THC) and x.shape[1]:
            longest = max(b - a for a, b in zip(ends, ends[1:]))
            y_THV = self._packed(q_1THC[0], after, starts_N.int(), longest)
            return self.o_proj(y_THV[None].flatten(-2)), after
        outputs = [
            self._expanded(q_1THC[:, a:b], row[None], None) for row, a, b in zip(after.rows(), ends, ends[1:]) if a < b
        ]
        y = torch.cat(outputs, dim=1) if outputs else x.new_zeros(1, 0, self.num_heads, self.V)
        return self.o_proj(y.flatten(-2)), after

    def _runs_packed(self, q: Tensor) -> bool:
        """Whether torch's attention over packed documents takes queries like these."""
        half = q.dtype in (torch.bfloat16, torch.float16)
        return q.is_cuda and half and varlen_attn is not None and self.V <= self.N + self.P

    def _packed(self, q_THC: Tensor, after: LatentState, starts_N: Tensor, longest: int) -> Tensor:
        """[T, H, V]: the last tokens of each sequence, end to end from starts [N + 1], each over its own up to itself.

        Args:
            after: holds those tokens, too. longest: at least as many as any sequence has among T.
        """
        N, S, _ = after.latent.shape
        if after.valid is None:
            keys_XC, first_N = after.latent.flatten(0, 1), torch.arange(N + 1, device=starts_N.device) * S
        else:
            keys_XC, first_N = after.latent[after.valid], F.pad(after.num_tokens().cumsum(0), (1, 0))
        k_1XHC, v_1XHV = self._keys_and_values(keys_XC[None])
        v_XHC = F.pad(v_1XHV[0], (0, self.N + self.P - self.V))  # the kernel wants one head size
        return _varlen(q_THC, k_1XHC[0], v_XHC, (starts_N, longest), (first_N.int(), S), self.scale)[..., : self.V]

    def _project(self, x: Tensor, position_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [B, T, H, N + P] and latents [B, T, R + P], rotated if this layer has positions."""
        return self._positioned(self.q_proj(x), self.kv_a_proj_with_mqa(x), position_BT)

    def _positioned(self, q_BTX: Tensor, latent_BTC: Tensor, position_BT: Tensor) -> tuple[Tensor, Tensor]:
        q_BTHC = q_BTX.unflatten(-1, (self.num_heads, self.N + self.P))
        latent_BTR, shared_BTP = latent_BTC.split([self.R, self.P], dim=-1)
        if self.rope is not None:
            q_BTHN, q_BTHP = q_BTHC.split([self.N, self.P], dim=-1)
            q_BTHC = torch.cat([q_BTHN, rotate(q_BTHP, position_BT[..., None], self.rope)], dim=-1)
            shared_BTP = rotate(shared_BTP, position_BT, self.rope)
        return q_BTHC, torch.cat([self.kv_a_layernorm(latent_BTR), shared_BTP], dim=-1)

    def _expanded(self, q_BTHC: Tensor, latent_BSC: Tensor, valid_BS: Tensor | None) -> Tensor:
        B, T, H, _ = q_BTHC.shape
        S = latent_BSC.shape[1]
        k_BSHC, v_BSHV = self._keys_and_values(latent_BSC)
        q, k, v = (t.transpose(1, 2) for t in (q_BTHC, k_BSHC, v_BSHV))
        seen = None if T == S and valid_BS is None else self._seen(T, S, valid_BS, q.device)[:, None]
        if (
            q.device.type == "cpu"
        ):  # the fused kernel there wants one head size; without it 2.7x slower, and T x S scores
            v = F.pad(v, (0, max(0, q.shape[-1] - self.V)))
        y_BHTV = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=seen is None, scale=self.scale)
        return y_BHTV[..., : self.V].transpose(1, 2)

    def _keys_and_values(self, latent_BSC: Tensor) -> tuple[Tensor, Tensor]:
        """Every head's keys [B, S, H, N + P] and values [B, S, H, V]."""
        B, S, H = *latent_BSC.shape[:2], self.num_heads
        latent_BSR, shared_BSP = latent_BSC.split([self.R, self.P], dim=-1)
        k_BSHN, v_BSHV = self.kv_b_proj(latent_BSR).unflatten(-1, (H, self.N + self.V)).split([self.N, self.V], dim=-1)
        return torch.cat([k_BSHN, shared_BSP[:, :, None].expand(B, S, H, self.P)], dim=-1), v_BSHV

    def _keys_and_values_of(self, latent_BSC: Tensor, heads: slice) -> tuple[Tensor, Tensor]:
        """`_keys_and_values` of some heads alone."""
        if heads == slice(0, self.num_heads) or type(self.kv_b_proj) is not nn.Linear:
            k_BSHC, v_BSHV = self._keys_and_values(latent_BSC)
            return k_BSHC[:, :, heads], v_BSHV[:, :, heads]
        latent_BSR, shared_BSP = latent_BSC.split([self.R, self.P], dim=-1)
        both_BSX = F.linear(latent_BSR, self._head_weights()[heads].flatten(0, 1))
        k_BSHN, v_BSHV = both_BSX.unflatten(-1, (-1, self.N + self.V)).split([self.N, self.V], dim=-1)
        shared_BSHP = shared_BSP[:, :, None].expand(*k_BSHN.shape[:3], self.P)
        return torch.cat([k_BSHN, shared_BSHP], dim=-1), v_BSHV

    def _absorbed(self, q_BTHC: Tensor, latent_BSC: Tensor, valid_BS: Tensor | None) -> Tensor:
        _, T, H, _ = q_BTHC.shape
        S = latent_BSC.shape[1]
        q_BTHC = self._to_latent(q_BTHC)
        scores_BTHS = float32(q_BTHC.flatten(1, 2) @ latent_BSC.mT).unflatten(1, (T, H))
        if T > 1 or valid_BS is not None:
            scores_BTHS = scores_BTHS.masked_fill(~self._seen(T, S, valid_BS, q_BTHC.device)[:, :, None], -torch.inf)
        weights_BTHS = scores_BTHS.softmax(dim=-1).to(latent_BSC.dtype)
        return self._from_latent((weights_BTHS.flatten(1, 2) @ latent_BSC[..., : self.R]).unflatten(1, (T, H)))

    def _to_latent(self, q_BTHC: Tensor) -> Tensor:
        """Queries against the latents themselves, scaled: [B, T, H, R + P]."""
        q_BTHN, q_BTHP = q_BTHC.split([self.N, self.P], dim=-1)
        q_BTHR = einsum("bthn,hnr->bthr", q_BTHN * self.scale, self._head_weights()[:, : self.N])
        return torch.cat([q_BTHR, q_BTHP * self.scale], dim=-1)

    def _from_latent(self, read_BTHR: Tensor) -> Tensor:
        """Values from a mean of latents, [B, T, H, V]."""
        return einsum("bthr,hvr->bthv", read_BTHR, self._head_weights()[:, self.N :])

    def _head_weights(self) -> Tensor:
        """kv_b_proj head by head, [H, N + V, R]."""
        return self.kv_b_proj.weight.unflatten(0, (self.num_heads, self.N + self.V))

    @staticmethod
    def _seen(T: int, S: int, valid_BS: Tensor | None, device: torch.device) -> Tensor:
        """Which of S tokens each of the last T may look at, [1 or B, T, S]; itself always: no row is empty."""
        key_S = torch.arange(S, device=device)
        query_T1 = key_S[S - T :, None]
        if valid_BS is None:
            return (key_S <= query_T1)[None]
        return (key_S < query_T1) & valid_BS[:, None] | (key_S == query_T1)

    @property
    def scale(self) -> float:
        """What queries are multiplied by: one over the root of a key's channels."""
        return (self.N + self.P) ** -0.5

    def extra_repr(self) -> str:
        return f"heads={self.num_heads}, positions={'none' if self.rope is None else f'rotary, base {self.rope:g}'}"


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, of_q: tuple[Tensor, int], of_k: tuple[Tensor, int], scale: float
) -> Tensor:
    """Attention of packed documents, [T, H, C]: the last query of each sees all its keys, the one before all but one.

    of_q, of_k: where each document begins, [N + 1] int32, and a bound on their lengths.
    """
    assert varlen_attn is not None
    (starts_q, longest_q), (starts_k, longest_k) = of_q, of_k
    y = varlen_attn(q, k, v, starts_q, starts_k, longest_q, longest_k, scale=scale, **CAUSAL)
    assert isinstance(y, Tensor)
    return y


def rotate(x: Tensor, position: Tensor, base: float) -> Tensor:
    """Rotary positions (arXiv:2104.09864): turn channels i and i + P / 2 of x [..., P] by position / base^(2i/P).

    >>> rotate(torch.tensor([1.0, 0.0]), torch.tensor(0), 10000.0)
    tensor([1., 0.])
    """
    half = x.shape[-1] // 2
    turns = base ** -(torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angle = position.double()[..., None] * turns
    cos, sin = angle.cos().to(float32(x).dtype), angle.sin().to(float32(x).dtype)
    a, b = float32(x).split(half, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)

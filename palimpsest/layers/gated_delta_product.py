"""Gated DeltaProduct: several erase-and-write sub-steps a token, so that a token may rotate the memory.

    S <- Diag(exp log_decay_t) S;    n times:  S <- S + beta_j k_j (v_j - S^T k_j)^T;    o = S^T q

One sub-step can reflect (beta 2): swap two things. Two reflections are a rotation, and n of them any permutation that n
swaps make, so a token can carry a step of a larger group.

Letters as in memory_layer.py. Source: DeltaProduct, arXiv:2502.10297.
"""

from __future__ import annotations

import torch
from torch import Tensor

from palimpsest.layers.memory_layer import MemoryLayer, linear
from palimpsest.ops.gates import l2norm
from palimpsest.ops.split import SequenceSplit
from palimpsest.ops.variants import gated_delta_product, kda_step_


class GatedDeltaProduct(MemoryLayer):
    """A memory layer whose tokens erase and write n times before they read; each sub-step has its key, value and beta.

    Args as MemoryLayer: hidden_size, num_heads, head_dim, conv_size, norm_eps, options. Of the options,
    `num_householder` is n; `decay` is one a "head" in the paper, and may be any here.

    >>> from palimpsest.layers.options import MixerOptions
    >>> layer = GatedDeltaProduct(64, num_heads=2, head_dim=16, options=MixerOptions(decay="head", num_householder=3))
    >>> y, state = layer(torch.randn(3, 10, 64))
    >>> y.shape, state.memory.shape, state.conv[1].shape
    (torch.Size([3, 10, 64]), torch.Size([3, 2, 16, 16]), torch.Size([3, 96, 3]))
    """

    @property
    def sub_steps(self) -> int:  # type: ignore[override]  # a number of the class there, of the options here
        return self.options.num_householder

    def add_gates(self) -> None:
        """The projection to the betas of all sub-steps."""
        self.b_proj = linear(self.hidden_size, self.sub_steps * self.num_heads)

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
        """As MemoryLayer.remember."""
        q, k, v, log_decay, beta = self._inputs(x, q, k, v)
        return gated_delta_product(q, k, v, log_decay, beta, state=memory, cu_seqlens=cu_seqlens, split=split)

    def remember_step_(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
        """As MemoryLayer.remember_step_."""
        q, k, v, log_decay, beta = self._inputs(x, q, k, v)
        if mask is not None:
            log_decay, beta = log_decay * mask[:, None, None], beta * mask[:, None, None]
        output = q
        for k_j, v_j, beta_j in zip(k.unbind(1), v.unbind(1), beta.unbind(1)):
            output = kda_step_(q, k_j.contiguous(), v_j.contiguous(), log_decay, beta_j.contiguous(), memory)
            log_decay = torch.zeros_like(log_decay)  # the token's decay comes once, before its first sub-step
        return output

    def _inputs(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        n, H, K = self.sub_steps, self.num_heads, self.head_dim
        if n == 1:
            k, v = k.unsqueeze(-3), v.unsqueeze(-3)
        if self.options.qk_norm:
            q, k = l2norm(q), l2norm(k)
        log_decay = self._log_decay(x)
        return q, k, v, log_decay.expand(*log_decay.shape[:-1], K), self._beta(x).unflatten(-1, (n, H))

"""Gated DeltaNet 2: a memory layer that erases per key channel and writes per value channel. Source: arXiv:2605.22791."""

from __future__ import annotations

from torch import Tensor

from palimpsest.layers.memory_layer import MemoryLayer, linear
from palimpsest.layers.precision import float32
from palimpsest.ops.gates import l2norm
from palimpsest.ops.split import SequenceSplit
from palimpsest.ops.variants import gdn2


class GatedDeltaNet2(MemoryLayer):
    """A memory with an erase gate a key channel and a write gate a value channel.

    Args as MemoryLayer: hidden_size, num_heads, head_dim, conv_size, norm_eps, options.

    >>> y, state = GatedDeltaNet2(64, num_heads=2, head_dim=16)(torch.randn(3, 10, 64))
    >>> y.shape, state.memory.shape
    (torch.Size([3, 10, 64]), torch.Size([3, 2, 16, 16]))
    """

    def add_gates(self) -> None:
        """The projections to the erase and the write gate."""
        D = self.num_heads * self.head_dim
        self.e_proj, self.w_proj = linear(self.hidden_size, D), linear(self.hidden_size, D)

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
        if self.options.qk_norm:
            q, k = l2norm(q), l2norm(k)
        erase, write = (float32(p(x)).sigmoid().view(k.shape) for p in (self.e_proj, self.w_proj))
        return gdn2(
            q, k, v, self._log_decay(x).expand_as(k), erase, write, state=memory, cu_seqlens=cu_seqlens, split=split
        )

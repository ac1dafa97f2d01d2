"""Memory layers that never erase: gated linear attention, linear attention, and the scalar decay of Mamba-2.

Source: arXiv:2312.06635 (gated linear attention), arXiv:2405.21060 (Mamba-2).
"""

from __future__ import annotations

from torch import Tensor

from palimpsest.layers.memory_layer import MemoryLayer, linear
from palimpsest.ops.gates import l2norm
from palimpsest.ops.split import SequenceSplit
from palimpsest.ops.variants import gated_linear_attention


class GatedLinearAttention(MemoryLayer):
    """A memory that fades and adds. With `options.decay` "none" it is linear attention.

    Args as MemoryLayer: hidden_size, num_heads, head_dim, conv_size, norm_eps, options.

    >>> y, state = GatedLinearAttention(64, num_heads=2, head_dim=16)(torch.randn(3, 10, 64))
    >>> y.shape, state.memory.shape
    (torch.Size([3, 10, 64]), torch.Size([3, 2, 16, 16]))
    """

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
        log_decay = self._log_decay(x).expand_as(k)
        return gated_linear_attention(
            q, k, self.written(x, v), log_decay, state=memory, cu_seqlens=cu_seqlens, split=split
        )

    def written(self, x: Tensor, v: Tensor) -> Tensor:
        """What is written of the values [B, T, H, K]."""
        return v


class ScalarDecay(GatedLinearAttention):
    """A memory that fades, and writes with a strength beta a head and token: with `options.decay` "head" that of Mamba-2.

    Args as MemoryLayer: hidden_size, num_heads, head_dim, conv_size, norm_eps, options.
    """

    def add_gates(self) -> None:
        """The projection to beta."""
        self.b_proj = linear(self.hidden_size, self.num_heads)

    def written(self, x: Tensor, v: Tensor) -> Tensor:
        """The values times beta."""
        return (v * self._beta(x)[..., None]).to(v.dtype)

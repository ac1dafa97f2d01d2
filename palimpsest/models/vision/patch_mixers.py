"""What mixes the patches of an image: memories that scan it, or attention of every patch to every other.

Letters  B images, T patches, D hidden channels, H heads.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palimpsest.models.kimi_linear.mixers import MIXERS
from palimpsest.models.vision.scans import in_order, in_reading_order
from palimpsest.models.vision.vision_config import VisionConfig


class ScannedMemory(nn.Module):
    """Memory layers that read the patches in different directions, an equal share of the heads each; their outputs add up.

    Args:
        config: the mixer, its heads and channels.
        directions: as of `scan_order`.

    >>> mixer = ScannedMemory(VisionConfig(hidden_size=32, head_dim=8), ("rows", "columns back"))
    >>> mixer(torch.randn(2, 12, 32), 3, 4).shape
    torch.Size([2, 12, 32])
    """

    def __init__(self, config: VisionConfig, directions: tuple[str, ...]):
        super().__init__()
        self.directions = directions
        share: Any = SimpleNamespace(
            hidden_size=config.hidden_size,
            linear_num_heads=config.num_heads // len(directions),
            linear_head_dim=config.head_dim,
            short_conv_kernel_size=config.short_conv_kernel_size,
            rms_norm_eps=config.rms_norm_eps,
            mixer_options=config.mixer_options,
        )
        self.mixers = nn.ModuleList(MIXERS[config.mixer].make(share, i) for i in range(len(directions)))

    def forward(self, x: Tensor, rows: int, columns: int) -> Tensor:
        """Of patches in reading order.

        Args:
            x: [B, T, D]. rows, columns: of the grid, T = rows * columns.

        Returns:
            y [B, T, D].
        """
        read = [mixer(in_order(x, d, rows, columns))[0] for d, mixer in zip(self.directions, self.mixers)]
        ys = [in_reading_order(y, d, rows, columns) for d, y in zip(self.directions, read)]
        return ys[0] if len(ys) == 1 else torch.stack(ys).sum(0)


class PatchAttention(nn.Module):
    """Softmax attention of every patch to every patch.

    Args:
        config: its heads and channels.

    >>> PatchAttention(VisionConfig(hidden_size=32, head_dim=8))(torch.randn(2, 12, 32), 3, 4).shape
    torch.Size([2, 12, 32])
    """

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.num_heads, D = config.num_heads, config.num_heads * config.head_dim
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(config.hidden_size, D, bias=False) for _ in range(3))
        self.o_proj = nn.Linear(D, config.hidden_size, bias=False)

    def forward(self, x: Tensor, rows: int, columns: int) -> Tensor:
        """As ScannedMemory's."""
        heads = [
            p(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        ]
        return self.o_proj(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(-2))


def make_patch_mixer(config: VisionConfig, layer: int) -> ScannedMemory | PatchAttention:
    """The mixer of layer number `layer`, from 0."""
    return PatchAttention(config) if config.mixer == "softmax" else ScannedMemory(config, config.directions(layer))

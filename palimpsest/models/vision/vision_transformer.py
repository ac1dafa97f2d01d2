"""The vision transformer: patches, layers, a mean, classes.

Letters  B images, C channels of an image, P pixels of a patch's side, T patches, D hidden channels.
Source   ViT, arXiv:2010.11929; memories in place of its attention as in Vision Mamba, arXiv:2401.09417, and ViG,
         arXiv:2405.18425. The layers are those of Kimi Linear, arXiv:2510.26692.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palimpsest.layers.mlp import GatedMLP
from palimpsest.layers.norms import RMSNorm
from palimpsest.models.vision.patch_mixers import make_patch_mixer
from palimpsest.models.vision.vision_config import VisionConfig


class VisionLayer(nn.Module):
    """Mix patches, then channels, each around a residual."""

    def __init__(self, config: VisionConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mixer = make_patch_mixer(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, rows: int, columns: int) -> Tensor:
        x = x + self.mixer(self.input_layernorm(x), rows, columns)
        return x + self.mlp(self.post_attention_layernorm(x))


class VisionTransformer(nn.Module):
    """Images in, logits of classes out.

    Args:
        config: its shape and what mixes its patches.

    >>> config = VisionConfig(image_size=16, patch_size=4, hidden_size=32, head_dim=8, num_layers=2, num_classes=10)
    >>> VisionTransformer(config)(torch.rand(3, 3, 16, 16)).shape
    torch.Size([3, 10])
    """

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.patches = nn.Linear(config.image_channels * config.patch_size**2, config.hidden_size)
        if config.positions == "learned":
            self.position = nn.Parameter(torch.empty(config.hidden_size, *config.grid))
        self.layers = nn.ModuleList(VisionLayer(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.classes = nn.Linear(config.hidden_size, config.num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if config.positions == "learned":
            nn.init.normal_(self.position, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes].

        Args:
            images: [B, C, height, width]: uint8 from 0 to 255, or floats from 0 to 1. Sides are multiples of a patch's.

        Raises:
            ValueError: another shape.
        """
        x, rows, columns = self.embed(images)
        for layer in self.layers:
            x = layer(x, rows, columns)
        return self.classes(self.norm(x).mean(1))

    def embed(self, images: Tensor) -> tuple[Tensor, int, int]:
        """What the first layer is given.

        Args:
            images: as forward's.

        Returns:
            Patches [B, T, D] in reading order, and how many of them are down and across.

        Raises:
            ValueError: as forward.
        """
        C, P = self.config.image_channels, self.config.patch_size
        if images.ndim != 4 or images.shape[1] != C or images.shape[2] % P or images.shape[3] % P or not images.numel():
            raise ValueError(
                f"images has shape {tuple(images.shape)}; expected [B, {C}, height, width] with sides that are multiples of {P}"
            )
        pixels = images.float() / 255 if images.dtype == torch.uint8 else images
        rows, columns = images.shape[2] // P, images.shape[3] // P
        pixels = (pixels - 0.5).to(self.patches.weight.dtype)
        x = self.patches(pixels.unflatten(3, (columns, P)).unflatten(2, (rows, P)).permute(0, 2, 4, 1, 3, 5).flatten(3))
        x = x.flatten(1, 2)
        if self.config.positions == "learned":
            position = self.position
            if (rows, columns) != self.config.grid:
                position = F.interpolate(position[None], size=(rows, columns), mode="bilinear", antialias=True)[0]
            x = x + position.flatten(1).mT.to(x.dtype)
        return x, rows, columns

    def until(self, images: Tensor, layer: int) -> tuple[Tensor, int, int]:
        """What the mixer of layer number `layer` reads, normalised: to look into it.

        Args:
            images: as forward's. layer: from 0; -1 is the last.

        Returns:
            As embed.
        """
        x, rows, columns = self.embed(images)
        layers = cast("list[VisionLayer]", list(self.layers))
        for before in layers[: layer % len(layers)]:
            x = before(x, rows, columns)
        return layers[layer].input_layernorm(x), rows, columns

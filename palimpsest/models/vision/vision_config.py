"""The shape of a vision transformer, and what mixes its patches."""

from __future__ import annotations

from dataclasses import dataclass

from palimpsest.checks import check, check_fields
from palimpsest.layers.options import OFFICIAL, MixerOptions
from palimpsest.models.kimi_linear.mixers import MIXERS
from palimpsest.models.vision.scans import SCANS

POSITIONS = ("none", "learned")


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Everything that decides a `VisionTransformer`.

    Attributes:
        mixer: "softmax", or the name of a memory layer: "kda", "gated_delta", "gated_linear_attention" and the others of
            `KimiLinearConfig.layer_types`.
        scan: "one", "both" or "four": the directions in which memories read, an equal share of the heads each.
        by_turns: a layer has one direction with all its heads, and the next layer the next one.
        positions: "none", or "learned": a vector a patch, added once.
        patch_size: pixels of a patch's side.
        image_channels: 3 for colour.
        image_size: pixels of the side of the images that it is made for; others may come, positions are then stretched.
        hidden_size, num_layers, intermediate_size: as of any transformer.
        num_heads, head_dim: of every layer.
        num_classes: that are told apart.
        short_conv_kernel_size, rms_norm_eps, mixer_options: as of KimiLinearConfig.

    >>> VisionConfig(image_size=32, patch_size=4).grid
    (8, 8)
    """

    mixer: str = "kda"
    scan: str = "both"
    by_turns: bool = False
    positions: str = "none"
    image_size: int = 224
    patch_size: int = 16
    image_channels: int = 3
    hidden_size: int = 192
    num_layers: int = 12
    num_heads: int = 4
    head_dim: int = 64
    intermediate_size: int = 512
    num_classes: int = 1000
    short_conv_kernel_size: int = 4
    rms_norm_eps: float = 1e-5
    mixer_options: MixerOptions = OFFICIAL

    def __post_init__(self):
        check_fields(self, "vision: ")
        known = ["softmax", *(name for name, mixer in MIXERS.items() if not mixer.full_attention)]
        check(self.mixer in known, f"vision: mixer is {self.mixer!r}; choose one of {', '.join(known)}")
        check(self.scan in SCANS, f"vision: scan is {self.scan!r}; choose one of {', '.join(SCANS)}")
        check(self.positions in POSITIONS, f"vision: positions is {self.positions!r}; it is 'none' or 'learned'")
        sizes = "image_size patch_size image_channels hidden_size num_layers num_heads head_dim intermediate_size num_classes"
        for name in sizes.split():
            check(getattr(self, name) >= 1, f"vision: {name} is {getattr(self, name)}; give at least 1")
        check(
            self.image_size % self.patch_size == 0,
            f"vision: image_size {self.image_size} is no multiple of patch_size {self.patch_size}; give one that is",
        )
        ways = 1 if self.by_turns else len(SCANS[self.scan])
        check(
            self.mixer == "softmax" or self.num_heads % ways == 0,
            f"vision: num_heads {self.num_heads} cannot be shared by the {ways} directions of scan {self.scan!r}; "
            f"give a multiple of {ways}, or by_turns=True",
        )

    @property
    def grid(self) -> tuple[int, int]:
        """Patches of an image down and across."""
        side = self.image_size // self.patch_size
        return side, side

    def directions(self, layer: int) -> tuple[str, ...]:
        """In which layer number `layer`, from 0, reads."""
        ways = SCANS[self.scan]
        return (ways[layer % len(ways)],) if self.by_turns else ways

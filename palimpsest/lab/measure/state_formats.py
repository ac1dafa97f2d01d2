"""How a memory is kept between tokens: fewer bits, and what may be done about the rounding.

    float32, bfloat16, float8 (e4m3), int8       the last two with one float32 scale a key channel
    -stochastic     rounds up or down by rng, so that the mean of many roundings is right
    -feedback       keeps four bits of each rounding error and adds them again at the next token

Letters  B sequences, H heads, K key channels, V value channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from palimpsest.checks import check, check_fields

KINDS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float8": torch.float8_e4m3fn, "int8": torch.int8}
LARGEST = {"float8": 448.0, "int8": 127.0}


class Stored(NamedTuple):
    """A memory as it is kept."""

    codes: Tensor  # [B, H, K, V] in the format's dtype
    scale: Tensor | None  # [B, H, K, 1], float32
    error: Tensor | None  # [B, H, K, V / 2], uint8: two errors of four bits a byte

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self if x is not None)


@dataclass(frozen=True)
class Format:
    """Args: kind, one of float32, bfloat16, float8, int8; stochastic rounding; feedback of errors, for int8.

    >>> memory = torch.tensor([[[[0.5, -1.0], [3.0, 0.1]]]])
    >>> Format("int8").unpack(Format("int8").pack(memory)).allclose(memory, atol=0.02)
    True
    """

    kind: str
    stochastic: bool = False
    feedback: bool = False

    def __post_init__(self):
        check_fields(self, "format: ")
        check(self.kind in KINDS, f"format kind is {self.kind!r}; choose one of {', '.join(KINDS)}")
        check(not self.feedback or self.kind == "int8", f"feedback is for int8; format kind is {self.kind!r}")
        check(
            not self.stochastic or self.kind != "float32", "float32 rounds nothing here, so it has no stochastic form"
        )

    @property
    def name(self) -> str:
        return self.kind + "-stochastic" * self.stochastic + "-feedback" * self.feedback

    def pack(self, memory: Tensor, rng: torch.Generator | None = None) -> Stored:
        """Rounds a float32 memory [B, H, K, V] (V even with feedback); rng decides stochastic rounding.

        Raises:
            ValueError: the memory is not finite: no format can hold it, and some would hide it. Looks only on the CPU:
                on a GPU it would stop the stream.
        """
        if memory.device.type == "cpu" and not memory.isfinite().all():
            raise ValueError("memory is not finite, so it cannot be stored; look for the token where it overflowed")
        if self.kind == "float32":
            return Stored(memory.clone(), None, None)
        if self.kind == "bfloat16":
            return Stored(_to_bfloat16(memory, rng) if self.stochastic else memory.bfloat16(), None, None)
        scale = (
            memory.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny * 1e4) / LARGEST[self.kind]
        )
        x = memory / scale
        if self.kind == "float8":
            x = _between_float8(x, rng) if self.stochastic else x
            return Stored(x.to(torch.float8_e4m3fn), scale, None)
        if (
            self.feedback
        ):  # rounded to sixteenths, and those split: to clip the error instead would be a bias that adds up
            sixteenths = (x * 16).round()
            codes = ((sixteenths + 8) / 16).floor()
            error = (sixteenths - 16 * codes + 8).to(torch.uint8)
            return Stored(codes.to(torch.int8), scale, error[..., ::2] << 4 | error[..., 1::2])
        codes = (x + _uniform(x, rng)).floor() if self.stochastic else x.round()
        return Stored(codes.clamp(-127, 127).to(torch.int8), scale, None)

    def unpack(self, stored: Stored) -> Tensor:
        """The memory, float32."""
        x = stored.codes.float()
        if stored.error is not None:
            pairs = torch.stack((stored.error >> 4, stored.error & 15), -1).flatten(-2)
            x = x + (pairs.float() - 8) / 16
        return x if stored.scale is None else x * stored.scale


FORMATS = {
    f.name: f
    for f in (
        Format("float32"),
        Format("bfloat16"),
        Format("bfloat16", stochastic=True),
        Format("float8"),
        Format("float8", stochastic=True),
        Format("int8"),
        Format("int8", stochastic=True),
        Format("int8", feedback=True),
    )
}


def _uniform(x: Tensor, rng: torch.Generator | None) -> Tensor:
    return torch.rand(x.shape, generator=rng, device=x.device)


def _to_bfloat16(x: Tensor, rng: torch.Generator | None) -> Tensor:
    """A bfloat16 is the upper half of a float32: add noise to the lower half, then cut it off."""
    noise = torch.randint(0, 1 << 16, x.shape, generator=rng, device=x.device, dtype=torch.int32)
    return ((x.contiguous().view(torch.int32) + noise) & -65536).view(torch.float32).bfloat16()


def _between_float8(x: Tensor, rng: torch.Generator | None) -> Tensor:
    """The e4m3 number below or above x: they lie 2^(exponent - 3) apart, and 2^-9 below 2^-6."""
    step = torch.exp2(x.abs().clamp(min=2.0**-6).log2().floor() - 3)
    return ((x / step + _uniform(x, rng)).floor() * step).clamp(-448, 448)

"""Inputs that hurt: keys that collide, strengths at their limits, gates from no decay to none left.

Every drawing is by name, so that a failing case can be run again alone. Letters as in palimpsest.ops.reference.
"""

from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from palimpsest.ops.arguments import state_dtype

KEYS = {
    "random": lambda draw, shape: draw(*shape),
    "correlated": lambda draw, shape: draw(*shape) + 3 * draw(1, 1, 1, shape[-1]),  # cosine about 0.9
    "repeated": lambda draw, shape: draw(shape[0], 4, *shape[2:]).repeat(1, shape[1] // 4 + 1, 1, 1)[:, : shape[1]],
    "nearly_identical": lambda draw, shape: draw(1, 1, 1, shape[-1]) + 1e-3 * draw(*shape),
}
BETAS = {
    "sigmoid": lambda draw, shape: draw(*shape).sigmoid(),
    "one": lambda draw, shape: torch.ones(shape, dtype=torch.float64),
    "zero": lambda draw, shape: torch.zeros(shape, dtype=torch.float64),
    "up_to_two": lambda draw, shape: 2 * draw(*shape).sigmoid(),
}
DECAYS = {
    "none": lambda draw, shape: torch.zeros(shape, dtype=torch.float64),
    "slow": lambda draw, shape: F.logsigmoid(draw(*shape) + 6),
    "slower": lambda draw, shape: -1e-3 * draw(*shape).sigmoid(),
    "fast": lambda draw, shape: F.logsigmoid(draw(*shape)),
    "floor": lambda draw, shape: -5 + 1e-2 * draw(*shape).sigmoid(),
    "half_slow": lambda draw, shape: torch.where(
        torch.arange(shape[-1]) % 2 == 0, -1e-3 * draw(*shape).sigmoid(), -4 * draw(*shape).sigmoid()
    ),
    "strong": lambda draw, shape: -50 * draw(*shape).sigmoid(),
    # The slow ones are drawn: of one constant every token repeats the same rounding of exp, and 130 of them add up.
    "mixed": lambda draw, shape: torch.where(draw(*shape) > 1.6, -50.0, -2e-2 * draw(*shape).sigmoid()),
    "bottomless": lambda draw, shape: torch.where(draw(*shape) > 1, -1e4, -2e-2 * draw(*shape).sigmoid()),
    # Two live channels at a time, each wiped at another quarter of every 16 tokens: the delta rule carries content
    # from the one about to be wiped to the other, so a test on the largest decay of a window believes it gone.
    "rotating": lambda draw, shape: torch.where(
        (torch.arange(shape[1])[:, None] // 4 + torch.arange(shape[-1])) % 4 == 0, -5.0, -1e-3
    )[None, :, None].double().expand(shape),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One drawing of KDA inputs.

    Attributes:
        keys, beta, decay: names from KEYS, BETAS and DECAYS.
        tokens, sequences, heads, key_dim, value_dim: sizes.
        seed: of the drawing.
    """

    keys: str = "random"
    beta: str = "sigmoid"
    decay: str = "slow"
    tokens: int = 130
    sequences: int = 2
    heads: int = 2
    key_dim: int = 16
    value_dim: int = 24
    seed: int = 0

    def __str__(self):
        return f"keys {self.keys}, beta {self.beta}, decay {self.decay}, T {self.tokens}"

    def kda(self, dtype: torch.dtype = torch.float64, device: str = "cpu") -> tuple[Tensor, ...]:
        """The tensors, rounded to `dtype` first, so that every dtype and the truth are asked about the same numbers.

        Args:
            dtype: of q, k and v; gates and state are in fp32, or fp64 with fp64.
            device: where they are wanted; they are drawn on the CPU.

        Returns:
            (q, k, v, log_decay, beta, state) with unit keys and q scaled.
        """
        rng = torch.Generator().manual_seed(self.seed)
        draw = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)
        B, T, H, K, V = self.sequences, self.tokens, self.heads, self.key_dim, self.value_dim
        q, v, state = draw(B, T, H, K) * K**-0.5, draw(B, T, H, V), draw(B, H, K, V)
        k = F.normalize(KEYS[self.keys](draw, (B, T, H, K)), dim=-1)
        log_decay, beta = DECAYS[self.decay](draw, (B, T, H, K)), BETAS[self.beta](draw, (B, T, H))
        wide = state_dtype(dtype)
        # All draws go through fp32, so that fp32 inputs and the fp64 truth are the same numbers exactly.
        gates = [x.float().to(wide).to(device) for x in (log_decay, beta, state)]
        q, k, v = (x.float().to(dtype).to(device) for x in (q, k, v))
        return q, k, v, *gates


CASES = [Case(keys, beta, decay) for keys, beta, decay in product(KEYS, BETAS, DECAYS)]

"""When numbers stop being finite: which layer, which head, which token.

A state is checked now and then, which is cheap; when a check fails, the tokens since the last good one are read again
one at a time, which names the first to fail and gives the state just before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from palimpsest.models.kimi_linear.model import KimiLinearForCausalLM
from palimpsest.models.kimi_linear.model_state import ModelState


class NonFiniteError(ArithmeticError):
    """A model's numbers became infinite or NaN; `fault` says where."""

    def __init__(self, fault: Fault):
        super().__init__(str(fault))
        self.fault = fault


@dataclass(frozen=True)
class Fault:
    """Where numbers first stopped being finite.

    Attributes:
        sequence: its place in the batch.
        layer, head: from 0; layer is None if the states are finite and only the logits are not, head is None for a
            layer without heads.
        position: tokens before the one that did it.
        token: its id.
    """

    sequence: int
    layer: int | None
    head: int | None
    position: int
    token: int

    def __str__(self) -> str:
        where = "the logits" if self.layer is None else f"layer {self.layer}"
        where += "" if self.head is None else f", head {self.head}"
        return (
            f"sequence {self.sequence} is not finite from token {self.token} at position {self.position} on, first in "
            f"{where}; look at the weights there, try float32, or keep what came before with on_nonfinite='stop'"
        )


@torch.no_grad()
def read_until_fault(
    model: KimiLinearForCausalLM, state: ModelState, tokens: Sequence[int], sequence: int = 0
) -> tuple[ModelState, Tensor | None, Fault | None]:
    """Read tokens one at a time from the state of one sequence, until numbers stop being finite.

    Args:
        sequence: the number to give the sequence in the fault.

    Returns: the last finite state; the logits [1, N] after it, None if the first token fails; the fault of the token
        that follows, None if all is finite.
    """
    start, logits = int(state.position[0]), None
    for position, token in enumerate(tokens, start):
        output = model(torch.tensor([[token]], device=state.device), state=state)
        faults = output.state.nonfinite()
        if faults:
            return state, logits, Fault(sequence, faults[0].layer, faults[0].head, position, token)
        if not output.logits.isfinite().all():
            return state, logits, Fault(sequence, None, None, position, token)
        state, logits = output.state, output.logits[:, -1]
    return state, logits, None

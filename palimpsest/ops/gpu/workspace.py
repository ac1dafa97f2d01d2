"""What one call hands to the kernels of either tier: its arguments under their names, and the memories it makes."""

from typing import NamedTuple

import torch
from torch import Tensor


class MemoryArguments(NamedTuple):
    """The arguments of the operator delta_memory, in its order; `schema` says the same to torch.

    One operator serves the whole family. With a gate, log_decay holds logits, beta is a logit, and q, k are normalised
    inside.
    """

    q: Tensor  # [B, T, H, K]
    k: Tensor
    v: Tensor  # [B, T, HV, V]; what is written, if erase is a vector
    log_decay: Tensor  # [B, T, HV, K]
    erase: Tensor  # [B, T, HV]: beta, erase = beta k, write = beta v.  [B, T, HV, K]: the vector erase
    state: Tensor | None  # [N, HV, K, V], fp32; None for zeros
    scale: float
    cu_seqlens: Tensor | None
    A_log: Tensor | None  # [HV]
    dt_bias: Tensor | None  # [HV, K]
    gate: int  # 0 none, 1 softplus, 2 sigmoid
    floor: float  # of the sigmoid's log_decay
    erase_before_decay: bool  # erase reads the memory before its own token's decay
    hopper: bool  # the tier

    def new_state(self) -> Tensor:
        return new_state(self.q, self.v, self.cu_seqlens)


class LinearArguments(NamedTuple):
    """The arguments of the operator linear_memory, in its order."""

    q: Tensor  # [B, T, H, K]
    k: Tensor
    v: Tensor  # [B, T, HV, V]
    state: Tensor | None  # [N, HV, K, V], fp32; None for zeros
    scale: float
    cu_seqlens: Tensor | None

    def new_state(self) -> Tensor:
        return new_state(self.q, self.v, self.cu_seqlens)


_SCHEMA_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", int: "int", bool: "bool"}


def schema(arguments: type[MemoryArguments] | type[LinearArguments]) -> str:
    """The fields in the notation of an operator's schema.

    >>> schema(LinearArguments)
    'Tensor q, Tensor k, Tensor v, Tensor? state, float scale, Tensor? cu_seqlens'
    """
    return ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in arguments.__annotations__.items())


def new_state(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """An uninitialised memory for each sequence: [N, HV, K, V], fp32."""
    N = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return v.new_empty(N, v.shape[2], q.shape[3], v.shape[3], dtype=torch.float32)


def runs_of(rows: list[int]) -> list[tuple[int, int, int]]:
    """Rows that follow one another as (first, how many, place of the first in `rows`).

    >>> runs_of([0, 1, 4])
    [(0, 2, 0), (4, 1, 2)]
    """
    found: list[tuple[int, int, int]] = []
    for at, row in enumerate(rows):
        if found and row == found[-1][0] + found[-1][1]:
            found[-1] = (found[-1][0], found[-1][1] + 1, found[-1][2])
        else:
            found.append((row, 1, at))
    return found

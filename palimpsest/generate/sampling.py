"""How the next token is chosen from its logits.

Order   repetition penalty, temperature, top-k, top-p, min-p; the order of transformers, so that settings carry over.
Chance  The number drawn for a token depends on the seed of its sequence and on its position, on nothing else. So a
        batch draws what its sequences draw alone, and a text saved and continued draws what one run would have drawn.
Legend  B sequences, N the size of the vocabulary.
Source  top-p: arXiv:1904.09751; min-p: arXiv:2407.01082; repetition penalty: arXiv:1909.05858.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from palimpsest.checks import is_count, require


@dataclass(frozen=True)
class Sampling:
    """How to choose a token. The default is greedy: always the most likely one.

    Args:
        temperature: divides the logits, 0 or more; 0 is greedy and then nothing below but the penalty matters.
        top_k: keep the k most likely tokens, k >= 1; None keeps all.
        top_p: keep the fewest most likely tokens whose probabilities reach top_p together, in (0, 1]; 1 keeps all.
        min_p: keep tokens at least min_p times as likely as the likeliest, in [0, 1]; 0 keeps all.
        repetition_penalty: logits of tokens seen before are divided by it where positive and multiplied where negative,
            above 0; 1 changes nothing, more discourages repetition.

    Raises:
        ValueError: a value outside its range.

    >>> Sampling(temperature=0.8, top_p=0.95)
    Sampling(temperature=0.8, top_k=None, top_p=0.95, min_p=0.0, repetition_penalty=1.0)
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        require("temperature", self.temperature, 0 <= self.temperature < math.inf, "a number >= 0 (0 is greedy)")
        whole = self.top_k is None or is_count(self.top_k)
        require("top_k", self.top_k, whole, "a whole number >= 1, or None to keep all tokens")
        require("top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1] (1 keeps all tokens)")
        require("min_p", self.min_p, 0 <= self.min_p <= 1, "in [0, 1] (0 keeps all tokens)")
        penalty = self.repetition_penalty
        require("repetition_penalty", penalty, 0 < penalty < math.inf, "a number > 0 (1 changes nothing)")


GREEDY = Sampling()


def choose_tokens(
    logits: Tensor,
    sampling: Sampling,
    *,
    seeds: Sequence[int] | Tensor,
    positions: Sequence[int] | Tensor,
    seen: Tensor | None = None,
) -> Tensor:
    """One token per sequence.

    Args:
        logits: [B, N], finite.
        seeds: B whole numbers, or [B] int64 on the device of logits.
        positions: B positions of the tokens to come, counted from the start of each sequence; lists or tensors both.
        seen: [B, N] bool, True for the tokens that occurred before; needed by the repetition penalty alone.

    Returns: [B] token ids, int64, on the device of logits.

    >>> logits = torch.tensor([[0.0, 3.0, 1.0]])
    >>> choose_tokens(logits, Sampling(), seeds=[0], positions=[0])
    tensor([1])
    """
    if sampling.temperature == 0:
        return _penalised(logits, sampling, seen).argmax(-1)
    cumulative_BN = probabilities(logits, sampling, seen).double().cumsum(-1)
    if isinstance(seeds, Tensor) and isinstance(positions, Tensor):
        draws_B = uniforms(seeds, positions)
    else:
        numbers = [uniform(int(s), int(p)) for s, p in zip(seeds, positions, strict=True)]
        draws_B = torch.tensor(numbers, dtype=torch.float64).to(logits.device)
    target_B1 = draws_B[:, None] * cumulative_BN[:, -1:]
    return torch.searchsorted(cumulative_BN, target_B1)[:, 0]


def probabilities(logits: Tensor, sampling: Sampling, seen: Tensor | None = None) -> Tensor:
    """The distribution that tokens are drawn from, [B, N] fp32 for logits [B, N]; one-hot if greedy.

    >>> probabilities(torch.tensor([[2.0, 2.0, -1.0]]), Sampling(temperature=1.0, top_k=2))
    tensor([[0.5000, 0.5000, 0.0000]])
    """
    logits_BN = _penalised(logits, sampling, seen)
    if sampling.temperature == 0:
        return torch.nn.functional.one_hot(logits_BN.argmax(-1), logits_BN.shape[-1]).float()
    logits_BN = logits_BN - logits_BN.amax(-1, keepdim=True)  # first, so that a tiny temperature cannot overflow
    logits_BN = logits_BN / max(
        sampling.temperature, torch.finfo(torch.float32).tiny
    )  # what is less would be 0 in fp32
    if sampling.top_k is not None or sampling.top_p < 1:
        sorted_BN, order_BN = logits_BN.sort(dim=-1, descending=True, stable=True)
        drop_BN = torch.zeros_like(sorted_BN, dtype=torch.bool)
        if sampling.top_k is not None:
            drop_BN[:, sampling.top_k :] = True
        probs_BN = sorted_BN.masked_fill(drop_BN, -math.inf).softmax(-1)
        drop_BN |= probs_BN.cumsum(-1) - probs_BN >= sampling.top_p  # those before a token reach top_p without it
        drop_BN[:, 0] = False
        logits_BN = logits_BN.masked_fill(drop_BN.scatter(-1, order_BN, drop_BN), -math.inf)
    probs_BN = logits_BN.softmax(-1)
    if sampling.min_p > 0:
        probs_BN = probs_BN.masked_fill(probs_BN < sampling.min_p * probs_BN.amax(-1, keepdim=True), 0)
        probs_BN = probs_BN / probs_BN.sum(-1, keepdim=True)
    return probs_BN


def uniform(seed: int, position: int) -> float:
    """A number in (0, 1) that depends on seed and position alone: splitmix64, the same on every machine.

    >>> uniform(0, 0) == uniform(0, 0), uniform(0, 0) == uniform(0, 1), uniform(0, 0) == uniform(1, 0)
    (True, False, False)
    """
    bits = _splitmix(_splitmix(seed) + position)
    return ((bits >> 12) + 0.5) / 2**52  # never 0, which would let a token of probability 0 through


def uniforms(seeds: Tensor, positions: Tensor) -> Tensor:
    """`uniform` of each seed and position, the same numbers, computed where the tensors lie.

    Args:
        seeds, positions: [B], int64; a seed beyond its range as `as_int64` gives it.

    Returns: [B], float64.

    >>> uniforms(torch.tensor([7]), torch.tensor([3])).item() == uniform(7, 3)
    True
    """
    bits = _splitmix_int64(_splitmix_int64(seeds) + positions)
    return (_shifted(bits, 12).double() + 0.5) / 2**52


def as_int64(seed: int) -> int:
    """The int64 that has the last 64 bits of a seed: all that `uniform` looks at."""
    return (seed + 2**63) % 2**64 - 2**63


def _splitmix_int64(x: Tensor) -> Tensor:
    x = x + as_int64(0x9E3779B97F4A7C15)  # int64 sums and products keep the last 64 bits, as those of uint64 do
    x = (x ^ _shifted(x, 30)) * as_int64(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * as_int64(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x >> bits of the number without sign."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def _splitmix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def _penalised(logits: Tensor, sampling: Sampling, seen: Tensor | None) -> Tensor:
    logits_BN = logits.float()
    if sampling.repetition_penalty == 1:
        return logits_BN
    if seen is None:
        raise ValueError("seen is missing: a repetition penalty needs to know which tokens occurred, [B, N] bool")
    penalty = sampling.repetition_penalty
    return torch.where(seen, torch.where(logits_BN > 0, logits_BN / penalty, logits_BN * penalty), logits_BN)

"""From logits to log-decay: how a token says, for each key channel, how much of the memory it keeps.

    softplus   log_decay = -exp(A_log) softplus(logits + dt_bias)           unbounded; the released Kimi Linear
    sigmoid    log_decay = floor sigmoid(exp(A_log) (logits + dt_bias))     bounded below by `floor`; later models

Both are computed in fp32 whatever the logits' dtype (fp64 stays fp64): a decay of 0.999 applied a thousand times
does not survive bf16, which rounds it to 1.

Letters as in reference.py. Source: Kimi Linear, arXiv:2510.26692.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from palimpsest.ops.arguments import expect_floats, state_dtype


def softplus_decay(logits: Tensor, A_log: Tensor, dt_bias: Tensor) -> Tensor:
    """The official gate: unbounded, from remembering everything (0) to forgetting at once (-1e3 and beyond).

    Args:
        logits: [B, T, H, K].
        A_log: H numbers in any shape; exp(A_log) scales a head's decay.
        dt_bias: H * K numbers in any shape.

    Returns:
        log_decay [B, T, H, K], natural log, <= 0, fp32 (fp64 for fp64 logits).

    >>> softplus_decay(torch.zeros(1, 1, 1, 2), torch.zeros(1), torch.tensor([0.0, 100.0]))
    tensor([[[[  -0.6931, -100.0000]]]])
    """
    logits, rate_H1, dt_bias_HK = _parameters(logits, A_log, dt_bias)
    return -rate_H1 * F.softplus(logits + dt_bias_HK)


def sigmoid_decay(logits: Tensor, A_log: Tensor, dt_bias: Tensor, floor: float = -5.0) -> Tensor:
    """The bounded gate: one token never multiplies a channel by less than exp(floor).

    Args:
        logits, A_log, dt_bias: as of softplus_decay.
        floor: the least log_decay, < 0.

    Returns:
        log_decay [B, T, H, K], in (floor, 0), fp32 (fp64 for fp64 logits).

    >>> sigmoid_decay(torch.zeros(1, 1, 1, 1), torch.zeros(1), torch.zeros(1), floor=-5.0)
    tensor([[[[-2.5000]]]])
    """
    logits, rate_H1, dt_bias_HK = _parameters(logits, A_log, dt_bias)
    return floor * torch.sigmoid(rate_H1 * (logits + dt_bias_HK))


@dataclass(frozen=True)
class SoftplusDecay:
    """softplus_decay with its parameters: a gate that kda_from_logits can hand to a kernel whole.

    Attributes:
        A_log, dt_bias: as of softplus_decay.

    >>> SoftplusDecay(torch.zeros(1), torch.zeros(2))(torch.zeros(1, 1, 1, 2))
    tensor([[[[-0.6931, -0.6931]]]])
    """

    A_log: Tensor
    dt_bias: Tensor
    name = "softplus"

    def __call__(self, logits: Tensor) -> Tensor:
        return softplus_decay(logits, self.A_log, self.dt_bias)


@dataclass(frozen=True)
class SigmoidDecay:
    """sigmoid_decay with its parameters and its floor.

    Attributes:
        A_log, dt_bias, floor: as of sigmoid_decay.
    """

    A_log: Tensor
    dt_bias: Tensor
    floor: float = -5.0
    name = "sigmoid"

    def __post_init__(self):
        if not isinstance(self.floor, (int, float)) or not -math.inf < self.floor < 0:
            raise ValueError(f"floor is {self.floor!r}; a log-decay bound must be a negative number, for example -5.0")

    def __call__(self, logits: Tensor) -> Tensor:
        return sigmoid_decay(logits, self.A_log, self.dt_bias, self.floor)


def l2norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(sum x^2 + eps) over the last dimension, computed in fp32 and returned in x's dtype.

    Args:
        x: [..., K].
        eps: stands inside the root, as in the released model; torch.nn.functional.normalize clamps outside it.

    Returns:
        x at length one, of its shape and dtype.

    >>> l2norm(torch.tensor([3.0, 4.0]), eps=0.0)
    tensor([0.6000, 0.8000])
    """
    expect_floats("x", x)
    wide = x.to(state_dtype(x.dtype))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


def _parameters(logits: Tensor, A_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    expect_floats("logits", logits)
    if logits.ndim < 2:
        raise ValueError(f"logits has shape {tuple(logits.shape)}; it must be [..., H, K]")
    H, K = logits.shape[-2:]
    for name, parameter, size in (("A_log", A_log, H), ("dt_bias", dt_bias, H * K)):
        expect_floats(name, parameter, logits.device)
        if parameter.numel() != size:
            raise ValueError(
                f"{name} has {parameter.numel()} elements; logits of shape {tuple(logits.shape)} ask for {size}"
            )
    dtype = state_dtype(logits.dtype)
    return logits.to(dtype), A_log.to(dtype).reshape(H, 1).exp(), dt_bias.to(dtype).reshape(H, K)

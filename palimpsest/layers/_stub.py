"""Temporary: ops that the layers need, over the reference, until the real ones are in place."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from palimpsest.ops import chunked, reference


class DeltaOutput(NamedTuple):
    output: Tensor
    state: Tensor


def l2norm(x, eps=1e-6):
    h = x if x.dtype == torch.float64 else x.float()
    return (h * torch.rsqrt(h.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


class SoftplusDecay(NamedTuple):
    A_log: Tensor
    dt_bias: Tensor

    def __call__(self, logits):
        x = logits if logits.dtype == torch.float64 else logits.float()
        return -self.A_log.to(x.dtype).exp()[:, None] * F.softplus(x + self.dt_bias.to(x.dtype))


class SigmoidDecay(NamedTuple):
    A_log: Tensor
    dt_bias: Tensor
    floor: float = -5.0

    def __call__(self, logits):
        x = logits if logits.dtype == torch.float64 else logits.float()
        return self.floor * torch.sigmoid(self.A_log.to(x.dtype).exp()[:, None] * (x + self.dt_bias.to(x.dtype)))


def _run(q, k, erase, write, log_decay, state, scale, cu_seqlens):
    dtype = q.dtype
    B, T, H, K = q.shape
    q = q * (K**-0.5 if scale is None else scale)
    up = torch.float64 if dtype == torch.float64 else torch.float32
    args = [x.to(up) for x in (q, k, erase, write, log_decay)]
    N = B if cu_seqlens is None else len(cu_seqlens) - 1
    if state is None:
        state = torch.zeros(N, H, K, write.shape[-1], dtype=up, device=q.device)
    if cu_seqlens is None:
        o, s = chunked.delta_memory(*args, state)
        return DeltaOutput(o.to(dtype), s)
    ends = cu_seqlens.tolist()
    outs, states = [], []
    for n, (a, b) in enumerate(zip(ends, ends[1:])):
        o, s = (
            reference.delta_memory(*(x[:, a:b] for x in args), state[n : n + 1])
            if b > a
            else (args[3][:, a:b], state[n : n + 1])
        )
        outs.append(o)
        states.append(s)
    return DeltaOutput(torch.cat(outs, 1).to(dtype), torch.cat(states))


def kda(q, k, v, log_decay, beta, *, state=None, scale=None, cu_seqlens=None, backend="auto"):
    b = beta[..., None]
    return _run(q, k, b * k, b * v, log_decay, state, scale, cu_seqlens)


def kda_from_logits(
    q, k, v, decay_logits, beta_logits, *, gate, state=None, scale=None, cu_seqlens=None, backend="auto"
):
    up = torch.float64 if q.dtype == torch.float64 else torch.float32
    return kda(
        l2norm(q),
        l2norm(k),
        v,
        gate(decay_logits),
        beta_logits.to(up).sigmoid(),
        state=state,
        scale=scale,
        cu_seqlens=cu_seqlens,
    )


def gated_delta(q, k, v, log_decay, beta, **rest):
    return kda(q, k, v, log_decay[..., None].expand_as(k), beta, **rest)


def delta_rule(q, k, v, beta, **rest):
    return kda(q, k, v, torch.zeros_like(k), beta, **rest)


def gdn2(q, k, v, log_decay, erase_gate, write_gate, *, state=None, scale=None, cu_seqlens=None, backend="auto"):
    return _run(q, k, erase_gate * k, write_gate * v, log_decay, state, scale, cu_seqlens)


def gated_linear_attention(q, k, v, log_decay, *, state=None, scale=None, cu_seqlens=None, backend="auto"):
    return _run(q, k, 0 * k, v, log_decay, state, scale, cu_seqlens)


def linear_attention(q, k, v, *, state=None, scale=None, cu_seqlens=None, backend="auto"):
    return _run(q, k, 0 * k, v, torch.zeros_like(k), state, scale, cu_seqlens)


def kda_step_(q, k, v, log_decay, beta, state, *, scale=None, backend="auto"):
    o, s = kda(*(x[:, None] for x in (q, k, v, log_decay, beta)), state=state, scale=scale)
    state.copy_(s)
    return o[:, 0]


def short_conv(x, weight, state=None, cu_seqlens=None):
    W = weight.shape[-1]
    if cu_seqlens is not None:
        ends = cu_seqlens.tolist()
        parts = [
            short_conv(x[:, a:b], weight, None if state is None else state[n : n + 1])
            for n, (a, b) in enumerate(zip(ends, ends[1:]))
        ]
        return torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts])
    before = x.new_zeros(x.shape[0], x.shape[2], W - 1) if state is None else state
    xs = torch.cat([before, x.transpose(1, 2)], -1)
    return F.conv1d(xs, weight, groups=x.shape[2]).transpose(1, 2), xs[..., xs.shape[-1] - (W - 1) :]


def short_conv_step_(x, weight, state):
    xs = torch.cat([state, x[..., None]], -1)
    state.copy_(xs[..., 1:])
    return (xs * weight[:, 0]).sum(-1)

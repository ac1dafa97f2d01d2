"""The law and its chunked form as backends: any device, any dtype, any shape, in plain PyTorch.

Half-precision inputs are computed in fp32, fp64 in fp64. Autocast is switched off inside, since it would round the
very products that the fp32 state is there to protect.
"""

from contextlib import nullcontext
from itertools import pairwise

import torch
from torch import Tensor

from palimpsest.ops import chunked, reference
from palimpsest.ops.arguments import check
from palimpsest.ops.backends import Backend, linear_by_core
from palimpsest.ops.packing import borders, by_sequence


def _backend(name: str, law, fold) -> Backend:
    """`law` has the equations; `fold(run, sequences, state)` takes `run` over a sequence, whole or piece by piece.

    Preparation (dtype, heads, scale, beta) happens inside `run`, so that no copy is as long as the sequence.
    """

    def core(q, k, erase, write, log_decay, state, scale, cu_seqlens):
        def run(q, k, erase, write, log_decay, S):
            q, k, erase, write, log_decay = _wide((q, k, erase, write, log_decay), S)
            return law.delta_memory(q * scale, k, erase, write, log_decay, S)

        return _run(run, (q, k, erase, write, log_decay), state, cu_seqlens, write.dtype)

    def kda(q, k, v, log_decay, beta, state, scale, cu_seqlens):
        def run(q, k, v, log_decay, beta, S):
            q, k, v, log_decay, beta = _wide((q, k, v, log_decay, beta), S)
            return law.delta_memory(q * scale, k, beta * k, beta * v, log_decay, S)

        return _run(run, (q, k, v, log_decay, beta[..., None]), state, cu_seqlens, v.dtype)

    def dplr(q, k, v, a, b, log_decay, state, scale, cu_seqlens):
        def run(q, k, v, a, b, log_decay, S):
            q, *rest = _wide((q, k, v, a, b, log_decay), S)
            return law.dplr(q * scale, *rest, S)

        return _run(run, (q, k, v, a, b, log_decay), state, cu_seqlens, v.dtype)

    def _run(run, sequences, state, cu_seqlens, dtype):
        given = state  # without tokens it comes back; the caller gets a memory of their own
        with _full_precision(state.device.type):
            if cu_seqlens is None:
                output, state = fold(run, sequences, state)
            else:
                output, state = by_sequence(lambda *x: fold(run, x[:-1], x[-1]), sequences, state, cu_seqlens)
        return output.to(dtype), state.clone() if state is given else state

    def lookup(q, k, v, keys, values, scale, cu_seqlens):
        q = q.repeat_interleave(v.shape[2] // q.shape[2], dim=2) * scale
        keys, values = torch.cat((keys, k), 1), torch.cat((values, v), 1)
        keys = keys.repeat_interleave(v.shape[2] // k.shape[2], dim=2)
        if cu_seqlens is None:
            return law.softmax_lookup(q, keys, values)
        ends = borders(cu_seqlens, q.shape[1])
        lengths = [stop - start for start, stop in pairwise(ends)]
        return torch.cat([law.softmax_lookup(*x) for x in zip(*(x.split(lengths, 1) for x in (q, keys, values)))], 1)

    linear = linear_by_core(core)
    return Backend(name, lambda problem: None, core=core, kda=kda, dplr=dplr, linear=linear, step=step_, lookup=lookup)


def _full_precision(device: str):
    """Without autocast, on devices that have it: meta tensors have shapes alone."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _wide(sequences, state):
    """In the state's dtype, and with the state's heads."""
    heads = state.shape[1]
    wide = (x.to(state.dtype) for x in sequences)
    return [x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2) for x in wide]


def step_(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor, scale: float) -> Tensor:
    """One token of KDA, in place: fade, see what is held, erase and write, read."""
    check("kda_step_", (q, k, v, log_decay, beta, state))
    with _full_precision(state.device.type):
        B, HV, K, V = state.shape
        S = state.view(B * HV, K, V)
        q, k = (x.to(S.dtype).repeat_interleave(HV // x.shape[1], 1).reshape(B * HV, 1, K) for x in (q, k))
        S.mul_(log_decay.to(S.dtype).exp().reshape(B * HV, K, 1))
        v_new = (v.reshape(B * HV, 1, V) - k @ S) * beta.to(S.dtype).reshape(B * HV, 1, 1)
        S.baddbmm_(k.mT, v_new)
        return (q @ S).mul_(scale).view(B, HV, V).to(v.dtype)


CHUNKED = _backend("chunked", chunked, chunked.by_segments)
REFERENCE = _backend("reference", reference, lambda run, sequences, state: run(*sequences, state))

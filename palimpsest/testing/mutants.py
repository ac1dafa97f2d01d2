"""Wrong memories. Each makes one mistake that a real implementation has made or could; a suite must reject them all.

Those of MUTANTS take and return what reference.delta_memory does.
"""

import torch
from torch import Tensor

from palimpsest.ops import reference

MARGINAL = "three_times_the_error"


def marginal(truth: Tensor, peer: Tensor) -> Tensor:
    """The mutant at the budget's edge: the truth but for three times an honest peer's error, where twice is allowed."""
    return truth + 3 * (peer.double() - truth)


def _one_token_late(q, k, e, w, g, S):
    output, final = reference.delta_memory(q, k, e, w, g, S)
    return output.roll(1, 1), final


def _read_before_write(q, k, e, w, g, S):
    output, final = reference.delta_memory(q, k, e, w, g, S)
    return output - (q * k).sum(-1, keepdim=True) * w, final


def _decay_after_write(q, k, e, w, g, S):
    shifted = torch.cat((torch.zeros_like(g[:, :1]), g[:, :-1]), 1)
    output, final = reference.delta_memory(q * g.exp(), k, e, w, shifted, S)
    return output, g[:, -1].exp()[..., None] * final


def _forgets_between_chunks(q, k, e, w, g, S):
    outputs, final = [], S
    for q_, k_, e_, w_, g_ in _split(q, k, e, w, g):
        output, final = reference.delta_memory(q_, k_, e_, w_, g_, S)
        outputs.append(output)
        S = torch.zeros_like(S)
    return torch.cat(outputs, 1), final


def _stale_erase(q, k, e, w, g, S):
    # Erases what the memory held on entry of the chunk, not what earlier tokens of the chunk left.
    outputs = []
    for q_, k_, e_, w_, g_ in _split(q, k, e, w, g):
        held = torch.einsum("bthk,bhkv->bthv", e_ * g_.cumsum(1).exp(), S)
        output, S = reference.delta_memory(q_, k_, 0 * e_, w_ - held, g_, S)
        outputs.append(output)
    return torch.cat(outputs, 1), S


def _truncates_history(q, k, e, w, g, S):
    # Drops the memory at a chunk's start when the sum of the largest decays says that nothing can be left.
    outputs = []
    for q_, k_, e_, w_, g_ in _split(q, k, e, w, g, size=16):
        gone = g_.sum(1).amax((1, 2)) < -3
        S = torch.where(gone[:, None, None, None], torch.zeros_like(S), S)
        output, S = reference.delta_memory(q_, k_, e_, w_, g_, S)
        outputs.append(output)
    return torch.cat(outputs, 1), S


def _split(*sequences, size=64):
    return zip(*(x.split(size, 1) for x in sequences))


MUTANTS = {
    "no_erase": lambda q, k, e, w, g, S: reference.delta_memory(q, k, 0 * e, w, g, S),
    "no_decay": lambda q, k, e, w, g, S: reference.delta_memory(q, k, e, w, 0 * g, S),
    "half_write": lambda q, k, e, w, g, S: reference.delta_memory(q, k, e, w / 2, g, S),
    "double_erase": lambda q, k, e, w, g, S: reference.delta_memory(q, k, 2 * e, w, g, S),
    "head_decay": lambda q, k, e, w, g, S: reference.delta_memory(q, k, e, w, g.mean(-1, True).expand_as(g), S),
    "clamped_decay": lambda q, k, e, w, g, S: reference.delta_memory(q, k, e, w, g.clamp(min=-0.5), S),
    "state_ignored": lambda q, k, e, w, g, S: reference.delta_memory(q, k, e, w, g, 0 * S),
    "state_not_returned": lambda q, k, e, w, g, S: (reference.delta_memory(q, k, e, w, g, S)[0], S),
    "channels_swapped": lambda q, k, e, w, g, S: reference.delta_memory(q, k, e, w, g.flip(-1), S),
    "one_token_late": _one_token_late,
    "read_before_write": _read_before_write,
    "decay_after_write": _decay_after_write,
    "forgets_between_chunks": _forgets_between_chunks,
    "stale_erase": _stale_erase,
    "truncates_history": _truncates_history,
    "zeros": lambda q, k, e, w, g, S: (torch.zeros_like(w), torch.zeros_like(S)),
}

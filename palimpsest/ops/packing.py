"""Packed sequences: many sequences laid end to end in one row, with their borders in cu_seqlens.

cu_seqlens is [N + 1] integers from 0 to T: sequence n is tokens cu_seqlens[n] to cu_seqlens[n + 1]; empty ones are
allowed. This file is the one place in plain PyTorch that knows about ragged batches. It pads sequences of like
length into a batch; a padding token has no decay, erases nothing and writes nothing, so the memory never sees it.
"""

from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor


def check_cu_seqlens(cu_seqlens: Tensor, batch: int, tokens: int, device: torch.device | None = None) -> None:
    """Raise unless cu_seqlens is [N + 1] integers that rise from 0 to `tokens`, with a batch of one.

    Reads the values only when they are in host memory, and real: on a GPU that would stop the stream.

    Args:
        device: that of the sequences; cu_seqlens may lie there or on the CPU.
    """
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens is a {type(cu_seqlens).__name__}; it must be a torch.Tensor of int32 or int64")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens is {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}; it must be [sequences + 1] int32 or int64"
        )
    if batch != 1:
        raise ValueError(f"cu_seqlens came with a batch of {batch}; packed sequences lie end to end in a batch of 1")
    if device is not None and cu_seqlens.device != device and cu_seqlens.device.type != "cpu":
        raise ValueError(
            f"cu_seqlens is on {cu_seqlens.device} and the sequences on {device}; move it there or to the CPU"
        )
    if type(cu_seqlens) is Tensor and cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        borders(cu_seqlens, tokens)


def borders(cu_seqlens: Tensor, tokens: int) -> list[int]:
    """cu_seqlens as numbers, or a ValueError unless they rise from 0 to `tokens`.

    >>> borders(torch.tensor([0, 2, 2, 5]), tokens=5)
    [0, 2, 2, 5]
    """
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != tokens or any(a > b for a, b in pairwise(ends)):
        few = f"{ends}" if len(ends) <= 8 else f"[{', '.join(map(str, ends[:8]))}, ...]"
        raise ValueError(f"cu_seqlens is {few}; it must rise from 0 to the number of tokens, {tokens}")
    return ends


def watch_borders(cu_seqlens: Tensor, tokens: int) -> None:
    """On a GPU, which is not waited for: the next wait raises unless cu_seqlens rises from 0 to `tokens`.

    Elsewhere, and within torch.compile, nothing: a CPU's borders have been read, and the memory's kernels watch for themselves.
    """
    if cu_seqlens.is_cuda and not torch.compiler.is_compiling():
        right = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == tokens) & (cu_seqlens.diff() >= 0).all()
        torch._assert_async(right, f"cu_seqlens must rise from 0 to the number of tokens, {tokens}")


def by_sequence(
    law: Callable[..., tuple[Tensor, Tensor]], sequences: tuple[Tensor, ...], state: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor]:
    """Run `law(*sequences, state)` on every packed sequence by itself.

    Args:
        law: takes tensors [B, T, H, X] and a state [B, ...], returns an output [B, T, H, V] and the state.
        sequences: tensors [1, T, H, X].
        state: [N, ...], one memory a sequence.

    Returns:
        The output [1, T, H, V] in the order of the tokens, and the states [N, ...].
    """
    ends = borders(cu_seqlens, sequences[0].shape[1])
    groups = defaultdict(list)  # sequences whose lengths share a power of two: padding at most doubles the work
    for n, (start, stop) in enumerate(pairwise(ends)):
        groups[(stop - start).bit_length()].append(n)

    tokens, outputs, members, states = [], [], [], []
    for size, group in sorted(groups.items()):
        members += group
        if size == 0:
            states.append(state[group])
            continue
        starts = torch.tensor([ends[n] for n in group])[:, None]
        lengths = torch.tensor([ends[n + 1] - ends[n] for n in group])[:, None]
        offsets = torch.arange(int(lengths.max()))
        real = (offsets < lengths).to(state.device)
        index = torch.where(offsets < lengths, starts + offsets, starts).to(state.device)
        padded = (torch.where(real[..., None, None], x[0, index], 0) for x in sequences)
        output, final = law(*padded, state[group])
        tokens.append(index[real])
        outputs.append(output[real])
        states.append(final)
    if not tokens:
        return sequences[0].new_zeros(1, 0, *state.shape[1:2], state.shape[-1]), state
    output, final = torch.cat(outputs)[torch.argsort(torch.cat(tokens))][None], torch.cat(states)
    return output, final[torch.argsort(torch.tensor(members, device=final.device))]

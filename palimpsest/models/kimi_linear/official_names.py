"""Between the model's tensors and the official names: there a tensor an expert, here all experts of a projection in one.

    model.layers.1.block_sparse_moe.experts.w1  [E, I, D]   <->   model.layers.1.block_sparse_moe.experts.0.w1.weight  [I, D]

Every other name and shape is the same on both sides. Nothing here copies: an official tensor is a view.
"""

import re
from collections.abc import Iterator, Mapping

from torch import Tensor

PROJECTIONS = ("w1", "w3", "w2")  # in the order of the official files
_STACKED = re.compile(r"((?:.+\.)?experts)\.(w[123])")
_OFFICIAL = re.compile(r"((?:.+\.)?experts)\.(\d+)\.(w[123])\.weight")


def official_tensors(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model's state dict under their official names, in the official order.

    >>> import torch
    >>> [name for name, _ in official_tensors({f"l.experts.w{i}": torch.zeros(2, 1, 1) for i in (1, 3, 2)})][:4]
    ['l.experts.0.w1.weight', 'l.experts.0.w3.weight', 'l.experts.0.w2.weight', 'l.experts.1.w1.weight']
    """
    for name, tensor in tensors.items():
        stacked = _STACKED.fullmatch(name)
        if stacked is None:
            yield name, tensor
        elif stacked[2] == PROJECTIONS[0]:
            rows = zip(*(tensors[f"{stacked[1]}.{w}"].unbind() for w in PROJECTIONS))
            for e, expert in enumerate(rows):
                yield from ((f"{stacked[1]}.{e}.{w}.weight", matrix) for w, matrix in zip(PROJECTIONS, expert))


def place_of(official: str) -> tuple[str, int | None]:
    """Where an official tensor lives in the model: a name, and the expert if it is one of a stack.

    >>> place_of("model.layers.1.block_sparse_moe.experts.7.w2.weight")
    ('model.layers.1.block_sparse_moe.experts.w2', 7)
    >>> place_of("lm_head.weight")
    ('lm_head.weight', None)
    """
    match = _OFFICIAL.fullmatch(official)
    return (official, None) if match is None else (f"{match[1]}.{match[3]}", int(match[2]))

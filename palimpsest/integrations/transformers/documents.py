"""Where documents begin in a batch that transformers hands to a model.

A collator may say it in position_ids that start again, in cu_seq_lens_q, or in both. transformers uses the first for the
masks of its attention, and only while there is no cache; its memory layers hear neither. Here both become cu_seqlens.
"""

import torch
from torch import Tensor


def documents(rows: tuple[int, int], position_ids: Tensor | None, cu_seq_lens_q: Tensor | None) -> Tensor | None:
    """The borders of documents in B rows of T tokens laid end to end, int64 [N + 1]; None if each row is one document.

    Args:
        rows: (B, T).
        position_ids: [B or 1, T]; a document begins wherever they do not go on by one.
        cu_seq_lens_q: [N + 1] borders in a single row.

    Raises:
        ValueError: cu_seq_lens_q does not fit the rows, or the two disagree.

    >>> documents((1, 5), torch.tensor([[0, 1, 2, 0, 1]]), None)
    tensor([0, 3, 5])
    >>> documents((2, 3), torch.tensor([[0, 1, 2]]), None) is None
    True
    """
    B, T = rows
    said = None
    if position_ids is not None and position_ids.ndim == 2:
        steps = position_ids.diff(dim=-1)
        if bool((steps != 1).any()):
            begins = torch.cat((position_ids.new_ones(len(position_ids), 1), steps != 1), -1).bool()
            starts = begins.expand(B, T).flatten().nonzero()[:, 0]
            said = torch.cat((starts, starts.new_full((1,), B * T)))
    if cu_seq_lens_q is None:
        return said
    given = cu_seq_lens_q.long()
    borders = given.tolist()
    if (
        B != 1
        or len(borders) < 2
        or borders[0] != 0
        or borders[-1] != T
        or any(b < a for a, b in zip(borders, borders[1:]))
    ):
        raise ValueError(
            f"cu_seq_lens_q is {borders[:8]}{' ...' if len(borders) > 8 else ''} with {B} rows of {T} tokens; "
            f"expected borders that rise from 0 to {T} in a single row"
        )
    begin = [a for a, b in zip(borders, borders[1:]) if b > a]
    if said is not None and said.tolist()[:-1] != begin:
        raise ValueError(
            "position_ids and cu_seq_lens_q say that documents begin at other tokens "
            f"({said.tolist()[:8]} and {borders[:8]}); give one of them, or the same"
        )
    return None if len(begin) <= 1 else given


def positions(cu_seqlens: Tensor) -> Tensor:
    """The place of each token in its document, [1, T], for borders of a single row.

    >>> positions(torch.tensor([0, 3, 5]))
    tensor([[0, 1, 2, 0, 1]])
    """
    lengths = cu_seqlens.diff()
    tokens = torch.arange(int(cu_seqlens[-1]), device=cu_seqlens.device)
    return (tokens - cu_seqlens[:-1].repeat_interleave(lengths))[None]

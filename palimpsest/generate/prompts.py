"""Prompts in any of their forms, as lists of token ids."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from palimpsest.text import Tokenizer

Prompts = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Tensor


def read_prompts(
    prompts: Prompts, *, vocab_size: int, tokenizer: Tokenizer | None = None, mask: Tensor | None = None
) -> list[list[int]]:
    """One list of ids per prompt.

    Args:
        prompts: a text or several (these need a tokenizer), a list of ids or several, or ids [B, T].
        mask: [B, T] bool for ids [B, T], True for a token; padding may stand on either side.

    Raises:
        ValueError: no prompt, an empty one, a token outside the vocabulary, or a mask that does not fit.

    >>> read_prompts(torch.tensor([[1, 2, 0], [0, 0, 3]]), vocab_size=9, mask=torch.tensor([[1, 1, 0], [0, 0, 1]]) > 0)
    [[1, 2], [3]]
    """
    if isinstance(prompts, Tensor):
        rows = _from_tensor(prompts, mask)
    elif mask is not None:
        raise ValueError(
            f"mask was given with prompts of type {type(prompts).__name__}; it belongs to ids [B, T] alone"
        )
    else:
        single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
        rows: list[Any] = [prompts] if single else list(prompts)
    if not rows:
        raise ValueError("prompts is empty; give at least one prompt")
    ids = [_encode(row, tokenizer) if isinstance(row, str) else list(row) for row in rows]
    for i, row in enumerate(ids):
        if not row:
            raise ValueError(
                f"prompt {i} is empty; give at least one token, such as the end mark that begins a document"
            )
        if set(map(type, row)) == {int} and min(row) >= 0 and max(row) < vocab_size:
            continue
        wrong = next(  # the same one by one, to say where
            (at for at, token in enumerate(row) if not (isinstance(token, int) and 0 <= token < vocab_size)), None
        )
        if wrong is not None:
            raise ValueError(
                f"prompt {i} has token {row[wrong]!r} at place {wrong}; the model's tokens are 0 to {vocab_size - 1}"
            )
    return ids


def _from_tensor(ids: Tensor, mask: Tensor | None) -> list[list[int]]:
    if ids.ndim != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"prompts is {ids.dtype} of shape {tuple(ids.shape)}; expected whole numbers [B, T]")
    if mask is None:
        return ids.tolist()
    if mask.dtype != torch.bool or mask.shape != ids.shape:
        raise ValueError(
            f"mask is {mask.dtype} of shape {tuple(mask.shape)}; expected torch.bool of {tuple(ids.shape)}"
        )
    return [row[kept].tolist() for row, kept in zip(ids, mask)]


def _encode(text: str, tokenizer: Tokenizer | None) -> list[int]:
    if tokenizer is None:
        raise ValueError(
            "prompts is text and tokenizer is None; give a tokenizer, such as palimpsest.text.ByteTokenizer()"
        )
    return tokenizer.encode(text)

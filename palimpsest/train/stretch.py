"""A process's part of a batch of whole rows, where several share the tokens of each."""

from palimpsest.parallel.spread import Spread
from palimpsest.train.data import IGNORED, Batch


def own_part(batch: Batch, num_predictions: int, spread: Spread) -> tuple[Batch, float]:
    """The part of a batch that this process computes, and the number of predictions in it.

    Args:
        batch: whole rows.
        num_predictions: in them.
        spread: says who shares their tokens; without anybody the batch is what it was.

    The weight is such that the mean over all processes is the mean over all rows.
    """
    group = spread.group("context")
    if group is None:
        return batch, num_predictions
    from palimpsest.parallel.context import own_stretch

    tokens, labels, cu_seqlens, mine = own_stretch(batch.tokens, batch.labels, batch.cu_seqlens, group)
    weight = batch.weight * mine * group.size() / max(num_predictions, 1)
    return Batch(tokens, tokens if labels is tokens else labels, cu_seqlens, weight), mine


def predictions_of(batch: Batch) -> int:
    """How many tokens of a batch are predicted from those before them."""
    wanted = batch.labels != IGNORED
    wanted[:, 0] = False
    if batch.cu_seqlens is not None:
        wanted[:, batch.cu_seqlens[:-1].long().clamp(max=wanted.shape[1] - 1)] = False
    return int(wanted.sum())

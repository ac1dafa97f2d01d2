"""Bits per byte on held-out text, beside what simple and strong compressors need for the same bytes."""

import gzip
import math
from collections import Counter

import torch
from accelerate import Accelerator
from torch import nn

from palimpsest.parallel.spread import Spread
from palimpsest.train.data import Heldout
from palimpsest.train.processes import total
from palimpsest.train.stretch import own_part


@torch.no_grad()
def bits_per_byte(
    accelerator: Accelerator, model: nn.Module, heldout: Heldout, *, batch_size: int, spread: Spread
) -> float:
    """What the model pays for one byte, log2: every token of every piece, the first at log2 of the vocabulary's size.

    The batches are dealt as a step's rows are; each process computes as many, since those that share a model meet in it.
    """
    was_training = model.training
    model.eval()
    batches = list(heldout.batches(batch_size))
    process, num_processes = spread.rows
    rounds = math.ceil(len(batches) / num_processes)
    nats = torch.zeros((), dtype=torch.float64)
    for i in range(rounds):
        index = i * num_processes + process
        batch, num_predictions = batches[min(index, len(batches) - 1)]
        batch, num_predictions = own_part(batch, num_predictions, spread)
        batch = batch.to(accelerator.device)
        with accelerator.autocast(), torch.compiler.set_stance("force_eager"):  # each length would be compiled anew
            loss = model(batch.tokens, labels=batch.labels, cu_seqlens=batch.cu_seqlens).loss
        if index < len(batches) and num_predictions:  # pieces of one token predict nothing
            nats += loss.double().cpu() * num_predictions
    nats = total(accelerator, nats)
    model.train(was_training)
    first = len(heldout.pieces) * heldout.first_token_bits
    return (float(nats) / math.log(2) + first) / heldout.num_bytes


def compressors(content: bytes) -> dict[str, float]:
    """Bits per byte of content by the entropy of its own bytes, by gzip and by xz, each at its strongest.

    The compressors see all of it in one stream, which favours them over a model that reads it in pieces.

    >>> {name: round(bits, 1) for name, bits in compressors(b"abab" * 1000).items()}
    {'unigram': 1.0, 'gzip': 0.1, 'xz': 0.2}
    """
    counts = Counter(content).values()
    total = len(content)
    bits = {"unigram": -sum(n / total * math.log2(n / total) for n in counts)}
    bits["gzip"] = 8 * len(gzip.compress(content, 9, mtime=0)) / total
    try:
        import lzma
    except ImportError:  # some builds of Python lack it
        return bits
    return bits | {"xz": 8 * len(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME)) / total}

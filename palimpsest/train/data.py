"""Documents in, batches out. The batch of a step follows from the seed and the step alone, so there is nothing to save.

No row lets one document see another: a row of layout "windows" lies within one document, and a row of layout "packed"
holds documents laid end to end, with their borders in `cu_seqlens`.

B rows of a part, T tokens of a row; a packed part is one row of B T tokens.
"""

import fnmatch
import hashlib
import math
import os
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from palimpsest.files import read_bytes
from palimpsest.text import ByteTokenizer, Tokenizer, load_tokenizer
from palimpsest.train.recipe import Data, NamedDataset, TextFiles

IGNORED = -100  # the label of padding


class Document(NamedTuple):
    name: str
    content: bytes


class Batch(NamedTuple):
    """One part of one process's share of a step."""

    tokens: Tensor  # [B, T], or packed [1, B T]
    labels: Tensor  # the same tokens, padding as -100; the model shifts them
    cu_seqlens: Tensor | None  # borders of a packed part
    weight: float  # this part's predictions over those of an average part of the step

    def to(self, device: torch.device) -> "Batch":
        """On a device; pinned tensors are copied there while the host goes on."""
        return self._map(lambda x: x.to(device, non_blocking=True))

    def pinned(self) -> "Batch":
        """In host memory that a GPU copies from by itself."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        tokens = change(self.tokens)
        labels = tokens if self.labels is self.tokens else change(self.labels)
        return Batch(tokens, labels, None if self.cu_seqlens is None else change(self.cu_seqlens), self.weight)


class Corpus:
    """The documents of one run, in tokens, and its held-out documents in bytes.

    Args:
        data: the recipe's part about data.
        seed: decides the order.

    Raises:
        ValueError: nothing to read, something that is not text, or too little of it.
    """

    def __init__(self, data: Data, seed: int):
        self.data, self.seed = data, seed
        self.tokenizer = load_tokenizer(data.tokenizer)
        train, self.heldout = read_documents(data.source)
        self.tokens, self.borders = tokenize(train, self.tokenizer)  # document i is tokens[borders[i]:borders[i + 1]]
        self.num_documents, self.num_bytes = len(train), sum(len(d.content) for d in train)
        self.tokens_per_byte = len(self.tokens) / max(self.num_bytes, 1)
        self.digest = _digest(self.tokens, self.borders, self.heldout)
        lengths, T = np.diff(self.borders), data.sequence_length
        windows = np.where(lengths > T, -(-(lengths - 1) // T) + 1, 1)  # one more than fits: the first may be cut short
        self.window_document = np.repeat(np.arange(len(lengths)), windows)
        self.window_in_document = np.concatenate([np.arange(n) for n in windows])
        self.rows_per_epoch = len(self.window_document) if data.layout == "windows" else len(self.tokens) // T
        if self.rows_per_epoch == 0:
            raise ValueError(
                f"the training documents hold {len(self.tokens)} tokens, less than one row of {T}; "
                "give more text or a smaller data.sequence_length"
            )
        self._orders: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def step(self, step: int, process: int = 0, num_processes: int = 1) -> tuple[list[Batch], int]:
        """The parts that this process computes in this step, counted from 0, and the step's tokens over all processes."""
        data = self.data
        self.refuse(num_processes)
        num_parts = data.accumulate * num_processes
        rows = [self._row(step * data.batch_size + i) for i in range(data.batch_size)]
        average = sum(_num_predictions(lengths) for _, lengths in rows) / num_parts
        size = data.batch_size // num_parts
        mine = [rows[(part * num_processes + process) * size :][:size] for part in range(data.accumulate)]
        return [self._collate(part, average) for part in mine], sum(len(tokens) for tokens, _ in rows)

    def refuse(self, num_processes: int) -> None:
        """Raises ValueError if a step's rows cannot be dealt to so many processes."""
        num_parts = self.data.accumulate * num_processes
        if self.data.batch_size % num_parts:
            raise ValueError(
                f"data.batch_size {self.data.batch_size} cannot be dealt to {num_processes} processes x data.accumulate "
                f"{self.data.accumulate}; give a multiple of {num_parts}"
            )

    def _row(self, index: int) -> tuple[np.ndarray, list[int]]:
        """Row `index` of the endless stream of epochs: at most T tokens, and the lengths of its documents."""
        epoch, row = divmod(index, self.rows_per_epoch)
        T = self.data.sequence_length
        if self.data.layout == "windows":
            window = self._order(epoch)[0][row]
            document = self.window_document[window]
            first, last = self.borders[document], self.borders[document + 1]
            phase = np.random.default_rng([self.seed, epoch, int(document)]).integers(T)  # cut elsewhere each epoch
            start = first + min(max(self.window_in_document[window] * T - phase, 0), max(last - first - T, 0))
            tokens = self.tokens[start : min(start + T, last)]
            return tokens, [len(tokens)]
        order, ends = self._order(epoch)
        start, pieces = row * T, []
        place = int(np.searchsorted(ends, start, side="right"))
        while sum(map(len, pieces)) < T:
            document = order[place]
            length = self.borders[document + 1] - self.borders[document]
            offset = max(start - (ends[place] - length), 0)
            begin = self.borders[document] + offset
            pieces.append(self.tokens[begin : begin + min(length - offset, T - sum(map(len, pieces)))])
            place += 1
        return np.concatenate(pieces), [len(p) for p in pieces]

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's order of windows, or of documents, and where each document ends when they are laid end to end."""
        if epoch not in self._orders:
            packed = self.data.layout == "packed"
            count = len(self.borders) - 1 if packed else self.rows_per_epoch
            order = np.random.default_rng([self.seed, epoch]).permutation(count)
            ends = np.cumsum(np.diff(self.borders)[order]) if packed else order
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1} | {epoch: (order, ends)}
        return self._orders[epoch]

    def _collate(self, rows: list[tuple[np.ndarray, list[int]]], average: float) -> Batch:
        weight = sum(_num_predictions(lengths) for _, lengths in rows) / max(average, 1)
        if self.data.layout == "packed":
            tokens = torch.from_numpy(np.concatenate([tokens for tokens, _ in rows]).astype(np.int64))[None]
            lengths = [length for _, lengths in rows for length in lengths]
            cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
            return Batch(tokens, tokens, cu_seqlens, weight)
        return Batch(*pad([tokens for tokens, _ in rows]), cu_seqlens=None, weight=weight)


def steps_ahead(
    corpus: Corpus,
    first: int,
    process: int,
    num_processes: int,
    *,
    pin: bool,
    change: Callable[[Batch], Batch] = lambda part: part,
) -> Generator[tuple[list[Batch], int], None, None]:
    """`corpus.step` from step `first` on, without end, each prepared while the one before is computed.

    Args:
        process, num_processes: of those that the rows are dealt to.
        pin: put tensors where a GPU copies from by itself.
        change: what is done to each part, on the host.
    """

    def prepare(step: int) -> tuple[list[Batch], int]:
        parts, num_tokens = corpus.step(step, process, num_processes)
        parts = [change(part) for part in parts]
        return [part.pinned() for part in parts] if pin else parts, num_tokens

    with ThreadPoolExecutor(1) as worker:
        following = worker.submit(prepare, first)
        for step in count(first + 1):
            now, following = following, worker.submit(prepare, step)
            yield now.result()


class Piece(NamedTuple):
    """A stretch of held-out text."""

    tokens: np.ndarray
    num_bytes: int


class Heldout:
    """The held-out text that is measured: pieces of whole characters, spread evenly over the documents.

    Args:
        documents: the held-out documents.
        tokenizer: of the model.
        piece_bytes: the length of a piece; the last of a document is shorter.
        max_bytes: about this much text is taken.

    Raises:
        ValueError: no document holds as much as two bytes.
    """

    def __init__(self, documents: Sequence[Document], tokenizer: Tokenizer, *, piece_bytes: int, max_bytes: int):
        whole = isinstance(tokenizer, ByteTokenizer)
        texts = [t for d in documents for t in _cut(d.content, piece_bytes, characters=not whole)]
        if not texts:
            raise ValueError(
                f"the {len(documents)} held-out documents hold no two bytes in a row, which an evaluation needs; name "
                "others by data.source.heldout_paths, or hold more out by data.source.heldout"
            )
        count = min(len(texts), math.ceil(max_bytes / piece_bytes))
        chosen = [texts[i] for i in sorted(set(np.linspace(0, len(texts) - 1, count).round().astype(int).tolist()))]
        self.content = b"".join(chosen)  # what the compressors are given
        self.pieces = [Piece(_encode(text, tokenizer), len(text)) for text in chosen]
        self.num_bytes = len(self.content)
        self.first_token_bits = math.log2(tokenizer.vocab_size)  # nothing precedes it: all are equally likely

    def batches(self, size: int) -> Iterator[tuple[Batch, int]]:
        """Padded batches with the number of their predictions; pieces of like length together."""
        pieces = sorted(self.pieces, key=lambda p: len(p.tokens))
        for i in range(0, len(pieces), size):
            rows = [p.tokens for p in pieces[i : i + size]]
            yield Batch(*pad(rows), cu_seqlens=None, weight=1.0), sum(len(r) - 1 for r in rows)


def pad(rows: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Rows of unequal length as (tokens, labels), padded on the right: no real token sees what comes after it."""
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.from_numpy(row.astype(np.int64))
    return tokens, tokens.masked_fill(torch.arange(tokens.shape[1]) >= lengths[:, None], IGNORED)


def read_documents(source: TextFiles | NamedDataset) -> tuple[list[Document], list[Document]]:
    """The documents to train on, and those held out; the same on every machine and in every order of listing."""
    if isinstance(source, NamedDataset):
        return tuple(_read_dataset(source, split) for split in (source.train_split, source.heldout_split))  # type: ignore[return-value]
    documents = _read_paths(source.paths, source)
    if source.heldout_paths:
        return documents, _read_paths(source.heldout_paths, source)
    if len(documents) == 1:
        (name, content), cut = documents[0], math.ceil(len(documents[0].content) * (1 - source.heldout))
        while 0 < cut < len(content) and content[cut] & 0xC0 == 0x80:  # not inside a character
            cut -= 1
        if not 0 < cut < len(content):
            raise ValueError(f"{name!r} holds {len(content)} bytes, too little to hold any out; give more text")
        return [Document(name, content[:cut])], [Document(name + " (end)", content[cut:])]
    # By the hash of the name, so that a file that comes or goes moves no other; at least one on either side.
    digests = {d.name: hashlib.sha256(os.fsencode(d.name)).digest() for d in documents}  # a name may be no UTF-8
    ranked = sorted(documents, key=lambda d: digests[d.name])
    limit = int(source.heldout * 2**64)
    count = sum(int.from_bytes(digest[:8], "big") < limit for digest in digests.values())
    count = min(max(count, 1), len(ranked) - 1)
    held = {d.name for d in ranked[:count]}
    return [d for d in documents if d.name not in held], [d for d in documents if d.name in held]


def tokenize(documents: Sequence[Document], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """All documents in one array, each closed by the end mark where the tokenizer has one, and their borders."""
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    rows = [np.concatenate([_encode(d.content, tokenizer), np.array(end, np.int64)]).astype(dtype) for d in documents]
    rows = [row for row in rows if len(row) > 1]  # a document of one token predicts nothing
    borders = np.concatenate([[0], np.cumsum([len(r) for r in rows])]).astype(np.int64)
    return (np.concatenate(rows) if rows else np.zeros(0, dtype)), borders


def _encode(content: bytes, tokenizer: Tokenizer) -> np.ndarray:
    if isinstance(tokenizer, ByteTokenizer):
        return np.frombuffer(content, np.uint8).astype(np.int64)
    return np.array(tokenizer.encode(content.decode("utf-8", errors="replace")), np.int64)


def _cut(content: bytes, size: int, *, characters: bool) -> list[bytes]:
    """Pieces of `size` bytes, a little less where a character would be cut; pieces of one byte are left out."""
    pieces, start = [], 0
    while start < len(content):
        end = min(start + size, len(content))
        while characters and end < len(content) and end > start + 1 and content[end] & 0xC0 == 0x80:
            end -= 1
        pieces.append(content[start:end])
        start = end
    return [p for p in pieces if len(p) > 1]


def _num_predictions(lengths: list[int]) -> int:
    return sum(length - 1 for length in lengths)


def _read_paths(paths: Sequence[str], source: TextFiles) -> list[Document]:
    documents = {}
    for path in map(Path, paths):
        if path.is_dir():
            files = [(f.relative_to(path).as_posix(), f) for f in _files_below(path)]
            files = [
                (name, f) for name, f in files if _named(name, source.include) and not _named(name, source.exclude)
            ]
            if not files:
                raise ValueError(
                    f"folder {str(path)!r} holds no file that data.source.include {' '.join(source.include)!r} takes; "
                    "give a folder with text files"
                )
        elif path.exists():
            files = [(path.name, path)]
        else:
            raise ValueError(f"data file {str(path)!r} does not exist; give a text file or a folder of them")
        for name, file in files:
            name = name if len(paths) == 1 else f"{path.name}/{name}"
            documents[name] = Document(name, _read_text(file))
    kept = [d for d in documents.values() if d.content]
    if not kept:
        raise ValueError(f"every data file in {', '.join(map(repr, paths))} is empty; give text to train on")
    return sorted(kept)


def _files_below(folder: Path) -> list[Path]:
    def refuse(error: OSError):
        raise ValueError(f"data folder {error.filename!r} cannot be read: {error.strerror}; change its permissions")

    files = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        files += [Path(parent, name) for name in sorted(names) if not name.startswith(".")]
    return files


def _read_text(file: Path) -> bytes:
    try:
        content = read_bytes(file, limit=_memory())
    except OSError as error:
        raise ValueError(
            f"data file {str(file)!r} cannot be read: {error.strerror}; leave it out by data.source.exclude"
        ) from error
    except ValueError as error:  # a pipe or a device, which may never end, or more than memory holds
        raise ValueError(f"data file {error}; leave it out by data.source.exclude") from error
    if b"\0" in content:
        raise ValueError(f"data file {str(file)!r} is binary, not text; leave it out by data.source.exclude")
    return content


def _memory() -> int | None:
    """Bytes of this machine's memory; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _named(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(name, p) or fnmatch.fnmatch(name.rpartition("/")[2], p) for p in patterns)


def _read_dataset(source: NamedDataset, split: str) -> list[Document]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError("named data sets need datasets: pip install palimpsest-kda[data]") from error
    try:
        rows = datasets.load_dataset(source.name, source.config, split=split)
    except Exception as error:  # the library has no common error for an unknown name, an unknown split and no network
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"data set {source.name!r}, split {split!r}, does not load ({first}); check the name, the split and the "
            "network, or train on local files with TextFiles"
        ) from error
    if source.column not in rows.column_names:
        raise ValueError(
            f"data set {source.name!r} has no column {source.column!r}; data.source.column is one of "
            f"{', '.join(rows.column_names)}"
        )
    starts = re.compile(source.document_start) if source.document_start else None
    texts: list[list[str]] = []
    for row in rows.select_columns([source.column]):
        text = dict(row)[source.column] or ""
        if starts is None or not texts or starts.match(text):
            texts.append([])
        texts[-1].append(text)
    documents = [Document(f"{split}/{i}", "".join(t).encode()) for i, t in enumerate(texts)]
    documents = [d for d in documents if d.content.strip()]
    if not documents:
        raise ValueError(f"data set {source.name!r}, split {split!r}, holds no text in column {source.column!r}")
    return documents


def _digest(tokens: np.ndarray, borders: np.ndarray, heldout: Sequence[Document]) -> str:
    digest = hashlib.sha256(tokens.tobytes() + borders.tobytes())
    for name, content in heldout:
        digest.update(b"\0" + os.fsencode(name) + f"\0{len(content)}\0".encode() + content)
    return digest.hexdigest()

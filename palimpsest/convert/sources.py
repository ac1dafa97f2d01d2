"""Reading a checkpoint tensor by tensor, whatever holds it; nothing is loaded that is not asked for."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from palimpsest.files import read_object
from palimpsest.models.kimi_linear.checkpoint import CONFIG, INDEX, WHOLE, read_config
from palimpsest.models.kimi_linear.checkpoint_place import checkpoint_of
from palimpsest.models.kimi_linear.config import KimiLinearConfig

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32,
}  # fmt: skip


class Entry(NamedTuple):
    """Where a tensor lies."""

    file: Path
    start: int  # byte in the file
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * int(torch.Size(self.shape).numel())


class Source:
    """A checkpoint to read from: `config`, and `entries` by name."""

    config: KimiLinearConfig
    entries: dict[str, Entry]

    def __init__(self, path: str | os.PathLike):
        self.path = checkpoint_of(path)
        self._opened: tuple[Path, FileIO] | None = None  # the file that was read last
        if self.path.suffix == ".gguf":
            from palimpsest.convert.gguf_files import read_header

            self.config, self.entries = read_header(self.path)
        else:
            self.config = read_config(self.path)
            self.entries = _entries(self.path)
            if self.config.tie_word_embeddings and EMBEDDING in self.entries:
                self.entries.setdefault(HEAD, self.entries[EMBEDDING])  # the one matrix, under both names

    def close(self) -> None:
        """Close the file that was read last."""
        if self._opened is not None:
            self._opened[1].close()
            self._opened = None

    def read(self, name: str, index: int | None = None, rows: tuple[int, int] | None = None) -> Tensor:
        """A tensor, or index `index` of its first dimension, or `rows` of what is left. The bytes asked for are read, no more."""
        entry, shape, start = self._place(name, index, rows)
        count = int(torch.Size(shape).numel())
        if not count:
            return torch.empty(shape, dtype=entry.dtype)
        content = bytearray(count * entry.dtype.itemsize)
        self._fill(memoryview(content), entry, start, name)
        return torch.frombuffer(content, dtype=entry.dtype).view(shape)

    def pieces(
        self, name: str, index: int | None = None, rows: tuple[int, int] | None = None, size: int = 4 << 20
    ) -> Iterator[Callable[[memoryview], int]]:
        """The bytes of what `read` returns, `size` at a time: functions that fill a buffer and say how far."""
        entry, shape, start = self._place(name, index, rows)
        stop = start + entry.dtype.itemsize * int(torch.Size(shape).numel())
        for first in range(start, stop, size):
            count = min(size, stop - first)
            yield lambda buffer, first=first, count=count: self._fill(buffer[:count], entry, first, name)

    def _place(self, name: str, index: int | None, rows: tuple[int, int] | None) -> tuple[Entry, tuple[int, ...], int]:
        entry = self.entries[name]
        shape, start = entry.shape, entry.start
        for first, last in ([] if index is None else [(index, None)]) + ([] if rows is None else [rows]):
            step = entry.dtype.itemsize * int(torch.Size(shape[1:]).numel())
            start += first * step
            shape = shape[1:] if last is None else (last - first, *shape[1:])
        return entry, shape, start

    def _fill(self, buffer: memoryview, entry: Entry, start: int, name: str) -> int:
        if self._opened is None or self._opened[0] != entry.file:
            self.close()
            self._opened = entry.file, open(entry.file, "rb", buffering=0)  # noqa: SIM115 - until another file is asked for
        file, count = self._opened[1], 0
        file.seek(start)
        while count < len(buffer):
            if not (got := file.readinto(buffer[count:])):
                raise ValueError(f"{str(entry.file)!r} is cut short in tensor {name!r}; fetch it again")
            count += got
        return count


def _entries(folder: Path) -> dict[str, Entry]:
    if (folder / INDEX).is_file():
        placed = read_object(folder / INDEX).get("weight_map")
        if not isinstance(placed, dict):
            raise ValueError(f"{str(folder / INDEX)!r} has no weight_map; fetch it again")
        files = sorted({str(name) for name in placed.values()})
        if strange := [name for name in files if Path(name).name != name]:
            raise ValueError(f"{str(folder / INDEX)!r} names {strange[0]!r}, which is outside of the folder")
    else:
        files = [WHOLE]
    found: dict[str, Entry] = {}
    for name in files:
        found |= read_safetensors_header(folder / name)
    return found


def read_safetensors_header(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file, from its header alone.

    Raises:
        ValueError: it is missing, cut short, or none.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size, 100_000_000):
                raise ValueError("its header is longer than the file")
            header: dict[str, Any] = json.loads(file.read(length))
        entries = {}
        for name, said in header.items():
            if name != "__metadata__":
                first, last = said["data_offsets"]
                entry = Entry(path, 8 + length + first, tuple(said["shape"]), DTYPES[said["dtype"]])
                if entry.nbytes != last - first or 8 + length + last > size:
                    raise ValueError(f"tensor {name!r} does not fit in it")
                entries[name] = entry
        return entries
    except FileNotFoundError:
        raise ValueError(
            f"{str(path)!r} is missing; a checkpoint has {CONFIG} and {WHOLE}, or shards and {INDEX}"
        ) from None
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(path)!r} is no whole safetensors file: {error}") from error

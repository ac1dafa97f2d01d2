"""What each process holds of a model, as rows of whole tensors; and safetensors files that each writes its rows of.

Everything is spread along the first dimension alone: experts to processes, rows to shards. A part of a tensor is therefore
one stretch of bytes of it, and a file that is whole on disk need never be whole in any memory.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from palimpsest.models.kimi_linear.official_names import official_tensors, place_of
from palimpsest.parallel.dealt_experts import DealtExperts
from palimpsest.parallel.spread import Spread

NAMES = {  # as safetensors calls them
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
}  # fmt: skip


class Piece(NamedTuple):
    """What this process holds of one tensor of a model's state.

    Attributes:
        held: this process's rows, in its own memory.
        shape: of the whole tensor.
        first: the whole's row that `held` begins with.
        copy: which of the processes that hold the same rows this one is, and their number.
    """

    held: Tensor
    shape: tuple[int, ...]
    first: int
    copy: tuple[int, int]

    def of(self, other: Tensor) -> Piece:
        """The same rows of another tensor that lies beside this one, such as a momentum."""
        return self._replace(held=_local(other))


def pieces(model: nn.Module, spread: Spread) -> dict[str, Piece]:
    """What this process holds of each tensor in the model's state dict, by name."""
    dealt = {name: module for name, module in model.named_modules() if isinstance(module, DealtExperts)}
    found = {}
    for name, tensor in model.state_dict().items():
        experts = dealt.get(name.rpartition(".")[0])
        first, rows = (0, tensor.shape[0] if tensor.ndim else 0)
        if experts is not None:
            first, rows = experts.first, experts.num_experts
        shape = (rows, *tensor.shape[1:]) if tensor.ndim else ()
        if isinstance(tensor, DTensor):
            mesh = tensor.device_mesh
            first += _first_row(tensor.shape[0], mesh.get_local_rank(mesh.ndim - 1), mesh.size(mesh.ndim - 1))
            copy = (mesh.get_local_rank(0), mesh.size(0)) if mesh.ndim > 1 else (0, 1)
        elif spread.mesh is None:
            copy = (0, 1)
        else:
            mesh = spread.expert_mesh["copy"] if experts is not None and spread.expert_mesh else None
            copy = (mesh.get_local_rank(), mesh.size()) if mesh else (spread.mesh.get_rank(), spread.mesh.size())
        found[name] = Piece(_local(tensor), shape, first, copy)
    return found


@dataclass(frozen=True)
class Stretch:
    """Rows of one tensor of a file.

    Attributes:
        name: in the file.
        dtype, shape: of the whole tensor.
        first: the whole's row that `held` begins with.
        held: the rows; None: this process writes none of it.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    first: int
    held: Tensor | None

    @property
    def nbytes(self) -> int:
        """Of the whole tensor."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta").nbytes


def official_stretches(held: Mapping[str, Piece]) -> Iterator[Stretch]:
    """Pieces of a model under the official names, in the official order; each row is given to one process alone."""
    whole = {name: torch.empty(p.shape, dtype=p.held.dtype, device="meta") for name, p in held.items()}
    for i, (official, like) in enumerate(official_tensors(whole)):
        name, expert = place_of(official)
        piece, rows, first = held[name], None, 0
        if i % piece.copy[1] == piece.copy[0]:
            if expert is None:
                rows, first = piece.held, piece.first
            elif piece.first <= expert < piece.first + len(piece.held):
                rows = piece.held[expert - piece.first]
        yield Stretch(official, like.dtype, tuple(like.shape), first, rows)


def split(stretches: Sequence[Stretch], max_bytes: int) -> list[list[Stretch]]:
    """The stretches of each of several files, none longer than max_bytes unless one tensor is."""
    files: list[list[Stretch]] = [[]]
    size = 0
    for stretch in stretches:
        if files[-1] and size + stretch.nbytes > max_bytes:
            files.append([])
            size = 0
        files[-1].append(stretch)
        size += stretch.nbytes
    return files


def create(file: Path, stretches: Sequence[Stretch], metadata: Mapping[str, str]) -> None:
    """A safetensors file of the right length, its header written and its tensors still 0. One process calls this."""
    header, length = _header(stretches, metadata)
    with open(file, "wb") as opened:
        opened.write(header)
        opened.truncate(len(header) + length)


def write_rows(file: Path, stretches: Sequence[Stretch], metadata: Mapping[str, str]) -> None:
    """This process's rows into a file that `create` made with the same stretches and metadata of the same lengths.

    Raises:
        OSError: the file is not there or of another length: this process does not see the folder that the first one does;
            or it cannot be written.
    """
    header, length = _header(stretches, metadata)
    if not file.exists() or file.stat().st_size != len(header) + length:
        raise OSError(f"{str(file)!r} is not what another process made there; give a folder that all hosts share")
    descriptor = os.open(file, os.O_WRONLY)
    try:
        place = len(header)
        for stretch in _aligned(stretches):
            if stretch.held is not None and stretch.held.numel():
                row = stretch.nbytes // (stretch.shape[0] if stretch.shape else 1)
                _write_at(descriptor, stretch.held, place + stretch.first * row)
            place += stretch.nbytes
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_in_header(file: Path, old: str, new: str) -> None:
    """One text of a header for another of the same length, such as a digest that is known once all is written."""
    assert len(old) == len(new)
    with open(file, "r+b") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header = opened.read(length)
        assert header.count(old.encode()) == 1
        opened.seek(8)
        opened.write(header.replace(old.encode(), new.encode()))
        opened.flush()
        os.fsync(opened.fileno())


def read_rows(opened: Any, name: str, first: int, count: int) -> Tensor:
    """Rows of a tensor in a file that safetensors' safe_open opened; no other is read."""
    part = opened.get_slice(name)
    return part[first : first + count] if part.get_shape() else opened.get_tensor(name)


def _header(stretches: Sequence[Stretch], metadata: Mapping[str, str]) -> tuple[bytes, int]:
    head: dict[str, Any] = {"__metadata__": dict(metadata)}
    place = 0
    for s in _aligned(stretches):
        head[s.name] = {"dtype": NAMES[s.dtype], "shape": list(s.shape), "data_offsets": [place, place + s.nbytes]}
        place += s.nbytes
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, place


def _aligned(stretches: Sequence[Stretch]) -> list[Stretch]:
    """The widest numbers first, so that each lies at a multiple of its size."""
    return sorted(stretches, key=lambda s: -s.dtype.itemsize)


def _write_at(descriptor: int, tensor: Tensor, place: int) -> None:
    content: Any = memoryview(cast(Any, tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    while content:
        written = os.pwrite(descriptor, content, place)
        content, place = content[written:], place + written


def _first_row(rows: int, part: int, parts: int) -> int:
    return min(part * -(-rows // parts), rows)


def _local(x: Tensor) -> Tensor:
    return x.to_local().detach() if isinstance(x, DTensor) else x.detach()

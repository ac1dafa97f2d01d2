"""convert(): one layout to another, shard by shard. Memory holds some pieces of 4 MB; a kill loses one shard.

Shards are written whole or not at all, and config.json and the index last: a half-converted folder is no checkpoint, and
the same call goes on where it was cut.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from palimpsest.convert.layouts import Made, Part, check_config, official_from, tensors_of
from palimpsest.convert.pipe import PIECE, Pipe, pipe
from palimpsest.convert.sources import DTYPES, Source, read_safetensors_header
from palimpsest.files import replacing, write_json
from palimpsest.models.kimi_linear.checkpoint import CONFIG, INDEX, WHOLE
from palimpsest.text.tiktoken_files import TIKTOKEN, tokenizer_json_of

REPORT = "convert.json"
NAMES = {dtype: name for name, dtype in DTYPES.items()}
BESIDE = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "tiktoken.model", "tokenization_kimi.py", "palimpsest.json",
)  # fmt: skip


@dataclass(frozen=True)
class Moved:
    """A tensor that was written.

    Attributes:
        to, shape, dtype: as written.
        source: the tensors it was made of; the first and the count where they are many.
        sha256: of its bytes as written.
        file: which file holds it.
    """

    to: str
    source: str
    shape: tuple[int, ...]
    dtype: str
    sha256: str
    file: str


@dataclass(frozen=True)
class Report:
    """What convert() did.

    Attributes:
        layout_from, layout_to: the layouts.
        tensors: every tensor that was written.
        copied: files that went along as they are.
        remarks: what could not be carried over, in sentences.
    """

    layout_from: str
    layout_to: str
    tensors: tuple[Moved, ...]
    copied: tuple[str, ...]
    remarks: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(torch.Size(t.shape).numel() * DTYPES[t.dtype].itemsize for t in self.tensors)


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    to: str,
    *,
    shard_bytes: int = 2 * 10**9,
    progress: Callable[[float, str], None] = lambda share, file: None,
) -> Report:
    """Write a checkpoint in another layout.

    Args:
        source: a folder in the official, native or FLA layout, or a .gguf file.
        target: a folder that holds no model, or a new .gguf file; a folder that an earlier call was cut short in goes on.
        to: "official", "native", "fla" or "gguf".
        shard_bytes: safetensors files beyond this are split.
        progress: called with the share that is done and the file that was written.

    Returns:
        The report, also in convert.json of the folder, or beside the .gguf file.

    Raises:
        ValueError: the source is not a whole checkpoint of this model, or the target cannot be written.
    """
    with closing(Source(source)) as opened:
        return _convert(opened, Path(target), to, shard_bytes, progress)


def _convert(opened: Source, target: Path, to: str, shard_bytes: int, progress: Callable[[float, str], None]) -> Report:
    from palimpsest.convert.validate import detect, refuse_unless_whole

    layout = detect(opened)
    refuse_unless_whole(opened, layout)
    check_config(opened.config, to)
    if target.resolve() == opened.path.resolve():
        raise ValueError(f"source and target are both {str(target)!r}; convert to another place")
    back = official_from(opened.config, layout)
    if layout == "fla":
        _refuse_biases(opened)
    plan = [_planned(opened, made, back) for made in tensors_of(opened.config, to)]
    if to == "gguf":
        from palimpsest.convert.gguf_files import write

        if target.suffix != ".gguf" or target.exists():
            problem = "exists already" if target.exists() else "is no .gguf"
            raise ValueError(f"target {str(target)!r} {problem}; name a new file such as model.gguf")
        moved, remarks = write(opened, plan, target, progress)
        report = Report(layout, to, moved, (), remarks)
        write_json(target.with_suffix(".convert.json"), asdict(report))
        return report

    if (target / CONFIG).exists():
        raise ValueError(f"target {str(target)!r} holds a model already; name a folder that does not")
    target.mkdir(parents=True, exist_ok=True)
    shards = _shards(plan, shard_bytes)
    files = (
        [WHOLE]
        if len(shards) == 1
        else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    )
    moved, total, done = [], sum(p.nbytes for p in plan), 0
    for file, shard in zip(files, shards):
        moved += _write_shard(opened, shard, target / file)
        done += sum(p.nbytes for p in shard)
        progress(done / max(total, 1), file)
    copied = [name for name in BESIDE if opened.path.is_dir() and (opened.path / name).is_file()]
    for name in copied:
        shutil.copyfile(opened.path / name, target / name)
    if (opened.path / TIKTOKEN).is_file() and not (opened.path / "tokenizer.json").is_file():
        (target / "tokenizer.json").write_bytes(tokenizer_json_of(opened.path))  # which every other tool reads
    report = Report(layout, to, tuple(moved), tuple(copied))
    write_json(target / REPORT, asdict(report))
    if len(shards) > 1:
        write_json(target / INDEX, {"metadata": {"total_size": total}, "weight_map": {m.to: m.file for m in moved}})
    kept = json.loads((opened.path / CONFIG).read_text()) if opened.path.is_dir() else opened.config.to_dict()
    write_json(target / CONFIG, kept)
    return report


@dataclass(frozen=True)
class Planned:
    """A tensor to be written: its parts in the source, and the dtype that all of them have."""

    made: Made
    parts: tuple[Part, ...]  # in the source's layout
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * int(torch.Size(self.made.shape).numel())

    @property
    def source(self) -> str:
        """The tensors it is made of, in words."""
        names = list(dict.fromkeys(part.source for part in self.parts if part.source))
        return "" if not names else names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _planned(opened: Source, made: Made, back: dict[str, Made]) -> Planned:
    parts, dtypes = [], set()
    for part in made.parts:
        if not part.source:
            parts.append(part)
            continue
        inner = back[part.source].parts
        if len(inner) > 1 and (part.rows or part.change):  # a slice of what the source keeps in pieces
            parts.append(Part(part.source, part.index, part.rows, part.change))  # read whole, below
        else:
            for one in inner:
                first = 0 if one.rows is None else one.rows[0]
                rows = one.rows if part.rows is None else (first + part.rows[0], first + part.rows[1])
                parts.append(Part(one.source, one.index, rows, _both(one.change, part.change)))
        dtypes |= {opened.entries[one.source].dtype for one in inner}
    if len(dtypes) > 1:
        raise ValueError(
            f"the tensors of {made.name!r} have several dtypes, {', '.join(map(str, dtypes))}; save them in one"
        )
    changed = any(part.change is not None and part.change.__name__ in ("_rate", "_log_rate", "both") for part in parts)
    return Planned(made, tuple(parts), torch.float32 if changed or not dtypes else dtypes.pop())


def _both(first, second):
    if first is None or second is None:
        return first or second

    def both(x: Tensor) -> Tensor:
        return second(first(x))

    return both


def send(opened: Source, planned: Planned, dtype: torch.dtype, into: Pipe, digest: Any) -> None:
    """The parts of a tensor in order: bytes as they lie where nothing is done to them, else one part at a time."""
    for part in planned.parts:
        entry = opened.entries.get(part.source)
        if entry is not None and part.change is None and entry.dtype == dtype:
            into.fill(opened.pieces(part.source, part.index, part.rows, PIECE), digest)
        else:
            into.put(raw(_part(opened, planned, part).to(dtype).contiguous()), digest)


def _part(opened: Source, planned: Planned, part: Part) -> Tensor:
    if not part.source:
        return torch.zeros(planned.made.shape, dtype=planned.dtype)
    if part.source in opened.entries:
        x = opened.read(part.source, part.index, part.rows)
    else:  # an official tensor that the source keeps in pieces
        x = _assembled(opened, part.source)
        x = x if part.rows is None else x[part.rows[0] : part.rows[1]]
    return x if part.change is None else part.change(x)


def _assembled(opened: Source, official: str) -> Tensor:
    from palimpsest.convert.validate import detect

    made = official_from(opened.config, detect(opened))[official]
    pieces = [opened.read(p.source, p.index, p.rows) for p in made.parts]
    pieces = [x if p.change is None else p.change(x) for x, p in zip(pieces, made.parts)]
    return torch.cat([x.reshape(-1, made.shape[-1]) for x in pieces]).view(made.shape)


def raw(x: Tensor) -> memoryview:
    """The bytes of a contiguous tensor."""
    return memoryview(x.flatten().view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]


def _shards(plan: list[Planned], limit: int) -> list[list[Planned]]:
    shards: list[list[Planned]] = [[]]
    size = 0
    for planned in plan:
        if shards[-1] and size + planned.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(planned)
        size += planned.nbytes
    return shards


def _write_shard(opened: Source, shard: list[Planned], file: Path) -> list[Moved]:
    header, start = {}, 0
    for planned in shard:
        stop = start + planned.nbytes
        header[planned.made.name] = {
            "dtype": NAMES[planned.dtype], "shape": list(planned.made.shape), "data_offsets": [start, stop],
        }  # fmt: skip
        start = stop
    plan = hashlib.sha256(json.dumps([header, [p.source for p in shard], _identity(opened)]).encode()).hexdigest()
    digests = _finished(file, plan)
    if digests is None:
        hashes = {planned.made.name: hashlib.sha256() for planned in shard}
        with replacing(file) as partial, open(partial, "wb", buffering=0) as out, pipe(out) as into:
            text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
            text += b" " * (-len(text) % 8)
            into.put(struct.pack("<Q", len(text)) + text)
            for planned in shard:
                send(opened, planned, planned.dtype, into, hashes[planned.made.name])
        digests = {name: digest.hexdigest() for name, digest in hashes.items()}
        write_json(_notes(file), {"plan": plan, "sha256": digests})
    return [Moved(p.made.name, p.source, p.made.shape, NAMES[p.dtype], digests[p.made.name], file.name) for p in shard]


def _notes(file: Path) -> Path:
    return file.with_name(f".{file.name}.converted.json")


def _finished(file: Path, plan: str) -> dict[str, str] | None:
    """The digests of a shard that an earlier call wrote by the same plan."""
    try:
        notes = json.loads(_notes(file).read_text())
        return notes["sha256"] if notes["plan"] == plan and read_safetensors_header(file) else None
    except (OSError, ValueError, KeyError):
        return None


def _identity(opened: Source) -> list:
    files = sorted({entry.file for entry in opened.entries.values()})
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def _refuse_biases(opened: Source) -> None:
    for name in opened.entries:
        if name.endswith("g_proj.1.bias") and bool(opened.read(name).any()):
            raise ValueError(f"{name!r} is not zero; Kimi Linear has no such bias, so this is a model of FLA's own")

"""Files that are whole or absent whatever stops their writer, locks that end with their holder, reading that cannot hang.

What is written lies in a folder beside its place, is forced to the disk, and is then renamed; last, the list of names is
forced to the disk. After a kill, a full disk or a power cut the name gives the old content or the new.

    .NAME.5f0c2b7e91d4a386.partial/NAME    being written; the next writer of NAME removes what a killed one left
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: no locks there, and what a killed writer left stays
    fcntl = None

PARTIAL = re.compile(r"\.(.+)\.[0-9a-f]{16}\.partial")  # folders of files that are being written


class LockedError(ValueError):
    """Somebody else is at work in this folder."""


@contextlib.contextmanager
def replacing(file: str | os.PathLike) -> Iterator[Path]:
    """A path to write to; at the end of the block what is there becomes `file`, and an error leaves `file` as it was.

    Args:
        file: its folder must exist. Its mode is what the process's umask gives to new files.

    Raises:
        OSError: the file cannot be written, for example because the disk is full.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with replacing(Path(folder, "a.txt")) as partial:
    ...         _ = partial.write_text("whole")
    ...     [path.name for path in Path(folder).iterdir()], Path(folder, "a.txt").read_text()
    (['a.txt'], 'whole')
    """
    file = Path(file)
    remove_partials(file.parent, file.name)
    partial, holder = _new_partial(file)
    try:
        yield partial / file.name
        put(partial / file.name, file)
    finally:
        if holder is not None:
            os.close(holder)
        shutil.rmtree(partial, ignore_errors=True)


def write_bytes(file: str | os.PathLike, content: bytes) -> None:
    """Writes a file whole or not at all."""
    with replacing(file) as partial:
        partial.write_bytes(content)


def write_text(file: str | os.PathLike, text: str) -> None:
    """Writes a text file, UTF-8, whole or not at all."""
    write_bytes(file, text.encode("utf-8"))


def write_json(file: str | os.PathLike, value: Any, *, indent: int | None = 2) -> None:
    """Writes a JSON file whole or not at all."""
    write_text(file, json.dumps(value, indent=indent) + "\n")


def put(whole: str | os.PathLike, place: str | os.PathLike) -> None:
    """Renames a finished file or folder to its place, forcing first its content and then the new name to the disk."""
    for file in [whole] if os.path.isfile(whole) else Path(whole).rglob("*"):
        give_usual_mode(file)
    flush(whole)
    os.replace(whole, place)
    flush_list(Path(place).parent)


def give_usual_mode(file: str | os.PathLike) -> None:
    """Opens a file to those whom the umask lets read new files: some writers, safetensors too, leave it to its owner."""
    if os.path.isfile(file) and stat.S_IMODE(os.stat(file).st_mode) == 0o600:
        mask = os.umask(0o077)
        os.umask(mask)
        os.chmod(file, 0o666 & ~mask)


def flush(path: str | os.PathLike) -> None:
    """Forces a file to the disk, or everything below a folder and the folders' own lists."""
    if not os.path.isdir(path):
        _sync(path)
        return
    for parent, _, names in os.walk(path):
        for name in names:
            _sync(os.path.join(parent, name))
        flush_list(parent)


def flush_list(folder: str | os.PathLike) -> None:
    """Forces a folder's list of names to the disk: a rename is safe only then."""
    if os.name != "nt":  # folders cannot be opened there, and renames are journaled
        _sync(folder)


def remove_partials(folder: str | os.PathLike, name: str | None = None) -> None:
    """Removes what killed writers left in a folder, of one file or of all; what a living one writes is left alone."""
    if fcntl is None:
        return
    with contextlib.suppress(OSError):  # a folder that cannot be listed has its own error when it is written to
        for entry in list(os.scandir(folder)):
            written = PARTIAL.fullmatch(entry.name)
            if written and name in (None, written[1]) and entry.is_dir(follow_symlinks=False):
                _remove_if_dead(entry.path)


@contextlib.contextmanager
def locked(folder: str | os.PathLike, busy: str) -> Iterator[None]:
    """Holds a folder for this block alone. The system ends the lock with its holder, so that none outlives a kill.

    Args:
        folder: exists.
        busy: the sentence of the error if somebody else holds it.

    Raises:
        LockedError: another process, or another block of this one, holds it.
    """
    if fcntl is None:
        yield
        return
    holder = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(holder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LockedError(busy) from None
        except OSError:  # a file system without locks: as safe as it was
            pass
        yield
    finally:
        os.close(holder)


def read_bytes(file: str | os.PathLike, *, limit: int | None = None) -> bytes:
    """The content of a regular file. Pipes and devices, which may never end, are refused unread.

    Args:
        file: a path; links are followed.
        limit: of the size in bytes.

    Raises:
        ValueError: it is no regular file, or it is longer than limit.
        OSError: it cannot be read.
    """
    descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # a pipe's open would wait for its writer
    with open(descriptor, "rb") as opened:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode):
            raise ValueError(f"{os.fspath(file)!r} is {_kind(about.st_mode)}, not a regular file")
        if limit is not None and about.st_size > limit:
            raise ValueError(f"{os.fspath(file)!r} is longer than {limit} bytes")
        return opened.read()


def read_json(file: str | os.PathLike, *, limit: int = 1 << 28) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: it cannot be read, is no regular file, or is not JSON; the sentence names the file.
    """
    try:
        return json.loads(read_bytes(file, limit=limit).decode("utf-8"))
    except OSError as error:
        raise ValueError(f"{os.fspath(file)!r} cannot be read: {error.strerror}") from error
    except RecursionError as error:
        raise ValueError(f"{os.fspath(file)!r} is nested too deeply to be read") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{os.fspath(file)!r} is not JSON ({error})") from error


def read_object(file: str | os.PathLike, *, limit: int = 1 << 28) -> dict[str, Any]:
    """What a JSON file holds, which must be an object; raises as `read_json`."""
    value = read_json(file, limit=limit)
    if not isinstance(value, dict):
        raise ValueError(f"{os.fspath(file)!r} holds a JSON {type(value).__name__}; expected an object, {{...}}")
    return value


def _new_partial(file: Path) -> tuple[Path, int | None]:
    """A new folder beside `file`, and what holds it against those who clear up: a lock, which ends with its holder."""
    while True:
        partial = file.with_name(f".{file.name}.{secrets.token_hex(8)}.partial")
        os.mkdir(partial)
        if fcntl is None:
            return partial, None
        try:
            holder = os.open(partial, os.O_RDONLY)
        except FileNotFoundError:  # it was cleared up before it was held
            continue
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(holder, fcntl.LOCK_EX)
        if partial.exists():
            return partial, holder
        os.close(holder)


def _remove_if_dead(partial: str) -> None:
    assert fcntl is not None
    with contextlib.suppress(OSError):
        holder = os.open(partial, os.O_RDONLY)
        try:
            fcntl.flock(holder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(partial, ignore_errors=True)
        finally:
            os.close(holder)


def _sync(path: str | os.PathLike) -> None:
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _kind(mode: int) -> str:
    kinds = {stat.S_IFIFO: "a pipe", stat.S_IFDIR: "a folder", stat.S_IFSOCK: "a socket"}
    kinds |= {stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
    return kinds.get(stat.S_IFMT(mode), "something else")

"""Bytes on their way into a file: read here, digested and written in threads beside, so that a disk never waits for a digest.

Memory holds a few pieces, however large the tensors are. What was written goes to the disk on the way, not all at the end.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, BinaryIO

PIECE = 4 << 20  # bytes read at once
PIECES = 6  # on their way at once
SYNC = 64 << 20  # bytes between two calls to the disk
Fill = Callable[[memoryview], int]  # fills a buffer and says with how many bytes


class Pipe:
    """Into one file, in order. See `pipe`.

    Args:
        out: the file, open for writing.
    """

    def __init__(self, out: BinaryIO):
        self._out = out
        self._digester, self._writer, self._syncer = (ThreadPoolExecutor(1) for _ in range(3))
        self._pending: deque[tuple[list[Future], bytearray | None]] = deque()
        self._free: list[bytearray] = []
        self._made = 0
        self._sync: Future | None = None
        self._unsynced = 0

    def put(self, content: Any, digest: Any = None) -> None:
        """Send bytes along, which nobody may change afterwards.

        Args:
            content: the bytes.
            digest: a hash that hears them too.
        """
        self._send(memoryview(content).cast("B"), digest, None)

    def fill(self, reads: Iterable[Fill], digest: Any) -> None:
        """Have pieces filled and send them along."""
        for read in reads:
            if not self._free and self._made < PIECES:
                self._free.append(bytearray(PIECE))
                self._made += 1
            while not self._free:
                self._settle()
            buffer = self._free.pop()
            count = read(memoryview(buffer))
            self._send(memoryview(buffer)[:count], digest, buffer)

    def finish(self) -> None:
        """Wait until everything is written; raises what went wrong."""
        while self._pending:
            self._settle()
        if self._sync is not None:
            self._sync.result()

    def close(self) -> None:
        """End the threads; what is still under way is waited for, and no longer heard."""
        for executor in (self._digester, self._writer, self._syncer):
            executor.shutdown(wait=True, cancel_futures=True)

    def _send(self, content: memoryview, digest: Any, buffer: bytearray | None) -> None:
        under_way = [self._writer.submit(self._write, content)]
        if digest is not None:
            under_way.append(self._digester.submit(digest.update, content))
        self._pending.append((under_way, buffer))
        self._unsynced += len(content)
        if self._unsynced >= SYNC and (self._sync is None or self._sync.done()):
            self._unsynced, self._sync = 0, self._syncer.submit(self._to_disk)
        while len(self._pending) > PIECES:
            self._settle()

    def _settle(self) -> None:
        under_way, buffer = self._pending.popleft()
        for future in under_way:
            future.result()
        if buffer is not None:
            self._free.append(buffer)

    def _write(self, content: memoryview) -> None:
        written = 0
        while written < len(content):
            written += self._out.write(content[written:])

    def _to_disk(self) -> None:
        with contextlib.suppress(OSError, AttributeError):  # it is asked for again when the file is whole
            (os.fdatasync if hasattr(os, "fdatasync") else os.fsync)(self._out.fileno())


@contextmanager
def pipe(out: BinaryIO) -> Iterator[Pipe]:
    """A pipe into a file that is open; at the end everything is written, or what went wrong is raised.

    >>> import hashlib, io
    >>> out, digest = io.BytesIO(), hashlib.sha256()
    >>> with pipe(out) as into:
    ...     into.put(b"one ", digest)
    ...     into.put(b"two", digest)
    >>> out.getvalue(), digest.hexdigest() == hashlib.sha256(b"one two").hexdigest()
    (b'one two', True)
    """
    made = Pipe(out)
    try:
        yield made
        made.finish()
    finally:
        made.close()

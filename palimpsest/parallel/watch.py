"""A process that dies ends the others within a minute, with a sentence, whatever they wait for.

A collective waits for as long as its backend lets it, ten minutes with NCCL. So each process counts in a store that the first
one keeps, from a thread of its own; the first one reads the counts and says who is gone, and the others read what it says.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch.distributed as dist

EVERY, SILENT = 5.0, 40.0  # seconds: between counts; without a count, until a process is taken for dead
GONE = "gone"


def end_process(sentence: str) -> None:
    """Says the sentence and ends this process at once: its main thread may be waiting where nothing reaches it."""
    with suppress(OSError, ValueError):
        sys.stderr.write(f"error: {sentence}\n" if sentence else "")
        sys.stderr.flush()
    os._exit(1)


@contextmanager
def watching(
    *, every: float = EVERY, silent: float = SILENT, end: Callable[[str], None] = end_process
) -> Iterator[None]:
    """Within it, this process ends if another one of the job is gone. All processes enter, after torch.distributed began.

    Args:
        every: seconds between two signs of life.
        silent: seconds without one, until a process counts as gone.
        end: what is done then, in a thread, with the sentence that says it; nothing is said by processes that need not.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        yield
        return
    store = _store(timeout=silent)
    stop = threading.Event()
    thread = threading.Thread(target=_watch, args=(store, stop, every, silent, end), daemon=True, name="watch")
    thread.start()
    try:
        yield
    except BaseException as error:
        first = str(error).strip().splitlines()
        left = f"process {dist.get_rank()} of {dist.get_world_size()} ended ({first[0][:200] if first else type(error).__name__})"
        with suppress(Exception):
            store.set(f"left/{dist.get_rank()}", left)
        stop.set()
        raise
    with suppress(RuntimeError):  # somebody left meanwhile, and has said so
        dist.barrier()
    stop.set()
    thread.join(timeout=2 * every)


def _store(timeout: float) -> dist.TCPStore:
    """A store of the job, kept by its first process."""
    first, size = dist.get_rank() == 0, dist.get_world_size()
    host, store = os.environ.get("MASTER_ADDR", "localhost"), None
    if first:
        store = dist.TCPStore(host, 0, size, True, wait_for_workers=False, timeout=timedelta(seconds=timeout))
    port: list[int] = [store.port if store is not None else 0]
    dist.broadcast_object_list(port, src=0)
    if store is None:
        store = dist.TCPStore(host, port[0], size, False, wait_for_workers=False, timeout=timedelta(seconds=timeout))
    store.set(f"alive/{dist.get_rank()}", "0")
    store.set(f"left/{dist.get_rank()}", "")
    if first:
        store.set(GONE, "")
    dist.barrier()  # every key is there before anybody reads
    return store


def _watch(
    store: dist.TCPStore, stop: threading.Event, every: float, silent: float, end: Callable[[str], None]
) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    last, since, told = [""] * size, [0.0] * size, ""
    beats = 0
    while not stop.wait(every):
        try:
            beats += 1
            store.set(f"alive/{rank}", str(beats))
            if rank == 0:
                counts = [x.decode() for x in store.multi_get([f"alive/{i}" for i in range(size)])]
                left = [x.decode() for x in store.multi_get([f"left/{i}" for i in range(size)])]
                since = [0.0 if now != before else s + every for now, before, s in zip(counts, last, since)]
                last = counts
                told = next((x for x in left if x), "") or next(
                    (
                        f"process {i} of {size} gave no sign of life for {s:.0f} s"
                        for i, s in enumerate(since)
                        if s >= silent
                    ),
                    "",
                )
                if told:
                    store.set(GONE, told)
                    stop.wait(2 * every)  # so that the others read it before the store goes with this process
            else:
                told = store.get(GONE).decode()
        except Exception:  # the store is gone, and the first process with it, unless all are at their end
            told = f"process 0 of {size} is gone"
        if told and not stop.wait(every / 2):
            speaks = rank == 0 or (rank == 1 and told.startswith("process 0 "))
            end(f"{told}; go on from the last checkpoint with --resume" if speaks else "")
            return

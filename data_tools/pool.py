"""One function over many shards: in this process, or in several that end with it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from typing import TypeVar

from megaprior.errors import MegapriorError

Item = TypeVar("Item")
Result = TypeVar("Result")


class WorkerDied(MegapriorError):
    """A worker process ended without a word."""


def each(work: Callable[[Item], Result], items: Sequence[Item], *, workers: int) -> Iterator[Result]:
    """`work(item)` for each item, in their order. What goes to other processes is pickled: a function of a module.

    Raises:
        WorkerDied: what `work` has finished on disk is kept.
    """
    if min(workers, len(items)) <= 1:
        yield from map(work, items)
        return
    pool = ProcessPoolExecutor(min(workers, len(items)), get_context("spawn"), end_with_parent)
    try:
        yield from pool.map(work, items)
    except BrokenProcessPool:
        raise WorkerDied(
            "a worker process died (killed, or out of memory); finished shards are kept, repeat the command, "
            "with fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def end_with_parent() -> None:
    """Called by a worker process when it begins: a killed command must not leave workers behind, who would write beside the
    one that repeats it."""
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()  # returns at once when it ends, however it ends
    os._exit(1)

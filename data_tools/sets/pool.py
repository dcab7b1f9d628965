"""One function over many shards: in this process, or in several that end with it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import TypeVar

from megaprior.errors import MegapriorError

Item = TypeVar("Item")
Result = TypeVar("Result")


def each(work: Callable[[Item], Result], items: Sequence[Item], *, workers: int) -> Iterator[Result]:
    """`work(item)` for each item, in their order. What goes to other processes is pickled: a function of a module.

    Raises:
        MegapriorError: a worker process died; what `work` has finished on disk is kept.
    """
    if min(workers, len(items)) <= 1:
        yield from map(work, items)
        return
    pool = ProcessPoolExecutor(min(workers, len(items)), get_context("spawn"), _begin, (os.getpid(),))
    try:
        yield from pool.map(work, items)
    except BrokenProcessPool:
        raise MegapriorError(
            "a worker process died (killed, or out of memory); finished shards are kept, repeat the command, "
            "with fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(parent: int) -> None:
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    """A killed command must not leave workers behind, who would write beside the one that repeats it."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)

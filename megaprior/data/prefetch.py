"""An iterator that runs ahead in a background thread."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Event, Semaphore, Thread
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class _End:
    error: BaseException | None


class Prefetch(Generic[T]):
    """Items of an iterator, prepared at most `depth` ahead of the caller; what fails in the thread is raised by `next`.

    Attributes:
        wait_s: seconds that the last `next` waited.
    """

    def __init__(self, items: Iterator[T], *, depth: int) -> None:
        assert depth >= 1, depth
        self.wait_s = 0.0
        self._ready: SimpleQueue[T | _End] = SimpleQueue()
        self._slots, self._stop = Semaphore(depth), Event()
        self._thread = Thread(target=self._run, args=(items,), name="megaprior-prefetch", daemon=True)
        self._thread.start()

    def _run(self, items: Iterator[T]) -> None:
        error: BaseException | None = None
        try:
            while True:
                self._slots.acquire()
                if self._stop.is_set():
                    return
                try:
                    item = next(items)
                except StopIteration:
                    return
                self._ready.put(item)
        except BaseException as raised:
            error = raised
        finally:
            self._ready.put(_End(error))

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        start = time.perf_counter()
        item = self._ready.get()
        self.wait_s = time.perf_counter() - start
        if not isinstance(item, _End):
            self._slots.release()
            return item
        self._ready.put(_End(None))  # asked once more, an ended iterator says so again
        if item.error is not None:
            raise item.error
        raise StopIteration

    def close(self) -> None:
        """Stop after the item in preparation, wait for the thread, and drop what was prepared. Harmless when repeated."""
        self._stop.set()
        self._slots.release()
        self._thread.join()
        while not isinstance(self._ready.get(), _End):
            pass
        self._ready.put(_End(None))

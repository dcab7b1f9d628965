"""Background work: in order, bounded, stoppable, and honest about its errors."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from itertools import count

import pytest

from megaprior.data.prefetch import Prefetch


def background_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "megaprior-prefetch"]


def stays_at(values: list[int], length: int) -> bool:
    """Whether the background thread brings `values` to `length` and then leaves it there."""
    patience = time.monotonic() + 5
    while len(values) < length and time.monotonic() < patience:
        time.sleep(0.01)
    time.sleep(0.05)
    return len(values) == length


def test_items_come_in_order_and_the_end_is_an_end() -> None:
    prefetch = Prefetch(iter(range(5)), depth=2)
    assert list(prefetch) == [0, 1, 2, 3, 4]
    assert list(prefetch) == []
    assert not background_threads()


def test_it_runs_ahead_by_depth_and_no_more() -> None:
    made: list[int] = []
    prefetch = Prefetch((made.append(i) or i for i in count()), depth=3)
    assert stays_at(made, 3)
    assert next(prefetch) == 0
    assert stays_at(made, 4)
    prefetch.close()
    assert made == [0, 1, 2, 3]


def test_an_error_in_the_thread_surfaces_after_the_items_before_it() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("sample 17 is broken")

    prefetch = Prefetch(items(), depth=4)
    assert next(prefetch) == 1
    with pytest.raises(ValueError, match="sample 17 is broken"):
        next(prefetch)
    with pytest.raises(StopIteration):
        next(prefetch)


def test_close_stops_the_thread_and_may_be_repeated() -> None:
    prefetch = Prefetch(count(), depth=2)
    next(prefetch)
    prefetch.close()
    prefetch.close()
    assert not background_threads()
    with pytest.raises(StopIteration):
        next(prefetch)


def test_the_wait_is_measured() -> None:
    def items() -> Iterator[int]:
        yield 0
        time.sleep(0.2)
        yield 1
        yield 2

    prefetch = Prefetch(items(), depth=2)
    next(prefetch)
    next(prefetch)
    waited = prefetch.wait_s
    assert waited > 0.1
    time.sleep(0.1)
    next(prefetch)
    assert prefetch.wait_s < waited

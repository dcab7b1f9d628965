"""Rows and parts: nothing lost, nothing too long, and better than the simple ways."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaprior.data.packing import pack_best_fit, split_balanced
from megaprior.errors import UsageError

LENGTHS = st.lists(st.integers(1, 100), max_size=60)


def next_fit(lengths: list[int], capacity: int) -> int:
    """Rows that filling one row after another takes."""
    rows, left = 0, 0
    for length in lengths:
        if length > left:
            rows, left = rows + 1, capacity
        left -= length
    return rows


def test_best_fit_takes_the_fullest_row_that_still_fits() -> None:
    #                      0  1  2  3  4  5
    assert pack_best_fit([4, 7, 3, 6, 2, 8], 10) == [[5, 4], [1, 2], [3, 0]]
    assert pack_best_fit([6, 5, 4, 3], 10) == [[0, 2], [1, 3]]  # the emptiest row would take the 4
    assert pack_best_fit([7, 5, 4, 1], 10) == [[0], [1, 2, 3]]  # the first row would take the 1
    assert pack_best_fit([5, 5, 5], 10) == [[0, 1], [2]]
    assert pack_best_fit([], 10) == []


@given(lengths=LENGTHS)
def test_rows_hold_everything_once_and_never_too_much(lengths: list[int]) -> None:
    rows = pack_best_fit(lengths, 100)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(row and sum(lengths[i] for i in row) <= 100 for row in rows)


@given(lengths=LENGTHS)
def test_all_rows_but_one_are_more_than_half_full(lengths: list[int]) -> None:
    """Two rows of at most half a capacity each would have been one row."""
    rows = pack_best_fit(lengths, 100)
    assert sum(sum(lengths[i] for i in row) <= 50 for row in rows) <= 1


def test_best_fit_beats_next_fit_on_captions() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.gamma(4.0, 40.0, 512).astype(int).clip(8, 1000).tolist()  # a batch of 512 images with captions
    rows = pack_best_fit(lengths, 1024)
    assert -(-sum(lengths) // 1024) == 77  # no packing can do better
    assert len(rows) == 78
    assert next_fit(lengths, 1024) == 86


def test_a_segment_longer_than_a_row_is_refused() -> None:
    with pytest.raises(UsageError, match="segment 1 has 11 tokens, a row holds 10; raise max_tokens to 11"):
        pack_best_fit([10, 11], 10)


def test_the_longest_goes_to_the_lightest() -> None:
    assert split_balanced([3, 8, 2, 5, 4], 2) == [[1, 0], [3, 4, 2]]
    assert split_balanced([4, 4], 3) == [[0], [1], []]
    assert split_balanced([], 2) == [[], []]


@settings(max_examples=50)
@given(lengths=LENGTHS, parts=st.integers(1, 9))
def test_parts_are_balanced_to_the_longest_segment(lengths: list[int], parts: int) -> None:
    split = split_balanced(lengths, parts)
    assert len(split) == parts
    assert sorted(i for part in split for i in part) == list(range(len(lengths)))
    load = [sum(lengths[i] for i in part) for part in split]
    assert max(load) - min(load) <= max(lengths, default=0)


def test_4096_segments_are_planned_for_64_ranks_in_no_time() -> None:
    lengths = np.random.default_rng(1).integers(10, 1000, 4096).tolist()
    split = split_balanced(lengths, 64)
    load = [sum(lengths[i] for i in part) for part in split]
    assert max(load) / min(load) < 1.001
    assert [pack_best_fit([lengths[i] for i in part], 4096) for part in split] == [
        pack_best_fit([lengths[i] for i in part], 4096) for part in split_balanced(lengths, 64)
    ]

"""The order of samples: a bijection, a pure function of the position, and the promised shares of a blend."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from megaprior.data.order import Schedule, derangement, epoch_key, permute
from megaprior.errors import DataError, UsageError

KEYS = st.integers(0, 2**64 - 1)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 3000), key=KEYS)
def test_every_index_comes_exactly_once(n: int, key: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(n), n, key)), np.arange(n))


@settings(max_examples=30, deadline=None)
@given(exponent=st.integers(20, 62), short=st.integers(0, 1000), key=KEYS)
def test_huge_domains_need_no_memory(exponent: int, short: int, key: int) -> None:
    n = 2**exponent - short
    position = np.unique(np.linspace(0, n - 1, 500).astype(np.int64).clip(0, n - 1))
    image = permute(position, n, key)
    assert image.min() >= 0
    assert image.max() < n
    assert len(np.unique(image)) == len(position)


@pytest.mark.parametrize("n", [2, 3, 10, 257])
def test_a_derangement_is_one_cycle_through_all(n: int) -> None:
    orders = set()
    for seed in range(5):
        places = derangement(n, seed)
        assert places.tolist() == derangement(n, seed).tolist()
        at, seen = 0, set()
        while at not in seen:
            seen.add(at)
            at = int(places[at])
        assert (at, len(seen)) == (0, n)  # so no place is its own
        orders.add(tuple(places.tolist()))
    assert len(orders) > 1 or n == 2


def test_a_derangement_never_changes_between_versions() -> None:
    assert derangement(6, 0).tolist() == [1, 3, 5, 2, 0, 4]


def test_one_key_a_position_equals_one_at_a_time() -> None:
    keys = epoch_key(5, 0, np.arange(8))
    together = permute(np.arange(8), 100, keys)
    assert together.tolist() == [int(permute(np.array([i]), 100, int(keys[i]))[0]) for i in range(8)]


@pytest.mark.parametrize("n", [2, 3, 5, 6, 7, 12, 31])
def test_no_place_is_preferred(n: int) -> None:
    """Chi-squared over 20,000 fixed keys; four pairs of rounds instead of eight give 4e-12 at n = 5."""
    keys = epoch_key(1, 0, np.arange(20_000))
    for position in range(n):
        found = permute(np.full(len(keys), position), n, keys)
        assert chisquare(np.bincount(found, minlength=n)).pvalue > 1e-4


def test_the_order_never_changes_between_versions() -> None:
    """A run that is resumed by a later version must meet the same samples."""
    assert permute(np.arange(10), 10, 0).tolist() == [4, 3, 6, 8, 5, 1, 9, 7, 2, 0]
    source, index = Schedule([5, 7], [1, 2], seed=3).ids(0, 12)
    assert source.tolist() == [1, 0, 1] * 4
    assert index.tolist() == [0, 0, 5, 6, 4, 4, 2, 2, 3, 1, 3, 0]


def test_any_stretch_equals_that_part_of_the_whole() -> None:
    schedule = Schedule([5, 17, 3], [2, 3, 1], seed=11)
    whole = np.stack(schedule.ids(0, 300))
    for start, stop in [(0, 1), (7, 8), (64, 128), (299, 300), (50, 50)]:
        assert np.array_equal(np.stack(schedule.ids(start, stop)), whole[:, start:stop])


def test_each_epoch_of_each_source_shows_every_sample_once_in_a_new_order() -> None:
    sizes, weights = [5, 17, 3], [2, 3, 1]
    source, index = Schedule(sizes, weights, seed=11).ids(0, 6 * 17 * 5)
    for s, size in enumerate(sizes):
        own = index[source == s]
        epochs = own[: len(own) // size * size].reshape(-1, size)
        assert (np.sort(epochs, axis=1) == np.arange(size)).all()
        assert len(np.unique(epochs, axis=0)) > 1


@settings(max_examples=50, deadline=None)
@given(weights=st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any), start=st.integers(0, 1000))
def test_a_period_has_each_source_weight_times(weights: list[int], start: int) -> None:
    schedule = Schedule([3] * len(weights), weights, seed=0)
    source, _ = schedule.ids(start, start + sum(weights))
    assert np.bincount(source, minlength=len(weights)).tolist() == weights


def test_the_shares_are_spread_over_the_period() -> None:
    assert Schedule([9, 9], [3, 1], seed=0).ids(0, 8)[0].tolist() == [0, 0, 1, 0, 0, 0, 1, 0]
    source, _ = Schedule([9, 9], [90, 10], seed=0).ids(0, 100)
    assert np.diff(np.flatnonzero(source == 1)).tolist() == [10] * 9


def test_seed_epoch_and_source_give_different_orders() -> None:
    orders = [Schedule([50], [1], seed, first_source=s).ids(e * 50, e * 50 + 50)[1].tolist() for seed, s, e in
              [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**63, 0, 0), (-1, 0, 0)]]  # fmt: skip
    assert len({tuple(order) for order in orders}) == len(orders)


def test_a_source_of_weight_0_never_comes_and_may_be_empty() -> None:
    source, _ = Schedule([4, 0, 4], [1, 0, 1], seed=0).ids(0, 100)
    assert set(source.tolist()) == {0, 2}


def test_what_cannot_be_drawn_from_is_refused() -> None:
    with pytest.raises(DataError, match="source 1 has weight 2 and 0 samples"):
        Schedule([4, 0], [1, 2], seed=0)
    with pytest.raises(UsageError, match=r"source weights are \[0, 0\]"):
        Schedule([4, 4], [0, 0], seed=0)
    with pytest.raises(UsageError, match="sum to 2,000,000, at most 1,048,576"):
        Schedule([4, 4], [1_000_000, 1_000_000], seed=0)

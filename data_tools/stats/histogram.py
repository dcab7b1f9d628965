"""Counts by value, in memory that does not grow with the data: the quantities that `stats` describes."""

from __future__ import annotations

from typing import Any

import numpy as np

_LIMIT = 1 << 20  # values beyond share the last bin


class Histogram:
    """How often each whole number from 0 on was seen; values from 2^20 on are counted as 2^20."""

    def __init__(self) -> None:
        self.counts = np.zeros(1, np.int64)

    def add(self, values: np.ndarray, times: np.ndarray | None = None) -> None:
        """Count `values`, int [n] and at least 0, each once or `times` int [n]."""
        if not len(values):
            return
        found = np.bincount(np.minimum(values, _LIMIT), times)
        if len(found) > len(self.counts):
            self.counts = np.pad(self.counts, (0, len(found) - len(self.counts)))
        self.counts[: len(found)] += found.astype(np.int64)

    @property
    def number(self) -> int:
        """How many values were counted."""
        return int(self.counts.sum())

    @property
    def total(self) -> int:
        """Their sum."""
        return int((self.counts * np.arange(len(self.counts))).sum())

    def quantile(self, share: float) -> int:
        """The smallest value that at least `share` of all are not above."""
        return int(np.searchsorted(np.cumsum(self.counts), share * self.number)) if self.number else 0

    def summary(self) -> dict[str, Any]:
        """number, total, mean, minimum, quantiles, maximum; None where nothing was counted."""
        seen = np.flatnonzero(self.counts)
        if not len(seen):
            return {"number": 0}
        return {
            "number": self.number,
            "total": self.total,
            "mean": self.total / self.number,
            "min": int(seen[0]),
            **{name: self.quantile(share) for name, share in _QUANTILES.items()},
            "max": int(seen[-1]),
        }

    def bins(self, at_most: int = 48) -> list[tuple[int, int, int]]:
        """(first value, last value, count) of `at_most` equal bins or fewer, to the 99.5% quantile; the last has the rest too."""
        if not self.number:
            return []
        low, high = int(np.flatnonzero(self.counts)[0]), self.quantile(0.995)
        width = -(-(high - low + 1) // at_most)
        starts = range(low, high + 1, width)
        found = [(start, start + width - 1, int(self.counts[start : start + width].sum())) for start in starts]
        rest = int(self.counts[starts[-1] + width :].sum())
        if rest:
            found[-1] = (found[-1][0], len(self.counts) - 1, found[-1][2] + rest)
        return found


_QUANTILES = {"p05": 0.05, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95, "p99": 0.99}

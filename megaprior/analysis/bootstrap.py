"""How sure a mean over tokens is: a percentile bootstrap that draws whole images, because their captions move together.

Letters: S captions, N tokens of all S captions, G distinct images, C columns.
"""

from __future__ import annotations

import numpy as np

_RESAMPLES = 2000
_AT_ONCE = 100  # resamples drawn together: 100 x G numbers in memory


def owners(image: np.ndarray, cu: np.ndarray) -> np.ndarray:
    """int64 [N]: the image of each token, of `image` [S] and the captions' bounds `cu` [S+1]."""
    return np.repeat(image, np.diff(cu))


def per_image(owner: np.ndarray, values: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float64 [G] each: sum of `values` [N] over each image's tokens where `known` bool [N], and how many those are."""
    groups = int(owner.max()) + 1 if len(owner) else 0
    sums = np.bincount(owner, weights=np.where(known, values, 0.0), minlength=groups)
    return sums, np.bincount(owner, weights=known, minlength=groups)


def intervals(sums: np.ndarray, counts: np.ndarray) -> list[list[float] | None]:
    """95% intervals of sum / count over resampled images, one for each column of `sums` and `counts` [G, C].

    All columns see the same draws. None where there are fewer than two images or no token.
    """
    groups, columns = sums.shape
    if groups < 2:
        return [None] * columns
    random, means = np.random.default_rng(0), []
    for _ in range(0, _RESAMPLES, _AT_ONCE):
        drawn = random.integers(groups, size=(_AT_ONCE, groups))
        places = drawn + groups * np.arange(_AT_ONCE)[:, None]
        times = np.bincount(places.ravel(), minlength=_AT_ONCE * groups).reshape(_AT_ONCE, groups).astype(float)
        means.append((times @ sums) / np.maximum(times @ counts, 1))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5], axis=0)
    some = counts.sum(axis=0) > 0
    return [[float(low[i]), float(high[i])] if some[i] else None for i in range(columns)]

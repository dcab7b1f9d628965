"""The comparison's own arithmetic, against scipy and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from benchmarks.transfer_scores import correlations, spearman


def test_spearman_is_scipys() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 9, 200), rng.normal(size=200)
    assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert spearman(a, -(a**3)) == pytest.approx(-1)
    assert np.isnan(spearman(a, np.ones(200)))


def test_tokens_are_told_apart_and_captions_go_by_their_mean() -> None:
    own = [np.array([0.1, 0.2, 0.3, 0.4]), np.array([0.5, 0.6, 0.7, 0.8]), np.array([0.9, 0.95, 0.96, 0.97])]
    other = [caption.copy() for caption in own]
    other[0] = other[0][::-1]
    same = np.array([False] * 4 + [True] * 8)
    found = correlations(own, other, same)
    assert found["token_cut_alike"] == pytest.approx(1)
    assert found["token_cut_otherwise"] == pytest.approx(-1)
    assert found["inside_a_caption"] == pytest.approx((-1 + 1 + 1) / 3)
    assert found["caption"] == pytest.approx(1)
    assert found["token"] < 1

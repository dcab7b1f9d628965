from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megaprior.analysis.losses import TokenLosses, by_threshold, keep, kept, read_losses, summarize
from megaprior.errors import DataError

LOSSES = TokenLosses(
    ids=np.array([0, 3]),
    cu=np.array([0, 3, 5]),
    image=np.array([0, 1]),
    nll=np.array([1, 2, 3, 4, 5], np.float32),
    nll_shuffled=np.array([2, 3, 4, 7, np.nan], np.float32),
    w=np.array([0.2, 0.5, 0.9, 0.6, 0.0]),
    word_class=np.array([0, 1, 2, 1, 0], np.uint8),
)


def test_thresholds_split_at_w_above_and_not_above() -> None:
    rows = by_threshold(LOSSES.nll, LOSSES.w, thresholds=(0.5, 0.95))
    assert rows == [
        {"threshold": 0.5, "share_above": 0.4, "above": 3.5, "below": pytest.approx(8 / 3)},
        {"threshold": 0.95, "share_above": 0.0, "above": None, "below": 3.0},
    ]


def test_a_summary_by_class_and_by_shuffling() -> None:
    summary = summarize(LOSSES)
    assert summary["loss"] == 3.0
    assert summary["loss_related"] == 3.0  # (2 + 4) / 2
    assert summary["loss_unrelated"] == 3.0  # (1 + 3 + 5) / 3
    # gaps 1 1 1 | 3, the last token has no shuffled loss: its caption was cut by the larger image
    assert summary["shuffle_gap"] == 1.5
    assert summary["shuffle_gap_related"] == 2.0
    # two images: a resample has both, only the first, or only the second
    assert summary["shuffle_gap_interval"] == [1.0, 3.0]


def test_the_interval_resamples_images_not_captions() -> None:
    """Forty captions of one image move together: their gap is no more certain than one caption's."""
    n = 42
    gaps = np.array([1.0] * 40 + [0.0, 2.0])
    losses = TokenLosses(
        ids=np.arange(n),
        cu=np.arange(n + 1),
        image=np.array([0] * 40 + [1, 2]),
        nll=np.zeros(n, np.float32),
        nll_shuffled=gaps.astype(np.float32),
        w=None,
        word_class=None,
    )
    low, high = summarize(losses)["shuffle_gap_interval"]
    assert low == 0.0  # the second image alone is drawn in 1 of 27 resamples
    assert high == 2.0


def test_what_is_unknown_is_none() -> None:
    summary = summarize(replace(LOSSES, nll_shuffled=None, w=None, word_class=None))
    assert summary["loss"] == 3.0
    assert summary["thresholds"] == []
    for name in ("loss_related", "loss_unrelated", "loss_shuffled", "shuffle_gap", "shuffle_gap_interval"):
        assert summary[name] is None


def test_what_is_kept_comes_back_and_is_not_reused_for_another_key(tmp_path: Path) -> None:
    path = tmp_path / "analysis" / "heldout_pairs.json"
    body = keep(path, replace(LOSSES, w=None), {"model_digest": "aa", "build_id": "b"})
    again, losses = read_losses(path)
    assert again == body
    assert losses.w is None
    for name in ("ids", "cu", "image", "nll", "nll_shuffled", "word_class"):
        np.testing.assert_array_equal(getattr(losses, name), getattr(LOSSES, name))
    assert kept(path, {"model_digest": "aa", "build_id": "b"}) == body
    assert kept(path, {"model_digest": "other", "build_id": "b"}) is None


def test_changed_losses_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "heldout_pairs.json"
    keep(path, LOSSES, {"model_digest": "aa"})
    npz = path.with_suffix(".npz")
    raw = bytearray(npz.read_bytes())
    raw[len(raw) // 2] ^= 1
    npz.write_bytes(raw)
    with pytest.raises(DataError, match=r"heldout_pairs\.npz: not the losses that heldout_pairs\.json names"):
        read_losses(path)
    assert kept(path, {"model_digest": "aa"}) is None

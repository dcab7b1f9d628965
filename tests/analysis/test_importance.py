from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megaprior.analysis.importance import (
    CaptionScores,
    auroc,
    by_length,
    by_position,
    caption_means,
    importance_summary,
    pearson,
    read_scores,
    word_relations,
)
from megaprior.data.shards import ShardSet
from megaprior.errors import DataError


def scores_of(*captions: list[float], kind: str = "logprob", truth: list[list[int]] | None = None) -> CaptionScores:
    cu = np.cumsum([0, *map(len, captions)])
    classes = np.concatenate(truth).astype(np.uint8) if truth is not None else None
    spaced = np.ones(cu[-1], dtype=bool) if truth is not None else None
    return CaptionScores(kind, np.concatenate(captions).astype(np.float32), cu, classes, spaced, len(captions))


def test_auroc_counts_pairs_and_halves_ties() -> None:
    random = np.random.default_rng(0)
    score, positive = random.integers(0, 5, 60).astype(float), random.random(60) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a in score[positive] for b in score[~positive]]
    assert auroc(score, positive) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert auroc(np.array([1.0, 2.0]), np.array([False, True])) == 1.0
    assert auroc(np.ones(4), np.array([True, False, True, False])) == 0.5
    assert auroc(np.ones(2), np.array([True, True])) is None


def test_importance_keeps_its_precision_near_certainty() -> None:
    w = scores_of([-1e-7, -np.log(4).item(), -np.inf, 0.0]).importance
    np.testing.assert_allclose(w, [1e-7, 0.75, 1.0, 0.0], rtol=1e-6)
    assert scores_of([0.25, 3.0], kind="importance").importance.tolist() == [0.25, 3.0]


def test_auroc_ranks_where_w_has_rounded_to_one() -> None:
    """r = -40 and -50 both give w = 1 in float64; the one with the lower r is still ranked higher."""
    summary = importance_summary(scores_of([-50.0, -40.0, -0.1], truth=[[1, 0, 0]]))
    assert summary["auroc"] == 1.0


def test_means_by_caption_length_and_position() -> None:
    w, cu = np.array([1.0, 0.0, 0.5, 0.25, 0.75, 0.5]), np.array([0, 2, 3, 3, 6])
    np.testing.assert_allclose(caption_means(w, cu), [0.5, 0.5, np.nan, 0.5])
    positions = by_position(w, cu, at_least=2)
    assert positions == [
        {"position": 0, "mean_w": pytest.approx((1.0 + 0.5 + 0.25) / 3), "tokens": 3},
        {"position": 1, "mean_w": pytest.approx((0.0 + 0.75) / 2), "tokens": 2},
    ]


def test_fig_8_bins_hold_every_caption_once_and_r_is_pearsons() -> None:
    random = np.random.default_rng(0)
    lengths = random.integers(1, 40, 500)
    means = 1 / np.sqrt(lengths)
    w, cu = np.repeat(means, lengths), np.cumsum([0, *lengths])
    found = by_length(w, cu)
    assert sum(b["captions"] for b in found["bins"]) == 500
    assert found["r"] == pytest.approx(np.corrcoef(lengths, means)[0, 1])
    assert [b["mean_w"] for b in found["bins"]] == sorted((b["mean_w"] for b in found["bins"]), reverse=True)
    assert sum(b["length"] * b["captions"] for b in found["bins"]) == pytest.approx(lengths.sum())
    assert pearson(np.arange(2), np.arange(2)) is None
    assert pearson(np.arange(3), np.ones(3)) is None


def test_the_truth_leaves_the_closing_token_out() -> None:
    """Tokens but the last of each caption: classes 1 0 | 0 2; w of the related one lies above one other and below one."""
    summary = importance_summary(scores_of([-1.0, -0.5, -9.0], [-0.1, -2.0, -9.0], truth=[[1, 0, 0], [0, 2, 0]]))
    assert (summary["related_fraction"], summary["related_token_fraction"]) == (0.25, 0.25)  # each token is a word here
    assert summary["auroc"] == pytest.approx(2 / 3)
    assert (summary["auroc_boilerplate"], summary["auroc_noise"]) == (1.0, 0.0)
    assert summary["mean_by_class"]["related"] == pytest.approx(1 - np.exp(-1), rel=1e-6)
    assert summary["perplexity"] == pytest.approx(np.exp((1 + 0.5 + 9 + 0.1 + 2 + 9) / 6), rel=1e-6)
    assert sum(summary["histogram"]["counts"]) == 6
    assert sum(summary["histogram"]["related"]) == 1


def test_a_word_is_image_related_when_one_of_its_tokens_is() -> None:
    """Tokens, | before those that begin with a space, * after image-related ones, . the closing token:

    | A | cir cle* , | on | it .      words  A  circle,  on  it            1 of 4
    red* dish | and | big* .          words  reddish  and  big             2 of 3; the caption begins a word without a space
    .                                 words  none
    | 2 5 .                           words  25                            0 of 1
    """
    classes = [[0, 0, 1, 0, 0, 0, 0], [1, 0, 0, 1, 0], [1], [2, 2, 1]]
    spaced = [[1, 1, 0, 0, 1, 1, 0], [0, 0, 1, 1, 0], [0], [1, 0, 0]]
    scores = scores_of(*[[-1.0] * len(caption) for caption in classes], truth=classes)
    scores = replace(scores, spaced=np.concatenate(spaced).astype(bool))
    assert word_relations(scores).tolist() == [False, True, False, False, True, False, True, False]
    summary = importance_summary(scores)
    assert summary["related_fraction"] == 3 / 8
    assert summary["related_token_fraction"] == 3 / 12


def test_without_truth_nothing_is_claimed() -> None:
    summary = importance_summary(scores_of([-1.0, -0.5]))
    assert summary["auroc"] is None
    assert (summary["related_fraction"], summary["related_token_fraction"]) == (None, None)
    assert summary["mean"] == pytest.approx(1 - (np.exp(-1) + np.exp(-0.5)) / 2, rel=1e-6)


def test_scores_are_read_whole_or_evenly(tmp_path: Path, write_pairs: Callable[..., Path]) -> None:
    folder = write_pairs(
        tmp_path / "pairs", ["a red square", "a blue circle at dusk", "one", "two"], images=[0, 1, 2, 3]
    )
    shards = ShardSet.open(folder, scores="ref_logprob")
    whole = read_scores(shards)
    assert whole.lengths.tolist() == shards.token_counts.tolist()
    assert whole.score[whole.cu[1] : whole.cu[2]].tolist() == shards.scores(1).tolist()
    part = read_scores(shards, max_captions=2)
    assert part.lengths.tolist() == shards.token_counts[[0, 3]].tolist()
    assert part.captions_in_all == 4
    pieces = [shards.tokenizer().token_bytes(token) for i in (0, 3) for token in shards.tokens(i).tolist()]
    assert part.spaced is not None
    assert part.spaced.tolist() == [piece[:1] == b" " for piece in pieces]
    assert any(part.spaced)
    assert not all(part.spaced)
    with pytest.raises(DataError, match="megaprior score --shards"):
        read_scores(ShardSet.open(folder))

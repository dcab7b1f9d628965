"""What a score stream says about its captions: importance, its truth where known, and the curves of the paper's Fig. 8.

Legend: S captions, N tokens of all S captions together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megaprior.data.shards import ShardSet
from megaprior.errors import DataError

RELATED, NOISE = 1, 2  # word classes; 0 is boilerplate


@dataclass(frozen=True)
class CaptionScores:
    """Scores of S captions, flat: caption s holds tokens `cu[s]:cu[s+1]`."""

    kind: str  # "logprob": score is r = log p_ref <= 0; "importance": score is w itself
    score: np.ndarray  # float32 [N]
    cu: np.ndarray  # int64 [S+1]
    word_class: np.ndarray | None  # uint8 [N]: 0 boilerplate, 1 image-related, 2 noise
    spaced: np.ndarray | None  # bool [N]: the token begins with a space; known where the classes are
    captions_in_all: int  # captions of the shard set; S may be a sample of them

    @property
    def lengths(self) -> np.ndarray:
        """int64 [S], tokens of each caption, EOS included."""
        return np.diff(self.cu)

    @property
    def importance(self) -> np.ndarray:
        """float64 [N]: w at alpha = 1."""
        return importance(self.score, self.kind)


def importance(score: np.ndarray, kind: str) -> np.ndarray:
    """float64, w = 1 - p_ref (alpha = 1) of scores of one kind, in the form that keeps its precision near p_ref = 1."""
    score = score.astype(np.float64)
    return -np.expm1(score) if kind == "logprob" else score


def open_scored(shards: Path | str, scores: str | None) -> ShardSet:
    """A shard folder with its score stream, or without where it has none of that name."""
    opened = ShardSet.open(shards)
    if scores is None or not (opened.folder / f"{opened.shards[0].prefix}.{scores}.json").exists():
        return opened
    return ShardSet.open(shards, scores=scores)


def read_scores(shards: ShardSet, *, max_captions: int = 200_000) -> CaptionScores:
    """Read the opened score stream, of `max_captions` evenly spaced captions where there are more.

    Raises:
        DataError: the shard set was opened without scores.
    """
    if shards.score_kind is None:
        raise DataError(f"{shards.folder}: opened without scores; run `megaprior score --shards {shards.folder}` first")
    total = len(shards)
    ids = np.arange(total) if total <= max_captions else np.linspace(0, total - 1, max_captions).astype(np.int64)

    def flat(sequence: Callable[[int], np.ndarray], dtype: type) -> np.ndarray:
        return np.concatenate([np.zeros(0, dtype), *(sequence(i) for i in ids.tolist())]).astype(dtype, copy=False)

    truth = spaced = None
    if shards.has_word_class:
        tokenizer = shards.tokenizer()
        begins = np.array([tokenizer.token_bytes(i).startswith(b" ") for i in range(tokenizer.vocab_size)])
        truth, spaced = flat(shards.word_class, np.uint8), begins[flat(shards.tokens, np.int64)]
    return CaptionScores(
        kind=shards.score_kind,
        score=flat(shards.scores, np.float32),
        cu=np.concatenate([[0], np.cumsum(shards.token_counts[ids])]).astype(np.int64),
        word_class=truth,
        spaced=spaced,
        captions_in_all=total,
    )


def auroc(score: np.ndarray, positive: np.ndarray) -> float | None:
    """Area under the ROC curve: P(score of a positive > score of a negative), ties counted half (Mann-Whitney U).

    `score` float [N], `positive` bool [N]. None when one of the two classes is empty.
    """
    from scipy.stats import rankdata

    positive = np.asarray(positive, dtype=bool)
    n_positive, n_negative = int(positive.sum()), int((~positive).sum())
    if n_positive == 0 or n_negative == 0:
        return None
    u = rankdata(score)[positive].sum() - n_positive * (n_positive + 1) / 2
    return float(u / (n_positive * n_negative))


def pearson(x: np.ndarray, y: np.ndarray) -> float | None:
    """Pearson's r of two float [S]; None for fewer than three points or a constant one."""
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def caption_means(values: np.ndarray, cu: np.ndarray) -> np.ndarray:
    """Mean of `values` [N] over each caption, float64 [S]; NaN for a caption without tokens."""
    lengths = np.diff(cu)
    sums = np.diff(np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])[cu])
    return np.divide(sums, lengths, out=np.full(len(lengths), np.nan), where=lengths > 0)


def by_length(w: np.ndarray, cu: np.ndarray, *, bins: int = 12) -> dict[str, Any]:
    """Fig. 8, left: mean w of a caption against its length, in bins that hold about equally many captions.

    Returns {"r": Pearson's r over captions, "captions": S, "bins": [{"length", "mean_w", "captions"}, ...]}.
    """
    lengths, means = np.diff(cu), caption_means(w, cu)
    kept = lengths > 0
    lengths, means = lengths[kept], means[kept]
    if len(lengths) == 0:
        return {"r": None, "captions": 0, "bins": []}
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, bins + 1)[1:-1]))
    place = np.searchsorted(edges, lengths, side="left")
    table = [
        {
            "length": float(lengths[place == b].mean()),
            "mean_w": float(means[place == b].mean()),
            "captions": int((place == b).sum()),
        }
        for b in np.unique(place)
    ]
    return {"r": pearson(lengths, means), "captions": len(lengths), "bins": table}


def by_position(w: np.ndarray, cu: np.ndarray, *, at_least: int = 20, most: int = 64) -> list[dict[str, Any]]:
    """Fig. 8, right: mean w by position in the caption (0 is the first token), where `at_least` captions reach it."""
    lengths = np.diff(cu)
    position = np.arange(len(w)) - np.repeat(cu[:-1], lengths)
    shown = position < most
    counts = np.bincount(position[shown], minlength=1)
    sums = np.bincount(position[shown], weights=w[shown], minlength=1)
    return [
        {"position": i, "mean_w": float(sums[i] / counts[i]), "tokens": int(counts[i])}
        for i in range(len(counts))
        if counts[i] >= at_least
    ]


def importance_summary(scores: CaptionScores) -> dict[str, Any]:
    """Everything the report says about importance, as plain numbers; what is not known is None.

    AUROC ranks by r rather than w: the order is the same, and r never saturates where w rounds to 1. `related_fraction` is
    the share of words that are image-related, `related_token_fraction` that of tokens. The closing token of a caption (its
    EOS) belongs to no word and stays out of both and of the AUROCs.
    """
    w = scores.importance
    truth = scores.word_class
    logprob = scores.kind == "logprob"
    counts, edges = np.histogram(np.clip(w, 0, 1), bins=20, range=(0.0, 1.0))
    mean_r = float(np.mean(scores.score, dtype=np.float64)) if logprob and len(w) else None
    summary = {
        "auroc": None,
        "auroc_boilerplate": None,
        "auroc_noise": None,
        "related_fraction": None,
        "related_token_fraction": None,
        "mean": float(w.mean()) if len(w) else None,
        "share_above_half": float((w > 0.5).mean()) if len(w) else None,
        "perplexity": math.exp(-mean_r) if mean_r is not None and mean_r > -700 else None,
        "captions": len(scores.cu) - 1,
        "captions_in_all": scores.captions_in_all,
        "tokens": len(w),
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
        "by_length": by_length(w, scores.cu),
        "by_position": by_position(w, scores.cu),
    }
    if truth is not None:
        summary["histogram"]["related"] = np.histogram(np.clip(w[truth == RELATED], 0, 1), bins=edges)[0].tolist()
        summary |= _against_truth(-scores.score if logprob else scores.score, w, truth, scores.cu)
        words = word_relations(scores)
        summary["related_fraction"] = float(words.mean()) if len(words) else None
    return summary


def word_relations(scores: CaptionScores) -> np.ndarray:
    """bool, one a word of all captions: whether it is image-related, which it is when one of its tokens is.

    A word begins with a caption, and at every token that begins with a space; a comma belongs to the word before it, and the
    closing token to none.
    """
    assert scores.word_class is not None
    assert scores.spaced is not None
    begins = scores.spaced.copy()
    begins[scores.cu[:-1][scores.lengths > 0]] = True
    inside = _inside(scores.cu)
    starts = np.flatnonzero(begins[inside])
    related = scores.word_class[inside] == RELATED
    return np.logical_or.reduceat(related, starts) if len(starts) else np.zeros(0, dtype=bool)


def _inside(cu: np.ndarray) -> np.ndarray:
    """bool [N]: all tokens but the closing one of each caption."""
    inside = np.ones(cu[-1], dtype=bool)
    inside[cu[1:][np.diff(cu) > 0] - 1] = False
    return inside


def _against_truth(order: np.ndarray, w: np.ndarray, truth: np.ndarray, cu: np.ndarray) -> dict[str, Any]:
    inside = _inside(cu)
    order, w, truth = order[inside], w[inside], truth[inside]
    related, noise = truth == RELATED, truth == NOISE
    against = {"auroc": ~related, "auroc_boilerplate": ~related & ~noise, "auroc_noise": noise}
    areas = {name: auroc(order[related | other], related[related | other]) for name, other in against.items()}
    names = {"related": related, "boilerplate": ~related & ~noise, "noise": noise}
    means = {name: float(w[mask].mean()) if mask.any() else None for name, mask in names.items()}
    return {**areas, "related_token_fraction": float(related.mean()) if len(truth) else None, "mean_by_class": means}

"""Eqs. 3-4 from scores to weights, and the refusal of scores that cannot be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaprior.config import load_config
from megaprior.data.samples import Segment
from megaprior.data.weighting import WeightingConfig, caption_weights, check_scores, is_flat, weigh
from megaprior.errors import DataError, UsageError

CAPTIONS = st.lists(st.lists(st.floats(-32, -(2**-10), width=32), min_size=1, max_size=12), min_size=1, max_size=5)


def expected(captions: list[list[float]], alpha: float, length_scale: bool) -> np.ndarray:
    """w = (1 - e^r)^alpha and g = k w / sum w per caption (Eq. 4), in float64."""
    parts = []
    for scores in captions:
        w = (-np.expm1(np.array(scores, dtype=np.float64))) ** alpha
        parts.append((len(w) * w if length_scale else w) / w.sum())
    return np.concatenate(parts)


@settings(max_examples=50, deadline=None)
@given(captions=CAPTIONS, alpha=st.sampled_from([0.5, 1.0, 2.0]), length_scale=st.booleans())
def test_weights_follow_equation_4(captions: list[list[float]], alpha: float, length_scale: bool) -> None:
    scores = [np.array(c, dtype=np.float32) for c in captions]
    g = caption_weights(scores, kind="logprob", alpha=alpha, length_scale=length_scale)
    assert g.dtype == np.float32
    np.testing.assert_allclose(g, expected([s.tolist() for s in scores], alpha, length_scale), rtol=1e-5)


@settings(max_examples=50, deadline=None)
@given(captions=CAPTIONS)
def test_weights_average_1_over_each_caption(captions: list[list[float]]) -> None:
    scores = [np.array(c, dtype=np.float32) for c in captions]
    g = caption_weights(scores, kind="logprob", alpha=1.0, length_scale=True)
    for part in np.split(g, np.cumsum([len(s) for s in scores])[:-1]):
        assert part.sum(dtype=np.float64) == pytest.approx(len(part), rel=1e-5)


def test_importance_is_used_as_it_is() -> None:
    scores = [np.array([1, 3], dtype=np.float32), np.array([5], dtype=np.float32)]
    g = caption_weights(scores, kind="importance", alpha=1.0, length_scale=True)
    assert g.tolist() == [0.5, 1.5, 1.0]


def test_no_captions_and_captions_without_loss_give_no_weights() -> None:
    assert caption_weights([], kind="logprob", alpha=1.0, length_scale=True).tolist() == []
    empty, one = np.empty(0, dtype=np.float32), np.array([-1], dtype=np.float32)
    assert caption_weights([empty, one, empty], kind="logprob", alpha=1.0, length_scale=True).tolist() == [1.0]


def segment(scores: list[float] | None, *, image: bool = True) -> Segment:
    values = None if scores is None else np.array(scores, dtype=np.float32)
    return Segment(0, np.arange(3), np.ones(3, dtype=np.float32), scores=values, grid=(1, 1) if image else None)


def test_only_scored_captions_behind_images_are_weighed_each_by_its_kind() -> None:
    segments = [
        segment([0, 1, 3]),
        segment(None),
        segment([0, 0, -np.inf]),
        segment([0, 1, 3], image=False),
        segment([0, 0, 0]),
    ]
    kinds = ["importance", None, "logprob", "importance", "importance"]
    weighted, flat = weigh(segments, kinds, WeightingConfig(kind="prior"))
    assert [s.token_weight.tolist() for s in weighted] == [[0, 0.75, 2.25], [1, 1, 1], [0, 0, 3], [1, 1, 1], [1, 1, 1]]
    assert flat == 1
    assert weigh([], [], WeightingConfig(kind="prior")) == ([], 0)


def test_a_caption_known_by_heart_falls_back_to_equal_weights_and_is_counted() -> None:
    zero = np.zeros(3, dtype=np.float32)
    assert caption_weights([zero], kind="logprob", alpha=1.0, length_scale=True).tolist() == [1, 1, 1]
    assert is_flat(zero, kind="logprob", alpha=1.0)
    assert is_flat(zero, kind="importance", alpha=1.0)
    assert not is_flat(zero, kind="logprob", alpha=0.0)  # 0^0 = 1: every w is 1
    assert not is_flat(np.array([0, -1], dtype=np.float32), kind="logprob", alpha=1.0)
    assert not is_flat(np.empty(0, dtype=np.float32), kind="logprob", alpha=1.0)


@pytest.mark.parametrize(
    ("kind", "scores", "message"),
    [
        ("logprob", [-1, np.nan, 0], "pairs/0 sample 3: score nan at token 1"),
        ("logprob", [-1, -2, 1e-3], "score 0.001.* at token 2"),
        ("logprob", [-1, -2], "pairs/0 sample 3: 2 scores for 3 tokens"),
        ("importance", [1, -0.5, 0], "score -0.5 at token 1"),
        ("importance", [np.inf, 1, 1], "score inf at token 0"),
        ("importance", [1, 1, np.nan], "score nan at token 2"),
    ],
)
def test_scores_that_cannot_be_are_refused(kind: str, scores: list[float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_scores("pairs/0 sample 3", np.array(scores, dtype=np.float32), kind=kind, tokens=3)


def test_the_limits_are_allowed() -> None:
    check_scores("s", np.array([-np.inf, 0, 1e-7], dtype=np.float32), kind="logprob", tokens=3)
    check_scores("s", np.array([0, 1e30], dtype=np.float32), kind="importance", tokens=2)


def test_the_configuration_refuses_what_has_no_meaning() -> None:
    assert load_config(WeightingConfig, None, ["kind=prior", "alpha=2"]) == WeightingConfig(kind="prior", alpha=2.0)
    for override in ("alpha=-1", "alpha=.inf", "kind=attention"):
        with pytest.raises(UsageError, match=override.split("=", maxsplit=1)[0]):
            load_config(WeightingConfig, None, [override])

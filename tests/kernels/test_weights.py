"""Eqs. 3-4 and every corner of them, against the equations in float64."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megaprior.kernels import oracle, token_weights

INF = math.inf
logprobs = st.one_of(st.sampled_from([0.0, -INF, -1e-12, -1e-7]), st.floats(-40, 0, width=32))


def cut(captions: list[list[float]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores (N,) and their boundaries (S+1,)."""
    edges = [0]
    for caption in captions:
        edges.append(edges[-1] + len(caption))
    return torch.tensor([score for caption in captions for score in caption], dtype=torch.float32), torch.tensor(
        edges, dtype=torch.int32
    )


@settings(max_examples=150, deadline=None)
@given(
    captions=st.lists(st.lists(logprobs, max_size=12), max_size=6),
    alpha=st.sampled_from([0, 0.5, 1, 2, 4]),
    length_scale=st.booleans(),
)
def test_the_formula(captions, alpha, length_scale):
    scores, edges = cut(captions)
    got = token_weights(scores, edges, alpha=alpha, length_scale=length_scale)
    kept = [oracle.token_weights(scores[a:b].tolist(), alpha=alpha, length_scale=length_scale)
            for a, b in pairwise(edges)]  # fmt: skip
    want = torch.cat([torch.zeros(0, dtype=torch.float64), *kept])
    assert got.dtype == torch.float32
    assert got.shape == scores.shape
    torch.testing.assert_close(got.double(), want, rtol=2e-7, atol=1e-44)  # one rounding to float32


def test_worked_by_hand():
    scores, edges = cut([[math.log(0.5), math.log(0.75)], [math.log(0.1), 0.0, -INF]])
    assert token_weights(scores, edges).tolist() == pytest.approx([4 / 3, 2 / 3, 2.7 / 1.9, 0, 3 / 1.9], rel=1e-6)
    squared = token_weights(scores, edges, alpha=2)
    assert squared.tolist() == pytest.approx([1.6, 0.4, 2.43 / 1.81, 0, 3 / 1.81], rel=1e-6)
    shares = token_weights(scores, edges, length_scale=False)
    assert shares.tolist() == pytest.approx([2 / 3, 1 / 3, 0.9 / 1.9, 0, 1 / 1.9], rel=1e-6)


def test_weights_average_one_over_a_caption():
    scores, edges = cut([torch.empty(k).exponential_().neg_().tolist() for k in (1, 7, 300, 2048)])
    for a, b in pairwise(edges):
        assert token_weights(scores, edges, alpha=0.5)[a:b].double().mean().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("k", [1, 2, 3, 7, 41, 49, 2048])
def test_equal_weights_are_exactly_one(k):
    edges = torch.tensor([0, k], dtype=torch.int32)
    mixed = torch.linspace(-30, 0, k).index_fill(0, torch.tensor(0), -INF)
    ones, shares = [1.0] * k, torch.full((k,), 1 / k).tolist()
    assert token_weights(mixed, edges, alpha=0).tolist() == ones
    assert token_weights(mixed, edges, alpha=0, length_scale=False).tolist() == shares
    for constant in (-0.3, -1e-30, -INF):
        assert token_weights(torch.full((k,), constant), edges, alpha=1).tolist() == ones


@pytest.mark.parametrize("alpha", [0, 0.5, 1, 4])
def test_a_caption_known_by_heart_gets_equal_weights(alpha):
    scores, edges = cut([[0.0, 0.0, 0.0], [-1.0, 0.0]])
    got = token_weights(scores, edges, alpha=alpha)
    assert got[:3].tolist() == [1, 1, 1]
    assert got[3:].tolist() == ([1, 1] if alpha == 0 else [2, 0])
    assert token_weights(scores, edges, alpha=alpha, length_scale=False)[:3].tolist() == pytest.approx([1 / 3] * 3)


def test_one_token_weighs_one_whatever_its_score():
    scores, edges = cut([[0.0], [-INF], [-1e-30], [-2.0]])
    assert token_weights(scores, edges, alpha=4).tolist() == [1, 1, 1, 1]
    assert token_weights(scores, edges, alpha=4, length_scale=False).tolist() == [1, 1, 1, 1]


def test_captions_without_tokens():
    scores, edges = cut([[], [-1.0, -1.0], [], []])
    assert token_weights(scores, edges).tolist() == [1, 1]
    assert token_weights(torch.empty(0), torch.zeros(3, dtype=torch.int32)).shape == (0,)
    assert token_weights(torch.empty(0), torch.zeros(1, dtype=torch.int32)).shape == (0,)


def test_a_large_power_of_small_importances_does_not_underflow():
    for r, alpha, first in ((-1e-20, 4, 2 / 17), (-1e-30, 16, 2 / 65_537)):  # 1e-80 is 0 in float32, 1e-480 in float64
        scores, edges = cut([[r, 2 * r]])
        assert token_weights(scores, edges, alpha=alpha).tolist() == pytest.approx([first, 2 - first], rel=1e-5)


def test_precision_near_certainty():
    scores, edges = cut([[-1e-9, -3e-9]])  # 1 - exp(r) in float32 is 0 for both
    assert token_weights(scores, edges).tolist() == pytest.approx([0.5, 1.5], rel=1e-6)


def test_neighbours_do_not_matter():
    captions = [[-0.5, -2.0, -1e-3], [-4.0], [-0.1] * 9 + [-7.0]]
    alone = [token_weights(*cut([caption]), alpha=0.5) for caption in captions]
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        together = token_weights(*cut([captions[i] for i in order]), alpha=0.5)
        assert torch.equal(together, torch.cat([alone[i] for i in order]))


def test_rounding_above_zero_counts_as_zero():
    scores, edges = cut([[9.9e-7, -1.0]])
    assert token_weights(scores, edges).tolist() == [0, 2]


@pytest.mark.parametrize("bad", [math.nan, 2e-6, INF])
def test_impossible_logprobs_are_refused(bad):
    scores, edges = cut([[-1.0], [-2.0, bad]])
    with pytest.raises(ValueError, match=r"scores\[2\] is .*at most 0"):
        token_weights(scores, edges)


def test_importance_is_used_as_it_is():
    scores, edges = cut([[1.0, 3.0], [0.0, 0.0], [5.0]])
    for alpha in (0.5, 1.0, 2.0):
        got = token_weights(scores, edges, kind="importance", alpha=alpha)
        assert got.tolist() == [0.5, 1.5, 1, 1, 1]


@pytest.mark.parametrize("bad", [math.nan, -1e-6, INF, -INF])
def test_impossible_importances_are_refused(bad):
    scores, edges = cut([[bad, 1.0]])
    with pytest.raises(ValueError, match=r"scores\[0\] is .*finite and at least 0"):
        token_weights(scores, edges, kind="importance")


@pytest.mark.parametrize("edges", [[0, 2], [1, 3], [0, 2, 1, 3], [0, 4]])
def test_boundaries_must_run_from_zero_to_n(edges):
    with pytest.raises(ValueError, match="from 0 to N = 3"):
        token_weights(torch.zeros(3), torch.tensor(edges, dtype=torch.int32))


def test_other_arguments_are_checked():
    scores, edges = cut([[-1.0, -2.0]])
    for changed, match in (({"alpha": -1.0}, "alpha"), ({"alpha": math.nan}, "alpha"), ({"alpha": INF}, "alpha"),
                           ({"kind": "surprise"}, "kind")):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            token_weights(scores, edges, **changed)
    for wrong in ((scores.long(), edges), (scores[None], edges), (scores, edges.float()), (scores, edges[:0])):
        with pytest.raises(ValueError, match="must be"):
            token_weights(*wrong)


def test_dtypes_and_gradients():
    scores, edges = cut([[-1.0, -2.0]])
    got = token_weights(scores.requires_grad_(), edges.long())
    assert got.dtype == torch.float32
    assert not got.requires_grad
    assert token_weights(scores.double(), edges).dtype == torch.float64
    assert token_weights(scores.bfloat16(), edges).dtype == torch.float32

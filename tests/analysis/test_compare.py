from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megaprior.analysis.bootstrap import intervals
from megaprior.analysis.compare import compare, comparisons, differing, heldout_difference, settings
from megaprior.analysis.losses import TokenLosses
from megaprior.analysis.runs import Run

A = TokenLosses(
    ids=np.array([0, 3, 4]),
    cu=np.array([0, 2, 3, 5]),
    image=np.array([0, 0, 1]),
    nll=np.array([1, 2, 3, 4, 5], np.float32),
    nll_shuffled=None,
    w=np.array([0.9, 0.5, 0.6, 0.1, 0.2]),
    word_class=np.array([1, 0, 0, 1, 2], np.uint8),
)
B = replace(A, nll=np.array([0.5, 2.5, 2.5, 4, 6], np.float32))  # changes: -0.5 0.5 -0.5 | 0 1


def run(losses: TokenLosses | None, *, build: str = "b", probe: dict | None = None, **trajectory: object) -> Run:
    heldout = {"build_id": build} if losses is not None else None
    summary = {"trajectory": {"seed": 0, **trajectory}, "world": 1}
    return Run(Path("run"), summary, [], [], heldout, losses, probe)


def test_the_paired_difference_by_hand() -> None:
    rows = heldout_difference(A, B)
    assert list(rows) == ["all", "above", "below", "related"]
    assert (rows["all"]["a"], rows["all"]["b"]) == (3.0, pytest.approx(15.5 / 5))
    assert rows["all"]["difference"] == pytest.approx(0.1)
    # two images: a resample has both (0.5 / 5), only the first (-0.5 / 3) or only the second (1 / 2)
    assert rows["all"]["interval"] == [pytest.approx(-0.5 / 3), pytest.approx(0.5)]
    assert (rows["all"]["tokens"], rows["all"]["images"]) == (5, 2)
    # w above 0.5: tokens 0 and 2, both of the first image; where a resample lacks it, nothing is divided by nothing
    assert rows["above"]["difference"] == -0.5
    assert (rows["above"]["tokens"], rows["above"]["images"]) == (2, 1)
    assert rows["below"]["difference"] == pytest.approx(0.5)
    assert rows["related"]["difference"] == pytest.approx(-0.25)


def test_what_both_runs_share_cancels_out() -> None:
    """Captions differ by nats, the runs by exactly 0.25 on each token: the interval has no width."""
    random = np.random.default_rng(0)
    many = TokenLosses(
        ids=np.arange(50),
        cu=np.arange(51),
        image=np.arange(50),
        nll=random.integers(0, 64, 50).astype(np.float32),
        nll_shuffled=None,
        w=None,
        word_class=None,
    )
    rows = heldout_difference(many, replace(many, nll=many.nll - np.float32(0.25)))
    assert list(rows) == ["all"]
    assert rows["all"]["interval"] == [-0.25, -0.25]


def test_intervals_cover_as_often_as_they_say() -> None:
    """Of 200 samples of 40 images around a mean of 0, about 95% of the intervals hold it."""
    random = np.random.default_rng(1)
    held = 0
    for _ in range(200):
        sums = random.normal(size=(40, 1))
        bounds = intervals(sums, np.ones((40, 1)))[0]
        assert bounds is not None
        held += bounds[0] <= 0 <= bounds[1]
    assert 0.88 <= held / 200 <= 0.99  # percentile intervals of 40 fall a little short of 95%; 93.5% was measured


def test_intervals_need_two_images_and_a_token() -> None:
    assert intervals(np.ones((1, 2)), np.ones((1, 2))) == [None, None]
    assert intervals(np.zeros((3, 1)), np.zeros((3, 1))) == [None]


def test_runs_that_cannot_be_compared_say_why() -> None:
    assert (
        compare(run(A), run(None), names=("a", "b"))["why"]
        == "`megaprior evaluate --shards` has not measured both runs"
    )
    assert compare(run(A), run(B, build="c"), names=("a", "b"))["why"] == "their losses are of different shards"
    fewer = replace(A, ids=np.array([0, 3, 5]))
    found = compare(run(A), run(fewer), names=("a", "b"))
    assert found["heldout"] is None
    assert found["why"] == "their losses are of different captions, or of captions cut at different tokens"
    assert compare(run(A), run(B), names=("a", "b"))["why"] is None


def test_the_probe_is_compared_where_both_answered_the_same_items() -> None:
    one = {"accuracy": 0.5, "items": 40, "interval": [0.4, 0.6]}
    other = {"accuracy": 0.75, "items": 40, "interval": [0.65, 0.85]}
    found = compare(run(A, probe=one), run(A, probe=other), names=("a", "b"))["probe"]
    assert found == {"a": 0.5, "b": 0.75, "difference": 0.25, "overlap": False}
    assert compare(run(A, probe=one), run(A, probe=other | {"items": 41}), names=("a", "b"))["probe"] is None
    assert compare(run(A, probe=one), run(A), names=("a", "b"))["probe"] is None


def test_what_differs_lists_keys_with_both_values() -> None:
    a = {"seed": 0, "optim.lr": 0.003, "weighting.kind": "ntp"}
    b = {"seed": 0, "optim.lr": 0.001, "model.patch": 16, "weighting.kind": "ntp"}
    assert differing(a, b) == [
        {"key": "model.patch", "a": None, "b": 16},
        {"key": "optim.lr", "a": 0.003, "b": 0.001},
    ]
    assert differing(a, a) == []


def test_data_are_compared_by_content_and_the_scorer_by_fingerprint() -> None:
    given = run(A)
    scorer = {"fingerprint": "f", "dtype": "float32"}
    given.summary["data"] = {"batch_size": 8, "weighting": {}, "sources": [{"build_id": "x", "scorer": scorer}]}
    assert settings(given) == {
        "world": 1,
        "seed": 0,
        "data.batch_size": 8,
        "data.sources.0.build_id": "x",
        "data.sources.0.scorer": "f",
    }


def test_first_seeds_come_first_and_the_rest_is_named() -> None:
    def seeds(n: int) -> list[Run]:
        return [run(A, seed=seed) for seed in range(n)]

    found = comparisons({"ulvlm": {"ntp": seeds(3), "prior": seeds(2)}, "hlvlm": {"prior": seeds(1)}}, most=4)
    assert found["runs"] == ["U-LVLM NTP, seed 0", "U-LVLM PRIOR, seed 0", "H-LVLM PRIOR, seed 0", "U-LVLM NTP, seed 1"]
    assert found["left_out"] == ["U-LVLM PRIOR, seed 1", "U-LVLM NTP, seed 2"]
    assert len(found["pairs"]) == 6
    assert (found["pairs"][0]["a"], found["pairs"][0]["b"]) == tuple(found["runs"][:2])
    one = comparisons({"ulvlm": {"ntp": seeds(1), "prior": seeds(1)}})
    assert one["runs"] == ["NTP, seed 0", "PRIOR, seed 0"]
    assert one["pairs"][0]["differs"] == []


def test_two_runs_of_one_seed_are_told_apart(tmp_path: Path, write_run: Callable[..., Path]) -> None:
    runs = [replace(run(A), folder=tmp_path / name) for name in ("slow", "fast")]
    assert comparisons({"ulvlm": {"ntp": runs}})["runs"] == ["NTP, seed 0 (slow)", "NTP, seed 0 (fast)"]

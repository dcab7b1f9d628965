from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

from megaprior.analysis import figures, importance_figures
from megaprior.analysis.names import looks
from megaprior.analysis.runs import read_run


@pytest.fixture
def runs(tmp_path: Path, write_run: Callable[..., Path]) -> dict:
    return {
        kind: [
            read_run(write_run(tmp_path / f"{kind}{seed}", kind=kind, seed=seed), results=[], build_id=None)
            for seed in (0, 1)
        ]
        for kind in ("ntp", "prior")
    }


LOOK = looks(["ntp", "prior"])
NAMESPACE = "{http://www.w3.org/2000/svg}"


def described(svg: str) -> tuple[str, str]:
    """An image's name and description, as they are referred to."""
    root = ElementTree.fromstring(svg)
    assert root.get("role") == "img"
    named = [root.find(f".//*[@id='{key}']") for key in (root.get("aria-labelledby") or "").split()]
    assert [element.tag for element in named if element is not None] == [f"{NAMESPACE}title", f"{NAMESPACE}desc"]
    return tuple(element.text or "" for element in named if element is not None)  # type: ignore[return-value]


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_curves_are_wellformed_svg_in_the_pages_colours_and_the_same_every_time(runs: dict) -> None:
    svg = figures.loss_curves("ulvlm", runs, LOOK)
    assert svg is not None
    assert figures.loss_curves("ulvlm", runs, LOOK) == svg
    assert {"NTP", "PRIOR", "step"} <= set(texts(svg))
    assert "var(--ntp)" in svg
    assert "var(--prior)" in svg
    assert "#0" not in svg.replace('href="#', "")  # no placeholder colour is left
    assert texts(svg).count("NTP") == 1  # two seeds, one entry in the legend


def test_heldout_curves_name_the_threshold(runs: dict) -> None:
    svg = figures.heldout_curves("ulvlm", runs, LOOK)
    assert svg is not None
    assert {"NTP, w above 0.5", "PRIOR, w below 0.5"} <= set(texts(svg))


def test_nothing_to_draw_is_no_figure(runs: dict) -> None:
    for methods in runs.values():
        for run in methods:
            run.evals.clear()
    assert figures.heldout_curves("ulvlm", runs, LOOK) is None
    assert figures.all_runs({"ulvlm": runs}, LOOK, heldout=True) is None
    assert figures.by_threshold("ulvlm", {"ntp": []}, LOOK) is None
    assert figures.probe_dots({"ulvlm": {"ntp": [{"probe_accuracy": None}]}}, LOOK, None) is None
    assert importance_figures.by_position("pairs", {"by_position": []}) is None


def test_a_figure_says_in_words_what_it_shows(runs: dict) -> None:
    svg = figures.heldout_curves("hlvlm", runs, LOOK)
    assert svg is not None
    name, says = described(svg)
    assert name == "Held-out loss by step, H-LVLM"
    assert "NTP, w above 0.5 goes from 4.00 at 20 to 4.00 at 40." in says
    assert "PRIOR, w below 0.5 goes from 2.00 at 20 to 2.00 at 40." in says
    curves = figures.loss_curves("ulvlm", runs, LOOK)
    assert curves is not None
    assert "PRIOR goes from 4.90 at 1 to 1.00 at 40." in described(curves)[1]  # 5 - step / 10


def test_all_runs_share_one_axis_and_differ_in_colour_and_dash(runs: dict) -> None:
    svg = figures.all_runs({"ulvlm": runs, "hlvlm": {"prior": runs["prior"]}}, LOOK, heldout=True)
    assert svg is not None
    assert {"U-LVLM NTP", "U-LVLM PRIOR", "H-LVLM PRIOR"} <= set(texts(svg))
    assert "var(--family1)" in svg
    assert "var(--family2)" in svg
    assert "stroke-dasharray" in svg  # NTP
    assert "var(--ntp)" not in svg


def test_the_common_axis_holds_every_curve() -> None:
    low, high = figures.limits([[(0, 1.0), (9, 3.0)], [], [(0, 0.5)]]) or (9, 9)
    assert low < 0.5
    assert low == pytest.approx(0.5 - 0.06 * 2.5)
    assert high == pytest.approx(3 + 0.06 * 2.5)
    assert figures.limits([[], []]) is None


def test_the_probe_as_dots_tells_mean_range_and_the_blind() -> None:
    models = {
        "ulvlm": {
            "ntp": [
                {"probe_accuracy": 0.75, "probe_shuffled_accuracy": 0.5},
                {"probe_accuracy": 0.85, "probe_shuffled_accuracy": 0.48},
            ],
            "rarity": [{"probe_accuracy": 0.7, "probe_shuffled_accuracy": None}],
        }
    }
    svg = figures.probe_dots(models, looks(["ntp", "rarity"]), {"accuracy": 0.5})
    assert svg is not None
    _, says = described(svg)
    assert "U-LVLM NTP: 80.0% right, from 75.0% to 85.0%; 49.0% with shuffled images." in says
    assert "U-LVLM rarity: 70.0% right." in says
    assert "The reference, which reads text only: 50.0%. Chance is 50%." in says
    assert {"U-LVLM NTP", "U-LVLM rarity", "reference, text only"} <= set(texts(svg))
    assert "var(--other1)" in svg


def test_the_histogram_tells_its_halves() -> None:
    edges = [i / 20 for i in range(21)]
    counts = [6] + [0] * 9 + [2] + [0] * 8 + [2]
    svg = importance_figures.histogram(
        "pairs", {"histogram": {"edges": edges, "counts": counts, "related": [1, *counts[1:]]}}
    )
    name, says = described(svg)
    assert name == "Histogram of importance, pairs"
    assert "40% of the tokens have a w of one half or more; 60% lie below 0.05 and 20% above 0.95." in says
    assert "Of the image-related tokens 80% have a w of one half or more." in says


def test_smoothing_is_a_mean_over_neighbours_and_keeps_the_length() -> None:
    assert figures.smooth([1.0, 2.0, 3.0]) == [1.0, 2.0, 3.0]  # short curves stay as they are
    values = [float(i % 2) for i in range(120)]
    smoothed = figures.smooth(values)
    assert len(smoothed) == 120
    assert smoothed[60] == pytest.approx(sum(values[58:63]) / 5)
    assert smoothed[0] == pytest.approx(sum(values[:3]) / 3)


def test_a_curve_counts_every_source_of_captions_and_no_text(runs: dict) -> None:
    """Two sources of captions and a language mix: the first two are the captions."""
    line = {f"source{i}_{name}": value for i in range(3) for name, value in (("share", (0.3, 0.1, 0.6)[i]),)}
    line |= {"source0_ntp_loss": 2.0, "source1_ntp_loss": 4.0, "source2_ntp_loss": 9.0, "ntp_loss": 6.4}
    run = next(iter(runs["ntp"]))
    two = dataclasses.replace(run, train=[{"step": 1, **line}], summary={**run.summary, "train_sources": 2})
    assert figures.loss_points(two) == [(1, pytest.approx((0.3 * 2 + 0.1 * 4) / 0.4))]

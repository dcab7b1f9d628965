from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

from megaprior.analysis import figures
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


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_curves_are_wellformed_svg_in_the_pages_colours_and_the_same_every_time(runs: dict) -> None:
    svg = figures.loss_curves(runs)
    assert svg is not None
    assert figures.loss_curves(runs) == svg
    assert {"NTP", "PRIOR", "step"} <= set(texts(svg))
    assert "var(--ntp)" in svg
    assert "var(--prior)" in svg
    assert "#0" not in svg.replace('href="#', "")  # no placeholder colour is left
    assert texts(svg).count("NTP") == 1  # two seeds, one entry in the legend


def test_heldout_curves_name_the_threshold(runs: dict) -> None:
    svg = figures.heldout_curves(runs)
    assert svg is not None
    assert {"NTP, w above 0.5", "PRIOR, w below 0.5"} <= set(texts(svg))


def test_nothing_to_draw_is_no_figure(runs: dict) -> None:
    for methods in runs.values():
        for run in methods:
            run.evals.clear()
    assert figures.heldout_curves(runs) is None
    assert figures.by_threshold({"ntp": []}) is None
    assert figures.by_position({"by_position": []}) is None


def test_smoothing_is_a_mean_over_neighbours_and_keeps_the_length() -> None:
    assert figures.smooth([1.0, 2.0, 3.0]) == [1.0, 2.0, 3.0]  # short curves stay as they are
    values = [float(i % 2) for i in range(120)]
    smoothed = figures.smooth(values)
    assert len(smoothed) == 120
    assert smoothed[60] == pytest.approx(sum(values[58:63]) / 5)
    assert smoothed[0] == pytest.approx(sum(values[:3]) / 3)

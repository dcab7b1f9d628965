"""The figure of benchmarks.loss: time per arm at the headline shape, and time against the share of loss rows."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from benchmarks.loss_report import floor_ms, measured, short

OURS, PEER, FLOOR = "#0b6e4f", "#9aa5b1", "#c1121f"


def figure(result: dict[str, Any], path: Path) -> None:
    """Write a PNG; nothing when no case has been measured. Raises ImportError without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    headline = next((case for case in result["cases"] if case["operation"] == "fused" and measured(case)), None)
    sweep = sorted((case for case in result["cases"] if case["sweep"]), key=lambda case: case["share"])
    if headline is None:
        return
    sheet = Figure(figsize=(13, 4.6), layout="constrained")
    FigureCanvasAgg(sheet)
    left, right = sheet.subplots(1, 2, width_ratios=(1.15, 1))
    _bars(left, result, headline)
    _sweep(right, result, sweep)
    quick = " (--quick: no measurement)" if result["quick"] else ""
    sheet.suptitle(f"{result['machine']}, {result['date']}{quick}", fontsize=10, x=0.01, ha="left")
    sheet.savefig(path, dpi=130)


def _bars(axes: Any, result: dict[str, Any], case: dict[str, Any]) -> None:
    """One bar per arm, fastest on top, quartiles as whiskers, the floor as a line."""
    arms = measured(case)[::-1]
    middles = [statistics.median(arm["ms"]) for arm in arms]
    floor = floor_ms(result, case)
    colours = [OURS if arm["ours"] else PEER for arm in arms]
    axes.barh(range(len(arms)), middles, color=colours, height=0.62)
    for i, (arm, middle) in enumerate(zip(arms, middles, strict=True)):
        mark = " (inexact)" if arm["inexact"] else ""
        axes.text(middle, i, f" {short(middle)} ms{mark}", va="center", fontsize=8)
    axes.axvline(floor, color=FLOOR, linewidth=1)
    axes.text(floor, len(arms) - 0.45, f" floor {short(floor)} ms", color=FLOOR, fontsize=8, va="bottom")
    axes.set_yticks(range(len(arms)), [arm["name"] for arm in arms], fontsize=8)
    axes.set_xlim(0, max(middles) * 1.22)
    axes.set_ylim(-0.6, len(arms))
    axes.set_xlabel("time of a call, ms (median)")
    axes.set_title(f"Forward + backward, N = {case['rows']:,}, {_shape(case)}", fontsize=10, loc="left")
    _tidy(axes)


def _sweep(axes: Any, result: dict[str, Any], cases: list[dict[str, Any]]) -> None:
    """Time over the share of rows that carry loss: a line per arm, named at its right end."""
    names = dict.fromkeys(arm["name"] for case in cases for arm in measured(case))
    ends: list[tuple[float, str, str]] = []
    for name in names:
        points = [(c["share"], arm) for c in cases for arm in measured(c) if arm["name"] == name]
        shares, times = [100 * share for share, _ in points], [statistics.median(arm["ms"]) for _, arm in points]
        colour = OURS if points[0][1]["ours"] else PEER
        axes.plot(shares, times, marker="o", markersize=3.5, color=colour, linewidth=1.5)
        ends.append((times[-1], name, colour))
    if cases:
        shares = [100 * case["share"] for case in cases]
        axes.plot(shares, [floor_ms(result, case) for case in cases], color=FLOOR, linewidth=1, linestyle="--")
        ends.append((floor_ms(result, cases[-1]), "floor", FLOOR))
        axes.set_title(f"Share of loss rows, N = {cases[0]['rows']:,}, {_shape(cases[0])}", fontsize=10, loc="left")
    top = axes.get_ylim()[1]
    at = -top
    for value, name, colour in sorted(ends):
        at = max(value, at + 0.05 * top)  # labels that would lie on each other move up
        axes.text(102, at, name, color=colour, fontsize=8, va="center", clip_on=False)
    axes.set_xlim(0, 101)
    axes.set_ylim(0, top)
    axes.set_xlabel("rows that carry loss, %")
    axes.set_ylabel("time of a call, ms (median)")
    _tidy(axes)


def _shape(case: dict[str, Any]) -> str:
    return f"H = {case['hidden']:,}, V = {case['vocabulary']:,}, {case['dtype']}"


def _tidy(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)

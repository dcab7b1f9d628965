"""The figure of benchmarks.data: our rate over each arm's, a dot per round."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from benchmarks.data_report import measured, ratios

OURS, PEER, TARGET = "#0b6e4f", "#9aa5b1", "#c1121f"


def figure(result: dict[str, Any], path: Path) -> None:
    """Write a PNG; nothing when no case has been compared. Raises ImportError without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [
        (case, arm, ratios(measured(case, ours=True)[0], arm))
        for case in result["cases"]
        if measured(case, ours=True)
        for arm in measured(case, ours=False)
    ][::-1]
    if not rows:
        return
    sheet = Figure(figsize=(11, 1.4 + 0.42 * len(rows)), layout="constrained")
    FigureCanvasAgg(sheet)
    axes = sheet.subplots()
    for y, (case, arm, found) in enumerate(rows):
        colour = OURS if arm["base"] else PEER
        axes.plot(found, [y] * len(found), "o", markersize=4, alpha=0.5, color=colour)
        centre = statistics.median(found)
        axes.plot([centre], [y], "|", markersize=16, markeredgewidth=2, color=colour)
        axes.text(centre, y + 0.28, f"{centre:.2f}x", fontsize=8, ha="center", color=colour)
        if case["least"] is not None and arm["base"]:
            axes.plot([case["least"]], [y], "|", markersize=16, markeredgewidth=1.5, color=TARGET)
    axes.axvline(1.0, color=PEER, linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_yticks(range(len(rows)), [f"{case['title']} / {arm['name']}" for case, arm, _ in rows], fontsize=8)
    axes.set_ylim(-0.6, len(rows) - 0.2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.set_xlabel("our rate over the arm's, by processor time (dot: a round; red: what the target asks)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    quick = " (--quick: no measurement)" if result["quick"] else ""
    sheet.suptitle(f"{result['machine']}, {result['runs'][0]['date']}{quick}", fontsize=9, x=0.01, ha="left")
    sheet.savefig(path, dpi=130)

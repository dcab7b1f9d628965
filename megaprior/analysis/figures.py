"""Figures as SVG that stands inline in a page and takes the page's colours, so that they read in light and dark.

matplotlib draws in placeholder colours, which become CSS variables. Series differ in dashes and markers too, so that they
read in black and white. The same data give the same bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megaprior.analysis.runs import Run, caption_loss

_VARIABLES = {"#010101": "var(--ink)", "#020202": "var(--faint)", "#030303": "var(--ntp)", "#040404": "var(--prior)"}
_INK, _FAINT, _NTP, _PRIOR = _VARIABLES
_STYLE = {"ntp": {"color": _NTP, "linestyle": (0, (4, 2))}, "prior": {"color": _PRIOR, "linestyle": "-"}}
NAMES = {"ntp": "NTP", "prior": "PRIOR"}


class Chart:
    """One axes on its own; `svg()` gives the finished figure."""

    def __init__(self, *, x: str, y: str, size: tuple[float, float] = (5.0, 3.1)) -> None:
        from matplotlib.figure import Figure

        self.figure = Figure(figsize=size, layout="constrained")
        self.axes = self.figure.add_subplot()
        self.axes.set_xlabel(x, color=_INK)
        self.axes.set_ylabel(y, color=_INK)
        self.axes.tick_params(colors=_INK, length=0)
        self.axes.grid(axis="y", color=_FAINT, linewidth=0.7)
        self.axes.set_axisbelow(True)
        for side, spine in self.axes.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_color(_INK)

    def svg(self, *, title: str) -> str:
        """The figure as an <svg> element, `title` for those who cannot see it."""
        import matplotlib

        handles, _ = self.axes.get_legend_handles_labels()
        if handles:
            place = {
                "loc": "lower left",
                "bbox_to_anchor": (-0.02, 1.0),
                "ncols": 2,
            }  # above the axes: never over a line
            self.axes.legend(frameon=False, labelcolor=_INK, handlelength=3, **place)
        file = io.StringIO()
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 10.5}):
            metadata = {"Date": None, "Creator": None, "Format": None, "Type": None, "Title": title}
            self.figure.savefig(file, format="svg", transparent=True, metadata=metadata)
        return _inlined(file.getvalue())


def _inlined(svg: str) -> str:
    """Placeholder colours become variables, the page's font is used, and ids are told apart from other figures'."""
    svg = svg[svg.index("<svg") :]
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    return re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)


# ---------------------------------------------------------------- the figures


def loss_curves(runs: Mapping[str, Sequence[Run]]) -> str | None:
    """Training: unweighted loss of the captions by step, smoothed; one line a run."""
    chart = Chart(x="step", y="loss per caption token, nats")
    for method, seeds in runs.items():
        for number, run in enumerate(seeds):
            pairs = len(run.trajectory.get("data.train") or []) or 1
            steps = [line["step"] for line in run.train]
            losses = smooth([caption_loss(line, pairs) for line in run.train])
            label = NAMES[method] if number == 0 else None
            chart.axes.plot(steps, losses, linewidth=1.8, label=label, **_STYLE[method])
    return chart.svg(title="Training loss by step") if chart.axes.lines else None


def heldout_curves(runs: Mapping[str, Sequence[Run]]) -> str | None:
    """Held-out loss by step, of the tokens above and below the threshold on w where the runs measured that."""
    chart, drawn = Chart(x="step", y="held-out loss, nats"), False
    for method, seeds in runs.items():
        for number, run in enumerate(seeds):
            split = [line for line in run.evals if "heldout_ntp_above" in line]
            names = {"heldout_ntp_above": "o", "heldout_ntp_below": "s"} if split else {"heldout_ntp": "o"}
            for name, marker in names.items():
                lines = [line for line in run.evals if name in line]
                drawn = drawn or bool(lines)
                words = {"heldout_ntp_above": ", w above ", "heldout_ntp_below": ", w below "}.get(name)
                label = NAMES[method] + (f"{words}{lines[0]['threshold']:g}" if words and lines else "")
                chart.axes.plot(
                    [line["step"] for line in lines],
                    [line[name] for line in lines],
                    marker=marker,
                    markersize=4,
                    label=label if number == 0 else None,
                    **_STYLE[method],
                )
    return chart.svg(title="Held-out loss by step") if drawn else None


def by_threshold(tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> str | None:
    """Fig. 9: held-out loss of the tokens with w above and below a threshold, for each method."""
    chart = Chart(x="threshold on w", y="held-out loss, nats")
    for method, table in tables.items():
        for side, marker in (("above", "o"), ("below", "s")):
            points = [(row["threshold"], row[side]) for row in table if row[side] is not None]
            if points:
                label = f"{NAMES[method]}, w {side}"
                chart.axes.plot(*zip(*points, strict=True), marker=marker, markersize=4, label=label, **_STYLE[method])
    return chart.svg(title="Held-out loss above and below a threshold on importance") if chart.axes.lines else None


def histogram(summary: Mapping[str, Any]) -> str:
    """How importance is distributed over tokens, in shares; stacked by class where the truth is known."""
    chart = Chart(x="importance w", y="share of tokens")
    edges, counts = np.array(summary["histogram"]["edges"]), np.array(summary["histogram"]["counts"])
    shares = counts / max(counts.sum(), 1)
    related = summary["histogram"].get("related")
    width = np.diff(edges) * 0.9
    label = "all tokens" if related is None else "other words"
    low = np.zeros_like(shares) if related is None else np.array(related) / max(counts.sum(), 1)
    if related is not None:
        chart.axes.bar(edges[:-1], low, width, align="edge", color=_PRIOR, label="image-related words")
    chart.axes.bar(
        edges[:-1],
        shares - low,
        width,
        bottom=low,
        align="edge",
        color="none",
        edgecolor=_NTP,
        hatch="////",
        label=label,
    )
    return chart.svg(title="Histogram of importance")


def by_length(summary: Mapping[str, Any]) -> str | None:
    """Fig. 8: mean importance of a caption by its length."""
    bins = summary["by_length"]["bins"]
    if len(bins) < 2:
        return None
    chart = Chart(x="caption length, tokens", y="mean w of the caption")
    chart.axes.plot([b["length"] for b in bins], [b["mean_w"] for b in bins], marker="o", markersize=4, color=_PRIOR)
    return chart.svg(title="Mean importance by caption length")


def by_position(summary: Mapping[str, Any]) -> str | None:
    """Fig. 8: mean importance by position in the caption."""
    points = summary["by_position"]
    if len(points) < 2:
        return None
    chart = Chart(x="position in the caption, tokens", y="mean w")
    positions = [p["position"] for p in points]
    chart.axes.plot(positions, [p["mean_w"] for p in points], marker="o", markersize=3, color=_PRIOR)
    return chart.svg(title="Mean importance by position")


def smooth(values: Sequence[float]) -> list[float]:
    """Mean over a centred window of about a thirtieth of the curve; shorter at its ends."""
    half = len(values) // 60
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    return ((sums[high] - sums[low]) / np.maximum(high - low, 1)).tolist()

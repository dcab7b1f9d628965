"""The figures of importance: its histogram, and the paper's Fig. 8 by length and by position."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from megaprior.analysis.chart import COLOURS, Chart
from megaprior.analysis.tables import number, percent


def histogram(name: str, summary: Mapping[str, Any]) -> str:
    """How importance is distributed over tokens, in shares; stacked by class where the truth is known."""
    chart = Chart(x="importance w", y="share of tokens")
    edges, counts = np.array(summary["histogram"]["edges"]), np.array(summary["histogram"]["counts"])
    shares = counts / max(counts.sum(), 1)
    related = summary["histogram"].get("related")
    width = np.diff(edges) * 0.9
    label = "all tokens" if related is None else "other words"
    low = np.zeros_like(shares) if related is None else np.array(related) / max(counts.sum(), 1)
    place = {"align": "edge", "width": width}
    if related is not None:
        chart.axes.bar(edges[:-1], low, color=COLOURS["prior"], label="image-related words", **place)
    hollow = {"color": "none", "edgecolor": COLOURS["ntp"], "hatch": "////"}
    chart.axes.bar(edges[:-1], shares - low, bottom=low, label=label, **hollow, **place)
    half = float(shares[edges[:-1] >= 0.5].sum())
    says = [
        f"{percent(half, 0)} of the tokens have a w of one half or more; {percent(float(shares[0]), 0)} lie below "
        f"{number(float(edges[1]))} and {percent(float(shares[-1]), 0)} above {number(float(edges[-2]))}."
    ]
    if related is not None and sum(related):
        upper = float(low[edges[:-1] >= 0.5].sum() / low.sum())
        says.append(f"Of the image-related tokens {percent(upper, 0)} have a w of one half or more.")
    return chart.svg(title=f"Histogram of importance, {name}", says=says)


def by_length(name: str, summary: Mapping[str, Any]) -> str | None:
    """Fig. 8: mean importance of a caption by its length."""
    bins = summary["by_length"]["bins"]
    if len(bins) < 2:
        return None
    chart = Chart(x="caption length, tokens", y="mean w of the caption")
    style = {"marker": "o", "markersize": 4, "color": COLOURS["prior"]}
    chart.axes.plot([b["length"] for b in bins], [b["mean_w"] for b in bins], **style)
    says = [
        f"Mean w {number(bins[0]['mean_w'])} in captions of about {bins[0]['length']:.0f} tokens, "
        f"{number(bins[-1]['mean_w'])} in captions of about {bins[-1]['length']:.0f}; "
        f"Pearson's r is {number(summary['by_length']['r'], 3)}."
    ]
    return chart.svg(title=f"Mean importance by caption length, {name}", says=says)


def by_position(name: str, summary: Mapping[str, Any]) -> str | None:
    """Fig. 8: mean importance by position in the caption."""
    points = summary["by_position"]
    if len(points) < 2:
        return None
    chart = Chart(x="position in the caption, tokens", y="mean w")
    style = {"marker": "o", "markersize": 3, "color": COLOURS["prior"]}
    chart.axes.plot([p["position"] for p in points], [p["mean_w"] for p in points], **style)
    first, last = points[0], points[-1]
    says = [
        f"Mean w {number(first['mean_w'])} at position {first['position']}, {number(last['mean_w'])} at position "
        f"{last['position']}."
    ]
    return chart.svg(title=f"Mean importance by position, {name}", says=says)

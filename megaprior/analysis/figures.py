"""The figures of runs: losses by step and by importance, and the probe as dots. Each says its numbers in words too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from megaprior.analysis.chart import COLOURS, INK, Chart
from megaprior.analysis.names import Look, family_name, method_name
from megaprior.analysis.runs import Run, caption_loss
from megaprior.analysis.tables import number, percent

Runs = Mapping[str, Sequence[Run]]  # method -> seeds
_FAMILIES = (("family1", "o"), ("family2", "s"))  # colour and marker of the first and the second family
_SPLIT = {"heldout_ntp_above": "o", "heldout_ntp_below": "s"}


def _style(look: Look) -> dict[str, Any]:
    return {"color": COLOURS[look.css], "linestyle": "-" if look.dash is None else (0, look.dash)}


def _from_to(name: str, points: Sequence[tuple[float, float]]) -> str:
    (x, first), (last_x, last) = points[0], points[-1]
    return f"{name} goes from {number(first)} at {x:g} to {number(last)} at {last_x:g}."


# ---------------------------------------------------------------- by step


def loss_points(run: Run) -> list[tuple[float, float]]:
    """(step, unweighted loss of the captions), smoothed."""
    pairs = run.summary.get("train_sources", 1)
    steps = [line["step"] for line in run.train]
    return list(zip(steps, smooth([caption_loss(line, pairs) for line in run.train]), strict=True))


def heldout_points(run: Run, name: str = "heldout_ntp") -> list[tuple[float, float]]:
    """(step, held-out loss) where the run measured `name`."""
    return [(line["step"], line[name]) for line in run.evals if line.get(name) is not None]


def limits(curves: Iterable[Sequence[tuple[float, float]]]) -> tuple[float, float] | None:
    """A y axis that holds all the curves, with a little room; None without any."""
    values = [y for points in curves for _, y in points]
    if not values:
        return None
    room = max(max(values) - min(values), 0.1) * 0.06
    return min(values) - room, max(values) + room


def loss_curves(
    family: str, runs: Runs, look: Mapping[str, Look], *, y: tuple[float, float] | None = None
) -> str | None:
    """Training: unweighted loss of the captions by step, smoothed; one line a run."""
    chart, says = Chart(x="step", y="loss per caption token, nats"), []
    for method, seeds in runs.items():
        for at, points in enumerate(filter(None, map(loss_points, seeds))):
            label = look[method].name if at == 0 else None
            chart.axes.plot(*zip(*points, strict=True), linewidth=1.8, label=label, **_style(look[method]))
            says.append(_from_to(look[method].name, points))
    chart.limits(y)
    return chart.svg(title=f"Training loss by step, {family_name(family)}", says=says) if says else None


def heldout_curves(
    family: str, runs: Runs, look: Mapping[str, Look], *, y: tuple[float, float] | None = None
) -> str | None:
    """Held-out loss by step, of the tokens above and below the threshold on w where the runs measured that."""
    chart, says, named = Chart(x="step", y="held-out loss, nats"), [], set()
    for method, seeds in runs.items():
        for run in seeds:
            split = any(name in line for line in run.evals for name in _SPLIT)
            for name, marker in (_SPLIT if split else {"heldout_ntp": "o"}).items():
                points = heldout_points(run, name)
                if not points:
                    continue
                words = {"heldout_ntp_above": ", w above ", "heldout_ntp_below": ", w below "}.get(name)
                threshold = next(line["threshold"] for line in run.evals if name in line) if words else None
                label = look[method].name + (f"{words}{threshold:g}" if words else "")
                shown = None if label in named else label
                named.add(label)
                style = _style(look[method])
                chart.axes.plot(*zip(*points, strict=True), marker=marker, markersize=4, label=shown, **style)
                says.append(_from_to(label, points))
    chart.limits(y)
    return chart.svg(title=f"Held-out loss by step, {family_name(family)}", says=says) if says else None


def all_runs(runs: Mapping[str, Runs], look: Mapping[str, Look], *, heldout: bool) -> str | None:
    """Every run of every family on one axis: the family by colour and marker, the method by its dash."""
    chart, says = Chart(x="step", y="held-out loss, nats" if heldout else "training loss, nats"), []
    for (family, methods), (colour, marker) in zip(runs.items(), _repeated(_FAMILIES), strict=False):
        for method, seeds in methods.items():
            name = f"{family_name(family)} {method_name(method)}"
            curves = [heldout_points(run) if heldout else loss_points(run) for run in seeds]
            for at, points in enumerate(filter(None, curves)):
                style = {**_style(look[method]), "color": COLOURS[colour]}
                if heldout:
                    style |= {"marker": marker, "markersize": 4.5}
                chart.axes.plot(*zip(*points, strict=True), label=name if at == 0 else None, linewidth=1.6, **style)
                says.append(_from_to(name, points))
    title = f"{'Held-out' if heldout else 'Training'} loss by step, all runs"
    return chart.svg(title=title, says=says) if says else None


def _repeated(values: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    return list(values) * 8


# ---------------------------------------------------------------- by importance (Fig. 9)


def threshold_limits(tables: Iterable[Sequence[Mapping[str, Any]]]) -> tuple[float, float] | None:
    """A y axis for the threshold tables of all families."""
    return limits(
        [(row["threshold"], row[side]) for row in table for side in ("above", "below") if row[side] is not None]
        for table in tables
    )


def by_threshold(
    family: str,
    tables: Mapping[str, Sequence[Mapping[str, Any]]],
    look: Mapping[str, Look],
    *,
    y: tuple[float, float] | None = None,
) -> str | None:
    """Fig. 9: held-out loss of the tokens with w above and below a threshold, for each method."""
    chart, says = Chart(x="threshold on w", y="held-out loss, nats"), []
    for method, table in tables.items():
        for side, marker in (("above", "o"), ("below", "s")):
            points = [(row["threshold"], row[side]) for row in table if row[side] is not None]
            if points:
                label = f"{look[method].name}, w {side}"
                style = _style(look[method])
                chart.axes.plot(*zip(*points, strict=True), marker=marker, markersize=4, label=label, **style)
                says.append(_from_to(label, points))
    chart.limits(y)
    title = f"Held-out loss above and below a threshold on importance, {family_name(family)}"
    return chart.svg(title=title, says=says) if says else None


# ---------------------------------------------------------------- the probe


def probe_dots(
    models: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]],
    look: Mapping[str, Look],
    reference: Mapping[str, Any] | None,
) -> str | None:
    """One line a method: a dot a seed (open with shuffled images), a bar at the mean; chance is the vertical line."""
    rows = [
        (f"{family_name(family)} {method_name(method)}", look[method], known)
        for family, methods in models.items()
        for method, seeds in methods.items()
        if (known := [row for row in seeds if row.get("probe_accuracy") is not None])
    ]
    if not rows:
        return None
    names = [name for name, _, _ in rows] + (["reference, text only"] if reference is not None else [])
    chart = Chart(x="statements told right, %", y="", size=(5.6, 0.8 + 0.34 * len(names)))
    says = []
    for at, (name, drawn, known) in enumerate(rows):
        colour, right = COLOURS[drawn.css], [100 * row["probe_accuracy"] for row in known]
        shuffled = [row.get("probe_shuffled_accuracy") for row in known]
        blind = [100 * value for value in shuffled if value is not None]
        chart.axes.plot(right, [at] * len(right), "o", color=colour, markersize=6.5, alpha=0.85)
        chart.axes.plot(blind, [at] * len(blind), "o", color=colour, markersize=6.5, fillstyle="none")
        chart.axes.plot([np.mean(right)] * 2, [at - 0.32, at + 0.32], color=colour, linewidth=2.2)
        spread = f", from {percent(min(right) / 100)} to {percent(max(right) / 100)}" if len(right) > 1 else ""
        text = f"{name}: {percent(float(np.mean(right)) / 100)} right{spread}"
        says.append(f"{text}; {percent(float(np.mean(blind)) / 100)} with shuffled images." if blind else f"{text}.")
    if reference is not None:
        chart.axes.plot([100 * reference["accuracy"]], [len(rows)], "D", color=INK, markersize=5.5)
        says.append(f"The reference, which reads text only: {percent(reference['accuracy'])}. Chance is 50%.")
    chart.axes.axvline(50, color=INK, linewidth=0.8, linestyle=(0, (1, 2)))
    chart.axes.set_yticks(range(len(names)), names)
    chart.axes.set_ylim(len(names) - 0.4, -0.6)
    chart.axes.grid(axis="y", visible=False)
    return chart.svg(title="The probe: true statements told from false ones, all runs", says=says)


def smooth(values: Sequence[float]) -> list[float]:
    """Mean over a centred window of about a thirtieth of the curve; shorter at its ends."""
    half = len(values) // 60
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    return ((sums[high] - sums[low]) / np.maximum(high - low, 1)).tolist()

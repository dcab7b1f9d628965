"""Plain rows for results.json and for the report's tables; numbers stay numbers, what is not known is None."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from megaprior.analysis.runs import Run

UNKNOWN, _MINUS = "\u2013", "\u2212"  # an en dash and a minus sign as typographers set it

# field of results.json -> where it comes from
_HELDOUT = (
    "loss",
    "loss_related",
    "loss_unrelated",
    "shuffle_gap",
    "shuffle_gap_interval",
    "shuffle_gap_related",
    "shuffle_gap_unrelated",
    "thresholds",
)
_PROBE = {
    "probe_accuracy": "accuracy",
    "probe_interval": "interval",
    "probe_shuffled_accuracy": "shuffled_accuracy",
    "probe_shuffled_interval": "shuffled_interval",
    "probe_by_attribute": "by_attribute",
    "probe_items": "items",
}


def model_row(run: Run) -> dict[str, Any]:
    """One trained model's entry in results.json."""
    heldout = run.heldout["summary"] if run.heldout else {}
    probe = run.probe or {}
    return {
        "seed": run.seed,
        "steps": run.summary.get("steps"),
        **{name: heldout.get(name) for name in _HELDOUT},
        **{name: probe.get(source) for name, source in _PROBE.items()},
        "run": run.folder.name,
    }


def stage_row(summary: Mapping[str, Any], train: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """Time and memory of one stage, from its run's summary or from a line of `times`; of a run also what its steps logged.

    `fill` is the mean share of a row's places that hold a real token, `data_wait_s` the seconds that the logged steps waited for
    data, and `data_wait_share` their share of those steps' time.
    """
    fields = ("wall_s", "peak_memory_mib", "steps", "loss_tokens_per_s", "restarts", "command")
    wait, seconds = _sum(train, "data_wait_s"), _sum(train, "step_s")
    return {
        **{field: summary.get(field) for field in fields},
        "fill": mean(train, "fill"),
        "data_wait_s": wait,
        "data_wait_share": wait / seconds if wait is not None and seconds else None,
    }


def _sum(rows: Sequence[Mapping[str, Any]], field: str) -> float | None:
    """Sum of a field; None unless every row has it."""
    average = mean(rows, field)
    return None if average is None else average * len(rows)


def stage_times(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """`stage_row` by stage of lines of `times`: attempts at one stage (a kill and its repetition) add up in time."""
    stages: dict[str, dict[str, Any]] = {}
    for line in lines:
        row = stage_row(line)
        before = stages.get(str(line.get("stage")), row | {"wall_s": None, "peak_memory_mib": None})
        for field, joined in (("wall_s", sum), ("peak_memory_mib", max)):
            known = [value for value in (before[field], row[field]) if value is not None]
            row[field] = joined(known) if known else None
        stages[str(line.get("stage"))] = row
    return stages


def mean(rows: Sequence[Mapping[str, Any]], field: str) -> float | None:
    """Mean of a field over seeds; None unless every row has it."""
    values = [row.get(field) for row in rows]
    if not values or any(value is None for value in values):
        return None
    return sum(values) / len(values)  # type: ignore[arg-type]


def spread(rows: Sequence[Mapping[str, Any]], field: str) -> dict[str, Any] | None:
    """Of a field over two seeds or more: mean, low, high, and the sample standard deviation where there are three.

    None for a single seed, or where a seed has no value.
    """
    average = mean(rows, field)
    if average is None or len(rows) < 2:
        return None
    values = [float(row[field]) for row in rows]
    deviation = statistics.stdev(values) if len(values) >= 3 else None
    return {"mean": average, "low": min(values), "high": max(values), "std": deviation, "seeds": len(values)}


def threshold_means(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The threshold tables (Fig. 9) of several seeds as one, by mean."""
    tables = [row["thresholds"] for row in rows if row.get("thresholds")]
    if not tables:
        return []
    return [
        {name: mean(cells, name) for name in ("threshold", "share_above", "above", "below")}
        for cells in zip(*tables, strict=True)
    ]


# ---------------------------------------------------------------- numbers as people read them


def percent(value: float | None, digits: int = 1) -> str:
    """0.7345 -> "73.5%"."""
    return UNKNOWN if value is None else f"{value:.{digits}%}"


def number(value: float | None, digits: int = 2) -> str:
    """1234.5 -> "1,234.50"."""
    return UNKNOWN if value is None else f"{value:,.{digits}f}".replace("-", _MINUS)


def signed(value: float | None, digits: int = 2) -> str:
    """0.5 -> "+0.50"."""
    return UNKNOWN if value is None else f"{value:+,.{digits}f}".replace("-", _MINUS)


def duration(seconds: float | None) -> str:
    """78.2 -> "1 min 18 s"."""
    if seconds is None:
        return UNKNOWN
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def memory(mib: float | None) -> str:
    """812.4 -> "812 MiB", 3300 -> "3.2 GiB"."""
    if mib is None:
        return UNKNOWN
    return f"{mib / 1024:.1f} GiB" if mib >= 1024 else f"{mib:.0f} MiB"


def setting(value: object) -> str:
    """A configuration's value as it would be typed; what is missing is a dash."""
    if value is None:
        return UNKNOWN
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) else json.dumps(value, default=str)

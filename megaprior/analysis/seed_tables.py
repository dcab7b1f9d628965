"""Tables with a row a seed, then the mean over seeds and their spread; numbers as people read them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megaprior.analysis.names import Look, family_name
from megaprior.analysis.tables import UNKNOWN, number, percent, signed, spread

Rows = Sequence[Mapping[str, Any]]  # of results.json, one a seed


@dataclass(frozen=True)
class Column:
    """One column: a field of a model's row, and how its numbers are written."""

    head: str
    field: str
    shown: Callable[[float | None, int], str]
    digits: int
    mean: bool = True  # False: a pair of bounds, which has no mean


HELDOUT = (
    Column("all tokens", "loss", number, 3),
    Column("w above 0.5", "above", number, 3),
    Column("w below 0.5", "below", number, 3),
    Column("image-related words", "loss_related", number, 3),
    Column("all other words", "loss_unrelated", number, 3),
    Column("change with shuffled images", "shuffle_gap", signed, 3),
    Column("its 95% interval", "shuffle_gap_interval", signed, 3, mean=False),
    Column("the same on image-related words", "shuffle_gap_related", signed, 3),
)
PROBE = (
    Column("right", "probe_accuracy", percent, 1),
    Column("95% interval", "probe_interval", percent, 1, mean=False),
    Column("images shuffled", "probe_shuffled_accuracy", percent, 1),
)
OVERVIEW = (*HELDOUT[:4], HELDOUT[5], Column("probe right", "probe_accuracy", percent, 1))


def with_halves(row: Mapping[str, Any]) -> dict[str, Any]:
    """A model's row with its losses of the tokens above and below w = 0.5."""
    half = next((cells for cells in row.get("thresholds") or [] if cells["threshold"] == 0.5), {})
    return {**row, "above": half.get("above"), "below": half.get("below")}


def known(columns: Sequence[Column], methods: Mapping[str, Rows]) -> list[Column]:
    """The columns in which any row has a value."""
    rows = [with_halves(row) for seeds in methods.values() for row in seeds]
    return [column for column in columns if any(row.get(column.field) is not None for row in rows)]


def seed_table(
    methods: Mapping[str, Rows], look: Mapping[str, Look], columns: Sequence[Column]
) -> list[dict[str, Any]]:
    """Rows of text: each seed's, and where there are several also their mean and their spread.

    The spread is the sample standard deviation of three seeds or more, and both values of two.
    """
    table = []
    for method, seeds in methods.items():
        rows = [with_halves(row) for row in seeds]
        head = {"name": look[method].name, "css": look[method].css}
        for row in rows:
            cells = [_cell(column, row.get(column.field)) for column in columns]
            table.append({**head, "kind": "seed", "label": str(row["seed"]), "cells": cells, "row": row})
        if len(rows) > 1:
            spreads = [spread(rows, column.field) if column.mean else None for column in columns]
            pairs = list(zip(columns, spreads, strict=True))
            means = [_cell(column, found["mean"]) if found else UNKNOWN for column, found in pairs]
            label = "std. dev." if len(rows) > 2 else "min to max"
            table.append({**head, "kind": "mean", "label": f"mean of {len(rows)}", "cells": means, "row": None})
            ranges = [_spread(column, found) for column, found in pairs]
            table.append({**head, "kind": "spread", "label": label, "cells": ranges, "row": None})
    return table


def overview(
    models: Mapping[str, Mapping[str, Rows]], look: Mapping[str, Look]
) -> tuple[list[str], list[dict[str, Any]]]:
    """Family by method: the heads of the columns, and rows with a mean over seeds and its range in each cell."""
    flat = {f"{family} {method}": rows for family, methods in models.items() for method, rows in methods.items()}
    columns = known(OVERVIEW, flat)
    table = []
    for family, methods in models.items():
        for method, seeds in methods.items():
            rows = [with_halves(row) for row in seeds]
            cells = []
            for column in columns:
                found = spread(rows, column.field)
                value = found["mean"] if found else rows[0].get(column.field) if len(rows) == 1 else None
                ends = f"{_cell(column, found['low'])} to {_cell(column, found['high'])}" if found else ""
                cells.append({"value": _cell(column, value), "range": ends})
            names = {"family": family_name(family), "name": look[method].name, "css": look[method].css}
            table.append({**names, "seeds": len(rows), "cells": cells})
    return [column.head for column in columns], table


def _cell(column: Column, value: Any) -> str:
    if value is None:
        return UNKNOWN
    if not column.mean and isinstance(value, Sequence):
        return " to ".join(column.shown(bound, column.digits) for bound in value)
    return column.shown(value, column.digits)


def _spread(column: Column, found: Mapping[str, Any] | None) -> str:
    if found is None:
        return UNKNOWN
    if found["std"] is None:
        return f"{_cell(column, found['low'])} to {_cell(column, found['high'])}"
    plain = number if column.shown is signed else column.shown
    return f"± {plain(found['std'], column.digits)}"

"""Any two runs against each other: held-out losses on the same tokens, the probe, and which settings differ.

Letters: N loss tokens that both runs were measured on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, zip_longest
from typing import Any

import numpy as np

from megaprior.analysis.bootstrap import intervals, owners, per_image
from megaprior.analysis.importance import RELATED
from megaprior.analysis.losses import TokenLosses
from megaprior.analysis.names import run_label
from megaprior.analysis.runs import Run

MOST = 6  # runs that are compared with each other: 15 pairs
_HALF = 0.5  # of w
_CONTEXT = ("world", "precision")  # what a summary says beside its trajectory and its data


def comparisons(runs: Mapping[str, Mapping[str, Sequence[Run]]], *, most: int = MOST) -> dict[str, Any]:
    """Every pair of the first `most` runs; the first seeds of all methods come before any second seed.

    Returns:
        {"runs": labels of those compared, "left_out": labels of the others, "pairs": [`compare(...)`]}.
    """
    several = len(runs) > 1
    columns = [
        [(run_label(family, method, run.seed, several=several), run) for run in seeds]
        for family, methods in runs.items()
        for method, seeds in methods.items()
    ]
    given = [entry for seeds in zip_longest(*columns) for entry in seeds if entry is not None]
    labels = [label for label, _ in given]
    given = [(n if labels.count(n) == 1 else f"{n} ({run.folder.name})", run) for n, run in given]
    pairs = [compare(a, b, names=(one, other)) for (one, a), (other, b) in combinations(given[:most], 2)]
    return {"runs": [n for n, _ in given[:most]], "left_out": [n for n, _ in given[most:]], "pairs": pairs}


def compare(a: Run, b: Run, *, names: tuple[str, str]) -> dict[str, Any]:
    """Run `b` against run `a`: every difference is b minus a.

    Returns:
        {"a", "b": names, "heldout": rows by kind of token, or None and then "why" says why not, "probe": both accuracies,
        "differs": [{"key", "a", "b"}]}.
    """
    why = _not_comparable(a, b)
    rows = None
    if why is None:
        assert a.losses is not None
        assert b.losses is not None
        rows = heldout_difference(a.losses, b.losses)
    return {
        "a": names[0],
        "b": names[1],
        "heldout": rows,
        "why": why,
        "probe": _probe(a, b),
        "differs": differing(settings(a), settings(b)),
    }


# ---------------------------------------------------------------- held-out losses


def _not_comparable(a: Run, b: Run) -> str | None:
    if a.losses is None or b.losses is None:
        return "`megaprior evaluate --shards` has not measured both runs"
    if (a.heldout or {}).get("build_id") != (b.heldout or {}).get("build_id"):
        return "their losses are of different shards"
    same = all(np.array_equal(getattr(a.losses, name), getattr(b.losses, name)) for name in ("ids", "cu", "image"))
    return None if same else "their losses are of different captions, or of captions cut at different tokens"


def heldout_difference(a: TokenLosses, b: TokenLosses) -> dict[str, dict[str, Any]]:
    """Mean NLL of both and their paired difference, b minus a, over all tokens, by importance, and on image-related words.

    The 95% interval is a bootstrap over images of the difference on the same tokens: what the two runs share (which captions are
    hard) cancels out. A kind of token that is not known or does not occur is left out.
    """
    masks = {"all": np.ones(len(a.nll), dtype=bool)}
    if a.w is not None:
        masks |= {"above": a.w > _HALF, "below": a.w <= _HALF}
    if a.word_class is not None:
        masks["related"] = a.word_class == RELATED
    masks = {name: mask for name, mask in masks.items() if mask.any()}
    if not masks:
        return {}
    change = b.nll.astype(np.float64) - a.nll
    owner = owners(a.image, a.cu)
    sums, counts = (
        np.stack(part, axis=1) for part in zip(*(per_image(owner, change, m) for m in masks.values()), strict=True)
    )
    found = {}
    for (name, mask), bounds in zip(masks.items(), intervals(sums, counts), strict=True):
        found[name] = {
            "a": float(a.nll[mask].mean(dtype=np.float64)),
            "b": float(b.nll[mask].mean(dtype=np.float64)),
            "difference": float(change[mask].mean()),
            "interval": bounds,
            "tokens": int(mask.sum()),
            "images": int((counts[:, list(masks).index(name)] > 0).sum()),
        }
    return found


def _probe(a: Run, b: Run) -> dict[str, Any] | None:
    if a.probe is None or b.probe is None or a.probe.get("items") != b.probe.get("items"):
        return None
    one, other = a.probe["accuracy"], b.probe["accuracy"]
    bounds = sorted(probe["interval"] for probe in (a.probe, b.probe) if probe.get("interval"))
    overlap = bounds[1][0] <= bounds[0][1] if len(bounds) == 2 else None
    return {"a": one, "b": other, "difference": other - one, "overlap": overlap}


# ---------------------------------------------------------------- settings


def settings(run: Run) -> dict[str, Any]:
    """Everything a run was told or given, flat: its trajectory, its data by content, and on how many processes."""
    data = {key: value for key, value in (run.summary.get("data") or {}).items() if key != "weighting"}
    if "sources" in data:  # a scorer is who it is by its fingerprint; the rest of its record follows from that
        data["sources"] = [{**s, "scorer": (s.get("scorer") or {}).get("fingerprint")} for s in data["sources"]]
    context = {key: run.summary[key] for key in _CONTEXT if key in run.summary}
    return {**context, **_flat(data, "data."), **run.trajectory}


def differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Keys whose values differ, with both values; None where a run does not have the key."""
    keys = sorted({*a, *b})
    return [{"key": key, "a": a.get(key), "b": b.get(key)} for key in keys if a.get(key) != b.get(key)]


def _flat(value: Any, prefix: str) -> dict[str, Any]:
    """{"data.": {"sources": [{"weight": 1}]}} -> {"data.sources.0.weight": 1}."""
    if isinstance(value, dict) and value:
        return {k: v for key, part in value.items() for k, v in _flat(part, f"{prefix}{key}.").items()}
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        return {k: v for at, part in enumerate(value) for k, v in _flat(part, f"{prefix}{at}.").items()}
    return {prefix.rstrip("."): value}

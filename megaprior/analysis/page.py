"""From the numbers of results.json to one HTML page: no script, nothing loaded, every value escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megaprior.analysis import figures, tables
from megaprior.analysis.findings import FAMILIES, caveats, findings
from megaprior.analysis.runs import Run

_HERO_TOKENS = 48  # the longest caption up to here stands at the top


def render(
    body: Mapping[str, Any],
    *,
    runs: Mapping[str, Mapping[str, Sequence[Run]]],
    captions: Sequence[Mapping[str, Any]],
    title: str,
) -> str:
    """The page for what stands in results.json (`body`), with the curves of `runs` and the `captions` of `caption_views`."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("megaprior.analysis"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for each in (tables.percent, tables.number, tables.signed, tables.duration, tables.memory):
        environment.filters[each.__name__] = each
    loader = environment.loader
    assert loader is not None
    # These two go in as they are: our own style sheet, and SVG in which matplotlib has escaped every text.
    style = Markup(loader.get_source(environment, "report.css")[0])
    drawn = {name: Markup(svg) for name, svg in _figures(body, runs).items() if svg}
    first = next(iter(runs.values()), {})
    measured = [method for method, seeds in first.items() if seeds[0].losses is not None]
    rows = [row for methods in body["models"].values() for seeds in methods.values() for row in seeds]
    return environment.get_template("report.html").render(
        **body,
        title=title,
        style=style,
        figures=drawn,
        captions=captions,
        hero=max(
            (c for c in captions if len(c["tokens"]) <= _HERO_TOKENS), key=lambda c: len(c["tokens"]), default=None
        ),
        findings=findings(body),
        caveats=caveats(body),
        keys=_keys(body),
        names=figures.NAMES,
        families=FAMILIES,
        has_losses=measured,
        has_w=any("--w:" in token["style"] for caption in captions for token in caption["tokens"]),
        has_change=len(measured) == 2,
        has_truth=any(row["loss_related"] is not None for row in rows),
        has_probe={family: _probe_items(methods) for family, methods in body["models"].items()},
        threshold_rows={family: _threshold_rows(methods) for family, methods in body["models"].items()},
        attribute_rows={family: _attribute_rows(methods) for family, methods in body["models"].items()},
    )


def _figures(body: Mapping[str, Any], runs: Mapping[str, Mapping[str, Sequence[Run]]]) -> dict[str, str | None]:
    drawn: dict[str, str | None] = {}
    for family, methods in runs.items():
        drawn[f"train {family}"] = figures.loss_curves(methods)
        drawn[f"heldout {family}"] = figures.heldout_curves(methods)
        rows = body["models"][family]
        drawn[f"threshold {family}"] = figures.by_threshold({m: tables.threshold_means(rows[m]) for m in rows})
    for name, summary in body["importance_by_shards"].items():
        drawn[f"histogram {name}"] = figures.histogram(summary)
        drawn[f"length {name}"] = figures.by_length(summary)
        drawn[f"position {name}"] = figures.by_position(summary)
    return drawn


_COMPARED = (
    ("loss_related", "held-out loss on image-related words, nats per token; lower is better", tables.number),
    ("loss_unrelated", "held-out loss on all other words; lower is better", tables.number),
    ("probe_accuracy", "of true statements told from false ones; 50% is chance", tables.percent),
)


def _keys(body: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The few numbers that stand large at the top."""
    keys = []
    importance = body["importance"]
    if importance.get("auroc") is not None:
        keys.append((tables.number(importance["auroc"]), "AUROC of importance for image-related words; 0.50 is chance"))
    elif importance.get("mean") is not None:
        keys.append((tables.number(importance["mean"]), "mean importance of a caption token"))
    for methods in body["models"].values():
        for field, words, shown in _COMPARED:
            values = {method: tables.mean(rows, field) for method, rows in methods.items()}
            known = {method: shown(value) for method, value in values.items() if value is not None}
            if known:
                names = " \u2192 ".join(figures.NAMES[method] for method in known)
                keys.append((" \u2192 ".join(known.values()), f"{names}: {words}"))
    return keys


def _probe_items(methods: Mapping[str, Sequence[Mapping[str, Any]]]) -> int | None:
    return next((row["probe_items"] for rows in methods.values() for row in rows if row["probe_items"]), None)


def _threshold_rows(methods: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[list[dict[str, Any]]]:
    """Row by row one cell a method; empty unless all methods were measured."""
    tables_ = [tables.threshold_means(rows) for rows in methods.values()]
    return [list(cells) for cells in zip(*tables_, strict=True)] if tables_ and all(tables_) else []


def _attribute_rows(methods: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """By attribute: how many items, and each method's first seed."""
    found: dict[str, dict[str, Any]] = {}
    for method, rows in methods.items():
        for attribute, cell in (rows[0]["probe_by_attribute"] or {}).items():
            found.setdefault(attribute, {"count": cell["items"], "by": {}})["by"][method] = cell
    return found

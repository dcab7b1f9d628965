"""From the numbers of results.json to one HTML page: no script, nothing loaded, every value escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from megaprior.analysis import figures, importance_figures, seed_tables, tables
from megaprior.analysis.findings import caveats, findings
from megaprior.analysis.names import Look, compared, family_name, looks, ordered
from megaprior.analysis.runs import Run
from megaprior.analysis.tower import tower_rows

if TYPE_CHECKING:
    from jinja2 import Environment

_HERO_TOKENS = 48  # the longest caption up to here stands at the top
Models = Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]  # family -> method -> seeds, as in results.json


def render(
    body: Mapping[str, Any],
    *,
    runs: Mapping[str, Mapping[str, Sequence[Run]]],
    captions: Sequence[Mapping[str, Any]],
    commands: Mapping[str, Sequence[str]],
    title: str,
) -> str:
    """The page for what stands in results.json (`body`).

    The curves come from `runs`, the heat map from the `captions` of `caption_views`, and `commands` are those of
    `report.figure_commands`.
    """
    from markupsafe import Markup

    environment = _environment()
    models: Models = body["models"]
    look = looks(method for methods in models.values() for method in methods)
    # SVG in which matplotlib has escaped every text.
    drawn = {name: Markup(svg) for name, svg in _figures(body, runs, look).items() if svg}
    short = [caption for caption in captions if len(caption["tokens"]) <= _HERO_TOKENS]
    heads, rows = seed_tables.overview(models, look)
    return environment.get_template("report.html").render(
        **body,
        title=title,
        figures=drawn,
        figure_commands=commands,
        captions=captions,
        hero=max(short, key=lambda caption: len(caption["tokens"]), default=None),
        findings=findings(body),
        caveats=caveats(body),
        keys=_keys(body, look),
        look=look,
        heat=_heat(runs),
        has_w=any(token["w"] is not None for caption in captions for token in caption["tokens"]),
        has_truth=any(
            row["loss_related"] is not None for m in models.values() for seeds in m.values() for row in seeds
        ),
        run_count=sum(len(seeds) for methods in models.values() for seeds in methods.values()),
        overview_heads=heads,
        overview_rows=rows,
        sections={family: _family(methods, look) for family, methods in models.items()},
        pairs=[{**pair, "scale": _scale(pair)} for pair in body["comparisons"]["pairs"]],
        tower_rows=tower_rows(body["tower"]) if body["tower"] is not None else [],
    )


def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("megaprior.analysis"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    written = (tables.percent, tables.number, tables.signed, tables.duration, tables.memory, tables.setting)
    for each in (*written, family_name):
        environment.filters[each.__name__] = each
    return environment


# ---------------------------------------------------------------- figures


def _figures(
    body: Mapping[str, Any], runs: Mapping[str, Mapping[str, Sequence[Run]]], look: Mapping[str, Look]
) -> dict[str, str | None]:
    """Every figure by its key; figures of one kind share their y axis over all families."""
    drawn: dict[str, str | None] = {}
    every = [run for methods in runs.values() for seeds in methods.values() for run in seeds]
    train = figures.limits(map(figures.loss_points, every))
    names = ("heldout_ntp", "heldout_ntp_above", "heldout_ntp_below")
    heldout = figures.limits(figures.heldout_points(run, name) for run in every for name in names)
    halves = {f: {m: tables.threshold_means(rows) for m, rows in body["models"][f].items()} for f in runs}
    threshold = figures.threshold_limits(table for methods in halves.values() for table in methods.values())
    for family, methods in runs.items():
        drawn[f"train {family}"] = figures.loss_curves(family, methods, look, y=train)
        drawn[f"heldout {family}"] = figures.heldout_curves(family, methods, look, y=heldout)
        drawn[f"threshold {family}"] = figures.by_threshold(family, halves[family], look, y=threshold)
    if len(runs) > 1:
        drawn["all train"] = figures.all_runs(runs, look, heldout=False)
        drawn["all heldout"] = figures.all_runs(runs, look, heldout=True)
    if len(every) > 1:
        drawn["probe"] = figures.probe_dots(body["models"], look, body["reference_probe"])
    for name, summary in body["importance_by_shards"].items():
        drawn[f"histogram {name}"] = importance_figures.histogram(name, summary)
        drawn[f"length {name}"] = importance_figures.by_length(name, summary)
        drawn[f"position {name}"] = importance_figures.by_position(name, summary)
    return drawn


# ---------------------------------------------------------------- numbers that the page arranges


def _heat(runs: Mapping[str, Mapping[str, Sequence[Run]]]) -> dict[str, dict[str, Any]]:
    """Of each family whose losses were kept: its methods, and the two whose change is coloured."""
    measured = {f: ordered(m for m, seeds in runs[f].items() if seeds and seeds[0].losses is not None) for f in runs}
    return {f: {"methods": methods, "pair": compared(methods)} for f, methods in measured.items() if methods}


_COMPARED = (
    ("loss_related", "held-out loss on image-related words, nats per token; lower is better", tables.number),
    ("loss_unrelated", "held-out loss on all other words; lower is better", tables.number),
    ("probe_accuracy", "of true statements told from false ones; 50% is chance", tables.percent),
)


def _keys(body: Mapping[str, Any], look: Mapping[str, Look]) -> list[tuple[str, str]]:
    """The few numbers that stand large at the top."""
    keys = []
    importance = body["importance"]
    if importance.get("auroc") is not None:
        keys.append((tables.number(importance["auroc"]), "AUROC of importance for image-related words; 0.50 is chance"))
    elif importance.get("mean") is not None:
        keys.append((tables.number(importance["mean"]), "mean importance of a caption token"))
    for family, methods in body["models"].items():
        where = f"{family_name(family)}, " if len(body["models"]) > 1 else ""
        pair = compared(methods) or tuple(methods)
        for field, words, shown in _COMPARED:
            values = {method: tables.mean(methods[method], field) for method in pair}
            known = {method: shown(value) for method, value in values.items() if value is not None}
            if known:
                names = " \u2192 ".join(look[method].name for method in known)
                keys.append((" \u2192 ".join(known.values()), f"{where}{names}: {words}"))
    return keys


def _family(methods: Mapping[str, Sequence[Mapping[str, Any]]], look: Mapping[str, Look]) -> dict[str, Any]:
    """The tables of one family's section."""
    heldout = seed_tables.known(seed_tables.HELDOUT, methods)
    probed = {
        m: known for m, rows in methods.items() if (known := [r for r in rows if r["probe_accuracy"] is not None])
    }
    return {
        "names": [look[method].name for method in methods],
        "heldout_heads": [column.head for column in heldout],
        "heldout_rows": seed_tables.seed_table(methods, look, heldout),
        "probe_items": next((row["probe_items"] for rows in probed.values() for row in rows), None),
        "probe_heads": [column.head for column in seed_tables.PROBE],
        "probe_rows": seed_tables.seed_table(probed, look, seed_tables.PROBE),
        "threshold_rows": _threshold_rows(methods),
        "attribute_rows": _attribute_rows(methods),
    }


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


def _scale(pair: Mapping[str, Any]) -> float:
    """Nats at the ends of a pair's intervals as they are drawn."""
    bounds = [abs(b) for row in (pair["heldout"] or {}).values() for b in [row["difference"], *(row["interval"] or [])]]
    return max([*bounds, 1e-6]) * 1.08

"""`megaprior report`: what the runs showed, as one HTML file that needs nothing else, and as results.json.

    scores + truth -> importance      runs -> curves, time, memory      held-out losses -> tables, heat maps, any two runs
    probe -> table, dots              tower -> retrieval                 -> findings in plain words -> report.html, results.json

Whatever is missing (the truth of words, a probe, a second method, images) leaves its section out and says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaprior.analysis import commands as typed
from megaprior.analysis import tables
from megaprior.analysis.captions import caption_views
from megaprior.analysis.compare import comparisons
from megaprior.analysis.importance import importance_summary, open_scored, read_scores
from megaprior.analysis.names import by_family, check_name
from megaprior.analysis.page import render
from megaprior.analysis.runs import Run, read_lines, read_run
from megaprior.analysis.tower import read_tower
from megaprior.data.shards import ShardSet
from megaprior.files import atomic_write

TITLE = "PRIOR, end to end"
TOWER, REFERENCE = "tower", "reference"  # stages that the report knows more about than time and memory


@dataclass(frozen=True)
class Inputs:
    """Where everything lies, as it was typed; what each field is stands at `report`."""

    shards: Sequence[Path | str]
    heldout: Path | str | None
    scores: str
    runs: Mapping[str, Mapping[str, Sequence[Path | str]]]
    stages: Mapping[str, Path | str]
    probe: Path | str | None
    times: Path | str | None
    commands: Sequence[str]
    captions: int


@dataclass(frozen=True)
class Sources:
    """Everything that the page is made of, read once."""

    importance: dict[str, dict[str, Any]]  # by shard folder
    runs: dict[str, dict[str, list[Run]]]  # family -> method -> seeds
    stages: dict[str, Run]
    times: list[dict[str, Any]]
    reference_probe: dict[str, Any] | None
    tower: dict[str, Any] | None
    captions: list[dict[str, Any]]
    fingerprints: dict[str, str]
    commands: list[str]


def report(
    output: Path | str,
    *,
    results: Path | str | None = None,
    shards: Sequence[Path | str] = (),
    heldout: Path | str | None = None,
    scores: str = "ref_logprob",
    runs: Mapping[str, Mapping[str, Sequence[Path | str]]] | None = None,
    stages: Mapping[str, Path | str] | None = None,
    probe: Path | str | None = None,
    times: Path | str | None = None,
    commands: Sequence[str] = (),
    captions: int = 12,
    title: str = TITLE,
) -> dict[str, Any]:
    """Write the report, and `results` beside it where a path is given.

    Args:
        shards: scored shard folders, for the sections on importance; the first one's numbers stand in results.json.
        heldout: the shards whose losses `megaprior evaluate --shards` kept in the runs' folders.
        runs: {"ulvlm": {"ntp": [run folder of each seed], "prior": [...]}, "hlvlm": {...}}; a method may have any name.
        stages: further runs whose time and memory count, by name; one called "reference" is looked up in `probe` too, and of one
            called "tower" the retrieval record in its folder is shown.
        probe: results.jsonl of `megaprior evaluate`.
        times: JSON lines {"stage", "wall_s", "peak_memory_mib", "command"} of what was no run (building, scoring).
        commands: what to type to repeat all this; by default the commands of stages and runs.
        captions: how many held-out captions are shown.

    Returns:
        What stands in results.json.

    Raises:
        DataError: a run is not finished, or a file is not what it claims to be.
        UsageError: a family or a method has a name that no file and no style sheet could carry.
    """
    given = Inputs(shards, heldout, scores, runs or {}, stages or {}, probe, times, commands, captions)
    sources = _read(given)
    own = _own_command(given, output=output, results=results, title=title)
    body = results_body(sources) | {"report_command": own}
    page = render(
        body, runs=sources.runs, captions=sources.captions, commands=figure_commands(given, sources), title=title
    )
    for path, text in ((output, page), (results, json.dumps(body, indent=1, allow_nan=False) + "\n")):
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, text)
    return body


# ---------------------------------------------------------------- reading


def _read(given: Inputs) -> Sources:
    for family, methods in given.runs.items():
        for name, what in ((family, "family"), *((method, "method") for method in methods)):
            check_name(name, what=what)
    scored = [ShardSet.open(folder, scores=given.scores) for folder in given.shards]
    held = open_scored(given.heldout, given.scores) if given.heldout is not None else None
    lines = read_lines(Path(given.probe)) if given.probe is not None else []
    build_id = held.build_id if held is not None else None
    trained = {
        family: {
            m: [read_run(Path(f), results=lines, build_id=build_id) for f in seeds] for m, seeds in methods.items()
        }
        for family, methods in by_family(given.runs).items()
    }
    steps = {name: read_run(Path(folder), results=lines, build_id=None) for name, folder in given.stages.items()}
    losses = {
        family: found
        for family, methods in trained.items()
        if (found := {m: seeds[0].losses for m, seeds in methods.items() if seeds and seeds[0].losses is not None})
    }
    shown = held if held is not None else next(iter(scored), None)
    every = [*steps.values(), *(run for methods in trained.values() for seeds in methods.values() for run in seeds)]
    extra = read_lines(Path(given.times)) if given.times is not None else []
    known = [line.get("command") for line in extra] + [typed.runnable(run.summary) for run in every]
    views = caption_views(shown, losses, count=given.captions, tokenizer=shown.tokenizer()) if shown is not None else []
    return Sources(
        importance={folder.folder.name: importance_summary(read_scores(folder)) for folder in scored},
        runs=trained,
        stages=steps,
        times=extra,
        reference_probe=steps[REFERENCE].probe if REFERENCE in steps else None,
        tower=read_tower(steps[TOWER].folder, shards=held.folder.name if held else None) if TOWER in steps else None,
        captions=views,
        fingerprints=_fingerprints(scored, held, every),
        commands=list(given.commands) or [command for command in known if command],
    )


def figure_commands(given: Inputs, sources: Sources) -> dict[str, list[str]]:
    """What made the data of each figure and table, by its key on the page; runs by family, * for all."""
    found: dict[str, list[str]] = {}
    every: dict[str, list[Run]] = {
        family: [run for seeds in methods.values() for run in seeds] for family, methods in sources.runs.items()
    }
    every["*"] = [run for runs in every.values() for run in runs]
    for key, runs in every.items():
        found[f"runs {key}"] = typed.training(runs)
        found[f"evaluate {key}"] = typed.evaluating(runs, sources.times, heldout=given.heldout)
        found[f"probe {key}"] = typed.evaluating(runs, sources.times, heldout=None, flag="--probe")
    reference = sources.stages[REFERENCE].folder if REFERENCE in sources.stages else None
    for folder in given.shards:
        name = Path(folder).resolve().name
        found[f"score {name}"] = typed.scoring(folder, sources.times, reference=reference, scores=given.scores)
    if TOWER in sources.stages:
        run, held = sources.stages[TOWER], given.heldout
        measured = (
            sources.tower is not None and held is not None and sources.tower["shards"] == Path(held).resolve().name
        )
        timed = typed.evaluating([run], sources.times, heldout=None)
        known = timed or ([typed.measuring(run.folder, held)] if measured and held is not None else [])
        found["tower"] = typed.training([run]) + known
    return found


def _own_command(given: Inputs, *, output: Path | str, results: Path | str | None, title: str) -> str:
    single = {
        "results": results,
        "heldout": given.heldout,
        "scores": given.scores if given.scores != "ref_logprob" else None,
        "probe": given.probe,
        "times": given.times,
        "title": title if title != TITLE else None,
    }
    return typed.reporting(
        output, single=single, shards=given.shards, runs=given.runs, stages=given.stages, commands=given.commands
    )


def _fingerprints(scored: Sequence[ShardSet], held: ShardSet | None, runs: Sequence[Run]) -> dict[str, str]:
    """What was compared with what, by content."""
    found = {}
    for opened in [*scored, *([held] if held is not None else [])]:
        found["tokenizer"] = opened.fingerprint
        found[f"shards {opened.folder.name}"] = opened.build_id
        if opened.scorer is not None:
            found[f"scorer of {opened.folder.name}"] = opened.scorer["fingerprint"]
    for run in runs:
        model = run.summary.get("fingerprints", {}).get("model")
        if model:
            found[f"model {run.folder.name}"] = model
    return found


# ---------------------------------------------------------------- results.json


def results_body(sources: Sources) -> dict[str, Any]:
    """The numbers of the report: importance, models by family and method (one entry a seed), any two runs, stages."""
    stages = tables.stage_times(sources.times)
    stages |= {name: tables.stage_row(run.summary, run.train) for name, run in sources.stages.items()}
    for family, methods in sources.runs.items():
        for method, seeds in methods.items():
            for run in seeds:
                name = f"{family} {method} seed {run.seed}"
                name += f" ({run.folder.name})" if name in stages else ""
                stages[name] = tables.stage_row(run.summary, run.train)
    first = next(
        iter(sources.importance.values()), {"auroc": None, "related_fraction": None, "related_token_fraction": None}
    )
    return {
        "importance": first,
        "importance_by_shards": sources.importance,
        "models": {
            family: {method: [tables.model_row(run) for run in seeds] for method, seeds in methods.items()}
            for family, methods in sources.runs.items()
        },
        "reference_probe": sources.reference_probe,
        "tower": sources.tower,
        "comparisons": comparisons(sources.runs),
        "stages": stages,
        "fingerprints": sources.fingerprints,
        "commands": sources.commands,
    }

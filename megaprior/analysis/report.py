"""`megaprior report`: what the runs showed, as one HTML file that needs nothing else, and as results.json.

    scores + truth -> importance      runs -> curves, time, memory      held-out losses -> tables, heat maps      probe -> table
    -> findings in plain words -> report.html, results.json

Whatever is missing (the truth of words, a probe, a second method, images) leaves its section out and says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaprior.analysis import tables
from megaprior.analysis.captions import caption_views
from megaprior.analysis.importance import importance_summary, open_scored, read_scores
from megaprior.analysis.page import render
from megaprior.analysis.runs import Run, read_lines, read_run
from megaprior.data.shards import ShardSet
from megaprior.errors import DataError
from megaprior.files import atomic_write

METHODS = ("ntp", "prior")


@dataclass(frozen=True)
class Sources:
    """Everything that the page is made of, read once."""

    importance: dict[str, dict[str, Any]]  # by shard folder
    runs: dict[str, dict[str, list[Run]]]  # family -> method -> seeds
    stages: dict[str, Run]
    times: list[dict[str, Any]]
    reference_probe: dict[str, Any] | None
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
    title: str = "PRIOR, end to end",
) -> dict[str, Any]:
    """Write the report, and `results` beside it where a path is given.

    Args:
        shards: scored shard folders, for the sections on importance; the first one's numbers stand in results.json.
        heldout: the shards whose losses `megaprior evaluate --shards` kept in the runs' folders.
        runs: {"ulvlm": {"ntp": [run folder of each seed], "prior": [...]}}.
        stages: further runs whose time and memory count, by name; one called "reference" is looked up in `probe` too.
        probe: results.jsonl of `megaprior evaluate`.
        times: JSON lines {"stage", "wall_s", "peak_memory_mib", "command"} of what was no run (building, scoring).
        commands: what to type to repeat all this; by default the commands of stages and runs.
        captions: how many held-out captions are shown.

    Returns:
        What stands in results.json.

    Raises:
        DataError: a run is not finished, or a file is not what it claims to be.
    """
    sources = _read(shards, heldout, scores, runs or {}, stages or {}, probe, times, commands, captions)
    body = results_body(sources)
    page = render(body, runs=sources.runs, captions=sources.captions, title=title)
    for path, text in ((output, page), (results, json.dumps(body, indent=1, allow_nan=False) + "\n")):
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, text)
    return body


# ---------------------------------------------------------------- reading


def _read(
    shards: Sequence[Path | str],
    heldout: Path | str | None,
    scores: str,
    runs: Mapping[str, Mapping[str, Sequence[Path | str]]],
    stages: Mapping[str, Path | str],
    probe: Path | str | None,
    times: Path | str | None,
    commands: Sequence[str],
    captions: int,
) -> Sources:
    scored = [ShardSet.open(folder, scores=scores) for folder in shards]
    held = open_scored(heldout, scores) if heldout is not None else None
    lines = read_lines(Path(probe)) if probe is not None else []
    build_id = held.build_id if held is not None else None
    for methods in runs.values():
        for method in methods:
            if method not in METHODS:
                raise DataError(f"{method!r}: the report compares {' and '.join(METHODS)}")
    trained = {
        family: {
            m: [read_run(Path(f), results=lines, build_id=build_id) for f in methods[m]]
            for m in METHODS
            if methods.get(m)
        }
        for family, methods in runs.items()
    }
    steps = {name: read_run(Path(folder), results=lines, build_id=None) for name, folder in stages.items()}
    first = next(iter(trained.values()), {})
    losses = {m: seeds[0].losses for m, seeds in first.items() if seeds[0].losses is not None}
    shown = held if held is not None else next(iter(scored), None)
    every = [*steps.values(), *(run for methods in trained.values() for seeds in methods.values() for run in seeds)]
    extra = read_lines(Path(times)) if times is not None else []
    typed = [line.get("command") for line in extra] + [run.summary.get("command") for run in every]
    return Sources(
        importance={folder.folder.name: importance_summary(read_scores(folder)) for folder in scored},
        runs=trained,
        stages=steps,
        times=extra,
        reference_probe=steps["reference"].probe if "reference" in steps else None,
        captions=caption_views(shown, losses, count=captions, tokenizer=shown.tokenizer()) if shown is not None else [],
        fingerprints=_fingerprints(scored, held, every),
        commands=list(commands) or [command for command in typed if command],
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
    """The numbers of the report: importance, models by family and method (one entry a seed), stages."""
    stages = tables.stage_times(sources.times)
    stages |= {name: tables.stage_row(run.summary) for name, run in sources.stages.items()}
    for family, methods in sources.runs.items():
        for method, seeds in methods.items():
            stages |= {f"{family} {method} seed {run.seed}": tables.stage_row(run.summary) for run in seeds}
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
        "stages": stages,
        "fingerprints": sources.fingerprints,
        "commands": sources.commands,
    }

"""What to type to make a figure again: the commands that runs and stages recorded, and the report's own.

Paths stand as they were typed. A command that is not known is left out, never guessed.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megaprior.analysis.runs import Run


def runnable(summary: Mapping[str, Any]) -> str | None:
    """A run's recorded command as a user types it: under DeepSpeed's launcher a rank sees another one."""
    command = summary.get("command")
    if not command:
        return None
    program, *words = shlex.split(command)
    words = [word for word in words if not word.startswith(("--local_rank", "--local-rank"))]
    if program not in ("cli.py", "__main__.py"):
        return command
    world = summary.get("world") or 1
    launcher = ["deepspeed", "--num_gpus", str(world), "--module", "megaprior.cli"] if world > 1 else ["megaprior"]
    return shlex.join([*launcher, *words])


def training(runs: Iterable[Run]) -> list[str]:
    """The training commands of runs, each once."""
    return _once(runnable(run.summary) for run in runs)


def evaluating(
    runs: Iterable[Run], times: Sequence[Mapping[str, Any]], *, heldout: Path | str | None, flag: str = "--shards"
) -> list[str]:
    """The `megaprior evaluate` of each run with `flag`: as it was timed, else put together where `heldout` was measured."""
    found = []
    for run in runs:
        timed = [c for c in _timed(times, "evaluate") if flag in c and _value(c, "--model") == str(run.folder)]
        if timed:
            found.append(shlex.join(timed[-1]))
        elif flag == "--shards" and heldout is not None and run.losses is not None:
            found.append(measuring(run.folder, heldout))
    return _once(found)


def measuring(model: Path | str, shards: Path | str) -> str:
    """The `megaprior evaluate` that measures a run on shards."""
    return shlex.join(["megaprior", "evaluate", "--model", str(model), "--shards", str(shards)])


def scoring(
    shards: Path | str, times: Sequence[Mapping[str, Any]], *, reference: Path | None, scores: str = "ref_logprob"
) -> list[str]:
    """The `megaprior score` of one shard folder: as it was timed, else with the stage called reference."""
    timed = [command for command in _timed(times, "score") if str(shards) in command]
    if timed:
        return [shlex.join(timed[-1])]
    if reference is None:
        return []
    name = [] if scores == "ref_logprob" else ["--name", scores]
    return [shlex.join(["megaprior", "score", "--model", str(reference), "--shards", str(shards), *name])]


def reporting(
    output: Path | str,
    *,
    single: Mapping[str, Path | str | None],
    shards: Sequence[Path | str],
    runs: Mapping[str, Mapping[str, Sequence[Path | str]]],
    stages: Mapping[str, Path | str],
    commands: Sequence[str],
) -> str:
    """The report's own command; `single` are the flags with one value each."""
    words = ["megaprior", "report", "--output", str(output)]
    for flag, value in single.items():
        words += [f"--{flag}", str(value)] if value is not None else []
    words += ["--shards", *map(str, shards)] if shards else []
    for family, methods in runs.items():
        for method, folders in methods.items():
            for folder in folders:
                words += ["--run", f"{family}.{method}={folder}"]
    for name, folder in stages.items():
        words += ["--stage", f"{name}={folder}"]
    for command in commands:
        words += ["--command", command]
    return shlex.join(words)


def _timed(times: Sequence[Mapping[str, Any]], verb: str) -> list[list[str]]:
    """The recorded commands of one verb, in words."""
    split = [shlex.split(line["command"]) for line in times if line.get("command")]
    return [words for words in split if words[:2] == ["megaprior", verb]]


def _value(words: Sequence[str], flag: str) -> str | None:
    at = words.index(flag) if flag in words else len(words)
    return words[at + 1] if at + 1 < len(words) else None


def _once(commands: Iterable[str | None]) -> list[str]:
    return list(dict.fromkeys(command for command in commands if command))

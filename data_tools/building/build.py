"""Inputs to shards: read, check, tokenize, write; interrupted anywhere, the same command goes on.

    1. make_plan     inputs, options -> shards to write (plan.py)
    2. build_shard   one input -> one shard; a function of its job alone (sharding.py)
    3. commit        quarantine.jsonl, tokenizer/, then build.json: only now may anybody read (join.py)

Step 2 runs in this process, in several (workers.py), under mpirun (ranks.py) or in parts that know nothing of each other
(`build_part`); the bytes are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from megaprior.data import manifest as mf
from megaprior.data_tools.building import folder
from megaprior.data_tools.building.join import QUARANTINE, commit
from megaprior.data_tools.building.parts import Part
from megaprior.data_tools.building.plan import Plan, ShardJob, make_plan
from megaprior.data_tools.building.sharding import read_job
from megaprior.data_tools.building.workers import Work, run_jobs
from megaprior.data_tools.options import BuildOptions
from megaprior.data_tools.readers.samples import Rejected, Sample
from megaprior.telemetry import progress, say
from megaprior.tokenizer import load_tokenizer

__all__ = ["QUARANTINE", "PartBuilt", "Preview", "build", "build_part", "preview"]


def build(
    paths: Sequence[Path], output: Path, *, tokenizer: Path, options: BuildOptions, workers: int = 1
) -> dict[str, Any]:
    """Write the shards of `paths` into `output` with `workers` processes and return the content of its build.json.

    Raises:
        UsageError: inputs and options do not fit each other; nothing was written.
        DataError: an input, the tokenizer or the output folder is not fit; or no sample survived.
        MegapriorError: a worker died, or a signal asked to stop; what is finished is kept.
    """
    words = load_tokenizer(tokenizer)
    plan = make_plan(paths, options, fingerprint=words.fingerprint)
    tell_left_out(plan)
    folder.state(output, plan)  # a foreign folder is refused before even a lock is put there
    with folder.whole(output):
        if start(output, plan) == "complete":
            folder.finish(output)
            return mf.read_build(output)
        folder.sweep(output)
        folder.begin(output, plan, words)
        with bytes_read(output, plan.jobs) as (todo, tick):
            run_jobs(Work(output=output, plan=plan, tokenizer=tokenizer), todo, words, workers=workers, tick=tick)
        return commit(output, folder.read_begun(output), words)


@dataclass(frozen=True, kw_only=True)
class PartBuilt:
    """What a part has done: `shards` of the `total` of the plan; `complete` when the whole build was there already."""

    part: Part
    shards: int
    total: int
    complete: bool = False


def build_part(
    paths: Sequence[Path], output: Path, *, part: Part, tokenizer: Path, options: BuildOptions, workers: int = 1
) -> PartBuilt:
    """Write one part's shards into `output`, beside the builders of other parts; `join` completes the build.

    Raises:
        MegapriorError: as `build`.
    """
    words = load_tokenizer(tokenizer)
    plan = make_plan(paths, options, fingerprint=words.fingerprint)
    tell_left_out(plan)
    jobs = part.select(plan.jobs)
    built = PartBuilt(part=part, shards=len(jobs), total=len(plan.jobs))
    if folder.state(output, plan) == "complete":
        start(output, plan)
        return PartBuilt(part=part, shards=len(jobs), total=len(plan.jobs), complete=True)
    with folder.held_part(output, part):
        folder.begin(output, plan, words)
        folder.sweep(output, [job.prefix for job in jobs])
        with bytes_read(output, jobs) as (todo, tick):
            run_jobs(Work(output=output, plan=plan, tokenizer=tokenizer), todo, words, workers=workers, tick=tick)
    return built


@dataclass(frozen=True, kw_only=True)
class Preview:
    """What a build would do: its plan, how far it is ("new", "begun", "complete"), the first items of its first shard."""

    plan: Plan
    state: str
    first: tuple[Sample | Rejected, ...]


def preview(paths: Sequence[Path], output: Path, *, tokenizer: Path, options: BuildOptions) -> Preview:
    """Look without writing; refuses what `build` would refuse at once."""
    plan = make_plan(paths, options, fingerprint=load_tokenizer(tokenizer).fingerprint)
    first = tuple(islice(read_job(plan.jobs[0], options, lambda _: None), 3))
    return Preview(plan=plan, state=folder.state(output, plan), first=first)


# ---------------------------------------------------------------- what all ways of running share


def tell_left_out(plan: Plan) -> None:
    """Name the files of input folders that are not read."""
    if plan.left_out:
        names = ", ".join(path.name for path in plan.left_out[:3]) + (", ..." if len(plan.left_out) > 3 else "")
        say(f"left out of input folders, being of another format: {names} ({len(plan.left_out):,} in all)")


def start(output: Path, plan: Plan) -> str:
    """How far the build is, told to the user; asked again under the lock."""
    state = folder.state(output, plan)
    if state == "complete":
        say(f"{output}: complete already (build {plan.build_id}); nothing to do")
    elif state == "begun":
        say(f"{output}: resuming build {plan.build_id}")
    return state


@contextmanager
def bytes_read(output: Path, jobs: Sequence[ShardJob]) -> Iterator[tuple[list[ShardJob], Callable[[int], None]]]:
    """Show progress over `jobs`; gives those that are still to do, and whom to tell of bytes read."""
    lacking = set(folder.missing(output, (job.prefix for job in jobs)))
    todo = [job for job in jobs if job.prefix in lacking]
    with progress(sum(job.bytes for job in jobs) // 1000, "build", "kB") as bar:
        carried = 0

        def tick(count: int) -> None:
            nonlocal carried
            carried += count
            bar.advance(carried // 1000)
            carried %= 1000

        tick(sum(job.bytes for job in jobs) - sum(job.bytes for job in todo))
        yield todo, tick

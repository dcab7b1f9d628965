"""`megaprior-data quarantine`: what a build left out and why, and building it once the cause is gone.

A replay is a build of its own, of the same sources: each is read again, and of all its samples those go on whose key was
refused. Of a source that was damaged, all that the build does not hold: what came after the damage was never listed.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from megaprior.data import manifest as mf
from megaprior.data.shards import Shard, ShardSet
from megaprior.data_tools.building import folder
from megaprior.data_tools.building.join import QUARANTINE, commit
from megaprior.data_tools.building.plan import Plan, ShardJob, make_plan, shard_prefix
from megaprior.data_tools.building.sharding import WORKING, build_shard
from megaprior.data_tools.options import BuildOptions
from megaprior.data_tools.pool import each
from megaprior.data_tools.readers.samples import Rejected, Sample
from megaprior.errors import DataError, UsageError
from megaprior.files import digest_json
from megaprior.telemetry import progress, say
from megaprior.tokenizer import load_tokenizer


def refusals(place: Path, *, examples: int = 3) -> dict[str, Any]:
    """folder, quarantined, complete (the build), and reasons: reason, count, examples; the most frequent first.

    Raises:
        DataError: neither a build nor a part of one, or its quarantine cannot be read.
    """
    complete = (place / mf.BUILD_NAME).exists()
    counts: Counter[str] = Counter()
    shown: dict[str, list[dict[str, Any]]] = {}
    for entry in _entries(place, complete):
        reason = entry["reason"].partition(":")[0]
        counts[reason] += 1
        if counts[reason] <= examples:
            shown.setdefault(reason, []).append(entry)
    reasons = [{"reason": r, "count": count, "examples": shown.get(r, [])} for r, count in counts.most_common()]
    return {"folder": str(place), "complete": complete, "quarantined": counts.total(), "reasons": reasons}


def _entries(place: Path, complete: bool) -> Iterator[dict[str, Any]]:
    if complete:
        for entries in refused_entries(ShardSet.open(place)):
            yield from entries
        return
    if not (place / WORKING).is_dir():
        mf.read_build(place)  # refused, with its reason
    for prefix in folder.read_begun(place).prefixes:
        path = place / WORKING / f"{prefix}.json"
        if path.exists():
            yield from json.loads(path.read_bytes())["quarantine"]


def refused_entries(shards: ShardSet) -> Iterator[list[dict[str, Any]]]:
    """The quarantine entries of each shard: in the file they stand in the order of the shards.

    Raises:
        DataError: the file holds fewer than the manifests count, or other things.
    """
    path = shards.folder / QUARANTINE
    counts = [shard.manifest["counts"]["quarantined"] for shard in shards.shards]
    if not sum(counts):
        yield from ([] for _ in counts)
        return
    if not path.is_file():
        raise DataError(f"{path}: missing, {sum(counts):,} entries are counted; copy it again, or rebuild")
    with open(path, encoding="utf-8") as file:
        for shard, count in zip(shards.shards, counts, strict=True):
            lines = list(islice(file, count))
            try:
                entries = [json.loads(line) for line in lines]
            except ValueError as error:
                raise DataError(f"{path}: not what was written ({error}); run `megaprior-data verify`") from None
            if len(entries) < count:
                raise DataError(
                    f"{path}: ends within shard {shard.prefix}: {len(entries):,} of its {count:,} entries; copy it again"
                )
            yield entries


# ---------------------------------------------------------------- replay


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What a replay is asked to do; `changes` are the options that are no longer those of the build."""

    source: Path
    inputs: tuple[Path, ...]
    output: Path
    changes: dict[str, Any]
    workers: int = 1


@dataclass(frozen=True)
class _Task:
    job: ShardJob
    plan: Plan
    source: Path
    shard: str
    output: Path
    wanted: frozenset[str]
    rest: bool


def replay(request: Replay) -> dict[str, Any]:
    """Build what was refused into a folder of its own, to be merged with the rest; returns its build.json.

    Raises:
        UsageError: options that do not fit the inputs.
        DataError: nothing was refused, no input is a source of the build, or everything is refused again.
    """
    shards = ShardSet.open(request.source)
    if "derived" in shards.build["options"]:
        verb = shards.build["options"]["derived"]["verb"]
        raise DataError(f"{request.source}: made by {verb}; replay the builds that it was made of, then {verb} again")
    words = load_tokenizer(request.source / "tokenizer")
    options = replace(recorded_options(shards.build["options"]), **request.changes)
    whole = make_plan(request.inputs, options, fingerprint=words.fingerprint)
    if whole.kind != shards.kind:
        raise UsageError(f"--input: of kind {whole.kind!r}, {request.source} is of kind {shards.kind!r}")
    chosen = _chosen(shards, whole)
    jobs = tuple(replace(job, prefix=shard_prefix(at)) for at, (job, _, _) in enumerate(chosen))
    plan = _plan(shards, whole, jobs, [entries for _, _, entries in chosen])
    tasks = [
        _Task(
            job,
            plan,
            request.source,
            shard.prefix,
            request.output,
            frozenset(entry["sample"] for entry in entries),
            any(entry["reason"].startswith("damaged") for entry in entries),
        )
        for job, (_, shard, entries) in zip(jobs, chosen, strict=True)
    ]
    new = folder.state(request.output, plan) == "new"
    with folder.whole(request.output):
        if folder.state(request.output, plan) == "complete":
            say(f"{request.output}: complete already (build {plan.build_id}); nothing to do")
            folder.finish(request.output)
            return mf.read_build(request.output)
        folder.sweep(request.output)
        folder.begin(request.output, plan, words)
        lacking = set(folder.missing(request.output, (job.prefix for job in jobs)))
        todo = [task for task in tasks if task.job.prefix in lacking]
        with progress(len(tasks), "replay", "sources") as shown:
            shown.advance(len(tasks) - len(todo))
            for _ in each(_build, todo, workers=request.workers):
                shown.advance()
        try:
            return commit(request.output, folder.read_begun(request.output), words)
        except DataError:
            if new and not any(Shard.open(request.output, job.prefix) for job in jobs):
                shutil.rmtree(request.output)  # it holds no sample: the next attempt will have other options
            raise


def recorded_options(recorded: dict[str, Any]) -> BuildOptions:
    """The options that a build's manifest records; the folder of images is told by its name alone and left out."""
    known = {name: recorded[name] for name in BuildOptions.__dataclass_fields__ if name in recorded}
    columns = known.pop("caption_column", None)
    known.pop("images", None)
    known["subset"] = tuple(known.get("subset", (0.0, 1.0)))
    return BuildOptions(**known, caption_column=tuple(columns) if columns else None)


def _chosen(shards: ShardSet, whole: Plan) -> list[tuple[ShardJob, Shard, list[dict[str, Any]]]]:
    """The inputs that shards with refused samples were made of, by name, else by content, else by the file's name alone."""
    if not shards.build["counts"].get("quarantined"):
        raise DataError(f"{shards.folder}: nothing was refused; there is nothing to replay")
    by: dict[Any, ShardJob | None] = {}
    for job in whole.jobs:
        start = job.recorded().get("start", 0)
        for name in {job.source.name, job.source.digest, Path(job.source.name).name}:
            by[name, start] = None if (name, start) in by else job
    found, lost = [], []
    for shard, entries in zip(shards.shards, refused_entries(shards), strict=True):
        source = shard.manifest["source"]
        names = (source["name"], source["digest"], Path(source["name"]).name)
        job = next((j for name in names if (j := by.get((name, source.get("start", 0))))), None)
        if entries and job is not None:
            found.append((job, shard, entries))
        elif entries:
            lost.append((source["name"], len(entries)))
    if lost:
        name, count = lost[0]
        say(
            f"not among --input: {len(lost)} of the sources, the first {name} with {count:,} refused samples; they stay out"
        )
    if not found:
        raise DataError(f"{shards.folder}: no --input is a source that samples were refused of, such as {lost[0][0]}")
    return found


def _plan(shards: ShardSet, whole: Plan, jobs: tuple[ShardJob, ...], entries: Sequence[list[dict[str, Any]]]) -> Plan:
    recorded = {
        **whole.recorded,
        "options": {
            **whole.recorded["options"],
            "derived": {"verb": "quarantine", "source": shards.build_id, "entries": digest_json(entries)},
        },
        "sources": [job.recorded() for job in jobs],
    }
    return replace(whole, jobs=jobs, recorded=recorded, build_id=digest_json(recorded))


def _build(task: _Task) -> int:
    held = frozenset(_held(task)) if task.rest else frozenset()

    def keep(item: Sample | Rejected) -> Sample | Rejected | None:
        if item.key in task.wanted:
            return item
        if isinstance(item, Rejected):
            return item if task.rest and item.key not in held else None
        captions = tuple(c for c in item.captions if c.key in task.wanted or (task.rest and c.key not in held))
        return replace(item, captions=captions) if captions else None

    words = load_tokenizer(task.source / "tokenizer")
    return build_shard(task.job, task.plan, words, task.output, keep=keep)["counts"]["samples"]


def _held(task: _Task) -> Iterator[str]:
    """The keys of what the build has of a source; windows of a long text count as the text."""
    shard = Shard.open(task.source, task.shard)
    for i in range(len(shard)):
        key = shard.key(i)
        yield key
        if " part " in key:
            yield key.rpartition(" part ")[0]
    shard.close()


def told(found: dict[str, Any]) -> str:
    """What `refusals` found, as a table for people."""
    if not found["quarantined"]:
        return f"{found['folder']}: nothing was refused"
    left = "" if found["complete"] else " so far (the build is not complete)"
    lines = [f"{found['folder']}: {found['quarantined']:,} refused{left}, see {QUARANTINE}"]
    for row in found["reasons"]:
        lines.append(f"  {row['count']:>9,}  {row['count'] / found['quarantined']:>6.1%}  {row['reason']}")
        lines += [f"{'':22}{e['source']}, {e['sample']}: {e['reason'][:200]}" for e in row["examples"]]
    return "\n".join(lines)

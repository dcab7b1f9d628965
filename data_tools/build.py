"""Inputs to shards: read, check, tokenize, write; interrupted anywhere, the same command goes on.

    1. make_plan     inputs, options -> shards to write (plan.py)
    2. build_shard   one input -> one shard; a function of its job alone (sharding.py)
    3. write_build   quarantine.jsonl, tokenizer/, then build.json: only now may anybody read

While it runs, `DIR/.building/` holds the plan and what each finished shard left out.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from megaprior.data import manifest as mf
from megaprior.data.shards import Shard, write_build
from megaprior.data_tools.options import BuildOptions
from megaprior.data_tools.plan import Plan, difference, make_plan
from megaprior.data_tools.samples import Rejected, Sample
from megaprior.data_tools.sharding import WORKING, build_shard, ledger_path, read_job
from megaprior.errors import DataError
from megaprior.files import atomic_file, owner_lock, read_manifest, write_manifest
from megaprior.telemetry import progress, say
from megaprior.tokenizer import Tokenizer, load_tokenizer

QUARANTINE = "quarantine.jsonl"
_PLAN, _FORMAT = "plan.json", "megaprior.plan"


def build(paths: Sequence[Path], output: Path, *, tokenizer: Path, options: BuildOptions) -> dict[str, Any]:
    """Write the shards of `paths` into `output` and return the content of its build.json.

    Raises:
        UsageError: inputs and options do not fit each other; nothing was written.
        DataError: an input, the tokenizer or the output folder is not fit; or no sample survived.
    """
    words = load_tokenizer(tokenizer)
    plan = make_plan(paths, options, fingerprint=words.fingerprint)
    if plan.left_out:
        names = ", ".join(path.name for path in plan.left_out[:3]) + (", ..." if len(plan.left_out) > 3 else "")
        say(f"left out of input folders, being of another format: {names} ({len(plan.left_out):,} in all)")
    _state(output, plan)  # a foreign folder is refused before even a lock is put there
    with owner_lock(output):
        state = _state(output, plan)
        if state == "complete":
            say(f"{output}: complete already (build {plan.build_id}); nothing to do")
            shutil.rmtree(output / WORKING, ignore_errors=True)
            return mf.read_build(output)
        if state == "begun":
            say(f"{output}: resuming build {plan.build_id}")
        _begin(output, plan)
        manifests = _build_shards(output, plan, words)
        return _commit(output, plan, words, manifests)


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
    return Preview(plan=plan, state=_state(output, plan), first=first)


# ---------------------------------------------------------------- the output folder


def _state(output: Path, plan: Plan) -> str:
    """How far the build of `plan` is in `output`: "new", "begun" or "complete".

    Raises:
        DataError: the folder holds something else.
    """
    if not output.exists():
        return "new"
    if not output.is_dir():
        raise DataError(f"{output}: exists and is not a folder; choose another --output")
    if (output / mf.BUILD_NAME).exists():
        found = mf.read_build(output)
        if found["build_id"] != plan.build_id:
            raise DataError(
                f"{output}: holds another build ({found['build_id']}, now {plan.build_id}); choose another --output"
            )
        return "complete"
    if (output / WORKING / _PLAN).exists():
        found = read_manifest(output / WORKING / _PLAN, format=_FORMAT)
        if found["build_id"] != plan.build_id:
            changed = difference(plan.recorded, found["plan"])
            raise DataError(
                f"{output}: holds an unfinished build of other inputs or options ({changed}); repeat that command, "
                "or choose another --output"
            )
        return "begun"
    # What a build leaves when it is killed before its plan is written: the lock, an empty or half-written .building.
    if strange := sorted(path.name for path in output.iterdir() if path.name not in (".lock", WORKING)):
        raise DataError(f"{output}: not empty ({', '.join(strange[:3])}...) and not a build; choose another --output")
    return "new"


def _begin(output: Path, plan: Plan) -> None:
    (output / WORKING).mkdir(exist_ok=True)
    for folder in (output, output / WORKING):
        for path in folder.glob(".*.tmp-*"):  # half-written files of a killed builder; the lock says it is gone
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    body = {"format": _FORMAT, "version": 1, "build_id": plan.build_id, "plan": plan.recorded}
    write_manifest(output / WORKING / _PLAN, body)


def _build_shards(output: Path, plan: Plan, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    manifests: list[dict[str, Any]] = []
    with progress(sum(job.bytes for job in plan.jobs) // 1000, "build", "kB") as bar:
        carried = 0

        def tick(count: int) -> None:
            nonlocal carried
            carried += count
            bar.advance(carried // 1000)
            carried %= 1000

        for job in plan.jobs:
            path = output / f"{job.prefix}.json"
            if path.exists():
                manifests.append(Shard.open(output, job.prefix).manifest)
                tick(job.bytes)
                continue
            manifests.append(build_shard(job, plan, tokenizer, output, tick=tick))
    return manifests


def _commit(output: Path, plan: Plan, tokenizer: Tokenizer, manifests: list[dict[str, Any]]) -> dict[str, Any]:
    ledgers = [json.loads(ledger_path(output, job).read_bytes()) for job in plan.jobs]
    entries = [entry for ledger in ledgers for entry in ledger["quarantine"]]
    if entries:
        with atomic_file(output / QUARANTINE, "w") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in entries)
    counts = Counter({"shards": len(manifests), "outside_subset": sum(ledger["outside_subset"] for ledger in ledgers)})
    for manifest in manifests:
        counts.update(manifest["counts"])
    if not counts["samples"]:
        first = "none was quarantined"
        if entries:
            first = "the first: {source}, {sample}: {reason}".format_map(entries[0])
        raise DataError(f"{output}: no sample is left; {len(entries):,} quarantined, see {QUARANTINE} ({first})")
    body = write_build(
        output,
        build_id=plan.build_id,
        shard_manifests=manifests,
        tokenizer=tokenizer,
        options=plan.options.recorded(),
        counts=dict(counts),
        files=[QUARANTINE] if entries else [],
    )
    shutil.rmtree(output / WORKING)
    return body

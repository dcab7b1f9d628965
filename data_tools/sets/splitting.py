"""`megaprior-data split`: one build into builds that share no image, nor two that look alike.

    OUTPUT/reference/     a build like any other, made of the same shards: its shard 00007 holds samples of the source's 00007
    OUTPUT/training/
    OUTPUT/split.json     what was asked and what came of it, written last

What goes where is a function of contents and options. Killed, the same command goes on: the hashes of finished shards are
kept in OUTPUT/.splitting until the end.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megaprior.data import manifest as mf
from megaprior.data.shards import Shard, ShardSet
from megaprior.data_tools.building.plan import Plan
from megaprior.data_tools.pool import each
from megaprior.data_tools.sets.derived import (
    Piece,
    copy_samples,
    derived_plan,
    recorded_source,
    refuse_changed,
    score_names,
    units_of,
    write_derived,
)
from megaprior.data_tools.sets.nearness import MOST_BITS
from megaprior.data_tools.sets.sides import UNIT, Cut, Subset, cut, hash_units, targets
from megaprior.errors import DataError, UsageError
from megaprior.files import atomic_write, fsync_folder, owner_lock, write_manifest
from megaprior.telemetry import progress

SPLIT, SPLIT_NAME = "megaprior.split", "split.json"
_WORKING = ".splitting"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a split is asked to do; `near_bits` 0 turns the comparison of looks off."""

    source: Path
    output: Path
    subsets: tuple[Subset, ...]
    near_bits: int = 6
    seed: int = 0
    workers: int = 1


@dataclass(frozen=True)
class _ToHash:
    folder: Path
    prefix: str
    kept: Path | None
    looks: bool
    scores: tuple[str, ...]


@dataclass(frozen=True)
class _ToWrite:
    piece: Piece
    sides: Path
    side: int


def split(request: Request, *, dry_run: bool = False) -> dict[str, Any]:
    """Write the subsets, or only find out what they would be; returns the content of split.json.

    Raises:
        UsageError: an option that cannot be.
        DataError: the source was changed, an output folder holds something else, or the disk is full.
    """
    if not 0 <= request.near_bits <= MOST_BITS:
        raise UsageError(f"--near-duplicates {request.near_bits}: bits, 0 (off) to {MOST_BITS}")
    shards = ShardSet.open(request.source.resolve())
    wanted = targets(request.subsets, len(shards))
    if dry_run:
        near = request.near_bits if shards.kind == "pairs" else 0
        found = cut(np.concatenate(_hashes(request, shards, (), kept=None)), wanted, near_bits=near, seed=request.seed)
        return _told(request, shards, wanted, found, [""] * len(wanted))
    if request.output.resolve() == shards.folder or shards.folder in request.output.resolve().parents:
        raise UsageError(f"--output {request.output}: inside the source; choose another folder")
    scores = score_names(shards)
    plans = [_plan(request, shards, subset, scores) for subset in request.subsets]
    _refuse_strange(request, plans)
    with owner_lock(request.output):
        working = request.output / _WORKING
        working.mkdir(exist_ok=True)
        units = _hashes(request, shards, scores, kept=working)
        near = request.near_bits if shards.kind == "pairs" else 0
        found = cut(np.concatenate(units), wanted, near_bits=near, seed=request.seed)
        _refuse_empty(request, found)
        sides = _keep_sides(working, shards, found, units)
        for number, plan in enumerate(plans):
            _write(request, shards, plan, scores, number, sides)
        body = write_manifest(
            request.output / SPLIT_NAME, _told(request, shards, wanted, found, [plan.build_id for plan in plans])
        )
        shutil.rmtree(working)
        fsync_folder(request.output)
    return body


def _plan(request: Request, shards: ShardSet, subset: Subset, scores: Sequence[str]) -> Plan:
    derived = {
        "verb": "split",
        "subset": subset.name,
        "into": {other.name: other.size or "rest" for other in request.subsets},
        "order": [other.name for other in request.subsets],
        "near_duplicates": request.near_bits,
        "seed": request.seed,
        "source": shards.build_id,
    }
    sources = [recorded_source(shard, scores) for shard in shards.shards]
    return derived_plan(shards.build, sources, options=shards.build["options"], derived=derived)


def _refuse_strange(request: Request, plans: Sequence[Plan]) -> None:
    """An output that holds anything but this very split is left alone."""
    known = {SPLIT_NAME, _WORKING, ".lock", *(subset.name for subset in request.subsets)}
    there = [path.name for path in request.output.iterdir()] if request.output.exists() else []
    if strange := sorted(name for name in there if name not in known and ".tmp-" not in name):
        raise DataError(f"{request.output}: holds {', '.join(strange[:3])}, not of this split; choose another --output")
    if (request.output / SPLIT_NAME).exists():
        body = mf.read(request.output / SPLIT_NAME, format=SPLIT)
        if [subset["build_id"] for subset in body["subsets"]] != [plan.build_id for plan in plans]:
            raise DataError(
                f"{request.output}: holds a split of another source or other options; choose another --output"
            )


def _refuse_empty(request: Request, found: Cut) -> None:
    for subset, size in zip(request.subsets, found.sizes, strict=True):
        if not size:
            raise DataError(
                f"--into {subset.name}: no sample would fall to it: the largest group of equal or similar images has "
                f"{found.largest:,} samples; ask for more, or for a smaller --near-duplicates than {request.near_bits}"
            )


# ---------------------------------------------------------------- hashes


def _hashes(request: Request, shards: ShardSet, scores: tuple[str, ...], *, kept: Path | None) -> list[np.ndarray]:
    looks = request.near_bits > 0
    tasks = [
        _ToHash(
            shard.folder,
            shard.prefix,
            kept and kept / f"{shard.prefix}.{shard.manifest['digest']}.{'looks' if looks else 'content'}",
            looks,
            scores,
        )
        for shard in shards.shards
    ]
    found = []
    with progress(len(shards), "hash", "samples") as shown:
        for shard, units in zip(shards.shards, each(_hash, tasks, workers=request.workers), strict=True):
            found.append(units)
            shown.advance(len(shard))
    return found


def _hash(task: _ToHash) -> np.ndarray:
    """The units of a shard whose bytes are what was written; kept, so that they are not hashed again."""
    if task.kept is not None and task.kept.exists():
        return np.frombuffer(task.kept.read_bytes(), UNIT)
    shard = Shard.open(task.folder, task.prefix)
    refuse_changed(shard, task.scores)
    units = hash_units(shard, looks=task.looks)
    shard.close()
    if task.kept is not None:
        atomic_write(task.kept, units.tobytes())
    return units


# ---------------------------------------------------------------- subsets


def _keep_sides(working: Path, shards: ShardSet, found: Cut, units: Sequence[np.ndarray]) -> list[Path]:
    """A file for each shard with the side of each unit, for whoever writes."""
    paths, start = [], 0
    for shard, part in zip(shards.shards, units, strict=True):
        path = working / f"{shard.prefix}.sides"
        atomic_write(path, found.side[start : start + len(part)].tobytes())
        start += len(part)
        paths.append(path)
    return paths


def _write(
    request: Request, shards: ShardSet, plan: Plan, scores: tuple[str, ...], number: int, sides: Sequence[Path]
) -> None:
    output = request.output / request.subsets[number].name
    pieces = [
        Piece(
            output=output,
            prefix=f"{at:05d}",
            build_id=plan.build_id,
            folder=shards.folder,
            source=shard.prefix,
            scores=scores,
        )
        for at, shard in enumerate(shards.shards)
    ]
    tasks = [_ToWrite(piece, path, number) for piece, path in zip(pieces, sides, strict=True)]
    write_derived(output, plan, pieces, _write_shard, workers=request.workers, tasks=tasks)


def _write_shard(task: _ToWrite) -> int:
    side = np.frombuffer(task.sides.read_bytes(), np.uint8)
    shard = Shard.open(task.piece.folder, task.piece.source)
    chosen = np.flatnonzero(side[units_of(shard)] == task.side)
    return copy_samples(task.piece, chosen)


def _told(
    request: Request, shards: ShardSet, wanted: Sequence[int], found: Cut, build_ids: Sequence[str]
) -> dict[str, Any]:
    return {
        "format": SPLIT,
        "version": 1,
        "source": {"name": shards.folder.name, "build_id": shards.build_id, "digest": shards.build["digest"]},
        "near_duplicates": request.near_bits,
        "seed": request.seed,
        "subsets": [
            {"name": subset.name, "wanted": size, "samples": got, "build_id": build_id}
            for subset, size, got, build_id in zip(request.subsets, wanted, found.sizes, build_ids, strict=True)
        ],
        "samples": len(shards),
        "left": len(shards) - sum(found.sizes),
        "units": len(found.side),
        "groups": found.groups,
        "equal": found.equal,
        "near": found.near,
        "largest_group": found.largest,
        "featureless": found.featureless,
    }

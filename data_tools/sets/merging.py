"""`megaprior-data merge`: several builds of one tokenizer and kind into one.

A shard's streams keep their bytes, so its tokens keep their digest and its scores stay valid; only manifests are written anew,
with the merged build's id. Samples are written one by one only where some are dropped or renamed.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megaprior.data import manifest as mf
from megaprior.data.hashing import BlockHasher
from megaprior.data.scores import open_scores
from megaprior.data.shards import Shard, ShardSet
from megaprior.data_tools.sets.derived import (
    Piece,
    copy_samples,
    derived_plan,
    recorded_source,
    score_names,
    taken_from,
    write_derived,
    write_ledger,
)
from megaprior.data_tools.sets.equals import first_ones
from megaprior.data_tools.sets.quarantining import refused_entries
from megaprior.errors import DataError, UsageError
from megaprior.files import atomic_file, digest_json, disk_full_explained, fsync_folder, temporary_name, write_manifest
from megaprior.telemetry import say

_CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a merge is asked to do."""

    folders: tuple[Path, ...]
    output: Path
    link: bool = False
    deduplicate: bool = False
    prefix_keys: bool = False
    workers: int = 1


@dataclass(frozen=True)
class _Task:
    piece: Piece
    quarantine: list[dict[str, Any]]
    link: bool
    key_prefix: str
    chosen: np.ndarray | None


def merge(request: Request) -> dict[str, Any]:
    """Write the merged build and return the content of its build.json; repeat the command to go on after a kill.

    Raises:
        UsageError: fewer than two folders, or one given twice.
        DataError: other tokenizers or kinds, the same samples twice, a source that was changed, an output that holds
            something else, or a full disk.
    """
    sets = _open(request)
    names = _names([shards.folder for shards in sets])
    scores = _common_scores(sets)
    shards = [shard for one in sets for shard in one.shards]
    plan = derived_plan(
        sets[0].build,
        [recorded_source(shard, scores) for shard in shards],
        options=_common_options(sets),
        derived={
            "verb": "merge",
            "folders": names,
            "deduplicate": request.deduplicate,
            "prefix_keys": request.prefix_keys,
            "sources": [one.build_id for one in sets],
        },
    )
    prefixes = [
        f"{name}/" if request.prefix_keys else "" for name, one in zip(names, sets, strict=True) for _ in one.shards
    ]
    pieces = [
        Piece(
            output=request.output,
            prefix=f"{number:05d}",
            build_id=plan.build_id,
            folder=shard.folder,
            source=shard.prefix,
            scores=scores,
        )
        for number, shard in enumerate(shards)
    ]
    complete = (request.output / mf.BUILD_NAME).exists()
    chosen = (
        first_ones(shards, workers=request.workers) if request.deduplicate and not complete else [None] * len(shards)
    )
    refused = [entries for one in sets for entries in refused_entries(one)]
    tasks = [
        _Task(piece, entries, request.link, prefix, places)
        for piece, entries, prefix, places in zip(pieces, refused, prefixes, chosen, strict=True)
    ]
    return write_derived(request.output, plan, pieces, _write, workers=request.workers, tasks=tasks)


# ---------------------------------------------------------------- what fits together


def _open(request: Request) -> list[ShardSet]:
    if len(request.folders) < 2:
        raise UsageError(f"merge: {len(request.folders)} folder, at least two are merged")
    places = [folder.resolve() for folder in request.folders]
    if len(set(places)) < len(places):
        twice = next(place for place in places if places.count(place) > 1)
        raise UsageError(f"{twice}: given twice; its samples would be doubled")
    sets = [ShardSet.open(folder) for folder in places]
    seen: dict[str, Path] = {}
    for shards in sets:
        mf.refuse_other_tokenizer(
            str(shards.folder), shards.build["tokenizer"], sets[0].build["tokenizer"], str(sets[0].folder)
        )
        if shards.kind != sets[0].kind:
            raise DataError(
                f"{shards.folder}: of kind {shards.kind!r}, {sets[0].folder} is of kind {sets[0].kind!r}; merge pairs with "
                "pairs and text with text"
            )
        own = {digest_json(s.manifest["streams"]): s.folder / s.prefix for s in shards.shards if len(s)}
        if (twice := own.keys() & seen) and not request.deduplicate:
            one = min(twice)
            raise DataError(
                f"{own[one]}: holds the same bytes as {seen[one]}; its samples would be doubled, leave one folder out or add "
                "--deduplicate"
            )
        seen |= own  # within one folder equal shards are what its sources hold
    return sets


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with as many of their parents as tell them apart."""
    names: list[str] = []
    for depth in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[1:][-depth:]) for folder in folders]
        if len(set(names)) == len(names):
            break
    return names


def _common_scores(sets: Sequence[ShardSet]) -> tuple[str, ...]:
    """Score streams that all folders have, of one kind and by one scorer; others are left behind, and named."""
    found = [set(score_names(shards)) for shards in sets]
    for name in sorted(set.union(*found) - set.intersection(*found)):
        lacking = next(shards.folder for shards, names in zip(sets, found, strict=True) if name not in names)
        say(f"{name!r} is left behind: {lacking} has no such scores")
    common = []
    for name in sorted(set.intersection(*found)):
        records = [open_scores(shards.shards[0], name)[1] for shards in sets]
        who = {(record["kind"], record["scorer"]["fingerprint"]) for record in records}
        if len(who) > 1:
            say(f"{name!r} is left behind: it is of {len(who)} scorers or kinds; score the merged folder anew")
        else:
            common.append(name)
    return tuple(common)


def _common_options(sets: Sequence[ShardSet]) -> dict[str, Any]:
    """What the builds were all made with; where they differ, None (each shard's manifest has its own)."""
    options = [{k: v for k, v in shards.build["options"].items() if k != "derived"} for shards in sets]
    common = {k: v if all(other.get(k) == v for other in options) else None for k, v in options[0].items()}
    # Messages name the limit at which captions were cut.
    common["max_sequence"] = max(other.get("max_sequence") or 0 for other in options)
    return common


# ---------------------------------------------------------------- one shard


def _write(task: _Task) -> int:
    piece = task.piece
    if task.chosen is not None or task.key_prefix:
        return copy_samples(
            piece, task.chosen, rename=partial("{}{}".format, task.key_prefix), quarantine=task.quarantine, check=True
        )
    shard, _ = piece.open()
    for name, entry in shard.manifest["streams"].items():
        _bring_stream(piece, name, entry, link=task.link)
    write_ledger(piece, task.quarantine)
    body = {**shard.manifest, "prefix": piece.prefix, "build_id": piece.build_id, "source": taken_from(shard)}
    written = Shard(folder=piece.output, prefix=piece.prefix, manifest=body, streams={})
    if not (piece.output / f"{piece.prefix}.json").exists():
        write_manifest(piece.output / f"{piece.prefix}.json", body)
    for name in piece.scores:
        _, record = open_scores(shard, name)
        _bring_stream(piece, name, record["stream"], link=task.link)
        assert record["tokens_digest"] == written.tokens_digest
        write_manifest(piece.output / f"{piece.prefix}.{name}.json", {**record, "prefix": piece.prefix})
    shard.close()
    return len(shard)


def _bring_stream(piece: Piece, name: str, entry: dict[str, Any], *, link: bool) -> None:
    for kind in ("bin", "idx"):
        source = piece.folder / f"{piece.source}.{name}.{kind}"
        target = piece.output / f"{piece.prefix}.{name}.{kind}"
        if link:
            _link(source, target)
        else:
            _copy(source, target, entry[kind])


def _link(source: Path, target: Path) -> None:
    temporary = temporary_name(target)
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
            raise
        raise DataError(
            f"{source}: cannot be linked into {target.parent} ({error.strerror}); leave --link out to copy"
        ) from error
    os.replace(temporary, target)
    temporary.unlink(missing_ok=True)  # where both names were the same file already, rename leaves both
    fsync_folder(target.parent)


def _copy(source: Path, target: Path, entry: dict[str, Any]) -> None:
    """Copy a file, holding it against its digests on the way."""
    hasher = BlockHasher()
    needed, free = entry["bytes"], shutil.disk_usage(target.parent).free
    if needed > free:
        raise DataError(
            f"{target}: disk full ({needed:,} bytes needed, {free:,} bytes free); free some space and repeat"
        )
    with disk_full_explained(target, needed), open(source, "rb") as file, atomic_file(target, needed=needed) as out:
        while data := file.read(_CHUNK):
            hasher.update(data)
            out.write(data)
        if hasher.blocks() != entry["blocks"]:
            pairs = zip(hasher.blocks(), entry["blocks"], strict=False)
            at = next((i for i, (now, then) in enumerate(pairs) if now != then), len(entry["blocks"]))
            raise DataError(
                f"{source}: block {at} is not what was written; run `megaprior-data verify` and rebuild it first"
            )

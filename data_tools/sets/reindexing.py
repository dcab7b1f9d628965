"""`megaprior-data reindex`: indexes rebuilt where their digest proves it, deliberate changes taken over where they are asked for.

    1. look      each file of each shard against the manifest: whole, changed or missing
    2. rebuild   a lost .idx whose .bin is whole: guesses (guesses.py), of which only the right one has the recorded digest
    3. accept    changed files that fit each other, on demand: new digests, the shard's manifest, then build.json

Never accepted: a missing file, changed scores (a scorer writes those), another number of samples, streams that do not fit.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megaprior.data import manifest as mf
from megaprior.data.alignment import shard_problems
from megaprior.data.indexed import IndexedStream
from megaprior.data_tools.sets.guesses import index_bytes, placements
from megaprior.errors import DataError
from megaprior.files import BLOCK_BYTES, atomic_write, block_digests, owner_lock, write_manifest
from megaprior.telemetry import progress

_WHOLE, _CHANGED, _MISSING = "whole", "changed", "missing"


@dataclass
class Reindexed:
    """What was rebuilt, taken over, and what is lost or waits for `accept`: a line each."""

    rebuilt: list[str] = field(default_factory=list)
    accepted: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)


def reindex(folder: Path, *, accept: bool = False) -> Reindexed:
    """Put right what can be in a shard folder.

    Raises:
        DataError: the folder's build.json is missing or changed, or another process works here.
    """
    build = mf.read_build(folder)
    told = Reindexed()
    manifests: dict[str, dict[str, Any]] = {}
    with owner_lock(folder), progress(len(build["shards"]), "look at", "shards") as shown:
        for entry in build["shards"]:
            try:
                manifest = mf.read(folder / f"{entry['prefix']}.json", format=mf.SHARD)
                mf.refuse_stranger(f"{folder.name}/{entry['prefix']}", manifest, build)
            except DataError as error:
                told.lost.append(
                    f"{error} (a shard's manifest names the digests of all its files: it is never guessed)"
                )
                continue
            manifests[entry["prefix"]] = _Shard(folder, manifest, told).put_right(accept=accept)
            shown.advance()
        _name_manifests(folder, build, manifests, told, accept=accept)
    return told


def _name_manifests(
    folder: Path, build: dict[str, Any], manifests: dict[str, dict[str, Any]], told: Reindexed, *, accept: bool
) -> None:
    """Have build.json name the manifests that are there now."""
    changed = [
        e for e in build["shards"] if e["prefix"] in manifests and manifests[e["prefix"]]["digest"] != e["digest"]
    ]
    for entry in changed:
        line = f"{folder / entry['prefix']}.json: not the manifest that {mf.BUILD_NAME} names"
        (told.accepted if accept else told.lost).append(
            f"{line}: accepted" if accept else f"{line}; if that was meant, add --accept"
        )
    if not accept or not changed:
        return
    if len(manifests) < len(build["shards"]):
        told.lost.append(f"{folder / mf.BUILD_NAME}: not written while a shard's manifest is lost")
        return
    counts = dict(build["counts"])
    for name in (*mf.COUNTS, "quarantined"):
        counts[name] = sum(manifest["counts"][name] for manifest in manifests.values())
    shards = [{**e, "digest": manifests[e["prefix"]]["digest"]} for e in build["shards"]]
    write_manifest(folder / mf.BUILD_NAME, {**build, "shards": shards, "counts": counts})


class _Shard:
    """One shard: its streams and scores, and what is known of their files."""

    def __init__(self, folder: Path, manifest: dict[str, Any], told: Reindexed) -> None:
        self.folder, self.manifest, self.told, self.prefix = folder, manifest, told, manifest["prefix"]
        self.entries: dict[str, dict[str, Any]] = dict(manifest["streams"])
        for path in sorted(folder.glob(f"{self.prefix}.*.json")):
            try:
                record = mf.read(path, format=mf.SCORES)
            except DataError as error:
                told.lost.append(str(error))
            else:
                self.entries[record["name"]] = record["stream"]
        self.state = {
            (name, kind): _look(self.path(name, kind), entry[kind])
            for name, entry in self.entries.items()
            for kind in ("bin", "idx")
        }

    def path(self, name: str, kind: str) -> Path:
        """The file of a stream."""
        return self.folder / f"{self.prefix}.{name}.{kind}"

    def put_right(self, *, accept: bool) -> dict[str, Any]:
        """Rebuild and accept what can be; returns the shard's manifest as it is now."""
        bad = [name for name in self.entries if self.state[name, "idx"] != _WHOLE]
        while bad:  # a rebuilt index may tell what another one was
            rebuilt = [name for name in bad if self.state[name, "bin"] == _WHOLE and self._rebuild(name)]
            bad = [name for name in bad if name not in rebuilt]
            if not rebuilt:
                break
        changed = [name for name in self.entries if self._wrong(name)]
        missing = [
            path for (name, kind), state in self.state.items() if state == _MISSING and (path := self.path(name, kind))
        ]
        takes = [name for name in changed if name in self.manifest["streams"]]
        if changed and accept and not missing and len(takes) == len(changed):
            return self._accept(takes)
        self._lament(changed, missing)
        return self.manifest

    def _wrong(self, name: str) -> list[Path]:
        return [self.path(name, kind) for kind in ("bin", "idx") if self.state[name, kind] != _WHOLE]

    def _sound(self) -> dict[str, IndexedStream]:
        return {
            name: IndexedStream(self.folder / f"{self.prefix}.{name}", expect=entry)
            for name, entry in self.entries.items()
            if not self._wrong(name)
        }

    def _rebuild(self, name: str) -> bool:
        entry, sound = self.entries[name], self._sound()
        dtype = np.dtype(entry["dtype"]).newbyteorder("<")
        data = self.path(name, "bin")
        flat = np.memmap(data, dtype, "r") if entry["bin"]["bytes"] else np.empty(0, dtype)
        count = entry["sequences"]
        documents = [other.documents for other in sound.values()][:1] or [np.arange(count + 1)]
        for lengths, pointers in placements(name, entry, flat, sound, self.manifest):
            index = index_bytes(dtype, lengths, pointers, documents[0])
            if _digests(index) == entry["idx"]["blocks"]:
                atomic_write(self.path(name, "idx"), index)
                was, self.state[name, "idx"] = self.state[name, "idx"], _WHOLE
                self.told.rebuilt.append(
                    f"{self.path(name, 'idx')}: was {was}; rebuilt, {count:,} sequences, the digest is the one recorded"
                )
                return True
        return False

    def _lament(self, changed: list[str], missing: list[Path]) -> None:
        """Say of each file what is lost, and what would be accepted."""
        for name in changed:
            for path in self._wrong(name):
                data_whole = self.state[name, "bin"] == _WHOLE
                if path in missing and path.suffix == ".idx" and data_whole:
                    why = "missing, and nothing that is left tells where each sequence ends"
                elif path in missing:
                    why = "missing"
                elif name not in self.manifest["streams"]:
                    why = f"scores that are not what was written are never accepted; delete {self.prefix}.{name}.* and score"
                else:
                    why = f"{_first_change(path, self.entries[name][path.suffix[1:]])}; if that was meant, add --accept"
                remedy = "" if why.endswith(("--accept", "score")) else "; copy it again or rebuild the shard"
                self.told.lost.append(f"{path}: {why}{remedy}")

    def _accept(self, names: list[str]) -> dict[str, Any]:
        streams, accepted = dict(self.manifest["streams"]), dict(self.manifest.get("accepted", {}))
        problems: list[str] = []
        for name in names:
            try:
                stream = IndexedStream(self.folder / f"{self.prefix}.{name}")
                streams[name] = {**streams[name], **_entry(stream)}
            except DataError as error:
                problems.append(str(error))
                continue
            for path in self._wrong(name):
                kind = path.suffix[1:]
                accepted[path.name] = {"was": self.entries[name][kind]["blocks"], "is": streams[name][kind]["blocks"]}
        body = {**self.manifest, "streams": streams, "accepted": accepted}
        if not problems:
            opened = {n: IndexedStream(self.folder / f"{self.prefix}.{n}", expect=e) for n, e in streams.items()}
            body |= {"counts": self._counts(opened), "lengths_digest": mf.lengths_digest(opened["tokens"].lengths)}
            problems = list(shard_problems(body, opened))
        if problems:
            self.told.lost += [f"{self.folder.name}/{self.prefix}: not accepted: {problem}" for problem in problems]
            return self.manifest
        for name in names:
            self.told.accepted += [
                f"{path}: {_first_change(path, self.entries[name][path.suffix[1:]])}: accepted"
                for path in self._wrong(name)
            ]
        return write_manifest(self.folder / f"{self.prefix}.json", body)

    def _counts(self, streams: dict[str, IndexedStream]) -> dict[str, Any]:
        """The counts that follow from the streams; the number of samples stays, which shard_problems holds."""
        tokens = streams["tokens"]
        counts = {**self.manifest["counts"], "tokens": int(tokens.lengths.sum(dtype=np.int64))}
        counts["loss_tokens"] = counts["tokens"]
        if "loss_spans" in streams:
            edges = streams["loss_spans"].flat().astype(np.int64)
            counts["loss_tokens"] = int((edges[1::2] - edges[::2]).sum())
        if "images" in streams:
            counts["images"] = len(np.unique(streams["images"].pointers))
        return counts


def _look(path: Path, entry: dict[str, Any]) -> str:
    if not path.is_file():
        return _MISSING
    return _WHOLE if os.path.getsize(path) == entry["bytes"] and block_digests(path) == entry["blocks"] else _CHANGED


def _entry(stream: IndexedStream) -> dict[str, Any]:
    files = {
        kind: {"bytes": path.stat().st_size, "blocks": block_digests(path)}
        for kind, path in (("bin", stream.bin), ("idx", stream.idx))
    }
    return {"dtype": stream.dtype.name, "sequences": len(stream), **files}


def _digests(data: bytes) -> list[str]:
    return [xxhash.xxh3_128_hexdigest(data[start : start + BLOCK_BYTES]) for start in range(0, len(data), BLOCK_BYTES)]


def _first_change(path: Path, entry: dict[str, Any]) -> str:
    """What differs from the manifest, in words."""
    size = path.stat().st_size
    if size != entry["bytes"]:
        return f"{size:,} bytes, the manifest says {entry['bytes']:,}"
    changed = [at for at, (a, b) in enumerate(zip(block_digests(path), entry["blocks"], strict=True)) if a != b]
    more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
    return f"block {changed[0]} (from byte {changed[0] * BLOCK_BYTES:,}){more} is not what was written"

"""Verify a shard folder: every byte against its digest, every count and alignment against the others, every file accounted for.

Reads everything in blocks; a problem is one line that names the file and, for changed bytes, the 64 MiB block.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megaprior.data import manifest as mf
from megaprior.data.alignment import score_problems, shard_problems
from megaprior.data.indexed import IndexedStream
from megaprior.errors import DataError
from megaprior.files import BLOCK_BYTES, block_digests


def verify(folder: Path | str) -> list[str]:
    """Every problem of a shard folder, one line each; an empty list means that all is as it was written."""
    return _Verifier(Path(folder)).problems()


class _Verifier:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.known = {mf.BUILD_NAME}  # files that some manifest accounts for, relative to the folder
        self.found: list[str] = []

    def problems(self) -> list[str]:
        build = self._manifest(mf.BUILD_NAME, mf.BUILD) if (self.folder / mf.BUILD_NAME).exists() else None
        if build is None:
            self.found.append(f"{self.folder}: no sound {mf.BUILD_NAME}: the build is not complete, repeat the command")
        for name, entry in (build or {}).get("files", {}).items():
            self._file(name, entry)
        listed = {entry["prefix"]: entry for entry in (build or {}).get("shards", [])}
        present = {path.stem for path in self.folder.glob("*.json") if "." not in path.stem} - {
            Path(mf.BUILD_NAME).stem
        }
        for prefix in sorted({*listed, *present}):
            self._shard(prefix, build, listed.get(prefix))
        self._orphans()
        return self.found

    def _manifest(self, name: str, format: str) -> dict[str, Any] | None:
        """A manifest if it is sound. A changed bit can leave the meaning of JSON alone (1e5, 1E5), so its bytes count too."""
        path = self.folder / name
        self.known.add(name)
        try:
            body = mf.read(path, format=format)
        except DataError as error:
            self.found.append(f"{error} ({path}, block 0)")
            return None
        if path.read_bytes() != (json.dumps(body, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode():
            self.found.append(f"{path}: block 0 is not what was written, though it still reads the same; rebuild it")
        return body

    def _file(self, name: str, entry: dict[str, Any]) -> bool:
        """Compare a file with its size and block digests; whether it is sound."""
        path, before = self.folder / name, len(self.found)
        self.known.add(name)
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            self.found.append(f"{path}: missing; copy it again or rebuild the shard")
        elif size != entry["bytes"]:
            self.found.append(
                f"{path}: {size:,} bytes, the manifest says {entry['bytes']:,}; copy it again or rebuild it"
            )
        else:
            for block, (now, then) in enumerate(zip(block_digests(path), entry["blocks"], strict=True)):
                if now != then:
                    first, last = block * BLOCK_BYTES, min((block + 1) * BLOCK_BYTES, size) - 1
                    self.found.append(
                        f"{path}: block {block} (bytes {first:,} to {last:,}) was changed; rebuild the shard"
                    )
        return len(self.found) == before

    def _stream(self, name: str, entry: dict[str, Any]) -> IndexedStream | None:
        """A stream whose two files are sound, open."""
        data, index = self._file(f"{name}.bin", entry["bin"]), self._file(f"{name}.idx", entry["idx"])
        if not (data and index):
            return None
        try:
            return IndexedStream(self.folder / name, expect=entry)
        except DataError as error:
            self.found.append(str(error))
            return None

    def _shard(self, prefix: str, build: dict[str, Any] | None, listed: dict[str, Any] | None) -> None:
        where = f"{self.folder.name}/{prefix}"
        manifest = self._manifest(f"{prefix}.json", mf.SHARD)
        if manifest is None:
            return
        if build is not None:
            try:
                mf.refuse_stranger(where, manifest, build)
            except DataError as error:
                self.found.append(str(error))
            if listed is None or listed["digest"] != manifest["digest"]:
                self.found.append(
                    f"{self.folder / prefix}.json: not the manifest that {mf.BUILD_NAME} names; rebuild the shards"
                )
        streams = {name: self._stream(f"{prefix}.{name}", entry) for name, entry in manifest["streams"].items()}
        sound = {name: stream for name, stream in streams.items() if stream is not None}
        if len(sound) == len(streams):
            self.found += [f"{where}: {problem}" for problem in shard_problems(manifest, sound)]
        for path in sorted(self.folder.glob(f"{prefix}.*.json")):
            self._scores(path.name, manifest, sound.get("tokens"))

    def _scores(self, name: str, manifest: dict[str, Any], tokens: IndexedStream | None) -> None:
        record = self._manifest(name, mf.SCORES)
        if record is None:
            return
        stream = self._stream(name.removesuffix(".json"), record["stream"])
        if stream is not None and tokens is not None:
            self.found += [
                f"{self.folder / name}: {problem}" for problem in score_problems(record, manifest, stream, tokens)
            ]

    def _orphans(self) -> None:
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            # .lock belongs to a running command; .score-<name>/ and .building/ to a scorer and a builder that can be resumed.
            if path.is_file() and name not in self.known and not name.startswith((".lock", ".score-", ".building")):
                self.found.append(f"{path}: in no manifest (an interrupted write?); delete it or repeat the command")

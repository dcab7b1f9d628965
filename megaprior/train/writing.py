"""The half of a save that needs no other rank's attention: write, digest, commit, in a thread beside the training.

No collective may run in a thread: the ranks tell each other through files. Each writes what it holds into the one temporary
folder, and last a list of its files with their digests; rank 0 waits for all lists, writes the manifest and renames.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaprior.distributed import Place
from megaprior.errors import CheckpointError, DataError
from megaprior.files import atomic_write, block_digests, fsync_file, fsync_folder, temporary_name, write_manifest
from megaprior.train.checkpoint import FORMAT, MANIFEST, Checkpoint
from megaprior.train.snapshot import Write

RUNNING, DONE, FAILED = 0, 1, 2
_PARTS = ".parts"
_LOOK_EVERY_S = 0.05
_CANNOT_WRITE = ("write", "inline_container", "I/O error")  # of torch, its archive writer, safetensors


@dataclass(frozen=True)
class Destination:
    """Where one checkpoint is written and what it will be called."""

    run: Path
    temporary: Path
    target: Path


class Writing:
    """One rank's part of one save, going on in a thread."""

    def __init__(
        self,
        where: Destination,
        writes: list[Write],
        *,
        place: Place,
        body: dict[str, Any],
        patience_s: float,
        committed: Callable[[], Any],
    ) -> None:
        """`body` is the manifest's but for the files; `patience_s` is how long rank 0 waits for the lists of the others;
        `committed` runs in rank 0's thread when the checkpoint is complete."""
        self.where, self.state, self.error = where, RUNNING, None
        self.checkpoint: Checkpoint | None = None  # rank 0's, when done
        self.seconds = 0.0
        self._writes, self._place, self._body, self._committed = writes, place, body, committed
        self._patience_s, self._stop, self._began = patience_s, threading.Event(), time.perf_counter()
        self._thread = threading.Thread(target=self._work, name="megaprior-save", daemon=True)
        self._thread.start()

    def wait(self, seconds: float | None = None) -> None:
        """Until this rank's part has ended, or so long."""
        self._thread.join(seconds)

    def cancel(self) -> None:
        """Stop after the file that is being written, without a commit, and wait for that."""
        self._stop.set()
        self._thread.join()

    def hurry(self, seconds: float) -> None:
        """From now on wait for the other ranks no longer than so long."""
        self._patience_s = min(self._patience_s, time.perf_counter() - self._began + seconds)

    def _work(self) -> None:
        error: Exception | None = None
        try:
            files = self._write_all()
            if self._place.rank == 0:
                self.checkpoint = self._commit(files)
                self._committed()
            else:
                parts = self.where.temporary / _PARTS
                atomic_write(parts / f"{self._place.rank}.json", json.dumps(files))
        except Exception as found:
            error = explained(found, self.where.temporary)
        self._writes = []  # the snapshot's memory
        self.error, self.seconds = error, time.perf_counter() - self._began
        self.state = FAILED if error is not None else DONE

    def _write_all(self) -> dict[str, Any]:
        """Run every write; size and digests of the files, by name in the checkpoint."""
        files: dict[str, Any] = {}
        for write in self._writes:
            self._check_stop()
            write.run()
            for path in files_below(write.path):
                files[str(path.relative_to(self.where.temporary))] = _entry(path)
        return files

    def _commit(self, files: dict[str, Any]) -> Checkpoint:
        temporary, target = self.where.temporary, self.where.target
        for part in self._await_parts():
            files |= part
        shutil.rmtree(temporary / _PARTS)
        for path in files_below(temporary):  # what DeepSpeed put there itself
            name = str(path.relative_to(temporary))
            if name not in files:
                files[name] = _entry(path)
        manifest = write_manifest(temporary / MANIFEST, {**self._body, "format": FORMAT, "version": 1, "files": files})
        for parent, _, _ in os.walk(temporary):
            fsync_folder(parent)
        self._check_stop()
        os.rename(temporary, target)
        fsync_folder(target.parent)
        atomic_write(self.where.run / "latest", target.name + "\n")
        return Checkpoint(target, manifest)

    def _await_parts(self) -> list[dict[str, Any]]:
        found: dict[int, dict[str, Any]] = {}
        while True:
            missing = [rank for rank in range(1, self._place.world) if rank not in found]
            for rank in missing:
                path = self.where.temporary / _PARTS / f"{rank}.json"
                if path.exists():
                    found[rank] = json.loads(path.read_text(encoding="utf-8"))
            if len(found) == self._place.world - 1:
                return list(found.values())
            waited = time.perf_counter() - self._began
            if waited > self._patience_s:
                raise CheckpointError(
                    f"{self.where.target}: rank {missing[0]} has not written its part after {waited:.0f} s; the earlier "
                    "checkpoints are intact: look at that machine's disk and repeat the command"
                )
            self._stop.wait(_LOOK_EVERY_S)
            self._check_stop()

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise CheckpointError(f"{self.where.target}: its save was given up; the earlier checkpoints are intact")


def begin_folder(target: Path, *, needed: float) -> Path:
    """The temporary folder of a save, on rank 0, where there is room for it.

    Raises:
        CheckpointError: the disk is full: a full disk is cheaper to explain before than after.
        DataError: `target` exists.
    """
    if target.exists():
        raise DataError(f"{target}: exists already and is never overwritten; remove it or choose another name")
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if needed > free:
        raise CheckpointError(
            f"{target}: disk full ({needed:,.0f} bytes needed, {free:,} bytes free); earlier checkpoints are intact: free some "
            "space and repeat the command"
        )
    temporary = temporary_name(target)
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "state").mkdir(parents=True)
    (temporary / _PARTS).mkdir()
    return temporary


def explained(error: Exception, folder: Path) -> Exception:
    """A failed write as one line that says how much room there is; other errors as they are."""
    if isinstance(error, DataError) and "disk full" not in str(error):
        return error
    if not isinstance(error, OSError | DataError) and not any(word in str(error) for word in _CANNOT_WRITE):
        return error
    free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
    return CheckpointError(
        f"{folder}: cannot be written ({' '.join(str(error).split())[:120]}; {free:,} bytes free); the earlier "
        "checkpoints are intact: free some space and repeat the command"
    )


def files_below(path: Path) -> list[Path]:
    """`path` itself where it is a file, else every file in it."""
    return [path] if path.is_file() else sorted(inner for inner in path.rglob("*") if inner.is_file())


def _entry(path: Path) -> dict[str, Any]:
    fsync_file(path)
    return {"bytes": os.path.getsize(path), "blocks": block_digests(path)}

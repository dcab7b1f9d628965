"""The book a scorer keeps while it works: which units are done, by which scorer, and on which hardware.

A unit is a run of neighbouring samples of one shard. The plan of units is a function of the shards' token counts alone, so any
number of processes, in any order, after any kill, fills the same units with the same bytes. The ledger lives in
`DIR/.score-NAME/` beside the shards and is removed when every shard has its stream:

    record-<digest>.json      device, versions, threads: one file for each kind of machine that took part
    ledger.json               the scorer, its options and the shards it works on
    <prefix>.<unit>.npy       float32 scores of a finished unit, renamed into place when whole
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from megaprior.errors import DataError
from megaprior.files import atomic_write, digest_json, fsync_folder, read_manifest, write_manifest

_FORMAT, _RECORD = "megaprior.score_ledger", "megaprior.score_record"


@dataclass(frozen=True)
class Unit:
    """Samples [start, stop) of shard `prefix`, numbered inside that shard; sample 0 of the shard is sample `base` of the set."""

    prefix: str
    number: int
    base: int
    start: int
    stop: int
    tokens: int  # scores in all

    @property
    def file(self) -> str:
        """Its name in the ledger."""
        return f"{self.prefix}.{self.number:06d}.npy"


def plan_units(prefix: str, token_counts: np.ndarray, *, unit_tokens: int, base: int = 0) -> list[Unit]:
    """Cut one shard, `token_counts` int [N], into units of about `unit_tokens` tokens.

    A new unit begins with the first sample that starts at or beyond a multiple of `unit_tokens`; no sample is cut.
    """
    counts = token_counts.astype(np.int64)
    owner = (np.cumsum(counts) - counts) // unit_tokens
    starts = np.flatnonzero(np.diff(owner, prepend=-1))
    edges = [*starts.tolist(), len(counts)]
    return [
        Unit(prefix, number, base, start, stop, int(counts[start:stop].sum()))
        for number, (start, stop) in enumerate(pairwise(edges))
    ]


class Ledger:
    """The finished units of one score stream; every write is whole or absent, so any process may die at any time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def open(
        cls, folder: Path, *, work: dict[str, Any], record: dict[str, Any], allow_other_hardware: bool = False
    ) -> Ledger:
        """Start the ledger, or go on with one of the same `work` under the same hardware `record`.

        Raises:
            DataError: it was begun by another scorer or with other options, or, unless allowed, on other hardware,
                versions or threads; the message names the field that differs.
        """
        path, mine = folder / "ledger.json", folder / f"record-{digest_json(record)}.json"
        folder.mkdir(parents=True, exist_ok=True)
        fsync_folder(folder.parent)
        if path.exists():
            begun = read_manifest(path, format=_FORMAT)["work"]
            if difference := _difference(begun, work):
                raise DataError(
                    f"{folder}: unfinished scores of another run ({difference}); repeat that command to finish them, "
                    "choose another --name, or delete this folder to start over"
                )
        ledger = cls(folder)
        if not mine.exists():
            others = ledger.records()
            if others and not allow_other_hardware:
                raise DataError(
                    f"{folder}: begun under other conditions ({_difference(others[0], record)}), under which the last bits "
                    "of scores may differ; go on with --allow-other-hardware, or delete this folder to start over"
                )
            write_manifest(mine, {"format": _RECORD, "version": 1, "record": record})
        if not path.exists():
            write_manifest(path, {"format": _FORMAT, "version": 1, "work": work})
        return ledger

    def records(self) -> list[dict[str, Any]]:
        """The hardware records of all who took part."""
        paths = sorted(self.folder.glob("record-*.json"))
        return [read_manifest(path, format=_RECORD)["record"] for path in paths]

    def done(self) -> set[str]:
        """Names of the finished units' files."""
        return {entry.name for entry in os.scandir(self.folder) if entry.name.endswith(".npy")}

    def has(self, unit: Unit) -> bool:
        """Whether somebody finished the unit."""
        return (self.folder / unit.file).exists()

    def write(self, unit: Unit, scores: np.ndarray) -> None:
        """Keep the scores of a finished unit, float32 [unit.tokens].

        Raises:
            DataError: the disk is full; finished units stay.
        """
        assert (scores.dtype, scores.shape) == (np.float32, (unit.tokens,))
        file = io.BytesIO()
        np.save(file, scores)
        atomic_write(self.folder / unit.file, file.getvalue())

    def read(self, unit: Unit) -> np.ndarray:
        """Scores of a finished unit, float32 [unit.tokens].

        Raises:
            DataError: the file is not what `write` left there.
        """
        path = self.folder / unit.file
        try:
            scores = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{path}: unreadable ({error}); delete this file and repeat the command") from None
        if scores.dtype != np.float32 or scores.shape != (unit.tokens,):
            found = f"{scores.dtype} {list(scores.shape)}"
            raise DataError(
                f"{path}: holds {found}, expected float32 [{unit.tokens}]; delete this file and repeat the command"
            )
        return scores

    def scores(self, units: Iterable[Unit], token_counts: np.ndarray) -> Iterator[np.ndarray]:
        """The scores of each sample of `units` in order, float32 [k]; `token_counts` int [N] of their shard."""
        for unit in units:
            yield from np.split(self.read(unit), np.cumsum(token_counts[unit.start : unit.stop])[:-1])

    def forget(self, units: Iterable[Unit]) -> None:
        """Drop the files of units whose stream is complete."""
        for unit in units:
            (self.folder / unit.file).unlink(missing_ok=True)

    def remove(self) -> None:
        """Drop the ledger: every shard has its stream."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _difference(found: Any, wanted: Any, name: str = "") -> str:
    """The first field in which two records differ, with both values; empty when they agree."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        fields = sorted({*found, *wanted})
        return next((text for key in fields if (text := _difference(found.get(key), wanted.get(key), key))), "")
    return "" if found == wanted else f"{name}: {found!r} then, {wanted!r} now"

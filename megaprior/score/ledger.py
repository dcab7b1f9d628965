"""The book a scorer keeps while it works: which units are done, under which scorer and on which hardware.

A unit is a run of neighbouring samples of one shard. The plan of units is a function of the shards' token counts alone, so any
number of processes, in any order, after any kill, fills the same units with the same bytes. The ledger lives in
`DIR/.score-NAME/` beside the shards and is removed when every shard has its stream:

    ledger.json               the scorer, the plan, and every hardware record that took part
    <prefix>.<unit>.npy       float32 scores of a finished unit, renamed into place when whole
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megaprior.errors import DataError
from megaprior.files import atomic_write, fsync_folder, read_manifest, write_manifest

_FORMAT = "megaprior.score_ledger"


@dataclass(frozen=True)
class Unit:
    """Samples [start, stop) of shard `prefix`, numbered inside that shard; `tokens` scores in all."""

    prefix: str
    number: int
    start: int
    stop: int
    tokens: int

    @property
    def file(self) -> str:
        return f"{self.prefix}.{self.number:06d}.npy"


def plan_units(prefix: str, token_counts: np.ndarray, unit_tokens: int) -> list[Unit]:
    """Cut one shard, `token_counts` int [N], into units of about `unit_tokens` tokens.

    A unit ends with the sample that reaches the next multiple of `unit_tokens`; no sample is cut.
    """
    ends = np.cumsum(token_counts, dtype=np.int64)
    owner = (ends - token_counts) // unit_tokens  # by where a sample starts
    starts = np.flatnonzero(np.diff(owner, prepend=-1))
    stops = np.append(starts[1:], len(token_counts))
    tokens = np.add.reduceat(token_counts, starts, dtype=np.int64) if len(starts) else []
    return [
        Unit(prefix, number, int(start), int(stop), int(total))
        for number, (start, stop, total) in enumerate(zip(starts, stops, tokens, strict=True))
    ]


class Ledger:
    """The finished units of one score stream; every write is whole or absent, so any process may die at any time."""

    def __init__(self, folder: Path, body: dict[str, Any]) -> None:
        self.folder = folder
        self.records: list[dict[str, Any]] = body["records"]

    @classmethod
    def open(
        cls, folder: Path, *, work: dict[str, Any], record: dict[str, Any], allow_other_hardware: bool = False
    ) -> Ledger:
        """Start the ledger, or go on with one of the same `work` (scorer, plan, options) under the same `record`.

        Raises:
            DataError: the ledger was begun by another scorer, with other options, or on other hardware or versions.
        """
        path = folder / "ledger.json"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            fsync_folder(folder.parent)
            return cls(folder, write_manifest(path, cls._body(work, [record])))
        body = read_manifest(path, format=_FORMAT)
        if difference := _difference(body["work"], work):
            raise DataError(
                f"{folder}: unfinished scores of another run ({difference}); repeat that command to finish them, "
                f"choose another --name, or delete the folder to start over"
            )
        if record not in body["records"]:
            if not allow_other_hardware:
                raise DataError(
                    f"{folder}: begun under other conditions ({_difference(body['records'][-1], record)}), so the bytes may "
                    f"differ in their last bits; go on with --allow-other-hardware, or delete the folder to start over"
                )
            body = write_manifest(path, cls._body(work, [*body["records"], record]))
        return cls(folder, body)

    @staticmethod
    def _body(work: dict[str, Any], records: list[dict[str, Any]]) -> dict[str, Any]:
        return {"format": _FORMAT, "version": 1, "work": work, "records": records}

    def done(self) -> set[str]:
        """Names of the finished units' files."""
        try:
            return {entry.name for entry in os.scandir(self.folder) if entry.name.endswith(".npy")}
        except FileNotFoundError:  # another rank finished the stream and removed the ledger
            return set()

    def write(self, unit: Unit, scores: np.ndarray) -> None:
        """Keep the scores of a finished unit, float32 [unit.tokens]."""
        assert scores.dtype == np.float32 and scores.shape == (unit.tokens,)
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
        """The scores of each sample of `units` in order, float32 [tokens of that sample]; `token_counts` int [N] of the shard."""
        for unit in units:
            yield from np.split(self.read(unit), np.cumsum(token_counts[unit.start : unit.stop])[:-1])

    def remove_units(self, units: Iterable[Unit]) -> None:
        """Drop the files of units whose stream is complete."""
        for unit in units:
            (self.folder / unit.file).unlink(missing_ok=True)

    def remove(self) -> None:
        """Drop the ledger: every shard has its stream."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _difference(found: Any, wanted: Any, name: str = "") -> str:
    """The first field in which two records differ, with both values; empty when they agree."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted({*found, *wanted}):
            if difference := _difference(found.get(key), wanted.get(key), key):
                return difference
        return ""
    return "" if found == wanted else f"{name}: {found!r} then, {wanted!r} now"

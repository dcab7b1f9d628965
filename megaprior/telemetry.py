"""What a run tells: plain lines, progress, and metrics in JSON lines with trackers on top. Nothing phones home."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from megaprior.files import disk_full_explained

_LINE_EVERY_S = 10.0
_NUMBERS_ONLY = ("train", "eval")  # kinds whose values others reckon with


def say(message: str) -> None:
    """Print one plain line to standard error, on rank 0 only."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """`text` without what a terminal would obey: a caption may hold escape sequences."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class Progress:
    """How far a long piece of work is; a bar on a terminal, a plain line about every ten seconds elsewhere."""

    def __init__(self, total: int | None, description: str, unit: str) -> None:
        self.total, self.description, self.unit = total, description, unit
        self.done = 0
        self._start = self._last = time.monotonic()
        self._bar: Any = None
        self._task: Any = None
        self._note = ""

    def advance(self, n: int = 1, note: str = "") -> None:
        """Count `n` more units done; `note` is shown at the end of the line."""
        self.done += n
        self._note = note
        if self._bar is not None:
            self._bar.update(self._task, advance=n, note=note)
        elif time.monotonic() - self._last >= _LINE_EVERY_S:
            self._last = time.monotonic()
            say(self._line())

    def _line(self) -> str:
        seconds = max(time.monotonic() - self._start, 1e-9)
        share = f" of {self.total:,} ({self.done / self.total:.0%})" if self.total else ""
        note = f", {self._note}" if self._note else ""
        return f"{self.description}: {self.done:,}{share} {self.unit}, {self.done / seconds:,.1f} {self.unit}/s{note}"


@contextmanager
def progress(total: int | None, description: str, unit: str) -> Iterator[Progress]:
    """Show the progress of the block; call `.advance(n)` inside it. Silent on ranks other than 0."""
    shown = Progress(total, description, unit)
    if not (sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"):
        yield shown
        if time.monotonic() - shown._start >= _LINE_EVERY_S:
            say(shown._line())
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    with RichProgress(
        *columns, TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=Console(stderr=True)
    ) as bar:
        shown._bar, shown._task = bar, bar.add_task(description, total=total, note="")
        yield shown


class Tracker(Protocol):
    """Shows the lines of metrics.jsonl somewhere else. What it raises costs the run nothing but this tracker."""

    name: str

    def write(self, values: dict[str, Any]) -> None:
        """Show one line."""
        ...

    def close(self) -> None:
        """Show what is still on its way, and end."""
        ...


class MetricsLog:
    """Appends one JSON object per line to `folder/metrics.jsonl`, and hands it to the trackers.

    Every line is on its way to the disk when `write` returns, so that a killed run leaves a complete log. Trackers are a
    convenience: one that fails is dropped, which is said once.
    """

    def __init__(self, folder: Path | str, trackers: Sequence[Tracker] = ()) -> None:
        self.path = Path(folder) / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (closed by close())
        self._trackers = list(trackers)

    def write(self, values: dict[str, Any]) -> None:
        """Append `values`: "kind" says what the line is about (train, eval, save, skip, spike, warn, ...), "step" when it was.

        Raises:
            ValueError: a number of a line of kind train or eval, or of no kind, is not finite; other kinds have it as text.
            DataError: the disk is full.
        """
        if values.get("kind", "train") not in _NUMBERS_ONLY:
            values = {name: _finite(value) for name, value in values.items()}
        line = memoryview((json.dumps(values, allow_nan=False, default=_plain) + "\n").encode())
        with disk_full_explained(self.path, len(line)):
            while line:
                line = line[self._file.write(line) or 0 :]
        self._tell("write", values)

    def close(self) -> None:
        """Close the log and its trackers."""
        self._file.close()
        self._tell("close")

    def _tell(self, method: str, *arguments: Any) -> None:
        for tracker in list(self._trackers):
            try:
                getattr(tracker, method)(*arguments)
            except Exception as error:  # whatever a foreign library meets: a full disk, a folder that is gone, a bug
                self._trackers.remove(tracker)
                reason = " ".join(str(error).split())[:300] or type(error).__name__
                say(f"{tracker.name} is off from here on ({reason}); {self.path} is complete without it")


def _plain(value: Any) -> Any:
    """Numbers and arrays of numpy and torch as Python's own; anything else as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _finite(value: Any) -> Any:
    """`value` with "nan", "inf" and "-inf" in the place of numbers that JSON has no word for."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value

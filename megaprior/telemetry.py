"""What a run tells: plain lines, progress, and metrics in JSON lines with TensorBoard on top. Nothing phones home."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_LINE_EVERY_S = 10.0


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


class MetricsLog:
    """Appends one JSON object per line to `folder/metrics.jsonl`; numbers also go to TensorBoard where it is installed.

    Every line is flushed, so that a killed run leaves a complete log. TensorBoard is a convenience: when it is missing or
    its folder cannot be written, the run goes on and says so once.
    """

    def __init__(self, folder: Path | str) -> None:
        self.path = Path(folder) / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close())
        self._board = _tensorboard(Path(folder) / "tensorboard")

    def write(self, values: dict[str, Any]) -> None:
        """Append `values`; "kind" and "step" name the TensorBoard series and its position."""
        self._file.write(json.dumps(values, allow_nan=False, default=str) + "\n")
        self._file.flush()
        if self._board is None or "step" not in values:
            return
        try:
            for name, value in values.items():
                if name != "step" and isinstance(value, int | float):
                    self._board.add_scalar(f"{values.get('kind', 'run')}/{name}", value, values["step"])
        except Exception as error:  # whatever its writer thread met: a full disk, a folder that is gone
            self._board = None
            say(f"TensorBoard is off from here on ({error}); {self.path} is complete without it")

    def close(self) -> None:
        """Close both logs."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(folder))
    except (ImportError, OSError) as error:
        say(f"TensorBoard is off ({error}); metrics.jsonl is complete without it")
        return None

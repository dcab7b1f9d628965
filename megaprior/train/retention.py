"""Which checkpoints of a run stay, and how the others and the leftovers of killed saves go."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from megaprior.files import fsync_folder, temporary_name
from megaprior.telemetry import say
from megaprior.train.checkpoint import complete_steps, step_folder

_WRITTEN_WHOLE = ("latest", "config.yaml", "summary.json", "metrics.jsonl")


def superfluous(steps: Iterable[int], *, keep_last: int, keep_every: int) -> list[int]:
    """Those of `steps` that neither rule keeps: the newest `keep_last` (0: all), and multiples of `keep_every` (0: none)."""
    ordered = sorted(steps)
    if keep_last <= 0:
        return []
    return [step for step in ordered[:-keep_last] if not (keep_every and step % keep_every == 0)]


def prune(run: Path, *, keep_last: int, keep_every: int) -> list[int]:
    """Delete the complete checkpoints that are superfluous, once a newer one is complete; returns their steps.

    A folder that is no complete checkpoint is neither counted nor touched. Each is renamed first: a kill in the middle of
    a deletion leaves nothing under a checkpoint's name.
    """
    gone = superfluous(complete_steps(run), keep_last=keep_last, keep_every=keep_every)
    for step in gone:
        folder = step_folder(run, step)
        hidden = temporary_name(folder)
        try:
            os.rename(folder, hidden)
            fsync_folder(folder.parent)
            shutil.rmtree(hidden)
        except OSError as error:
            say(f"warning: {folder}: cannot be deleted ({error.strerror}); delete it by hand, training goes on")
    return gone


def remove_leftovers(run: Path) -> None:
    """Delete what killed saves and deletions left half done (call it while holding the run's lock)."""
    for path in (run / "checkpoints").glob(".step_*"):
        shutil.rmtree(path, ignore_errors=True)
    for name in _WRITTEN_WHOLE:
        for path in run.glob(f".{name}.tmp-*"):
            path.unlink(missing_ok=True)

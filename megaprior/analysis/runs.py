"""What a run's folder tells the report: its summary, its curves, its held-out losses and its probe; whatever is there.

Nothing here loads a model. What was measured on another checkpoint than the run's newest is left out, and said so.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaprior.analysis.losses import TokenLosses, read_losses
from megaprior.errors import DataError
from megaprior.telemetry import say

RESULT = "megaprior.result"


@dataclass(frozen=True)
class Run:
    """One training run. `heldout` is the record of its held-out losses, `losses` those themselves, per token."""

    folder: Path
    summary: dict[str, Any]
    train: list[dict[str, Any]]  # metrics.jsonl, kind "train"
    evals: list[dict[str, Any]]  # metrics.jsonl, kind "eval"
    heldout: dict[str, Any] | None
    losses: TokenLosses | None
    probe: dict[str, Any] | None

    @property
    def trajectory(self) -> dict[str, Any]:
        """The configuration that losses depend on, flat: {"seed": 0, "weighting.kind": "prior", ...}."""
        return self.summary.get("trajectory", {})

    @property
    def seed(self) -> int | None:
        """Of the weights and of the order of samples."""
        return self.trajectory.get("seed")


def read_run(folder: Path, *, results: Sequence[dict[str, Any]], build_id: str | None) -> Run:
    """Read a run, with the held-out losses of the shards `build_id` and its line of `results`.

    Raises:
        DataError: the folder has no summary: the run is not finished, or this is no run.
    """
    path = folder / "summary.json"
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: not readable ({error}); finish the run first, by repeating its training command"
        ) from None
    lines = read_lines(folder / "metrics.jsonl")
    latest = latest_checkpoint(folder)
    heldout, losses = _heldout(folder, build_id, latest)
    return Run(
        folder=folder,
        summary=summary,
        train=[line for line in lines if line.get("kind") == "train"],
        evals=[line for line in lines if line.get("kind") == "eval"],
        heldout=heldout,
        losses=losses,
        probe=_probe(folder, results, latest, heldout),
    )


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file of lines; a line that a kill cut short is left out. Empty where there is no file."""
    if not path.exists():
        return []
    found = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            found.append(line)
    return found


def caption_loss(line: dict[str, Any], pairs: int) -> float:
    """The unweighted loss of the image captions in a "train" line: of the first `pairs` sources, the rest being plain text."""
    shares = [
        (line[f"source{i}_share"], line[f"source{i}_ntp_loss"]) for i in range(pairs) if f"source{i}_share" in line
    ]
    total = sum(share for share, _ in shares)
    return sum(share * loss for share, loss in shares) / total if total else line["ntp_loss"]


def latest_checkpoint(folder: Path) -> str | None:
    """step_00000500, the newest of a run; None where the folder names none."""
    try:
        return (folder / "latest").read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _heldout(
    folder: Path, build_id: str | None, latest: str | None
) -> tuple[dict[str, Any] | None, TokenLosses | None]:
    for path in sorted((folder / "analysis").glob("heldout_*.json")):
        body, losses = read_losses(path)
        if build_id not in (None, body["build_id"]):
            continue
        if body["checkpoint"] == latest:
            return body, losses
        say(f"warning: {path} is of {body['checkpoint']}, the run is at {latest}; run `megaprior evaluate` again")
    return None, None


def _probe(
    folder: Path, results: Sequence[dict[str, Any]], latest: str | None, heldout: dict[str, Any] | None
) -> dict[str, Any] | None:
    """The newest line that measured the run's newest checkpoint: by digest where that is known, else by name and step."""
    for line in reversed(results):
        if line.get("format") != RESULT:
            continue
        if heldout is not None and line["digest"] == heldout["model_digest"]:
            return line["probe"]
        named = Path(line["model"]).resolve() == folder.resolve()
        if heldout is None and named and line["checkpoint"] == latest:
            return line["probe"]
    return None

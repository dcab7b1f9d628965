"""What a run left behind, as the tests of this room read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def lines(out: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The lines of metrics.jsonl of one kind."""
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


def losses(out: Path) -> list[float]:
    """Of every step."""
    return [line["loss"] for line in lines(out)]


def folder(out: Path, step: int) -> Path:
    """The checkpoint after that step."""
    return out / "checkpoints" / f"step_{step:08d}"


def model_bytes(out: Path, step: int) -> bytes:
    """Its weights, as they lie on disk."""
    return (folder(out, step) / "model" / "model.safetensors").read_bytes()

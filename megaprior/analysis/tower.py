"""What `megaprior evaluate --shards` kept of a vision tower: how well it finds a caption's image, and an image's caption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megaprior.analysis.runs import latest_checkpoint
from megaprior.errors import DataError
from megaprior.files import read_manifest
from megaprior.telemetry import say

FORMAT = "megaprior.retrieval"
_FIELDS = ("images", "captions", "image_to_text", "text_to_image", "chance", "model_digest", "build_id")


def read_tower(folder: Path, *, shards: str | None) -> dict[str, Any] | None:
    """The retrieval record of a tower's run: that of the shards called `shards` where there is one, else the first.

    Returns:
        "shards" and the record's numbers; None where nothing was measured, or only an earlier checkpoint.

    Raises:
        DataError: the record is not what was written, or lacks a field.
    """
    paths = {
        path.stem.removeprefix("retrieval_"): path for path in sorted((folder / "analysis").glob("retrieval_*.json"))
    }
    name = shards if shards in paths else next(iter(paths), None)
    if name is None:
        return None
    body = read_manifest(paths[name], format=FORMAT)
    missing = [field for field in _FIELDS if field not in body]
    if missing:
        raise DataError(f"{paths[name]}: has no {', '.join(missing)}; measure the tower again")
    latest = latest_checkpoint(folder)
    if body.get("checkpoint") and latest and body["checkpoint"] != latest:
        say(
            f"warning: {paths[name]} is of {body['checkpoint']}, the run is at {latest}; run `megaprior evaluate` again"
        )
        return None
    return {"shards": name, **{field: body[field] for field in _FIELDS}}


def tower_rows(tower: dict[str, Any]) -> list[dict[str, Any]]:
    """For the table: each direction with its recalls, chance at 1, and recall at 1 as a multiple of chance."""
    rows = []
    for direction, words in (("image_to_text", "an image's caption"), ("text_to_image", "a caption's image")):
        recall, chance = tower[direction], tower["chance"].get(f"{direction}_r1")
        rows.append(
            {
                "words": words,
                "r1": recall["r1"],
                "r5": recall["r5"],
                "r10": recall["r10"],
                "median_rank": recall.get("median_rank"),
                "chance": chance,
                "times": recall["r1"] / chance if chance else None,
            }
        )
    return rows

"""What contrastive learning asks of its data: pairs only, a batch that is one row, captions that the text tower reads whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from megaprior.data.loader import plan_rows
from megaprior.errors import DataError

if TYPE_CHECKING:
    from megaprior.data.loader import Loader


def refuse_text(loader: Loader) -> None:
    """Raises DataError where a source has no images."""
    for path, shards in zip(loader.sources, loader.corpus.sets, strict=True):
        if shards.kind != "pairs":
            raise DataError(f"{path}: stage=clip compares images with captions, these are shards of {shards.kind}")


def contrast_notes(loader: Loader, *, positions: int, world: int) -> list[str]:
    """What a reader should know before the run: captions that are cut, a batch whose pairs do not all meet each other.

    `positions` is the most tokens of a caption that the text tower reads, BOS and EOS included.
    """
    notes = []
    for path, shards in zip(loader.sources, loader.corpus.sets, strict=True):
        cut = int((np.asarray(shards.token_counts) + 1 > positions).sum())
        if cut:
            notes.append(f"{path}: {cut:,} of {len(shards):,} captions are read up to token {positions}")
    lengths = loader.corpus.lengths(loader.sample_ids(0)).segment.tolist()
    _, rows = plan_rows(lengths, rank=0, world=world, max_tokens=loader.cfg.max_tokens)
    if rows > 1:
        needed = sum(lengths) // world
        notes.append(
            f"a batch of {len(lengths)} pairs takes {rows} rows a process, and pairs meet only within a row: "
            f"set data.max_tokens to {needed + needed // 4:,} or more"
        )
    return notes

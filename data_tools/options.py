"""What a build is asked to do; the whole of it is part of the build id."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaprior.errors import UsageError

FORMATS = ("webdataset", "parquet", "arrow", "jsonl", "csv", "tsv", "json", "text")
CAPTIONS = ("all", "first", "random")
TURNS = ("one", "all")
CHECKS = ("whole", "header")


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """How inputs are read and cut.

    `caption_column` is a name or several; None means "captions" (a list) where a record has it, else "caption", else a
    conversation. `turns` "all" builds conversations whole, with loss on the answers; "one" takes the single answer for a
    caption. `subset` keeps the samples whose content hash, as a fraction of 2^64, lies in [start, end). `images` is the
    folder image names are relative to, `split` the split of a Hugging Face folder. `check` says how much of an image is read
    before it enters a shard: all of it, or its header.
    """

    format: str = "auto"
    images: Path | None = None
    image_column: str = "image"
    caption_column: str | tuple[str, ...] | None = None
    captions: str = "all"
    turns: str = "one"
    split: str | None = None
    max_sequence: int = 2048
    subset: tuple[float, float] = (0.0, 1.0)
    check: str = "whole"
    text: bool = False
    documents: bool = False
    text_shard_bytes: int = 256 << 20
    parquet_shard_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        if self.format not in ("auto", *FORMATS):
            raise UsageError(f"--format {self.format}: expected auto, {', '.join(FORMATS)}")
        if self.captions not in CAPTIONS:
            raise UsageError(f"--captions {self.captions}: expected {', '.join(CAPTIONS)}")
        if self.turns not in TURNS:
            raise UsageError(f"--turns {self.turns}: expected {', '.join(TURNS)}")
        if self.check not in CHECKS:
            raise UsageError(f"--check {self.check}: expected {', '.join(CHECKS)}")
        if len(set(self.caption_columns)) < len(self.caption_columns):
            raise UsageError(f"--caption-column {' '.join(self.caption_columns)}: a column is named twice")
        if self.turns == "all" and self.documents:
            raise UsageError("--turns all builds conversations whole, --documents cuts text; choose one of them")
        if self.max_sequence < 2:
            raise UsageError(f"--max-sequence {self.max_sequence}: at least 2, a token and the closing EOS")
        if min(self.text_shard_bytes, self.parquet_shard_bytes) < 1:
            raise UsageError(f"shards of {min(self.text_shard_bytes, self.parquet_shard_bytes)} bytes: at least 1")
        start, end = self.subset
        if not 0.0 <= start < end <= 1.0:
            raise UsageError(f"--subset {start}:{end}: expected 0 <= A < B <= 1, for example 0:0.5")

    @property
    def caption_columns(self) -> tuple[str, ...]:
        """The columns asked for by name; empty where the record's own columns decide."""
        named = self.caption_column
        return () if named is None else (named,) if isinstance(named, str) else tuple(named)

    @property
    def whole(self) -> bool:
        """Whether every sample is kept, so that nothing need be hashed."""
        return self.subset == (0.0, 1.0)

    def recorded(self) -> dict[str, Any]:
        """The options as manifests and the build id hold them: no absolute path, no host, no time."""
        # What came later is recorded only where it was asked for: builds made before keep their id.
        later = {} if self.check == "whole" else {"check": self.check}
        return {
            **later,
            "captions": self.captions,
            "caption_column": list(self.caption_columns) or None,
            "documents": self.documents,
            "image_column": self.image_column,
            "images": self.images.name if self.images else None,
            "max_sequence": self.max_sequence,
            "parquet_shard_bytes": self.parquet_shard_bytes,
            "split": self.split,
            "subset": list(self.subset),
            "text": self.text,
            "text_shard_bytes": self.text_shard_bytes,
            "turns": self.turns,
        }


def parse_subset(text: str) -> tuple[float, float]:
    """`"0:0.5"` -> (0.0, 0.5).

    Raises:
        UsageError: not two numbers with a colon between.
    """
    start, colon, end = text.partition(":")
    try:
        if not colon:
            raise ValueError
        return float(start), float(end)
    except ValueError:
        raise UsageError(f"--subset {text}: expected A:B, two fractions of the whole, for example 0:0.5") from None

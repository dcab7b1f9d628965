"""What a build is asked to do; the whole of it is part of the build id."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaprior.errors import UsageError

FORMATS = ("webdataset", "jsonl", "tsv", "text")


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """How inputs are read and cut.

    `caption_column` None means "captions" (a list) where a record has it, else "caption". `subset` keeps the samples whose
    content hash, as a fraction of 2^64, lies in [start, end). `images` is the folder image names are relative to.
    """

    format: str = "auto"
    images: Path | None = None
    image_column: str = "image"
    caption_column: str | None = None
    captions: str = "all"
    max_sequence: int = 2048
    subset: tuple[float, float] = (0.0, 1.0)
    text: bool = False
    documents: bool = False
    text_shard_bytes: int = 256 << 20

    def __post_init__(self) -> None:
        if self.format not in ("auto", *FORMATS):
            raise UsageError(f"--format {self.format}: expected auto, {', '.join(FORMATS)}")
        if self.captions not in ("all", "first"):
            raise UsageError(f"--captions {self.captions}: expected all or first")
        if self.max_sequence < 2:
            raise UsageError(f"--max-sequence {self.max_sequence}: at least 2, a token and the closing EOS")
        if self.text_shard_bytes < 1:
            raise UsageError(f"--text-shard-bytes {self.text_shard_bytes}: at least 1")
        start, end = self.subset
        if not 0.0 <= start < end <= 1.0:
            raise UsageError(f"--subset {start}:{end}: expected 0 <= A < B <= 1, for example 0:0.5")

    @property
    def whole(self) -> bool:
        """Whether every sample is kept, so that nothing need be hashed."""
        return self.subset == (0.0, 1.0)

    def recorded(self) -> dict[str, Any]:
        """The options as manifests and the build id hold them: no absolute path, no host, no time."""
        return {
            "captions": self.captions,
            "caption_column": self.caption_column,
            "documents": self.documents,
            "image_column": self.image_column,
            "images": self.images.name if self.images else None,
            "max_sequence": self.max_sequence,
            "subset": list(self.subset),
            "text": self.text,
            "text_shard_bytes": self.text_shard_bytes,
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

"""`megaprior-data stats`: what a shard folder holds, shard by shard, in memory that does not grow with it.

    lengths, truncation, quarantine    every caption, from indices and manifests; nothing is decoded
    image sizes, image tokens          every sample, from `image_sizes`
    vocabulary                         every token
    equal captions                     every caption up to 2^22 of them, beyond that a share chosen by content (see Duplicates)
    equal images                       inside a shard from the index; between shards a share chosen by size, whose files are read

Letters: N samples, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megaprior.data import manifest as mf
from megaprior.data.shards import Shard
from megaprior.data.vision import PatchSpec
from megaprior.data_tools.commands.screen import token_text
from megaprior.data_tools.stats.duplicates import Captions, Images
from megaprior.data_tools.stats.histogram import Histogram
from megaprior.errors import UsageError
from megaprior.telemetry import progress
from megaprior.tokenizer import Tokenizer, load_tokenizer

_CHUNK = 1 << 24  # tokens looked at together
_TOP = 25
_ASPECTS = (0.25, 0.5, 2 / 3, 0.8, 1.25, 1.5, 2.0, 4.0)  # edges, width over height


@dataclass
class Collected:
    """Everything counted so far, of one folder."""

    vision: Sequence[PatchSpec]
    vocabulary: np.ndarray  # int64 [V]
    captions: Captions
    images: Images
    lengths: Histogram = field(default_factory=Histogram)
    width: Histogram = field(default_factory=Histogram)
    height: Histogram = field(default_factory=Histogram)
    aspects: np.ndarray = field(default_factory=lambda: np.zeros(len(_ASPECTS) + 1, np.int64))
    image_bytes: int = 0
    image_tokens: list[Histogram] = field(default_factory=list)
    patches: list[Histogram] = field(default_factory=list)
    quarantine: Counter[str] = field(default_factory=Counter)
    scores: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.image_tokens = [Histogram() for _ in self.vision]
        self.patches = [Histogram() for _ in self.vision]


def parse_vision(texts: Sequence[str]) -> list[PatchSpec]:
    """`["32:1024", "16"]` -> the U-LVLM's geometries; the long side is at most 1,024 pixels where none is given.

    Raises:
        UsageError: not PATCH or PATCH:LIMIT, or the limit is no multiple of the patch.
    """
    specs = []
    for text in texts:
        patch, colon, limit = text.partition(":")
        if not (patch.isdecimal() and int(patch) and (limit.isdecimal() or not colon)):
            raise UsageError(f"--vision {text}: expected PATCH or PATCH:LIMIT in pixels, such as 32:1024")
        side = int(patch)
        # How many tokens an image takes depends on the geometry alone, not on which ids stand for them.
        spec = PatchSpec(side, int(limit) if limit else 1024 // side * side, 0, 0, 0, 0)
        spec.tokens((side, side))
        specs.append(spec)
    return specs


def describe(folder: Path, *, vision: Sequence[PatchSpec] = ()) -> dict[str, Any]:
    """The statistics of a folder as plain values, for JSON, tables and pages.

    Raises:
        DataError: the build is not complete, or a file is not what its manifest says.
    """
    build = mf.read_build(folder)
    tokenizer = load_tokenizer(folder / "tokenizer")
    found = Collected(
        vision=vision,
        vocabulary=np.zeros(tokenizer.vocab_size, np.int64),
        captions=Captions(build["counts"]["samples"]),
        images=Images(build["counts"].get("images", 0)),
    )
    with progress(build["counts"]["samples"], f"stats of {folder.name}", "samples") as shown:
        for entry in build["shards"]:
            shard = Shard.open(folder, entry["prefix"])
            mf.refuse_stranger(shard.name, shard.manifest, build)
            _add_shard(found, shard)
            shard.close()
            shown.advance(len(shard))
    return _told(folder, build, tokenizer, found)


# ---------------------------------------------------------------- collecting


def _add_shard(found: Collected, shard: Shard) -> None:
    tokens = shard.streams["tokens"]
    found.lengths.add(tokens.lengths)
    flat = tokens.flat()
    for start in range(0, len(flat), _CHUNK):
        found.vocabulary += np.bincount(flat[start : start + _CHUNK], minlength=len(found.vocabulary))
    found.captions.add(shard)
    found.quarantine.update(shard.manifest["quarantine"])
    found.scores.update(path.name.split(".")[1] for path in shard.folder.glob(f"{shard.prefix}.*.json"))
    if "image_sizes" in shard.streams:
        _add_images(found, shard)


def _add_images(found: Collected, shard: Shard) -> None:
    """Sizes of every sample's image; the rule for image tokens is applied once for each distinct size of the shard."""
    sizes = shard.streams["image_sizes"].flat().reshape(-1, 2).astype(np.int64)
    found.image_bytes += shard.manifest["streams"]["images"]["bin"]["bytes"]
    found.width.add(sizes[:, 0])
    found.height.add(sizes[:, 1])
    aspect = np.searchsorted(_ASPECTS, sizes[:, 0] / sizes[:, 1], side="right")
    found.aspects += np.bincount(aspect, minlength=len(_ASPECTS) + 1)
    distinct, times = np.unique(sizes[:, 0] << 32 | sizes[:, 1], return_counts=True)
    shapes = [(int(size >> 32), int(size & 0xFFFFFFFF)) for size in distinct]
    for spec, tokens, patches in zip(found.vision, found.image_tokens, found.patches, strict=True):
        tokens.add(np.array([spec.tokens(shape) for shape in shapes], np.int64), times)
        grids = [spec.grid(shape) for shape in shapes]
        patches.add(np.array([columns * rows for columns, rows in grids], np.int64), times)
    found.images.add(shard)


# ---------------------------------------------------------------- telling


def _told(folder: Path, build: dict[str, Any], tokenizer: Tokenizer, found: Collected) -> dict[str, Any]:
    counts = build["counts"]
    told: dict[str, Any] = {
        "folder": folder.name,
        "build_id": build["build_id"],
        "kind": build["kind"],
        "tokenizer": build["tokenizer"]["fingerprint"],
        "shards": len(build["shards"]),
        "samples": counts["samples"],
        "documents": counts["documents"],
        "tokens": counts["tokens"],
        "loss_tokens": counts["loss_tokens"],
        "truncated": counts["truncated"],
        "lengths": found.lengths.summary() | {"bins": found.lengths.bins()},
        "vocabulary": _vocabulary(found.vocabulary, tokenizer),
        "equal_captions": found.captions.told(),
        "quarantined": sum(found.quarantine.values()),
        "quarantine": dict(found.quarantine.most_common()),
        "scores": {name: {"shards": count} for name, count in sorted(found.scores.items())},
        "images": None,
    }
    if build["kind"] == "pairs":
        told["images"] = {
            "stored": counts["images"],
            "bytes": found.image_bytes,
            "width": found.width.summary() | {"bins": found.width.bins()},
            "height": found.height.summary() | {"bins": found.height.bins()},
            "aspect": {"edges": list(_ASPECTS), "counts": found.aspects.tolist()},
            "equal": found.images.told(),
            "geometries": [
                {
                    "patch": spec.patch,
                    "limit": spec.limit,
                    "tokens": tokens.summary() | {"bins": tokens.bins()},
                    "patches": patches.summary(),
                }
                for spec, tokens, patches in zip(found.vision, found.image_tokens, found.patches, strict=True)
            ],
        }
    return told


def _vocabulary(counts: np.ndarray, tokenizer: Tokenizer) -> dict[str, Any]:
    """What of the vocabulary is used; control tokens other than EOS never stand in a caption."""
    widths = np.array([len(tokenizer.token_bytes(i)) for i in range(len(counts))])
    total, order = int(counts.sum()), np.argsort(-counts, kind="stable")
    text = widths > 0
    covered = np.cumsum(counts[order])
    return {
        "size": len(counts),
        "spelling": int(text.sum()),
        "used": int((counts[text] > 0).sum()),
        "ids_for_99_percent": int(np.searchsorted(covered, 0.99 * total)) + 1 if total else 0,
        "bytes_per_token": float((counts * widths).sum() / max(1, int(counts[text].sum()))),
        "unspelled": int(counts[~text].sum() - counts[tokenizer.eos_id]),
        "top": [
            {"id": int(i), "text": token_text(int(i), tokenizer), "count": int(counts[i]), "share": counts[i] / total}
            for i in order[:_TOP].tolist()
            if counts[i]
        ],
    }

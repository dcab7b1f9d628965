"""Which shards a build will write: a function of inputs and options alone, so that repeating the command resumes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaprior.data_tools.options import BuildOptions
from megaprior.data_tools.readers.columns import PARQUET, row_group_ranges
from megaprior.data_tools.readers.inputs import Source, find_sources
from megaprior.data_tools.readers.records import check_columns, find_images
from megaprior.data_tools.readers.samples import Unfit
from megaprior.data_tools.readers.streams import packing
from megaprior.errors import DataError, UsageError
from megaprior.files import digest_json

RECIPE = 1  # raise it whenever the same inputs and options give other bytes


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """One shard: a whole input file, or a part of it.

    Of plain text the lines whose first byte lies in [start, end), of parquet those row groups; `part_bytes` is then what
    they take on disk.
    """

    prefix: str
    source: Source
    images: Path | None = None
    start: int = 0
    end: int | None = None
    part_bytes: int | None = None

    @property
    def bytes(self) -> int:
        """Bytes on disk that the job reads of its input file."""
        if self.part_bytes is not None:
            return self.part_bytes
        return min(self.end or self.source.size, self.source.size) - self.start

    def recorded(self) -> dict[str, Any]:
        """What the shard's manifest and the build id say of its source."""
        source = self.source
        body = {"name": source.name, "format": source.format, "bytes": source.size, "digest": source.digest}
        if self.images is not None:
            body["images"] = self.images.name
        if self.end is not None:
            body |= {"start": self.start, "end": self.end}
        return body


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All shards of a build, their kind ("pairs" or "text") and the id that names inputs, options and tokenizer."""

    kind: str
    jobs: tuple[ShardJob, ...]
    options: BuildOptions
    left_out: tuple[Path, ...]
    build_id: str
    recorded: dict[str, Any]


def shard_prefix(number: int) -> str:
    """Name of the shard at `number` of a plan."""
    return f"{number:05d}"


def make_plan(paths: Sequence[Path], options: BuildOptions, *, fingerprint: str) -> Plan:
    """Look at every input, without reading it through, and cut it into shards.

    Raises:
        UsageError: inputs or options that do not fit each other.
        DataError: an input that is not what its name or the options say; nothing has been written.
    """
    sources, left_out = find_sources(paths, format=options.format, split=options.split)
    kinds = {"text" if options.text or source.format == "text" else "pairs" for source in sources}
    if len(kinds) > 1:
        text = next(source for source in sources if source.format == "text")
        raise UsageError(f"{text.path}: text among inputs of pairs; build it into a folder of its own, or add --text")
    if options.images is not None and not options.images.is_dir():
        raise UsageError(f"--images {options.images}: no such folder")
    kind = kinds.pop()
    if options.documents and kind == "pairs":
        raise UsageError("--documents cuts text, a pair's caption stays whole; add --text to take the captions alone")
    if options.images is not None and all(source.format in ("webdataset", "text") for source in sources):
        raise UsageError(f"--images {options.images}: no input is a table that names images (jsonl, csv, parquet, ...)")
    if options.turns == "all" and all(source.format in ("csv", "tsv", "text") for source in sources):
        raise UsageError("--turns all: no input holds conversations (json, jsonl, parquet, arrow, webdataset)")
    jobs = [job for source in sources for job in _cut(source, options, pairs=kind == "pairs")]
    jobs = [ShardJob(prefix=shard_prefix(number), **job) for number, job in enumerate(jobs)]
    recorded = {
        "recipe": RECIPE,
        "kind": kind,
        "tokenizer": fingerprint,
        "options": options.recorded(),
        "sources": [job.recorded() for job in jobs],
    }
    return Plan(
        kind=kind,
        jobs=tuple(jobs),
        options=options,
        left_out=tuple(left_out),
        build_id=digest_json(recorded),
        recorded=recorded,
    )


def difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """Which parts of two plans differ, in words."""
    changed = [name for name in ("recipe", "kind", "tokenizer", "sources") if ours.get(name) != theirs.get(name)]
    one, two = ours["options"], theirs.get("options", {})
    for name in [*one, *(name for name in two if name not in one)]:
        there, now = (side.get(name, getattr(BuildOptions, name, None)) for side in (two, one))
        if there != now:
            changed.append(f"{name} {there!r} there, {now!r} now")
    return "; ".join(changed)


def _cut(source: Source, options: BuildOptions, *, pairs: bool) -> list[dict[str, Any]]:
    if source.format == "text":
        if packing(source.path) or source.size <= options.text_shard_bytes:
            return [{"source": source}]
        starts = range(0, source.size, options.text_shard_bytes)
        return [{"source": source, "start": start, "end": start + options.text_shard_bytes} for start in starts]
    if source.format == "webdataset":
        return [{"source": source}]
    try:
        images = _images(source, options, pairs=pairs)
        check_columns(source, options)
    except Unfit as unfit:
        raise DataError(f"{source.path}: {unfit.reason}") from None
    return [{"source": source, "images": images, **part} for part in _parts(source, options)]


def _parts(source: Source, options: BuildOptions) -> list[dict[str, Any]]:
    """A parquet file is cut between row groups, which can be read without those before them."""
    if source.format != PARQUET:
        return [{}]
    ranges = row_group_ranges(source.path, limit=options.parquet_shard_bytes)
    if len(ranges) == 1:
        return [{}]
    return [{"start": start, "end": end, "part_bytes": size} for start, end, size in ranges]


def _images(source: Source, options: BuildOptions, *, pairs: bool) -> Path | None:
    if pairs:
        return find_images(source, options)
    if options.whole:
        return None
    try:  # a subset of captions alone is cut by their images where these are at hand, so that it fits a subset of pairs
        return find_images(source, options)
    except Unfit:
        return None

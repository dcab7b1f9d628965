"""Samples of records, whatever file they come from, and of plain text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO

from megaprior.data_tools.options import BuildOptions
from megaprior.data_tools.readers.advice import list_of_urls
from megaprior.data_tools.readers.captions import caption_columns, record_captions, record_conversation
from megaprior.data_tools.readers.columns import ARROW, PARQUET, open_rows
from megaprior.data_tools.readers.inputs import Source
from megaprior.data_tools.readers.lines import Line, read_lines
from megaprior.data_tools.readers.pictures import file_name, from_base64, image_bytes, image_column, is_link
from megaprior.data_tools.readers.samples import Caption, Record, Rejected, Sample, Unfit, clean_text
from megaprior.data_tools.readers.streams import open_input
from megaprior.data_tools.readers.tables import Records, read_records
from megaprior.data_tools.readers.webdataset import read_tar

DOCUMENT_BYTES = 1 << 20

Samples = Iterator[Sample | Rejected]


@contextmanager
def open_samples(
    source: Source, options: BuildOptions, *, start: int = 0, end: int | None = None
) -> Iterator[tuple[Samples, Callable[[], int]]]:
    """The samples of a source in order, and a function that tells how many bytes of them have been read from disk.

    `start` and `end` count bytes of plain text and row groups of parquet; other formats are read whole.
    """
    if source.format in (PARQUET, ARROW):
        with open_rows(source.path, source.format, wanted=_wanted(options), start=start, end=end) as rows:
            yield read_samples(rows.records, options), rows.consumed
        return
    with open_input(source.path) as opened:
        if source.format == "webdataset":
            samples = read_tar(opened.stream, options)
        elif source.format == "text":
            samples = read_text(opened.stream, options, start=start, end=end)
        else:
            samples = read_table(opened.stream, source.format, options)
        yield samples, lambda: opened.consumed() - (start if source.format == "text" else 0)


def read_table(stream: IO[bytes], format: str, options: BuildOptions) -> Samples:
    """The samples of a jsonl, json, csv or tsv stream, in order; `options.images` is the folder its images lie in."""
    return read_samples(read_records(stream, format, options), options)


def read_samples(records: Records, options: BuildOptions) -> Samples:
    """One sample for each record, with all its captions and its one image."""
    for key, record in records:
        if isinstance(record, Rejected):
            yield record
            continue
        try:
            captions, refused = record_captions(key, record, options)
            image = _image(record, options) if captions else None
        except Unfit as unfit:
            yield Rejected(key=key, reason=unfit.reason)
            continue
        yield from refused
        if captions:
            yield Sample(key=key, captions=tuple(captions), image=image)


def read_text(stream: IO[bytes], options: BuildOptions, *, start: int, end: int | None) -> Iterator[Sample | Rejected]:
    """One caption a line; with `options.documents`, one document for about each MiB, cut at a line end."""
    lines = read_lines(stream, start=start, end=end)
    yield from _documents(lines, start) if options.documents else _captions(lines, start)


def peek_record(source: Source, options: BuildOptions, *, image: bool = False) -> Record | Rejected | None:
    """The first record of a source that is one, all columns; where the first 100 hold none, why the first is none.

    With `image` a record among them that names an image goes before one that does not: mixtures hold both.
    """
    first: Record | Rejected | None = None
    with _open_records(source, options) as records:
        for _, record in islice(records, 100):
            if isinstance(record, dict) and not (image and record.get(image_column(record, options)) is None):
                return record
            if first is None or (isinstance(record, dict) and isinstance(first, Rejected)):
                first = record
    return first


@contextmanager
def _open_records(source: Source, options: BuildOptions) -> Iterator[Records]:
    if source.format in (PARQUET, ARROW):
        with open_rows(source.path, source.format, wanted=lambda names: names) as rows:
            yield rows.records
    else:
        with open_input(source.path) as opened:
            yield read_records(opened.stream, source.format, options)


def find_images(source: Source, options: BuildOptions) -> Path | None:
    """The folder that a source's image names are relative to: --images, else `images/` beside it, else its own.

    None where the first record holds its image itself.

    Raises:
        Unfit: there is none, or the first record names no image; the reason tells the remedy.
    """
    record = peek_record(source, options, image=True)
    if isinstance(record, Rejected):
        raise Unfit(f"none of its first records can be read ({record.key}: {record.reason})")
    record = record or {}
    column = image_column(record, options)
    value = record.get(column)
    if value is None:
        conversation = record_conversation(record, options)
        if conversation is not None and conversation.images:
            return options.images
    if is_link(value) or (value is None and any(map(is_link, record.values()))):
        raise Unfit(list_of_urls(source, record, caption_columns(record, options)))
    if value is None:
        raise Unfit(
            f"no column '{column}' (columns: {_names(record)}); name it with --image-column, or take captions alone with "
            "--text"
        )
    name = file_name(value)
    if options.images is not None or name is None:
        return options.images
    for folder in (source.path.parent / "images", source.path.parent):
        if (folder / name).is_file():
            return folder
    where = "neither beside it nor in images/ beside it"
    raise Unfit(f"its first image {name!r} is {where}; add --images DIR, or --text for captions alone")


def check_columns(source: Source, options: BuildOptions) -> None:
    """Refuse a whole file whose first record lacks a caption column: a wrong option, not a bad sample.

    Raises:
        Unfit: a column is missing; the reason tells the columns there are.
    """
    record = peek_record(source, options)
    if not isinstance(record, dict):
        return
    missing = [column for column in caption_columns(record, options) if column not in record]
    if missing:
        example = ", for example --caption-column 0" if "0" in record else ""
        raise Unfit(f"no column '{missing[0]}' (columns: {_names(record)}); name it with --caption-column{example}")


def _names(record: Record) -> str:
    # A table whose header was not recognised has numbers for names: its first cells say more.
    shown = [f"{name!r} = {str(value)[:30]!r}" if name.isdigit() else repr(name) for name, value in record.items()]
    return ", ".join(shown) or "none"


def _wanted(options: BuildOptions) -> Callable[[Sequence[str]], Sequence[str]]:
    """Of a table's columns those that samples are made of; the others are not read."""

    def choose(names: Sequence[str]) -> Sequence[str]:
        wanted = {*caption_columns(names, options), "words"}
        if _image_wanted(options):
            wanted.add(image_column(names, options))
        return [name for name in names if name in wanted]

    return choose


def _image_wanted(options: BuildOptions) -> bool:
    return not (options.text and options.whole)


def _image(record: Record, options: BuildOptions) -> bytes | None:
    """The image of a record; None for captions alone whose image is not there."""
    if not _image_wanted(options):
        return None
    try:
        value = record.get(image_column(record, options))
        if value is None and (conversation := record_conversation(record, options)) and conversation.images:
            if len(conversation.images) > 1:
                raise Unfit(f"more than one image: {len(conversation.images)} in the conversation; a sample has one")
            value = next(iter(conversation.images))
            return from_base64(value) if isinstance(value, str) else image_bytes(value, options.images)
        return image_bytes(value, options.images)
    except Unfit:
        if options.text:  # a subset of captions alone goes by their images where these are at hand
            return None
        raise


def _place(line: Line, start: int) -> str:
    # A later cut of a large file starts at a byte; its line numbers would need a pass over all before it.
    return f"line {line.number}" if not start else f"byte {line.offset}"


def _captions(lines: Iterator[Line], start: int) -> Iterator[Sample | Rejected]:
    for line in lines:
        key = _place(line, start)
        try:
            if line.problem is not None:
                raise Unfit(line.problem)
            text = clean_text(line.text).strip()
        except Unfit as unfit:
            yield Rejected(key=key, reason=unfit.reason)
            continue
        yield Sample(key=key, captions=(Caption(key=key, text=text),))


def _documents(lines: Iterator[Line], start: int) -> Iterator[Sample | Rejected]:
    """Blank lines belong to a document; only one that is blank altogether is refused."""
    parts: list[str] = []
    key, size = "", 0
    for line in lines:
        if line.problem is not None:
            yield Rejected(key=_place(line, start), reason=line.problem)
            continue
        if not parts:
            key, size = _place(line, start), 0
        parts.append(line.text)
        size += len(line.text) + 1
        if size >= DOCUMENT_BYTES:
            yield _document(key, parts)
            parts = []
    if parts:
        yield _document(key, parts)


def _document(key: str, parts: list[str]) -> Sample | Rejected:
    text = "\n".join(parts)
    if not text.strip():
        return Rejected(key=key, reason="document is blank")
    return Sample(key=key, captions=(Caption(key=key, text=text),))

"""Records of jsonl and tsv files with an image folder beside them, and plain text."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import IO, Any

from megaprior.data_tools.inputs import Source, download_advice, open_input
from megaprior.data_tools.lines import Line, read_lines
from megaprior.data_tools.options import BuildOptions
from megaprior.data_tools.samples import (
    Caption,
    Rejected,
    Sample,
    Unfit,
    caption_column,
    clean_text,
    json_type,
    parse_record,
    record_captions,
)

MAX_IMAGE_BYTES = 256 << 20
DOCUMENT_BYTES = 1 << 20

Record = dict[str, Any]


def read_table(stream: IO[bytes], format: str, options: BuildOptions) -> Iterator[Sample | Rejected]:
    """The samples of a jsonl or tsv stream, in order; `options.images` None reads captions alone."""
    for key, record in _records(stream, format, options):
        if isinstance(record, Rejected):
            yield record
            continue
        try:
            captions, refused = record_captions(key, record, options)
            image = _image(record, options) if _image_needed(options) else None
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


def peek_record(source: Source, options: BuildOptions) -> Record | None:
    """The first record of a jsonl or tsv that is one; None when the first 100 lines hold none."""
    with open_input(source.path) as opened:
        for _, record in islice(_records(opened.stream, source.format, options), 100):
            if isinstance(record, dict):
                return record
    return None


def find_images(source: Source, options: BuildOptions) -> Path:
    """The folder that the image names of a jsonl or tsv are relative to: --images, else `images/` beside it, else its own.

    Raises:
        Unfit: there is none, or the first record names no image; the reason tells the remedy.
    """
    record, column = peek_record(source, options) or {}, options.image_column
    name = record.get(column)
    if name is None:
        columns = ", ".join(map(repr, record)) or "none"
        links = [key for key, value in record.items() if str(value).startswith(("http://", "https://"))]
        if links:
            url = next((key for key in ("url", "image_url", "URL") if key in links), links[0])
            caption, header = caption_column(record, options), ""
            if url.isdigit():
                url, caption, header = "url", "caption", "put a header line, 'caption' and 'url', on top; "
            advice = download_advice(source.path.name, source.format, url, caption)
            raise Unfit(f"a list of image URLs, not of images; {header}{advice} (or take captions alone with --text)")
        raise Unfit(
            f"no column '{column}' (columns: {columns}); name it with --image-column, or take captions alone with --text"
        )
    if options.images is not None:
        return options.images
    for folder in (source.path.parent / "images", source.path.parent):
        if isinstance(name, str) and (folder / name).is_file():
            return folder
    where = "neither beside it nor in images/ beside it"
    raise Unfit(f"its first image {name!r} is {where}; add --images DIR, or --text for captions alone")


def check_columns(source: Source, options: BuildOptions) -> None:
    """Refuse a whole file whose first record lacks the caption column: a wrong option, not a bad sample.

    Raises:
        Unfit: the column is missing; the reason tells the columns there are.
    """
    record = peek_record(source, options)
    if record is not None and (column := caption_column(record, options)) not in record:
        columns = ", ".join(map(repr, record)) or "none"
        example = ", for example --caption-column 0" if "0" in record else ""
        raise Unfit(f"no column '{column}' (columns: {columns}); name it with --caption-column{example}")


def _records(stream: IO[bytes], format: str, options: BuildOptions) -> Iterator[tuple[str, Record | Rejected]]:
    header: list[str] | None = None
    for line in read_lines(stream):
        key = f"line {line.number}"
        if line.problem is not None:
            yield key, Rejected(key=key, reason=line.problem)
        elif format == "tsv" and header is None:
            header, is_record = _header(line.text, options)
            if is_record:
                yield key, dict(zip(header, line.text.split("\t"), strict=True))
        else:
            try:
                yield key, parse_record(line.text) if format == "jsonl" else _row(line.text, header or [])
            except Unfit as unfit:
                yield key, Rejected(key=key, reason=unfit.reason)


def _header(first: str, options: BuildOptions) -> tuple[list[str], bool]:
    """Column names of a tsv, and whether its first line is a record already (columns are then called "0", "1", ...)."""
    cells = first.split("\t")
    names = {options.caption_column} if options.caption_column is not None else {"caption", "captions"}
    if names & set(cells):
        return cells, False
    return [str(number) for number in range(len(cells))], True


def _row(text: str, header: list[str]) -> Record:
    cells = text.split("\t")
    if len(cells) != len(header):
        raise Unfit(f"wrong number of columns: {len(cells)}, the first line has {len(header)}")
    return dict(zip(header, cells, strict=True))


def _image_needed(options: BuildOptions) -> bool:
    return options.images is not None and not (options.text and options.whole)


def _image(record: Record, options: BuildOptions) -> bytes | None:
    """The image file a record names; None for captions alone whose image is not there."""
    assert options.images is not None
    try:
        return _read_image(options.images, record.get(options.image_column))
    except Unfit:
        if options.text:
            return None
        raise


def _read_image(folder: Path, name: Any) -> bytes:
    if not isinstance(name, str) or not name:
        raise Unfit(f"no image name: {json_type(name) if name != '' else 'an empty string'}")
    if name.startswith("/") or ".." in PurePosixPath(name).parts or "\0" in name:
        raise Unfit(f"unsafe image name: {name!r} leads out of the image folder")
    path = folder / name
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            raise Unfit(f"no image: {name} is not a file")
        if status.st_size > MAX_IMAGE_BYTES:
            raise Unfit(f"image too large: {status.st_size:,} bytes, at most {MAX_IMAGE_BYTES:,}")
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, UnicodeEncodeError):
        raise Unfit(f"no image: {name!r} is not in the image folder") from None
    except PermissionError:
        raise Unfit(f"no image: {name!r} may not be read") from None


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

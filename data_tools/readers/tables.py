"""Records of text files: jsonl, JSON arrays, csv and tsv, one by one, whatever the file's size.

A JSON array is read with the standard library's own decoder over a moving window: it keeps to one record what is wrong with
one (a lone surrogate, a byte that is no UTF-8), where streaming parsers replace the character or give up the rest.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from typing import IO, Any

from megaprior.data_tools.options import BuildOptions
from megaprior.data_tools.readers.conversations import as_record
from megaprior.data_tools.readers.lines import read_lines
from megaprior.data_tools.readers.samples import Record, Rejected, Unfit, json_type, parse_json
from megaprior.data_tools.readers.streams import DAMAGE

MAX_RECORD_BYTES = 64 << 20  # an image of 48 MiB as base64
_CHUNK = 1 << 20
_BLANKS = " \t\r\n"

Records = Iterator[tuple[str, Record | Rejected]]


def read_records(stream: IO[bytes], format: str, options: BuildOptions) -> Records:
    """(key, record) for each of an unpacked stream of format jsonl, json, csv or tsv, in order."""
    if format == "json":
        yield from _array(stream)
    elif format == "csv":
        yield from _csv(stream, options)
    else:
        yield from _lines(stream, format, options)


def _rejected(key: str, reason: str) -> tuple[str, Rejected]:
    return key, Rejected(key=key, reason=reason)


# ---------------------------------------------------------------- a record a line


def _lines(stream: IO[bytes], format: str, options: BuildOptions) -> Records:
    header: list[str] | None = None
    limit = MAX_RECORD_BYTES if format == "jsonl" else None
    for line in read_lines(stream, limit=limit):
        key = f"line {line.number}"
        if line.problem is not None:
            yield _rejected(key, line.problem)
        elif format == "tsv" and header is None:
            header, is_record = _header(line.text.split("\t"), options)
            if is_record:
                yield key, dict(zip(header, line.text.split("\t"), strict=True))
        else:
            try:
                if format == "jsonl":
                    yield key, _object(parse_json(line.text))
                else:
                    yield key, _row(line.text.split("\t"), header or [], hint=True)
            except Unfit as unfit:
                yield _rejected(key, unfit.reason)


def _object(value: Any) -> Record:
    value = as_record(value)
    if not isinstance(value, dict):
        raise Unfit(f"not a JSON object: {json_type(value)}")
    return value


def _header(cells: list[str], options: BuildOptions) -> tuple[list[str], bool]:
    """Column names of a table, and whether its first line is a record already (columns are then called "0", "1", ...)."""
    names = {*(options.caption_columns or ("caption", "captions")), options.image_column}
    if names & set(cells):
        return cells, False
    return [str(number) for number in range(len(cells))], True


def _row(cells: list[str], header: list[str], *, hint: bool = False) -> Record:
    if len(cells) != len(header):
        quoted = (
            " (cells in quotes may hold tabs and line ends: --format csv)" if hint and '"' in "".join(cells) else ""
        )
        raise Unfit(f"wrong number of columns: {len(cells)}, the first line has {len(header)}{quoted}")
    return dict(zip(header, cells, strict=True))


# ---------------------------------------------------------------- csv


class _CountedLines:
    """The lines of a stream for csv.reader, which may take several for one record; `number` is that of the last one."""

    def __init__(self, stream: IO[bytes], limit: int) -> None:
        self._stream, self._limit, self.number = stream, limit, 0
        self._first: str | None = None

    def delimiter(self) -> str:
        """Comma, tab or semicolon: what the first line has most of. It names the columns, so it holds little else."""
        self._first = next(self, "")
        self.number = 0
        return max((",", "\t", ";"), key=self._first.count)

    def __iter__(self) -> _CountedLines:
        return self

    def __next__(self) -> str:
        if self._first:
            line, self._first, self.number = self._first, None, 1
            return line
        raw = self._stream.readline(self._limit)
        if not raw:
            raise StopIteration
        self.number += 1
        if self.number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        # A byte that is no UTF-8 becomes a lone surrogate, so that it costs its own record and not the file.
        return raw.decode("utf-8", "surrogateescape")


def _csv(stream: IO[bytes], options: BuildOptions) -> Records:
    limit = 16 << 20
    csv.field_size_limit(limit)
    lines = _CountedLines(stream, limit)
    try:
        # strict: a quote that is never closed would swallow the records behind it and pass them off as one caption.
        rows = csv.reader(lines, delimiter=lines.delimiter(), strict=True)
    except DAMAGE as error:
        yield _rejected("line 1", f"damaged file: the rest is lost ({error})")
        return
    header: list[str] | None = None
    while True:
        first = lines.number + 1
        try:
            cells = next(rows, None)
        except csv.Error as error:
            yield _rejected(_range(first, lines.number), f"not csv: {error}")
            continue
        except DAMAGE as error:
            yield _rejected(f"line {first}", f"damaged file: the rest is lost ({error})")
            return
        if cells is None:
            return
        key = _range(first, lines.number)
        if not cells:
            yield _rejected(key, "wrong number of columns: the line is empty")
        elif header is None:
            header, is_record = _header(cells, options)
            if is_record:
                yield _checked_row(key, cells, header)
        else:
            yield _checked_row(key, cells, header)


def _checked_row(key: str, cells: list[str], header: list[str]) -> tuple[str, Record | Rejected]:
    try:
        for cell in cells:
            if found := next((letter for letter in cell if "\udc80" <= letter <= "\udcff"), None):
                raise Unfit(f"invalid UTF-8: byte 0x{ord(found) - 0xDC00:02x} at position {cell.index(found)}")
        return key, _row(cells, header)
    except Unfit as unfit:
        return _rejected(key, unfit.reason)


def _range(first: int, last: int) -> str:
    return f"line {first}" if last <= first else f"lines {first} to {last}"


# ---------------------------------------------------------------- JSON arrays


class _Window:
    """The part of a stream that is being looked at, as text; `at` is the next character."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._rest = stream, b""
        self.text, self.at, self.ended = "", 0, False

    def grow(self) -> bool:
        """Read on, at least as much again as there is; False at the end of the stream."""
        raw = self._stream.read(max(_CHUNK, len(self.text) - self.at))
        self.ended = not raw
        raw = self._rest + raw
        # A character may be cut by the window's end: its bytes wait for the next ones.
        keep = 0 if self.ended else _cut_bytes(raw)
        self._rest = raw[len(raw) - keep :] if keep else b""
        text = raw[: len(raw) - keep].decode("utf-8", "surrogateescape")
        self.text, self.at = self.text[self.at :] + text, 0
        return not self.ended

    def next(self) -> str:
        """The next character that is no blank, without taking it; "" at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in _BLANKS:
                self.at += 1
            if self.at < len(self.text) or not self.grow():
                return self.text[self.at : self.at + 1]


def _cut_bytes(raw: bytes) -> int:
    """How many bytes at the end begin a UTF-8 character that is not whole."""
    for back in range(1, min(3, len(raw)) + 1):
        byte = raw[-back]
        if byte >= 0xC0:
            return back if back < (2 if byte < 0xE0 else 3 if byte < 0xF0 else 4) else 0
        if byte < 0x80:
            return 0
    return 0


def _array(stream: IO[bytes]) -> Records:
    """Items in turn; after text that is no JSON nobody can tell where the next item begins, so the rest is given up."""
    window, number = _Window(stream), 0
    decoder = json.JSONDecoder(
        strict=False
    )  # control characters inside strings are the caption's trouble, not the file's
    try:
        array = _opened(window)
        while (letter := window.next()) not in ("", "]" if array else ""):
            if array and number:
                if letter != ",":
                    raise Unfit(f"not JSON: {letter!r} after item {number - 1}, expected ','")
                window.at += 1
                window.next()
            value = _item(window, decoder)
            key = f"item {number}"
            number += 1
            try:
                yield key, _object(value)
            except Unfit as unfit:
                yield _rejected(key, unfit.reason)
        if array and not letter:
            raise Unfit("it ends without ']', so it is cut short here")
        window.at += 1
        if array and (letter := window.next()):
            raise Unfit(f"not JSON: {letter!r} after the end of the array")
    except (Unfit, *DAMAGE) as error:
        yield _rejected(f"item {number}", f"damaged file: the rest is lost ({error})")


def _opened(window: _Window) -> bool:
    """Whether the stream is an array, whose bracket is then taken; else it is records one after another."""
    if window.next() == "\ufeff":
        window.at += 1
    first = window.next()
    if first not in ("[", "{"):
        raise Unfit(f"not JSON: it begins with {first!r}, expected an array of records")
    window.at += first == "["
    return first == "["


def _item(window: _Window, decoder: json.JSONDecoder) -> Any:
    while True:
        try:
            value, end = decoder.raw_decode(window.text, window.at)
            if end < len(window.text) or window.ended:  # at the window's end 12 may go on as 123
                window.at = end
                return value
        except json.JSONDecodeError as error:
            # What the window's end cut off fails at its last characters, or as a string without end.
            cut = error.msg.startswith("Unterminated string") or error.pos >= len(window.text) - len("\\ud800\\udc00")
            if window.ended or not cut:
                raise Unfit(f"not JSON: {error.msg}") from None
        except (ValueError, RecursionError) as error:
            raise Unfit(f"not JSON: {str(error)[:120]}") from None
        if len(window.text) - window.at > MAX_RECORD_BYTES:
            raise Unfit(f"not JSON: an item over {MAX_RECORD_BYTES >> 20} MiB")
        window.grow()

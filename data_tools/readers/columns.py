"""Rows of parquet and arrow files, read a few at a time and only in the columns that are needed.

Arrow files are what `datasets` writes with `save_to_disk` (IPC streams); IPC files ("Feather") are read as well.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaprior.data_tools.readers.samples import Record, Rejected, Unfit

if TYPE_CHECKING:
    import pyarrow

PARQUET, ARROW = "parquet", "arrow"
_ROWS = 64  # a batch of photographs is then some 10 MB
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"

Wanted = Callable[[Sequence[str]], Sequence[str]]


@dataclass
class OpenRows:
    """A table open for one pass: `records` are keyed "row N", counted from 0 as pandas counts."""

    records: Iterator[tuple[str, Record | Rejected]]
    _bytes: int
    _rows: int
    _seen: list[int] = field(default_factory=lambda: [0])

    def consumed(self) -> int:
        """Bytes on disk read so far of what was opened, by the share of rows."""
        return self._bytes * self._seen[0] // max(1, self._rows)


def row_group_ranges(path: Path, *, limit: int) -> list[tuple[int, int, int]]:
    """(start, end, bytes on disk) of runs of row groups, each of at most `limit` bytes or a single group.

    Raises:
        Unfit: the file's footer cannot be read.
    """
    with _parquet(path) as file:
        sizes = _group_bytes(file.metadata)
    ranges: list[tuple[int, int, int]] = []
    for number, size in enumerate(sizes):
        if ranges and ranges[-1][2] + size <= limit:
            ranges[-1] = (ranges[-1][0], number + 1, ranges[-1][2] + size)
        else:
            ranges.append((number, number + 1, size))
    return ranges or [(0, 0, 0)]


@contextmanager
def open_rows(path: Path, format: str, *, wanted: Wanted, start: int = 0, end: int | None = None) -> Iterator[OpenRows]:
    """Open the row groups [start, end) of a parquet file, or all of an arrow file.

    Args:
        wanted: names of the columns to read, given those that there are.

    Raises:
        Unfit: the file's beginning (arrow) or end (parquet) cannot be read.
    """
    if format == ARROW:
        with _arrow(path) as opened:
            yield _arrow_rows(path, opened, wanted)
        return
    with _parquet(path) as file:
        metadata = file.metadata
        last = metadata.num_row_groups if end is None else end
        counts = [metadata.row_group(number).num_rows for number in range(last)]
        columns = list(wanted(file.schema_arrow.names))
        seen = [0]
        records = _parquet_records(file, columns, counts, start, seen)
        yield OpenRows(records, sum(_group_bytes(metadata)[start:last]), sum(counts[start:]), seen)


def _group_bytes(metadata: Any) -> list[int]:
    """Bytes on disk of each row group."""
    return [
        sum(group.column(column).total_compressed_size for column in range(group.num_columns))
        for group in map(metadata.row_group, range(metadata.num_row_groups))
    ]


def _parquet_records(
    file: Any, columns: list[str], counts: list[int], start: int, seen: list[int]
) -> Iterator[tuple[str, Record | Rejected]]:
    for number in range(start, len(counts)):
        first, done = sum(counts[:number]), 0
        try:
            for batch in file.iter_batches(_ROWS, row_groups=[number], columns=columns, use_threads=False):
                seen[0] += batch.num_rows
                yield from _rows(batch, first + done)
                done += batch.num_rows
        except _arrow_errors() as error:  # the next row group does not depend on this one
            yield _lost(
                error, f"rows {first + done} to {first + counts[number] - 1}", f"of row group {number} are lost"
            )


def _arrow_rows(path: Path, reader: Any, wanted: Wanted) -> OpenRows:
    """The rows of an arrow reader (a stream, or a file of numbered batches)."""
    size, seen = path.stat().st_size, [0]

    def records() -> Iterator[tuple[str, Record | Rejected]]:
        first = 0
        columns = list(wanted(reader.schema.names))
        try:
            for batch in reader.batches():
                batch, seen[0] = batch.select(columns), reader.tell()
                for begin in range(0, batch.num_rows, _ROWS):
                    yield from _rows(batch.slice(begin, _ROWS), first + begin)
                first += batch.num_rows
        except _arrow_errors() as error:
            yield _lost(error, f"rows from {first}", "are lost")
            return
        if not reader.ended():  # cut between two batches, which the format itself cannot tell from its end
            key = f"rows from {first}"
            yield key, Rejected(key=key, reason="damaged file: no end mark, so it is cut short here")

    return OpenRows(records(), size, size, seen)


def _lost(error: Exception, key: str, what: str) -> tuple[str, Rejected]:
    return key, Rejected(key=key, reason=f"damaged file: {key} {what} ({_first_line(error)})")


def _rows(batch: Any, first: int) -> Iterator[tuple[str, Record | Rejected]]:
    """Records of a batch; a value that Python cannot hold costs its own row, not the batch."""
    try:
        for number, record in enumerate(batch.to_pylist()):
            yield f"row {first + number}", record
    except UnicodeDecodeError:
        for number in range(batch.num_rows):
            key = f"row {first + number}"
            try:
                yield key, {name: batch.column(name)[number].as_py() for name in batch.schema.names}
            except UnicodeDecodeError as error:
                byte = error.object[error.start]
                yield key, Rejected(key=key, reason=f"invalid UTF-8: byte 0x{byte:02x} at position {error.start}")


@contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    from pyarrow import parquet

    try:
        # Page by page rather than a row group at once: these may be gigabytes.
        file = parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True)
    except _arrow_errors() as error:
        raise Unfit(f"not a whole parquet file, fetch it again ({_first_line(error)})") from None
    with file:
        yield file


class _Batches:
    """An arrow stream or file, batch by batch."""

    def __init__(self, file: pyarrow.NativeFile, path: Path) -> None:
        from pyarrow import ipc

        self._file, self._path = file, path
        self._numbered = _head(path).startswith(b"ARROW1")
        self._reader: Any = ipc.open_file(file) if self._numbered else ipc.open_stream(file)
        self.schema = self._reader.schema

    def batches(self) -> Iterator[Any]:
        if self._numbered:
            for number in range(self._reader.num_record_batches):
                yield self._reader.get_batch(number)
        else:
            yield from self._reader

    def tell(self) -> int:
        return self._file.tell()

    def ended(self) -> bool:
        with open(self._path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - len(_END_OF_STREAM)))
            return self._numbered or file.read() == _END_OF_STREAM


@contextmanager
def _arrow(path: Path) -> Iterator[_Batches]:
    import pyarrow

    with pyarrow.OSFile(str(path)) as file:
        try:
            batches = _Batches(file, path)
        except _arrow_errors() as error:
            raise Unfit(f"not a whole arrow file, fetch it again ({_first_line(error)})") from None
        yield batches


def _head(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(8)


def _arrow_errors() -> tuple[type[Exception], ...]:
    import pyarrow

    return (pyarrow.ArrowException, OSError)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]

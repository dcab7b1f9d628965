"""Lines of text files as they are in the wild: BOM, CRLF, broken UTF-8, NUL, endless lines, archives cut short."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, NamedTuple

from megaprior.data_tools.readers.samples import Unfit
from megaprior.data_tools.readers.streams import DAMAGE

MAX_LINE_BYTES = 16 << 20
_BOM = b"\xef\xbb\xbf"


class Line(NamedTuple):
    """One line without its end: `text`, or the `problem` that makes it unusable; `offset` is its first byte in the stream.

    `number` counts from 1 at the first line read.
    """

    number: int
    offset: int
    text: str = ""
    problem: str | None = None


def read_lines(
    stream: IO[bytes], *, start: int = 0, end: int | None = None, limit: int | None = None
) -> Iterator[Line]:
    """The lines whose first byte lies in [start, end) of the unpacked stream, which stands at its beginning.

    Cutting a file at any offsets thus gives every line to exactly one cut. A stream that ends in the middle of its packed
    data yields one last line with that problem. A line over `limit` bytes (MAX_LINE_BYTES) is skipped and told.
    """
    limit = MAX_LINE_BYTES if limit is None else limit
    offset = number = 0
    try:
        if start:
            stream.seek(start - 1)
            offset = start - 1 + _skip_line(stream)  # start - 1: a line that begins exactly at `start` is kept
        while end is None or offset < end:
            raw = stream.readline(limit + 1)
            if not raw:
                return
            number += 1
            here, offset = offset, offset + len(raw)
            if len(raw) > limit and not raw.endswith(b"\n"):
                offset += _skip_line(stream)
                yield Line(number, here, problem=f"line too long: over {limit >> 20} MiB")
            else:
                try:
                    line = Line(number, here, decode(raw.removesuffix(b"\n").removesuffix(b"\r")))
                except Unfit as unfit:
                    line = Line(number, here, problem=unfit.reason)
                yield line
    except DAMAGE as error:
        yield Line(number + 1, offset, problem=f"damaged file: the rest is lost ({error})")


def decode(raw: bytes) -> str:
    """The text of one line or one small file; a byte-order mark in front is dropped.

    Raises:
        Unfit: not UTF-8, or a NUL in it, as in files that were cut off and padded.
    """
    raw = raw.removeprefix(_BOM)
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise Unfit(f"invalid UTF-8: byte 0x{raw[error.start]:02x} at position {error.start}") from None
    if "\0" in text:
        raise Unfit(f"NUL character: at position {text.index(chr(0))}")
    return text


def _skip_line(stream: IO[bytes]) -> int:
    """Bytes up to and with the next line end, in bounded memory."""
    skipped = 0
    while part := stream.readline(MAX_LINE_BYTES):
        skipped += len(part)
        if part.endswith(b"\n"):
            break
    return skipped

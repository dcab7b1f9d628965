"""Input files open for one pass from front to back: plain, gzip, zstd or lz4, told by their first bytes.

pyarrow unpacks zstd and lz4, because it raises when a frame is cut short; the `zstandard` package ends there as if the file
did. A frame that asks for a window over 128 MiB is refused by it, which bounds the memory.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

# What reading an unpacked stream raises where its file is broken or cut short.
DAMAGE = (EOFError, gzip.BadGzipFile, zlib.error)
_BUFFER_BYTES = 1 << 18
_PACKED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\x04\x22\x4d\x18": "lz4"}


@dataclass
class OpenInput:
    """An input open for one pass; `stream` is unpacked when the file is packed."""

    stream: IO[bytes]
    _raw: IO[bytes]

    def consumed(self) -> int:
        """Bytes of the file on disk read so far."""
        return self._raw.tell()


def packing(path: Path) -> str | None:
    """ "gzip", "zstd" or "lz4" by the content, whatever the name says; None for a plain file."""
    with open(path, "rb") as file:
        head = file.read(4)
    return next((name for magic, name in _PACKED.items() if head.startswith(magic)), None)


@contextmanager
def open_input(path: Path) -> Iterator[OpenInput]:
    """Open a plain or packed file; the content decides which it is, not the name."""
    packed = packing(path)
    with open(path, "rb") as raw:
        if packed is None:
            yield OpenInput(raw, raw)
        elif packed == "gzip":
            with gzip.GzipFile(fileobj=raw, mode="rb") as unpacked:
                yield OpenInput(cast(IO[bytes], unpacked), raw)
        else:
            with io.BufferedReader(_Unpacked(raw, packed), _BUFFER_BYTES) as unpacked:
                yield OpenInput(unpacked, raw)


class _Unpacked(io.RawIOBase):
    """pyarrow's unpacked stream with Python's manners: what a broken file raises is told from what a broken disk raises."""

    def __init__(self, raw: IO[bytes], codec: str) -> None:
        import pyarrow

        self._stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), codec)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._stream.read(len(buffer))
        except OSError as error:
            if error.errno is not None:
                raise
            raise EOFError(str(error)) from None
        buffer[: len(data)] = data
        return len(data)

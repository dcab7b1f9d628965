"""A tar's members from front to back: plain headers are read here, at a fifth of tarfile's price; tarfile reads all others.

A header is plain where every field is what any tar program writes for a file with a short ASCII name. At the first that is
not (a long name, a link, a broken header, the end mark) tarfile takes over, at that very offset, and decides all that comes.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from typing import IO, NamedTuple

_BLOCK = tarfile.BLOCKSIZE
_BUFFER_BYTES = 128 * _BLOCK
_SHORT = rb"(?:[0-7]{7}\0|[0-7]{6} \0)"
_PLAIN = re.compile(
    rb"(?=([ -~]{1,99})\0).{100}"  # name
    + _SHORT * 3  # mode, user, group
    + rb"([0-7]{11})[\0 ][0-7]{11}[\0 ]"  # size, time
    + rb"([0-7]{6})(?:\0 | \0)"  # checksum
    + rb"([05\0]).{172}"  # type, then names that nobody asks for
    + (rb"(?:" + _SHORT + rb"|\0{8})") * 2  # device
    + rb"\0",  # no prefix of the name
    re.DOTALL,
)


class Member(NamedTuple):
    """One member's header; `info` is tarfile's, where that read it."""

    name: str
    size: int
    info: tarfile.TarInfo | None = None


class Archive:
    """The members of an unpacked tar stream, folders left out; `read` gives the data of the one that came last.

    Both raise tarfile's and the stream's own errors where the archive is broken.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._blocks = _Blocks(stream)
        self._tar: tarfile.TarFile | None = None

    def __iter__(self) -> Iterator[Member]:
        blocks, end = self._blocks, 0
        while True:
            blocks.seek(end)
            header = blocks.read(_BLOCK)
            plain = _plain(header)
            if plain is None:
                break
            name, size, folder = plain
            end += _BLOCK
            if not folder:
                end += -(-size // _BLOCK) * _BLOCK
                yield Member(name, size)
        blocks.unread(header)
        # Every attribute that is used here has been tarfile's since it began; `members` would keep every header.
        with tarfile.TarFile(fileobj=blocks) as self._tar:  # pyright: ignore[reportArgumentType]
            # Opening reads one header already; where that was no member, asking for the next would go back to it.
            info = self._tar.next() if self._tar.members else None  # pyright: ignore[reportAttributeAccessIssue]
            while info is not None:
                self._tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]
                if not info.isdir():
                    yield Member(info.name, info.size, info)
                info = self._tar.next()
            # tarfile ends without a word at a broken header; only a block of zeros ends an archive.
            if not blocks.read_zeros_at(self._tar.offset):
                raise tarfile.ReadError("no end mark, so it is cut short or broken here")

    def read(self, member: Member) -> bytes:
        """The data of `member`, before the next is asked for."""
        if member.info is not None and member.info.issparse():
            assert self._tar is not None
            file = self._tar.extractfile(member.info)
            assert file is not None  # regular files always have one
            return file.read()
        data = self._blocks.read(max(0, member.size))  # some headers hold a size below 0
        if len(data) < member.size:
            raise tarfile.ReadError("unexpected end of data")
        return data


def _plain(header: bytes) -> tuple[str, int, bool] | None:
    """(name, size, whether it is a folder) of a plain header."""
    found = _PLAIN.match(header) if len(header) == _BLOCK else None
    if found is None:
        return None
    name, size, checksum, kind = found.groups()
    # The checksum is the sum of all bytes, its own eight counted as blanks.
    if sum(header) - sum(header[148:156]) + 8 * 32 != int(checksum, 8) or (kind == b"\0" and name.endswith(b"/")):
        return None
    return name.decode("ascii"), int(size, 8), kind == b"5"


class _Blocks:
    """What tarfile asks of a file: read, tell, and a seek that only goes forward."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._chunk, self._at = b"", 0
        self._start = 0  # where the chunk begins in the stream
        self._last = b""

    def tell(self) -> int:
        return self._start + self._at

    def seek(self, position: int) -> None:
        """Go forward; the byte before `position` must be there.

        Raises:
            tarfile.TarError: it is not, or `position` lies behind.
        """
        at = position - self._start
        if at < self._at:
            raise tarfile.StreamError("seeking backwards is not allowed")
        if at <= len(self._chunk):
            self._at = at
            return
        while (lacking := position - self.tell()) > 0:
            if not self.read(min(lacking, _BUFFER_BYTES)):
                raise tarfile.ReadError("unexpected end of data")

    def read(self, size: int) -> bytes:
        at, end = self._at, self._at + size
        if end <= len(self._chunk):
            self._at = end
            self._last = self._chunk[at:end]
        else:
            self._last = self._read_on(size)
        return self._last

    def _read_on(self, size: int) -> bytes:
        parts = [self._chunk[self._at :]]
        lacking = size - len(parts[0])
        self._start += len(self._chunk)
        self._chunk, self._at = b"", 0
        while lacking > 0:
            data = self._stream.read(max(lacking, _BUFFER_BYTES))
            if not data:
                break
            parts.append(data[:lacking])
            if len(data) > lacking:
                self._chunk, self._at = data, lacking
            else:
                self._start += len(data)
            lacking -= len(parts[-1])
        return b"".join(parts)

    def unread(self, data: bytes) -> None:
        """Give back what was read last."""
        self._start = self.tell() - len(data)
        self._chunk, self._at = data + self._chunk[self._at :], 0

    def read_zeros_at(self, position: int) -> bool:
        """Whether what was read last is a whole block of zeros at `position`."""
        return self.tell() == position + _BLOCK and self._last == bytes(_BLOCK)

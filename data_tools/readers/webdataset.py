"""WebDataset tars as img2dataset writes them, read front to back; nothing is ever extracted.

One sample is a run of neighbours whose names agree up to the first dot: 000000017.jpg, 000000017.txt, 000000017.json.
"""

from __future__ import annotations

import io
import posixpath
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

from megaprior.data_tools.options import BuildOptions
from megaprior.data_tools.readers.captions import record_captions
from megaprior.data_tools.readers.lines import decode
from megaprior.data_tools.readers.samples import Rejected, Sample, Unfit, parse_record
from megaprior.data_tools.readers.streams import DAMAGE

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
MAX_MEMBER_BYTES = 256 << 20
_BUFFER_BYTES = 128 * tarfile.BLOCKSIZE
# ValueError: what tarfile raises for some headers that no tar program writes.
_DAMAGE = (*DAMAGE, tarfile.TarError, ValueError)


@dataclass(frozen=True, slots=True)
class _Member:
    """One file of the archive; `data` is an Unfit where it was too large to be read."""

    name: str
    key: str
    suffix: str
    data: bytes | Unfit


@dataclass(frozen=True, slots=True)
class _Damage:
    reason: str


def read_tar(stream: IO[bytes], options: BuildOptions) -> Iterator[Sample | Rejected]:
    """The samples of an unpacked tar stream, in order, and a `Rejected` for every member that cannot be part of one.

    Of an archive that is cut short, the whole samples before the cut are given, then what was lost.
    """
    key: str | None = None
    members: dict[str, bytes | Unfit] = {}
    finished: set[str] = set()
    for member in _read_members(stream, options):
        if isinstance(member, Rejected):
            yield member
        elif isinstance(member, _Damage):
            if key is not None:  # whether its image or a further caption was cut away cannot be known
                yield Rejected(key=key, reason="damaged archive: it breaks off in or right after this sample")
            yield Rejected(key="(end of archive)", reason=member.reason)
            return
        elif member.key in finished:
            yield Rejected(
                key=member.name, reason="duplicate key: an earlier sample has it; members must be neighbours"
            )
        elif member.key == key and member.suffix in members:
            yield Rejected(key=member.name, reason="duplicate member: the sample has one of that name")
        else:
            if member.key != key:
                if key is not None:
                    yield from _finish(key, members, options)
                    finished.add(key)
                key, members = member.key, {}
            members[member.suffix] = member.data
    if key is not None:
        yield from _finish(key, members, options)


def _read_members(stream: IO[bytes], options: BuildOptions) -> Iterator[_Member | Rejected | _Damage]:
    tail = _Tail(stream)
    wanted = {"txt", "json"} if options.text and options.whole else {"txt", "json", *IMAGE_SUFFIXES}
    try:
        with tarfile.open(fileobj=tail, mode="r|", bufsize=_BUFFER_BYTES) as tar:
            while (info := tar.next()) is not None:
                tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]  # else a large tar keeps every header
                if not info.isdir():
                    yield _read_member(tar, info, wanted)
            # tarfile ends without a word at a broken header; only a block of zeros ends an archive.
            if not tail.ends_at(tar.offset):
                yield _Damage("damaged archive: no end mark, so it is cut short or broken here")
    except _DAMAGE as error:
        yield _Damage(f"damaged archive: {error}")


def _read_member(tar: tarfile.TarFile, info: tarfile.TarInfo, wanted: set[str]) -> _Member | Rejected:
    name = posixpath.normpath(info.name)
    if name.startswith("/") or ".." in info.name.split("/"):
        return Rejected(key=info.name, reason="unsafe name: it leads out of the archive")
    if not info.isreg():
        kinds = {tarfile.SYMTYPE: "symbolic link", tarfile.LNKTYPE: "hard link", tarfile.FIFOTYPE: "pipe"}
        return Rejected(key=info.name, reason=f"not a file: {kinds.get(info.type, 'device or unknown type')}")
    folder, base = posixpath.split(name)
    stem, _, suffix = base.partition(".")
    if not stem or not suffix:
        return Rejected(key=info.name, reason="not a sample's member: its name is not KEY.SUFFIX")
    key, suffix = posixpath.join(folder, stem), suffix.lower()
    if suffix not in wanted:
        return _Member(info.name, key, suffix, b"")
    if info.size > MAX_MEMBER_BYTES:
        limit = f"{info.size:,} bytes, at most {MAX_MEMBER_BYTES:,}"
        return _Member(info.name, key, suffix, Unfit(f"member too large: {info.name} has {limit}"))
    file = tar.extractfile(info)
    assert file is not None  # regular files always have one
    return _Member(info.name, key, suffix, file.read())


def _finish(key: str, members: dict[str, bytes | Unfit], options: BuildOptions) -> Iterator[Sample | Rejected]:
    try:
        record = _record(members, options)
        image = None if options.text and options.whole else _image(members, record, required=not options.text)
        captions, refused = record_captions(key, record, options)
    except Unfit as unfit:
        yield Rejected(key=key, reason=unfit.reason)
        return
    yield from refused
    if captions:
        yield Sample(key=key, captions=tuple(captions), image=image)


def _record(members: dict[str, bytes | Unfit], options: BuildOptions) -> dict[str, Any]:
    """KEY.json with KEY.txt as its "caption"; a column that was asked for by name comes from the json alone."""
    record = parse_record(_text(members["json"])) if "json" in members else {}
    if "txt" in members and options.caption_column is None:
        record["caption"] = _text(members["txt"])
    if not record:
        raise Unfit(f"no caption: neither .txt nor .json beside {', '.join('.' + suffix for suffix in members)}")
    return record


def _text(data: bytes | Unfit) -> str:
    if isinstance(data, Unfit):
        raise data
    return decode(data)


def _image(members: dict[str, bytes | Unfit], record: dict[str, Any], *, required: bool) -> bytes | None:
    found = [suffix for suffix in members if suffix in IMAGE_SUFFIXES]
    if len(found) > 1:
        raise Unfit(f"more than one image: {', '.join('.' + suffix for suffix in found)}")
    if not found:
        if not required:
            return None
        status = f" (status: {record['status']})" if record.get("status", "success") != "success" else ""
        others = ", ".join("." + suffix for suffix in members)
        raise Unfit(f"no image: only {others}{status}; read are .{', .'.join(IMAGE_SUFFIXES)}")
    image = members[found[0]]
    if isinstance(image, Unfit):
        raise image
    return image


class _Tail(io.RawIOBase):
    """A stream that remembers its last two reads, so that the block at which tarfile stopped can be looked at."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._last = (b"", b"")
        self._position = 0

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self._last = (self._last[1], data)
        self._position += len(data)
        return data

    def ends_at(self, offset: int) -> bool:
        """Whether a whole block of zeros lies at `offset`, counted from the start of the stream."""
        seen = self._last[0] + self._last[1]
        start = offset - (self._position - len(seen))
        block = seen[start : start + tarfile.BLOCKSIZE]
        return len(block) == tarfile.BLOCKSIZE and not any(block)

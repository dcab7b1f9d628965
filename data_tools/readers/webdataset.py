"""WebDataset tars as img2dataset writes them, read front to back; nothing is ever extracted.

One sample is a run of neighbours whose names agree up to the first dot: 000000017.jpg, 000000017.txt, 000000017.json.
"""

from __future__ import annotations

import posixpath
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any, NamedTuple

from megaprior.data_tools.options import BuildOptions
from megaprior.data_tools.readers.captions import record_captions
from megaprior.data_tools.readers.lines import decode
from megaprior.data_tools.readers.samples import Rejected, Sample, Unfit, parse_record
from megaprior.data_tools.readers.streams import DAMAGE
from megaprior.data_tools.readers.tars import Archive, Member

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
MAX_MEMBER_BYTES = 256 << 20
# ValueError: what tarfile raises for some headers that no tar program writes.
_DAMAGE = (*DAMAGE, tarfile.TarError, ValueError)


class _Member(NamedTuple):
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
    wanted = {"txt", "json"} if options.text and options.whole else {"txt", "json", *IMAGE_SUFFIXES}
    archive = Archive(stream)
    try:
        for member in archive:
            yield _read_member(archive, member, wanted)
    except _DAMAGE as error:
        yield _Damage(f"damaged archive: {error}")


def _read_member(archive: Archive, member: Member, wanted: set[str]) -> _Member | Rejected:
    name, size, info = member
    folder, base = "", name
    if "/" in name or name == "..":
        folder, base = posixpath.split(posixpath.normpath(name))
        if folder.startswith("/") or ".." in name.split("/"):
            return Rejected(key=name, reason="unsafe name: it leads out of the archive")
    if info is not None and not info.isreg():
        kinds = {tarfile.SYMTYPE: "symbolic link", tarfile.LNKTYPE: "hard link", tarfile.FIFOTYPE: "pipe"}
        return Rejected(key=name, reason=f"not a file: {kinds.get(info.type, 'device or unknown type')}")
    stem, _, suffix = base.partition(".")
    if not stem or not suffix:
        return Rejected(key=name, reason="not a sample's member: its name is not KEY.SUFFIX")
    key, suffix = posixpath.join(folder, stem) if folder else stem, suffix.lower()
    if suffix not in wanted:
        return _Member(name, key, suffix, b"")
    if size > MAX_MEMBER_BYTES:
        limit = f"{size:,} bytes, at most {MAX_MEMBER_BYTES:,}"
        return _Member(name, key, suffix, Unfit(f"member too large: {name} has {limit}"))
    return _Member(name, key, suffix, archive.read(member))


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

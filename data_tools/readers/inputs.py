"""The files a user names: found, told apart by suffix and first bytes, named without their absolute place."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megaprior.data_tools.readers.folders import SUFFIXES, folder_files
from megaprior.data_tools.readers.streams import DAMAGE, open_input
from megaprior.errors import DataError, UsageError
from megaprior.files import digest_bytes, looks_like

_AT_ONCE = 16  # files looked at together: opening thousands on a network file system is waiting
_SAMPLED_BYTES = 64 << 10
_FOREIGN = {  # first bytes -> what such a file is, beyond what `looks_like` knows
    b"BZh": "bzip2 data",
    b"\xfd7zXZ": "xz data",
    b"\xff\xfe": "UTF-16 text (convert it with `iconv -f UTF-16 -t UTF-8`)",
    b"\xfe\xff": "UTF-16 text (convert it with `iconv -f UTF-16 -t UTF-8`)",
}
_NAMES = {"webdataset": "a tar archive", "parquet": "a parquet file", "arrow": "an arrow file"}


@dataclass(frozen=True, kw_only=True)
class Source:
    """One input file; `name` is the end of its path that tells it from the other inputs, `size` in bytes on disk.

    `given` is the folder that the user named, where it was found in one.
    """

    path: Path
    name: str
    format: str
    size: int
    digest: str
    given: Path | None = None


def find_sources(
    paths: Sequence[Path], *, format: str = "auto", split: str | None = None
) -> tuple[list[Source], list[Path]]:
    """The input files in order, and the files of input folders that were left out.

    A folder stands for the files directly in it of the first format it holds (in the order of `folders.SUFFIXES`), a
    folder that `datasets` saved for its data files.

    Raises:
        UsageError: a path does not exist, is given twice, or neither its suffix nor its content says what it is.
        DataError: an input is empty, unreadable, or not of its format.
    """
    files: list[tuple[Path, str]] = []
    given: dict[Path, Path] = {}
    left_out: list[Path] = []
    for path in paths:
        if not path.exists():
            raise UsageError(f"--input {path}: no such file or folder")
        if path.is_dir():
            found, others = folder_files(path, format=format, split=split)
            files += found
            given |= {file: path for file, _ in found}
            left_out += others
        else:
            files.append((path, format if format != "auto" else _guessed_format(path)))
    if split is not None and not given:
        raise UsageError(f"--split {split}: no input is a folder of splits; name the folder instead of its files")
    resolved = [path.resolve() for path, _ in files]
    if len(set(resolved)) < len(resolved):
        twice = next(path for path in resolved if resolved.count(path) > 1)
        raise UsageError(f"--input {twice}: given twice; its samples would be doubled")
    names = _short_names([path for path, _ in files])
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        looked = list(pool.map(lambda file: (_check_content(*file), sampled_digest(file[0])), files))
    sources = [
        Source(path=path, name=name, format=kind, size=size, digest=digest, given=given.get(path))
        for (path, kind), name, (size, digest) in zip(files, names, looked, strict=True)
    ]
    return sources, left_out


def _short_names(paths: Sequence[Path]) -> list[str]:
    """File names, with as many of their folders as tell them apart; where the folders lie does not matter.

    Links keep their own names: in a store of blobs those of their targets say nothing.
    """
    parts = [Path(os.path.abspath(path)).parts[1:] for path in paths]
    names: list[str] = []
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def sampled_digest(path: Path) -> str:
    """xxh3-128 over the size and the first, middle and last 64 KiB: cheap at any size, enough to notice another file."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        parts = [size.to_bytes(8, "little")]
        for start in (0, (size - _SAMPLED_BYTES) // 2, size - _SAMPLED_BYTES):
            file.seek(max(0, start))
            parts.append(file.read(_SAMPLED_BYTES))
    return digest_bytes(b"".join(parts))


def _guessed_format(path: Path) -> str:
    """By the suffix; where that says nothing, by the first bytes."""
    name = path.name.lower()
    for kind, suffixes in SUFFIXES.items():
        if name.endswith(suffixes):
            return kind
    if path.is_file() and (kind := _content_format(_head(path))) is not None:
        return kind
    raise UsageError(f"--input {path}: neither suffix nor content tells its format; add --format {'|'.join(SUFFIXES)}")


def _head(path: Path) -> bytes:
    """The first bytes of an input, unpacked."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise DataError(f"{path}: not a regular file")
        with open_input(path) as opened:
            return opened.stream.read(1024)
    except (OSError, *DAMAGE) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None


def _content_format(head: bytes) -> str | None:
    """The format that the first bytes cannot but be; of text only JSON tells."""
    if head[257:262] == b"ustar" or (len(head) >= 512 and _is_old_tar(head)):
        return "webdataset"
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    magics = {b"PAR1": "parquet", b"ARROW1": "arrow", b"\xff\xff\xff\xff": "arrow", b"[": "json", b"{": "jsonl"}
    return next((kind for magic, kind in magics.items() if start.startswith(magic)), None)


def _check_content(path: Path, kind: str) -> int:
    """Bytes of the file, when its first ones fit its format."""
    head, size = _head(path), path.stat().st_size
    if not head:
        raise DataError(f"{path}: empty ({size} bytes on disk); leave it out or fetch it again")
    looks = next((what for magic, what in _FOREIGN.items() if head.startswith(magic)), None) or looks_like(head[:64])
    found = _content_format(head)
    if found == kind:
        return size
    if found in _NAMES:
        raise DataError(f"{path}: {_NAMES[found]}, not {kind}; add --format {found}")
    if kind in _NAMES:
        raise DataError(f"{path}: not {_NAMES[kind]}{f', it looks like {looks}' if looks else ''}; fetch it again")
    if looks not in (None, "JSON text"):
        raise DataError(f"{path}: not {kind}, it looks like {looks}; unpack it or fetch it again")
    return size


def _is_old_tar(block: bytes) -> bool:
    """Tars older than POSIX have no magic, only a checksum over the header with its own eight bytes as blanks."""
    try:
        claimed = int(block[148:156].strip(b"\0 ") or b"x", 8)
    except ValueError:
        return False
    return sum(block[:148]) + 8 * 0x20 + sum(block[156:512]) == claimed

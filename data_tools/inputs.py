"""The files a user names: found, told apart by suffix and first bytes, named without their absolute place."""

from __future__ import annotations

import gzip
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from megaprior.errors import DataError, UsageError
from megaprior.files import digest_bytes, looks_like

SUFFIXES = {
    "webdataset": (".tar", ".tar.gz", ".tgz"),
    "jsonl": (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz"),
    "tsv": (".tsv", ".tsv.gz"),
    "text": (".txt", ".txt.gz"),
}
_SAMPLED_BYTES = 64 << 10
_GZIP = b"\x1f\x8b"
_FOREIGN = {  # first bytes -> what such a file is, beyond what `looks_like` knows
    b"BZh": "bzip2 data",
    b"\xfd7zXZ": "xz data",
    b"\xff\xfe": "UTF-16 text (convert it with `iconv -f UTF-16 -t UTF-8`)",
    b"\xfe\xff": "UTF-16 text (convert it with `iconv -f UTF-16 -t UTF-8`)",
}


@dataclass(frozen=True, kw_only=True)
class Source:
    """One input file; `name` is the end of its path that tells it from the other inputs, `size` in bytes on disk."""

    path: Path
    name: str
    format: str
    size: int
    digest: str


@dataclass
class OpenInput:
    """An input open for one pass from front to back; `stream` is unpacked when the file is gzipped."""

    stream: IO[bytes]
    _raw: IO[bytes]

    def consumed(self) -> int:
        """Bytes of the file on disk read so far."""
        return self._raw.tell()


def is_gzipped(path: Path) -> bool:
    """Whether the content, not the name, says gzip."""
    with open(path, "rb") as file:
        return file.read(2) == _GZIP


@contextmanager
def open_input(path: Path) -> Iterator[OpenInput]:
    """Open a plain or gzipped file; the content decides which it is, not the name."""
    packed = is_gzipped(path)
    with open(path, "rb") as raw:
        if not packed:
            yield OpenInput(raw, raw)
            return
        with gzip.GzipFile(fileobj=raw, mode="rb") as unpacked:
            yield OpenInput(cast(IO[bytes], unpacked), raw)


def find_sources(paths: Sequence[Path], *, format: str = "auto") -> tuple[list[Source], list[Path]]:
    """The input files in order, and the files of input folders that were left out.

    A folder stands for the files directly in it of the first format it holds: tars, else jsonl, else tsv, else text.

    Raises:
        UsageError: a path does not exist, is given twice, or its suffix says nothing.
        DataError: an input is empty, unreadable, a parquet, or of a format that is not read here.
    """
    files: list[tuple[Path, str]] = []
    left_out: list[Path] = []
    for path in paths:
        if not path.exists():
            raise UsageError(f"--input {path}: no such file or folder")
        if path.is_dir():
            found, others = _folder_files(path, format)
            files += found
            left_out += others
        else:
            files.append((path, format if format != "auto" else _suffix_format(path)))
    resolved = [path.resolve() for path, _ in files]
    if len(set(resolved)) < len(resolved):
        twice = next(path for path in resolved if resolved.count(path) > 1)
        raise UsageError(f"--input {twice}: given twice; its samples would be doubled")
    sources = []
    for (path, kind), name in zip(files, _short_names([path for path, _ in files]), strict=True):
        size = _check_content(path, kind)
        sources.append(Source(path=path, name=name, format=kind, size=size, digest=sampled_digest(path)))
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


def _folder_files(folder: Path, format: str) -> tuple[list[tuple[Path, str]], list[Path]]:
    inside = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    for kind in SUFFIXES if format == "auto" else (format,):
        found = [path for path in inside if path.name.lower().endswith(SUFFIXES[kind])]
        if found:
            return [(path, kind) for path in found], [path for path in inside if path not in found]
    parquet = next((path for path in inside if path.suffix.lower() == ".parquet"), None)
    if parquet is not None:
        _check_content(parquet, "webdataset")
    known = ", ".join(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)
    raise UsageError(f"--input {folder}: no file to read directly inside it ({known})")


def _suffix_format(path: Path) -> str:
    name = path.name.lower()
    for kind, suffixes in SUFFIXES.items():
        if name.endswith(suffixes):
            return kind
    if name.endswith(".parquet"):
        return "webdataset"  # refused with the remedy once its content has been looked at
    raise UsageError(f"--input {path}: the suffix does not tell its format; add --format {'|'.join(SUFFIXES)}")


def _check_content(path: Path, kind: str) -> int:
    """Bytes of the file, when its first ones fit its format."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{path}: not a regular file")
        with open_input(path) as opened:
            head = opened.stream.read(1024)
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    if not head:
        raise DataError(f"{path}: empty ({status.st_size} bytes on disk); leave it out or fetch it again")
    if head.startswith(b"PAR1"):
        raise DataError(f"{path}: {_about_parquet(path)}")
    tar = head[257:262] == b"ustar" or (len(head) >= 512 and _is_old_tar(head))
    looks = next((what for magic, what in _FOREIGN.items() if head.startswith(magic)), None) or looks_like(head[:64])
    if kind == "webdataset" and not tar:
        raise DataError(f"{path}: not a tar archive{f', it looks like {looks}' if looks else ''}; fetch it again")
    if kind != "webdataset" and tar:
        raise DataError(f"{path}: a tar archive, not {kind}; add --format webdataset")
    if kind != "webdataset" and looks not in (None, "JSON text"):
        raise DataError(f"{path}: not {kind}, it looks like {looks}; unpack it or fetch it again")
    return status.st_size


def _is_old_tar(block: bytes) -> bool:
    """Tars older than POSIX have no magic, only a checksum over the header with its own eight bytes as blanks."""
    try:
        claimed = int(block[148:156].strip(b"\0 ") or b"x", 8)
    except ValueError:
        return False
    return sum(block[:148]) + 8 * 0x20 + sum(block[156:512]) == claimed


def _about_parquet(path: Path) -> str:
    # The footer at the end names the columns; looking for two words in it needs no parquet library.
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - (1 << 20)))
        footer = file.read()
    url = next((name for name in ("image_url", "url", "URL") if name.encode() in footer), None)
    caption = next((name for name in ("capsfusion", "caption", "TEXT", "text") if name.encode() in footer), "caption")
    what = "a parquet of image URLs, not of images" if url else "a parquet file, which is not read here"
    return f"{what}; {download_advice(path.name, 'parquet', url or 'url', caption)}"


def download_advice(name: str, format: str, url: str, caption: str) -> str:
    """How to get the images of a list of URLs; nothing is ever downloaded here."""
    return (
        "fetch the images with img2dataset, then build from the tars it writes: "
        f"pip install img2dataset && img2dataset --url_list {name} --input_format {format} --url_col {url} "
        f"--caption_col {caption} --output_format webdataset --output_folder PAIRS "
        "--image_size 1024 --resize_mode keep_ratio_largest --resize_only_if_bigger True"
    )

"""Files that are either whole or absent, digests that prove what they hold, and what a file of another kind looks like.

Every write is: temporary name in the same folder, fsync, rename, fsync of the folder; a manifest is written last.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from megaprior.errors import DataError

BLOCK_BYTES = 64 << 20
_READ_BYTES = 1 << 20


# ---------------------------------------------------------------- digests


def digest_bytes(data: bytes | memoryview) -> str:
    """xxh3-128 of `data`, 32 hex digits."""
    import xxhash

    return xxhash.xxh3_128_hexdigest(data)


def digest_json(value: Any) -> str:
    """xxh3-128 of the canonical JSON of `value` (sorted keys, no blanks, UTF-8)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return digest_bytes(text.encode())


def block_digests(path: Path | str) -> list[str]:
    """xxh3-128 of each 64 MiB block of the file; an empty file has no block. Memory stays at 1 MiB."""
    import xxhash

    digests = []
    with open(path, "rb") as file:
        while True:
            block, left = xxhash.xxh3_128(), BLOCK_BYTES
            while left and (data := file.read(min(_READ_BYTES, left))):
                block.update(data)
                left -= len(data)
            if left == BLOCK_BYTES:
                return digests
            digests.append(block.hexdigest())
            if left:
                return digests


# ---------------------------------------------------------------- whole or absent


@contextmanager
def disk_full_explained(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turn ENOSPC into a DataError that gives the bytes needed (where known) and the bytes free.

    Raises:
        DataError: the disk that holds `path` is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(path.parent).free
        wanted = f"{needed:,} bytes needed, " if needed is not None else ""
        raise DataError(
            f"{path}: disk full ({wanted}{free:,} bytes free); free some space and repeat the command"
        ) from error


def fsync_folder(path: Path | str) -> None:
    """Make the names in a folder durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_file(path: Path | str) -> None:
    """Make a finished file's bytes durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def temporary_name(path: Path) -> Path:
    """The name under which `path` is written until it is whole: hidden, in the same folder, one per process."""
    return path.with_name(f".{path.name}.tmp-{socket.gethostname()}-{os.getpid()}")


@contextmanager
def atomic_file(path: Path | str, mode: str = "wb", *, needed: int | None = None) -> Iterator[IO[Any]]:
    """Open a file that appears under its name only when the block ends without an exception.

    `needed` is the size in bytes, where it is known beforehand, for the message about a full disk.

    Raises:
        DataError: the disk is full; nothing is left behind.
    """
    path = Path(path)
    temporary = temporary_name(path)
    with disk_full_explained(path, needed):
        try:
            with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    fsync_folder(path.parent)


def atomic_write(path: Path | str, data: bytes | str) -> None:
    """Write a whole file or nothing.

    Raises:
        DataError: the disk is full; an earlier file of that name is intact.
    """
    raw = data.encode() if isinstance(data, str) else data
    with atomic_file(path, needed=len(raw)) as file:
        file.write(raw)


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """A temporary sibling folder that takes the name `path` when the block ends without an exception.

    Raises:
        DataError: `path` exists already, or the disk is full; nothing is left behind.
    """
    path = Path(path)
    if path.exists():
        raise DataError(f"{path}: exists already and is never overwritten; remove it or choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    with disk_full_explained(path):
        try:
            yield temporary
            for parent, _, names in os.walk(temporary):
                for name in names:
                    fsync_file(os.path.join(parent, name))
                fsync_folder(parent)
            os.rename(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    fsync_folder(path.parent)


# ---------------------------------------------------------------- manifests


def write_manifest(path: Path | str, body: dict[str, Any]) -> dict[str, Any]:
    """Write `body` with a digest of itself under "digest"; returns what was written."""
    whole = {key: value for key, value in body.items() if key != "digest"}
    whole["digest"] = digest_json(whole)
    atomic_write(path, json.dumps(whole, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    return whole


def read_manifest(path: Path | str, *, format: str, version: int = 1) -> dict[str, Any]:
    """Read a manifest that `write_manifest` wrote.

    Raises:
        DataError: it is missing, no JSON object, of another format, of a newer version, or its digest does not match.
    """
    path = Path(path)
    try:
        body = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(
            f"{path}: no manifest, so nothing was completed here; repeat the command that writes it"
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: not a manifest ({error}); rebuild it") from None
    if not isinstance(body, dict) or body.get("format") != format:
        found = body.get("format") if isinstance(body, dict) else type(body).__name__
        raise DataError(f"{path}: format is {found!r}, expected {format!r}")
    if body.get("version") != version:
        raise DataError(
            f"{path}: version {body.get('version')}, this program reads version {version}; upgrade megaprior"
        )
    found = body.get("digest")
    try:
        expected = digest_json({key: value for key, value in body.items() if key != "digest"})
    except ValueError as error:  # NaN or half a character: nothing that write_manifest could have written
        raise DataError(f"{path}: not a manifest of ours ({error}); rebuild it") from None
    if found != expected:
        raise DataError(f"{path}: digest {found} but the content gives {expected}; the file was changed, rebuild it")
    return body


def kept_manifest(path: Path | str, key: dict[str, Any], *, format: str) -> dict[str, Any] | None:
    """An earlier result's manifest where it is whole and says of all of `key` what is asked for now, else None."""
    try:
        body = read_manifest(path, format=format)
    except DataError:
        return None
    return body if all(body.get(name) == value for name, value in key.items()) else None


# ---------------------------------------------------------------- files of another kind

_LOOKS = (
    (b"\x1f\x8b", "gzip data"),
    (b"version https://git-lfs", "a Git-LFS pointer (run `git lfs pull`)"),
    (b"<!doctype html", "an HTML page"),
    (b"<html", "an HTML page"),
    (b"<?xml", "XML"),
    (b"\x28\xb5\x2f\xfd", "zstd data"),
    (b"pk\x03\x04", "a zip archive or a PyTorch checkpoint"),
    *((bytes([0x80, protocol]), "a pickle, which is never loaded") for protocol in range(2, 6)),
    (b"\x93numpy", "a NumPy array"),
    (b"tntidx\0\0", "Megatron's old index format"),
    (b"{", "JSON text"),
)


def looks_like(head: bytes) -> str | None:
    """What a file with these first bytes (64 are enough) looks like, in words: the usual accidents of copying and downloading.

    None when they say nothing.
    """
    if not head:
        return "an empty file"
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for magic, words in _LOOKS:
        if start.startswith(magic):
            return words
    return "zeros (an unfinished copy)" if not any(head) else None


def appearance(path: Path) -> str:
    """ ", it looks like gzip data" for a file whose beginning says so, else "" (for error messages)."""
    with open(path, "rb") as file:
        words = looks_like(file.read(64))
    return f", it looks like {words}" if words else ""


# ---------------------------------------------------------------- one owner at a time


@contextmanager
def owner_lock(folder: Path | str, name: str = ".lock") -> Iterator[None]:
    """Hold `folder` exclusively; a lock whose process is gone from this host is taken over.

    Raises:
        DataError: another live process (named by host and pid) holds it, or the file system has no locks.
    """
    import fcntl

    path = Path(folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    me = f"{socket.gethostname()} pid {os.getpid()}"
    # flock: the kernel drops it with its process, so that a killed owner never leaves a stale lock behind.
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A file that was unlinked between open and flock belongs to an owner who has just left.
            held = path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise DataError(
                    f"{path}: cannot be locked ({error.strerror}); mount that file system with locks (Lustre: -o flock) or "
                    "choose a folder on another"
                ) from None
            held = False
        if not held:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise DataError(f"{folder}: in use by {owner}; wait for it or choose another folder")
        file.truncate(0)
        file.write(me)
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)

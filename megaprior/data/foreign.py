"""What a file that should be ours looks like instead: the usual accidents of copying and downloading."""

from __future__ import annotations

from pathlib import Path

_LOOKS = (
    (b"\x1f\x8b", "gzip data"),
    (b"version https://git-lfs", "a Git-LFS pointer (run `git lfs pull`)"),
    (b"<!doctype html", "an HTML page"),
    (b"<html", "an HTML page"),
    (b"<?xml", "XML"),
    (b"\x28\xb5\x2f\xfd", "zstd data"),
    (b"pk\x03\x04", "a zip archive"),
    (b"\x93numpy", "a NumPy array"),
    (b"tntidx\0\0", "Megatron's old index format"),
    (b"{", "JSON text"),
)


def looks_like(head: bytes) -> str | None:
    """What the first bytes of a foreign file look like, in words; None when they say nothing."""
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

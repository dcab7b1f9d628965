"""Where the sequences of a stream end, guessed from what is left when its index is lost; a digest decides who guessed right.

Letters: N sequences.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from megaprior.data.indexed import CODES, HEADER, MAGIC, IndexedStream

_PICTURE = rb"(?:\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|BM|RIFF....WEBP)"
_START = re.compile(_PICTURE, re.DOTALL)
_ENDS = {  # of formats whose header does not say how long they are: their last bytes, then another picture or nothing
    b"\xff\xd8": re.compile(rb"\xff\xd9(?=" + _PICTURE + rb"|\Z)", re.DOTALL),
    b"GI": re.compile(rb"\x3b(?=" + _PICTURE + rb"|\Z)", re.DOTALL),
}
_KEYS = (rb"line \d+(?:#\w+)?(?: part \d+)?", *(rb"\d{%d}(?:#\d)?" % width for width in range(1, 13)))


def index_bytes(dtype: np.dtype, lengths: np.ndarray, pointers: np.ndarray, documents: np.ndarray) -> bytes:
    """The bytes of an .idx."""
    head = HEADER.pack(MAGIC, 1, CODES[dtype], len(lengths), len(documents))
    return head + lengths.astype("<i4").tobytes() + pointers.astype("<i8").tobytes() + documents.astype("<i8").tobytes()


def token_lengths(flat: np.ndarray, *, eos: int, limit: int | None) -> np.ndarray:
    """Lengths when every sequence ends in its only EOS, or is cut at `limit` tokens."""
    ends = np.flatnonzero(flat == eos) + 1
    if limit is None or not len(flat):
        return np.diff(ends, prepend=0)
    found, start = [], 0
    for end in [*ends.tolist(), len(flat)]:
        while end - start > limit:
            found.append(limit)
            start += limit
        if end > start:
            found.append(end - start)
        start = end
    return np.array(found, np.int64)


def key_lengths(flat: np.ndarray, count: int) -> Iterator[np.ndarray]:
    """Lengths of keys that are all as long, that name lines, or that are numbers with the number of a caption."""
    if count and len(flat) % count == 0:
        yield np.full(count, len(flat) // count)
    data = flat.tobytes()
    for pattern in _KEYS:
        found = np.array([len(key) for key in re.findall(pattern, data)], np.int64)
        if len(found) == count and found.sum() == len(data):
            yield found


def picture_lengths(flat: np.ndarray) -> np.ndarray | None:
    """Lengths of pictures one after another, by what their formats say of their end; None where they do not say it."""
    data, start, found = memoryview(flat.data), 0, []
    while start < len(data):
        end = _picture_end(data, start)
        if end is None or end > len(data):
            return None
        found.append(end - start)
        start = end
    return np.array(found, np.int64)


def _picture_end(data: memoryview, start: int) -> int | None:
    head = bytes(data[start : start + 12])
    if not _START.match(head):
        return None
    if head.startswith(b"\x89PNG"):
        at = start + 8
        while at + 8 <= len(data):
            size, kind = int.from_bytes(data[at : at + 4], "big"), bytes(data[at + 4 : at + 8])
            at += size + 12
            if kind == b"IEND":
                return at
        return None
    if head.startswith(b"RIFF"):
        size = int.from_bytes(head[4:8], "little")
        return start + 8 + size + size % 2
    if head.startswith(b"BM"):
        return start + int.from_bytes(head[2:6], "little")
    match = _ENDS[head[:2]].search(data, start + 3)
    return match.end() if match else None


def shared_pictures(keys: IndexedStream, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """(lengths, pointers) of N samples when captions of one record, with keys k#0, k#1, ..., share its picture."""
    names = [keys[i].tobytes().partition(b"#")[0] for i in range(len(keys))]
    begins = np.array([i == 0 or names[i] != names[i - 1] for i in range(len(names))], np.bool_)
    which = np.cumsum(begins) - 1
    if not len(which) or which[-1] + 1 != len(lengths):
        return None
    return lengths[which], (np.cumsum(lengths) - lengths)[which]


def touching(lengths: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Pointers of sequences that lie one after another."""
    return (np.cumsum(lengths, dtype=np.int64) - lengths) * dtype.itemsize


def placements(
    name: str, entry: dict[str, Any], flat: np.ndarray, sound: dict[str, IndexedStream], manifest: dict[str, Any]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Guesses at (lengths, pointers) of a stream whose bytes are whole; `sound` are the shard's streams that can be read."""
    count = entry["sequences"]
    per_token = [n for n in sound if n not in ("keys", "images", "image_sizes", "loss_spans")]
    guesses: list[np.ndarray] = []
    if name in ("image_sizes", "loss_spans"):
        guesses.append(np.full(count, 2))
    elif name == "keys":
        guesses += key_lengths(flat, count)
    elif name == "images":
        pictures = picture_lengths(flat)
        if pictures is not None and len(pictures) != count and "keys" in sound:
            shared = shared_pictures(sound["keys"], pictures)
            if shared is not None:
                yield shared
        elif pictures is not None:
            guesses.append(pictures)
    else:
        guesses += [sound[other].lengths.astype(np.int64) for other in per_token]
        if name == "tokens":
            limit = manifest["options"].get("max_sequence")
            eos = manifest["tokenizer"]["identity"]["eos"]
            guesses.append(token_lengths(flat, eos=eos, limit=limit))
    for lengths in guesses:
        if len(lengths) == count:
            yield lengths, touching(lengths, flat.dtype)

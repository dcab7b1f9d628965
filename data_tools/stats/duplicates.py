"""Equal captions and equal images, counted in bounded memory.

A sample of rows would miss most pairs of equals: both would have to be drawn. So the content itself decides whether it is
looked at (its hash falls into a share of 1 / 2^s): equals are looked at together or not at all, and the share of repetitions
among those looked at is an unbiased estimate for all.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megaprior.data.shards import Shard

KEPT = 1 << 22  # contents remembered at most, 8 bytes each
READ = 1 << 17  # images whose files are read, at most


class Captions:
    """Captions that were there before, by their tokens."""

    def __init__(self, samples: int, *, kept: int = KEPT) -> None:
        self._shift = _shift(samples, kept)
        self._parts: list[np.ndarray] = []

    def add(self, shard: Shard) -> None:
        """Look at the captions of a shard."""
        tokens = shard.streams["tokens"]
        data, size = tokens.flat().view(np.uint8).data, tokens.dtype.itemsize
        edges = np.concatenate([[0], np.cumsum(tokens.lengths, dtype=np.int64) * size]).tolist()
        hashes = np.array([xxhash.xxh3_64_intdigest(data[start:end]) for start, end in pairwise(edges)], np.uint64)
        self._parts.append(hashes[_chosen(hashes, self._shift)])

    def told(self) -> dict[str, Any]:
        """looked_at, one_in, repeated: how many of those looked at were there before; most: the largest group of equals."""
        _, times = np.unique(np.concatenate([np.empty(0, np.uint64), *self._parts]), return_counts=True)
        return _told(times, self._shift)


class Images:
    """Stored images whose file is that of another one.

    Equal files have equal length, width and height: a key from the index alone. A share of the keys is chosen, and only
    files whose chosen key comes more than once are read.
    """

    def __init__(self, images: int, *, read: int = READ) -> None:
        self._shift = _shift(images, read)
        self._parts: list[np.ndarray] = []  # key, shard, sample: uint64 [n, 3]
        self._shards: list[tuple[Path, str]] = []
        self._shared = 0

    def add(self, shard: Shard) -> None:
        """Note the images of a shard, each stored one once."""
        images, sizes = shard.streams["images"], shard.streams["image_sizes"].flat().reshape(-1, 2).astype(np.uint64)
        _, first = np.unique(images.pointers, return_index=True)
        self._shared += len(images) - len(first)
        key = _mixed(images.lengths[first].astype(np.uint64), sizes[first, 0], sizes[first, 1])
        chosen = _chosen(key, self._shift)
        place = np.full(int(chosen.sum()), len(self._shards), np.uint64)
        self._parts.append(np.stack([key[chosen], place, first[chosen].astype(np.uint64)], axis=1))
        self._shards.append((shard.folder, shard.prefix))

    def told(self) -> dict[str, Any]:
        """shared: samples that take an image stored for another one of their shard; and as `Captions.told` of stored images."""
        rows = np.concatenate([np.empty((0, 3), np.uint64), *self._parts])
        _, which, times = np.unique(rows[:, 0], return_inverse=True, return_counts=True)
        alike = rows[times[which] > 1] if len(rows) else rows
        hashes: list[int] = []
        for place in np.unique(alike[:, 1]).tolist():
            shard = Shard.open(*self._shards[place])
            images = shard.streams["images"]
            hashes += [xxhash.xxh3_64_intdigest(images[i].data) for i in alike[alike[:, 1] == place, 2].tolist()]
            shard.close()
        _, equal = np.unique(np.array(hashes, np.uint64), return_counts=True)
        alone = np.ones(len(rows) - len(alike), np.int64)
        return {"shared": self._shared, "read": len(alike), **_told(np.concatenate([equal, alone]), self._shift)}


def _told(times: np.ndarray, shift: int) -> dict[str, Any]:
    looked = int(times.sum())
    repeated = looked - len(times)
    return {
        "looked_at": looked,
        "one_in": 1 << shift,
        "repeated": repeated,
        "share": repeated / looked if looked else 0.0,
        "most": int(times.max(initial=0)),
    }


def _shift(number: int, limit: int) -> int:
    """The smallest s for which number / 2^s is at most the limit."""
    return max(0, (max(number, 1) - 1).bit_length() - (limit.bit_length() - 1))


def _chosen(hashes: np.ndarray, shift: int) -> np.ndarray:
    return (hashes & np.uint64((1 << shift) - 1)) == 0


def _mixed(*parts: np.ndarray) -> np.ndarray:
    """A hash of each row of numbers, uint64 [n]; the finaliser of SplitMix64 after each number."""
    found = np.zeros(len(parts[0]), np.uint64)
    for part in parts:
        found = found ^ part
        found = (found ^ (found >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        found = (found ^ (found >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        found = found ^ (found >> np.uint64(31))
    return found

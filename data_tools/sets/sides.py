"""Which side of a split each image, or each document of text, falls on.

    1. hash     every stored image once: its content, and how it looks (nearness.py)
    2. group    equal contents are one group; so are images that look alike, and all that a chain of those connects
    3. order    groups by a hash of their smallest content hash: any order that knows nothing of the data would do
    4. cut      along that order at the sizes asked for; a group is never cut

Letters: n units (stored images, or documents), g groups.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from megaprior.data.shards import Shard
from megaprior.data_tools.sets.derived import document_bytes, units_of
from megaprior.data_tools.sets.nearness import near_labels, picture_hashes
from megaprior.errors import UsageError

UNIT = np.dtype([("content", "<u8"), ("coarse", "<u8"), ("fine", "<u8"), ("samples", "<i8"), ("looks", "u1")])
LEFT = 255  # the side of what no subset takes
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SCALES = {"k": 10**3, "M": 10**6, "G": 10**9}


@dataclass(frozen=True)
class Subset:
    """A part to cut off: its name and its size, in samples or as a fraction of all; None is what the others leave."""

    name: str
    size: int | float | None


def parse_subsets(texts: Sequence[str]) -> tuple[Subset, ...]:
    """`["reference=5M", "training=0.25", "held_out=rest"]` -> subsets, in that order.

    Raises:
        UsageError: not NAME=SIZE, a name twice, a size that cannot be, or fractions of more than the whole.
    """
    found = [_subset(text) for text in texts]
    names = [subset.name for subset in found]
    if len(set(names)) < len(names):
        raise UsageError(f"--into {' '.join(texts)}: a name is given twice")
    if not 1 <= len(found) < LEFT:
        raise UsageError(f"--into: {len(found)} subsets, expected 1 to {LEFT - 1}")
    if sum(subset.size is None for subset in found) > 1:
        raise UsageError(f"--into {' '.join(texts)}: only one subset can be the rest")
    whole = sum(subset.size for subset in found if isinstance(subset.size, float))
    if whole > 1 + 1e-9:
        raise UsageError(f"--into {' '.join(texts)}: the fractions make {whole:g} of the whole, at most 1")
    return tuple(found)


def _subset(text: str) -> Subset:
    name, equals, size = text.partition("=")
    words = f"--into {text}: expected NAME=SIZE, such as training=3000000, training=3M, training=0.25 or training=rest"
    if not equals or not _NAME.fullmatch(name):
        raise UsageError(words)
    if size == "rest":
        return Subset(name, None)
    scale = _SCALES.get(size[-1:], 1)
    is_fraction = "." in size and scale == 1
    try:
        number = float(size) if is_fraction else float(size[:-1]) * scale if scale > 1 else int(size)
    except ValueError:
        raise UsageError(words) from None
    if is_fraction:
        if not 0 < number <= 1:
            raise UsageError(f"--into {text}: a size with a point is a fraction, above 0 and at most 1")
        return Subset(name, number)
    if number < 1 or number != int(number):
        raise UsageError(f"--into {text}: a size without a point is a number of samples, at least 1")
    return Subset(name, int(number))


def targets(subsets: Sequence[Subset], samples: int) -> list[int]:
    """Samples that each subset is to get.

    Raises:
        UsageError: more than there are.
    """
    sizes = [round(s.size * samples) if isinstance(s.size, float) else s.size for s in subsets]
    taken = sum(size for size in sizes if size is not None)
    # Fractions of the whole may exceed it by a rounding, numbers may not.
    if taken > samples + len(subsets) * any(isinstance(s.size, float) for s in subsets):
        raise UsageError(f"--into: {taken:,} samples asked for, there are {samples:,}; ask for less")
    return [max(0, samples - taken) if size is None else size for size in sizes]


def hash_units(shard: Shard, *, looks: bool) -> np.ndarray:
    """UNIT [n of the shard]; how images look where that is asked for."""
    units = units_of(shard)
    found = np.zeros(int(units.max(initial=-1)) + 1, UNIT)
    found["samples"] = np.bincount(units, minlength=len(found))
    if "images" not in shard.streams:
        found["content"] = [xxhash.xxh3_64_intdigest(part) for part in document_bytes(shard)]
        return found
    first = np.unique(units, return_index=True)[1]
    for unit, sample in enumerate(first.tolist()):
        image = shard.streams["images"][sample]
        row = found[unit]
        row["content"] = xxhash.xxh3_64_intdigest(image.data)
        if looks and (hashes := picture_hashes(image.tobytes())) is not None:
            row["coarse"], row["fine"], row["looks"] = *hashes, 1
    return found


@dataclass(frozen=True, kw_only=True)
class Cut:
    """The outcome: the side of each unit (uint8 [n]), and what the user is told of the groups."""

    side: np.ndarray
    sizes: list[int]
    groups: int
    equal: int  # units whose content another unit has
    near: int  # groups beyond that: how many fewer there are because images look alike
    largest: int  # samples of the largest group
    featureless: int  # images that had no look: equal ones alone are held together


def cut(units: np.ndarray, wanted: Sequence[int], *, near_bits: int, seed: int) -> Cut:
    """Sides for UNIT [n]: a function of the contents, the sizes, the bits and the seed; not of the order of the units.

    Each boundary goes where it comes nearest to the size asked for, so it is off by at most half a group.
    """
    contents, which = np.unique(units["content"], return_inverse=True)
    labels = np.arange(len(contents), dtype=np.int64)
    featureless = 0
    if near_bits:
        first = np.unique(which, return_index=True)[1]
        seen = units[first]["looks"] == 1
        featureless = int((~seen).sum())
        at = np.flatnonzero(seen)
        labels[at] = at[near_labels(units["coarse"][first[at]], units["fine"][first[at]], near_bits)]
    distinct, group = np.unique(labels, return_inverse=True)
    samples = np.zeros(len(distinct), np.int64)
    np.add.at(samples, group[which], units["samples"])
    # Contents are sorted, so the content of a group's label is its smallest.
    order = np.argsort(_mixed(contents[distinct], seed))
    middles = np.cumsum(samples[order]) - samples[order] / 2
    sides = np.searchsorted(np.cumsum(wanted), middles, side="right")
    of_group = np.empty(len(distinct), np.uint8)
    of_group[order] = np.where(sides < len(wanted), sides, LEFT)
    side = of_group[group[which]]
    return Cut(
        side=side,
        sizes=[int(units["samples"][side == k].sum()) for k in range(len(wanted))],
        groups=len(distinct),
        equal=len(units) - len(contents),
        near=len(contents) - len(distinct),
        largest=int(samples.max(initial=0)),
        featureless=featureless,
    )


def _mixed(hashes: np.ndarray, seed: int) -> np.ndarray:
    """Other numbers for each seed, distinct for distinct hashes: SplitMix64's finaliser."""
    found = hashes ^ np.uint64(xxhash.xxh3_64_intdigest(str(seed).encode()))
    found = (found ^ (found >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    found = (found ^ (found >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return found ^ (found >> np.uint64(31))

"""Pictures that look alike: two 64-bit hashes of each, and groups of those that differ in few bits.

    coarse   pHash: the signs, about their median, of the 8 x 8 lowest frequencies of the picture as 32 x 32 grey
    fine     dHash: of the picture as 9 x 8 grey, whether each value is above its left neighbour

Two pictures are near when their pHash differs in at most D bits and their dHash in at most D + 6. One hash alone is enough for
thousands of pictures; among 100 million there are 5e15 pairs, and a single false link of two large groups is one too many.
Letters: n pictures, D bits, m bands of the 64 bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations, pairwise

import numpy as np

from megaprior.data.images import ImageError, decode_rgb

FINE_MARGIN = 6
MOST_BITS = 16
_GREY = 32
_FLAT = 2.0  # grey levels: a picture with less contrast has hashes of noise, and is near to its equals alone
_SORT, _COMPARE = 100.0, 10.0  # ns a picture, for the choice of bands
_BASIS = np.cos(np.pi * (2 * np.arange(_GREY) + 1)[None, :] * np.arange(8)[:, None] / (2 * _GREY))


def picture_hashes(image: bytes) -> tuple[int, int] | None:
    """(coarse, fine) of an encoded picture; None where it has no contrast or cannot be decoded."""
    from PIL import Image

    try:
        grey = decode_rgb(image, thumbnail=(_GREY // 2, _GREY // 2)).convert("L")
    except ImageError:
        return None
    box = Image.Resampling.BOX
    small = np.asarray(grey.resize((_GREY, _GREY), box), np.float64)
    if small.std() < _FLAT:
        return None
    waves = (_BASIS @ small @ _BASIS.T).ravel()
    steps = np.diff(np.asarray(grey.resize((9, 8), box), np.int16), axis=1)
    return _packed(waves > np.median(waves[1:])), _packed(steps.ravel() > 0)


def _packed(bits: np.ndarray) -> int:
    return int(np.packbits(bits).view(">u8")[0])


def near_labels(coarse: np.ndarray, fine: np.ndarray, bits: int) -> np.ndarray:
    """int64 [n]: pictures that a chain of near ones connects get the same number, the smallest index among them.

    Exact: no near pair is missed. Of m bands of the coarse hash, D changed bits leave at least m - D untouched, so for some
    choice of m - D bands the two are equal there; pictures are sorted by each choice in turn and compared with those
    that are equal in it. m is chosen for n. Memory: about 90 bytes a picture beside the hashes.
    """
    order = np.lexsort((fine, coarse))
    coarse, fine = coarse[order], fine[order]
    labels = np.arange(len(order), dtype=np.int64)
    for keys in _choices(coarse, bits):
        for one, other in _equal_pairs(keys):
            near = _ones(coarse[one] ^ coarse[other]) <= bits
            one, other = one[near], other[near]
            near = _ones(fine[one] ^ fine[other]) <= bits + FINE_MARGIN
            _join(labels, one[near], other[near])
    smallest = np.full(len(order), len(order), np.int64)
    np.minimum.at(smallest, labels, order)
    found = np.empty(len(order), np.int64)
    found[order] = smallest[labels]
    return found


def _ones(bits: np.ndarray) -> np.ndarray:
    """Set bits of each uint64 (NumPy counts them itself from 2.0 on; older ones are supported)."""
    if hasattr(np, "bitwise_count"):
        return np.bitwise_count(bits)
    pairs, fours, eights = (np.uint64(mask) for mask in (0x5555555555555555, 0x3333333333333333, 0x0F0F0F0F0F0F0F0F))
    one, two, four = np.uint64(1), np.uint64(2), np.uint64(4)
    bits = bits - ((bits >> one) & pairs)
    bits = (bits & fours) + ((bits >> two) & fours)
    bits = (bits + (bits >> four)) & eights
    return (bits * np.uint64(0x0101010101010101)) >> np.uint64(56)


def _bands(n: int, bits: int) -> int:
    """The m with the least work: few bands have fewer choices, many tell pictures apart better."""

    def cost(m: int) -> float:
        alike = n / 2.0 ** ((m - bits) * 64 / m)
        return math.comb(m, bits) * (_SORT + _COMPARE * alike)

    return min(range(bits + 1, 2 * bits + 8), key=cost)


def _choices(coarse: np.ndarray, bits: int) -> Iterator[np.ndarray]:
    m = _bands(len(coarse), bits)
    edges = [64 * band // m for band in range(m + 1)]
    masks = [np.uint64((1 << end) - (1 << start)) for start, end in pairwise(edges)]
    for chosen in combinations(masks, m - bits):
        yield coarse & np.bitwise_or.reduce(np.array(chosen, np.uint64))


def _equal_pairs(keys: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All pairs of places with equal keys, those that are k apart in the sorted order together."""
    order = np.argsort(keys)
    ordered = keys[order]
    left, apart = np.arange(len(keys) - 1), 1
    while len(left := left[left + apart < len(keys)]):
        left = left[ordered[left] == ordered[left + apart]]
        yield order[left], order[left + apart]
        apart += 1


def _join(labels: np.ndarray, one: np.ndarray, other: np.ndarray) -> None:
    """Give connected places the smallest label among theirs, in place."""
    while True:
        low, high = np.minimum(labels[one], labels[other]), np.maximum(labels[one], labels[other])
        apart = low != high
        if not apart.any():
            return
        one, other = one[apart], other[apart]
        np.minimum.at(labels, high[apart], low[apart])
        while (labels != (shorter := labels[labels])).any():
            labels[:] = shorter

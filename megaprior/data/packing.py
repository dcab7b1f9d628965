"""How the samples of a global batch become rows: a balanced split over ranks, then best fit into rows.

Both are deterministic functions of the lengths alone, so every rank computes every rank's plan and all of them agree,
without communication, on how many micro-steps a step has.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence

from megaprior.errors import UsageError


def pack_best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: the longest segment first, each into the fullest row that still takes it.

    Args:
        lengths: tokens of each segment.
        capacity: tokens that a row holds.

    Returns:
        Rows, each a list of positions in `lengths`; ties go to the earlier segment and the earlier row.

    Raises:
        UsageError: a segment is longer than a row.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = int(lengths[item])
        if length > capacity:
            raise UsageError(
                f"segment {item} has {length:,} tokens, a row holds {capacity:,}; raise max_tokens to {length:,}"
            )
        place = bisect_left(room, (length, -1))
        if place == len(room):
            left, row = capacity, len(rows)
            rows.append([])
        else:
            left, row = room.pop(place)
        rows[row].append(item)
        insort(room, (left - length, row))
    return rows


def split_balanced(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Longest processing time first: the longest segment goes to the part that has the fewest tokens so far.

    The fullest part holds at most 4/3 of the best possible one's tokens (Graham 1969). Parts may be empty.

    Returns:
        `parts` lists of positions in `lengths`; ties go to the earlier segment and the lower part.
    """
    split: list[list[int]] = [[] for _ in range(parts)]
    load = [(0, part) for part in range(parts)]
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        tokens, part = load[0]
        split[part].append(item)
        heapq.heapreplace(load, (tokens + int(lengths[item]), part))
    return split

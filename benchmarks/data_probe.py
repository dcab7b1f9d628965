"""What benchmarks.data measures in fresh processes of its own: `ShardSet.open`, and order and packing of a large index.

    python -m benchmarks.data_probe '{"do": "open", "folder": DIR}'

Memory is the peak of the resident pages (VmHWM) less the peak after the imports.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np


def peak_bytes() -> int:
    """Most pages that this process ever had in memory (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def opened(folder: str) -> dict[str, float]:
    """Open a shard folder."""
    from megaprior.data.shards import ShardSet

    before, cpu, wall = peak_bytes(), time.process_time(), time.perf_counter()
    shards = ShardSet.open(folder)
    found = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}
    found |= {"extra_bytes": peak_bytes() - before, "base_bytes": before}
    assert len(shards)
    sizes = shards.image_sizes  # read when packing first asks
    assert sizes is not None
    assert len(sizes) == len(shards)
    found |= {"with_sizes_wall_s": time.perf_counter() - wall, "with_sizes_extra_bytes": peak_bytes() - before}
    return found


def ordered(samples: int, steps: int, batch: int, row: int, seed: int) -> dict[str, float]:
    """The plans of `steps` steps, from anywhere in the order; lengths are made up from the ids, so that none are stored."""
    from megaprior.data.loader import plan_rows
    from megaprior.data.order import Schedule

    schedule = Schedule([samples], [1], seed)
    places = np.random.default_rng(seed).integers(0, 4 * samples // batch + 1, steps + 1).tolist()

    def plan(step: int) -> tuple[float, float]:
        start = time.perf_counter()
        _, ids = schedule.ids(step * batch, (step + 1) * batch)
        between = time.perf_counter()
        lengths = (200 + ids * 2_654_435_761 % 500).tolist()
        begin = time.perf_counter()
        plan_rows(lengths, rank=0, world=8, max_tokens=row)
        return between - start, time.perf_counter() - begin

    plan(places.pop())  # what the first call loads and makes once
    before, cpu = peak_bytes(), time.process_time()
    spent = np.array([plan(step) for step in places])
    order, pack = 1e6 * spent.sum(axis=0) / (steps * batch)
    found = {"order_us": float(order), "pack_us": float(pack), "cpu_s": time.process_time() - cpu}
    return found | {"extra_bytes": peak_bytes() - before, "base_bytes": before}


if __name__ == "__main__":
    request: dict[str, Any] = json.loads(sys.argv[1])
    print(json.dumps({"open": opened, "order": ordered}[request.pop("do")](**request)))

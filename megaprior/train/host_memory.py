"""How much memory the host has left, and whether the ranks' snapshots fit into it."""

from __future__ import annotations

import socket
from pathlib import Path

from megaprior.distributed import Peers, digest
from megaprior.telemetry import say

_ROOM = 1.1
_GROUP = Path("/sys/fs/cgroup")


def fits_in_memory(needed: float, peers: Peers) -> bool:
    """Whether every host can hold what its ranks need, in bytes; the same answer on all ranks. Collective."""
    rows = peers.gather([needed, available_memory(), digest(socket.gethostname())])
    for host in {row[2] for row in rows}:
        here = [row for row in rows if row[2] == host]
        wanted, free = sum(row[0] for row in here), min(row[1] for row in here)
        if wanted * _ROOM > free:
            say(
                f"warning: a copy of {wanted:,.0f} bytes does not fit into the {free:,.0f} bytes of memory that a host has left: "
                "this checkpoint is written before training goes on (save_background=false does so without this line)"
            )
            return False
    return True


def available_memory() -> float:
    """Bytes that can be had without swapping, a container's limit considered; infinite where nothing says."""
    free = _fields(Path("/proc/meminfo")).get("MemAvailable:", float("inf")) * 1024
    try:
        limit = float((_GROUP / "memory.max").read_text())  # "max": none
        used = float((_GROUP / "memory.current").read_text())
    except (OSError, ValueError):
        return free
    cache = _fields(_GROUP / "memory.stat")
    return min(free, limit - used + cache.get("file", 0.0) - cache.get("shmem", 0.0))


def _fields(path: Path) -> dict[str, float]:
    try:
        words = [line.split() for line in path.read_text().splitlines()]
        return {line[0]: float(line[1]) for line in words if len(line) > 1}
    except (OSError, ValueError):
        return {}

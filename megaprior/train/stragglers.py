"""Which rank holds up the others. Collectives make every rank's step equally long, so what is compared is a rank's own:

    data     seconds that it waited for its batch
    host     processor time of its main thread from the first row to the last one's launch; blocked in a collective it sleeps
    device   a small fixed product on its device, in seconds: the same arithmetic everywhere, so that a slow chip shows; on a CPU
             the fastest of several in processor time, which other processes on the machine disturb least

They travel in the gather that a step has anyway. On a GPU the product is timed by events, which are read after the step's
one wait for the device: nothing waits more than it did.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from megaprior.train.guards import GuardConfig

PARTS = ("data", "host", "device")
_SIDE = {"cuda": 2048, "cpu": 192}  # of the square matrices
_REPEATS = {"cuda": 8, "cpu": 4}
_LEAST_SHARE = 0.1  # of the step: what costs less is not worth a warning


class OwnTime:
    """Measures this rank's parts of a step: `begin`, `launched`, then `values`. With one rank it measures nothing."""

    def __init__(self, device: torch.device, *, world: int) -> None:
        self._on, self._kind = world > 1, device.type
        self._data = self._host = self._device = 0.0
        if self._on:
            dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
            side = _SIDE[device.type]
            self._factor = torch.full((side, side), 1.0 / side, dtype=dtype, device=device)
            self._product = torch.empty_like(self._factor)
        self._events: tuple[Any, Any] | None = None

    def begin(self, waited: float) -> None:
        """The batch is there after `waited` seconds; the rows come next."""
        if self._on:
            self._data = waited
            self._probe()
            self._host = time.thread_time()

    def launched(self) -> None:
        """The last row is on its way."""
        if self._on:
            self._host = time.thread_time() - self._host

    def values(self) -> list[float]:
        """Seconds, in the order of `PARTS`; call it after the step's wait for the device."""
        if self._events is not None:
            self._device = self._events[0].elapsed_time(self._events[1]) / 1e3
        return [self._data, self._host, self._device]

    def _probe(self) -> None:
        if self._kind == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            self._multiply(_REPEATS["cuda"])
            end.record()
            self._events = start, end
        else:
            self._device = min(self._timed_product() for _ in range(_REPEATS["cpu"]))

    def _timed_product(self) -> float:
        start = time.thread_time()
        self._multiply(1)
        return time.thread_time() - start

    def _multiply(self, times: int) -> None:
        for _ in range(times):
            torch.mm(self._factor, self._factor, out=self._product)


@dataclass(frozen=True)
class Slowest:
    """The rank that costs a step most, and in which part; seconds."""

    rank: int
    part: str
    own: float
    others: float  # median of the other ranks
    cost: float  # what it adds to a step, estimated

    def metrics(self) -> dict[str, Any]:
        """For a step's line in metrics.jsonl."""
        times = {"slowest_s": self.own, "others_s": self.others, "slowest_costs_s": self.cost}
        return {"slowest_rank": self.rank, "slowest_part": self.part, **times}


class Stragglers:
    """Compares ranks over the last steps."""

    def __init__(self, cfg: GuardConfig) -> None:
        self._cfg = cfg
        self._tables: deque[tuple[tuple[float, ...], ...]] = deque(maxlen=cfg.straggler_steps)
        self._named: set[tuple[int, str]] = set()  # a rank at the edge would else be named again and again

    def judge(self, step: int, own: tuple[tuple[float, ...], ...], seconds: float) -> tuple[Slowest | None, str | None]:
        """The slowest rank of the last steps, and a warning where it is too slow for the first time.

        Args:
            own: [rank][part] of this step, seconds.
            seconds: what the step took.
        """
        if len(own) < 2:
            return None, None
        self._tables.append(own)
        usual = [
            [statistics.median(t[rank][part] for t in self._tables) for part in range(3)] for rank in range(len(own))
        ]
        found = [_slowest(part, [row[part] for row in usual], seconds) for part in range(3)]
        slow = [s for s in found if s.own > self._cfg.straggler_factor * s.others and s.cost > _LEAST_SHARE * seconds]
        worst = max(slow or found, key=lambda s: s.cost)
        named = (worst.rank, worst.part)
        if not slow or named in self._named or len(self._tables) < self._cfg.straggler_steps:
            return worst, None
        self._named.add(named)
        return worst, (
            f"warning: step {step}: rank {worst.rank} is slow in its {worst.part} time, {1e3 * worst.own:.1f} ms against "
            f"{1e3 * worst.others:.1f} ms of the others (medians of {self._cfg.straggler_steps} steps): all ranks wait for it"
        )


def _slowest(part: int, times: list[float], seconds: float) -> Slowest:
    rank = max(range(len(times)), key=times.__getitem__)
    others = statistics.median(times[:rank] + times[rank + 1 :])
    cost = times[rank] - others
    if PARTS[part] == "device":  # the product stands for all the arithmetic of a step
        cost = cost / max(others, 1e-9) * seconds
    return Slowest(rank, PARTS[part], times[rank], others, cost)

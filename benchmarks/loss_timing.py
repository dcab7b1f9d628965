"""Clocks of benchmarks.loss: a call's time and peak memory, and the machine's two ceilings.

On a GPU a call is timed by CUDA events around it. Before each call the second-level cache is filled with something else
and, given logits, the inputs are restored; the host runs ahead meanwhile, so that launches are not what is timed unless
the arm itself makes the host wait. The device is waited for after every call, outside the events.
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

FLUSHED_BYTES = 1 << 30  # far more than any second-level cache; half a millisecond for the host to run ahead
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
CEILING_ROUNDS = 50


class Clock:
    """Times one call at a time, in milliseconds."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flush = torch.ones(FLUSHED_BYTES, dtype=torch.uint8, device=device) if device.type == "cuda" else None

    def time(self, call: Callable[[], object], before: Callable[[], object] | None = None) -> float:
        """Milliseconds of `call`; `before` runs first and is not timed."""
        if before is not None:
            before()
        if self._flush is None:
            start = time.perf_counter()
            result = call()
            milliseconds = 1e3 * (time.perf_counter() - start)
            del result
            return milliseconds
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._flush.add_(1)
        begin.record()
        result = call()
        end.record()
        end.synchronize()
        del result
        return begin.elapsed_time(end)

    def peak_extra_bytes(self, call: Callable[[], object]) -> int | None:
        """Most memory in use during a call that has run before, less what was in use when it began. On a GPU that is
        what tensors take, on a CPU the process's resident pages (Linux; None elsewhere)."""
        gc.collect()
        if self._flush is not None:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            result = call()
            torch.cuda.synchronize()
            del result
            return torch.cuda.max_memory_allocated() - before
        try:
            ctypes.CDLL(None).malloc_trim(0)  # else what an earlier call has freed counts as there before
            CLEAR.write_text("5", encoding="ascii")  # sets the high-water mark to what is resident now
            before = _status_bytes("VmRSS")
            result = call()
            del result
            return max(0, _status_bytes("VmHWM") - before)
        except (AttributeError, OSError, StopIteration):
            return None

    def settle(self) -> None:
        """Wait for the device."""
        if self._flush is not None:
            torch.cuda.synchronize()

    def free_bytes(self) -> int:
        """Memory that a new tensor can have."""
        if self._flush is not None:
            free, _ = torch.cuda.mem_get_info()
            return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def ceilings(clock: Clock, *, quick: bool = False) -> dict[str, dict]:
    """What the machine can do, measured here: a large copy and a large product of random numbers.

    Returns:
        "copy": {"bytes" read + written, "ms": samples}; "gemm": {"operations", "ms": samples, "what"}.
    """
    device = clock.device
    cuda = device.type == "cuda"
    size, dtype = (8192, torch.bfloat16) if cuda else (256 if quick else 2048, torch.float32)
    source = torch.randn(
        (1 << 30) if cuda else (1 << 20 if quick else 1 << 26), device=device
    )  # float32: 4 GiB on a GPU
    target = torch.empty_like(source)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    rounds = CEILING_ROUNDS if cuda else 3 if quick else 7

    def copy() -> Tensor:
        return target.copy_(source)

    def product() -> Tensor:
        return torch.mm(left, right, out=out)

    for _ in range(3):
        copy()
        product()
    return {
        "copy": {"bytes": 2 * source.nbytes, "ms": [clock.time(copy) for _ in range(rounds)]},
        "gemm": {
            "operations": 2 * size**3,
            "ms": [clock.time(product) for _ in range(rounds)],
            "what": f"{size}^3, {str(dtype)[6:]}",
        },
    }


def take_turns(
    clock: Clock,
    steps: Mapping[str, Callable[[], object]],
    *,
    before: Callable[[], object],
    seconds: float,
    rounds: tuple[int, int],
    warm: int,
) -> tuple[dict[str, list[float]], dict[str, Exception]]:
    """Milliseconds of every step, one per round; each round starts with another arm, so that none is always first.

    Args:
        before: runs before each call, untimed.
        seconds: that all rounds should take, kept within `rounds` = (fewest, most).
        warm: untimed rounds before those, at least 1.

    Returns:
        (name -> samples, name -> what stopped it): a step that fails has no samples, and the others go on.
    """
    faults: dict[str, Exception] = {}
    begun = time.perf_counter()
    for _ in range(warm):
        _round(clock, steps, list(steps), before, faults)
    once = (time.perf_counter() - begun) / warm
    fewest, most = rounds
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(min(most, max(fewest, int(seconds / max(once, 1e-6))))):
        names = [name for name in _rotated(list(steps), number) if name not in faults]
        for name, milliseconds in _round(clock, steps, names, before, faults).items():
            samples[name].append(milliseconds)
    return {name: values for name, values in samples.items() if name not in faults}, faults


def _round(
    clock: Clock,
    steps: Mapping[str, Callable[[], object]],
    names: Sequence[str],
    before: Callable[[], object],
    faults: dict[str, Exception],
) -> dict[str, float]:
    times = {}
    for name in names:
        if name in faults:
            continue
        try:
            times[name] = clock.time(steps[name], before)
        except Exception as error:
            faults[name] = error
    return times


def _rotated(names: list[str], number: int) -> list[str]:
    start = number % max(1, len(names))
    return names[start:] + names[:start]


def processor() -> str:
    """The CPU's name, as Linux gives it."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def _status_bytes(field: str) -> int:
    lines = STATUS.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))

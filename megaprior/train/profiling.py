"""A profile of some steps, on demand: `megaprior train FILE --profile steps=10:13`.

    RUN/profile/steps_10-13.rank0.trace.json.gz   every operator on a time line, for chrome://tracing or ui.perfetto.dev
    RUN/profile/steps_10-13.rank0.txt             the operators that took most time, and most memory
    RUN/profile/steps_10-13.rank0.memory.pickle   on a GPU: every allocation of these steps, for pytorch.org/memory_viz

Nothing of the run depends on it; the steps under it are slower.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from megaprior.config import configclass
from megaprior.errors import UsageError
from megaprior.telemetry import say

_ROWS = 40  # of the tables
_MEMORY_EVENTS = 1_000_000  # allocations and frees that a snapshot keeps


@configclass
class ProfileConfig:
    """Steps `first` to `last`, both included; 0 profiles none."""

    first: Annotated[int, Field(ge=0)] = 0
    last: Annotated[int, Field(ge=0)] = 0
    ranks: Literal["first", "all"] = "first"


def profile_overrides(words: list[str]) -> list[str]:
    """`--profile steps=10:13 --profile ranks=all` as overrides of the configuration.

    Raises:
        UsageError: says how it is written.
    """
    overrides = []
    for word in words:
        name, _, value = word.partition("=")
        first, _, last = value.partition(":")
        if name == "steps" and first.isdecimal() and last.isdecimal() and 0 < int(first) <= int(last):
            overrides += [f"profile.first={first}", f"profile.last={last}"]
        elif word in ("ranks=first", "ranks=all"):
            overrides.append(f"profile.{word}")
        else:
            raise UsageError(
                f"--profile {word}: write --profile steps=10:13 (both included), and --profile ranks=all for all ranks"
            )
    return overrides


class Profiler:
    """`before` every step, `close` at the end; between, it starts and stops by itself."""

    def __init__(self, cfg: ProfileConfig, out: Path, *, rank: int) -> None:
        self._cfg, self._rank = cfg, rank
        self._on = cfg.first > 0 and (rank == 0 or cfg.ranks == "all")
        self._folder = out / "profile"
        self._running: Any = None
        self._steps = (0, 0)

    def before(self, step: int) -> None:
        """Step number `step` begins; the one before it has ended."""
        if self._running is not None:
            if step > self._cfg.last:
                self.close()
            else:
                self._steps = self._steps[0], step
        elif self._on and self._cfg.first <= step <= self._cfg.last:
            self._start(step)

    def close(self) -> None:
        """Write what was profiled, if anything is being. A profile that cannot be written costs the run nothing."""
        if self._running is None:
            return
        running, self._running, self._on = self._running, None, False
        running.stop()
        stem = self._folder / f"steps_{self._steps[0]}-{self._steps[1]}.rank{self._rank}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if torch.cuda.is_available():
                torch.cuda.memory._dump_snapshot(f"{stem}.memory.pickle")
            running.export_chrome_trace(f"{stem}.trace.json.gz")
            averages = running.key_averages()
            place = "cuda" if torch.cuda.is_available() else "cpu"
            tables = [
                averages.table(sort_by=f"self_{place}_{what}", row_limit=_ROWS)
                for what in ("time_total", "memory_usage")
            ]
            Path(f"{stem}.txt").write_text("\n\n".join(tables), encoding="utf-8")
            say(
                f"profile of steps {self._steps[0]} to {self._steps[1]}: {stem}.txt, beside it a trace for ui.perfetto.dev"
            )
        except OSError as error:
            say(f"the profile cannot be written ({error}); the run goes on")
        finally:
            if torch.cuda.is_available():
                torch.cuda.memory._record_memory_history(enabled=None)

    def _start(self, step: int) -> None:
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
            with suppress(RuntimeError):  # not on every platform
                torch.cuda.memory._record_memory_history(max_entries=_MEMORY_EVENTS)
        self._running = profile(activities=activities, record_shapes=True, profile_memory=True)
        self._running.start()
        self._steps = step, step

"""What looks at the loop's steps without taking part in them, in one place: guards, speed, slow ranks, a profile.

Only the guard has a say in what becomes of a step; the others measure.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megaprior.telemetry import say
from megaprior.train.guards import Guard, Verdict
from megaprior.train.profiling import Profiler
from megaprior.train.stragglers import OwnTime, Stragglers
from megaprior.train.throughput import Meter

if TYPE_CHECKING:
    from megaprior.data.loader import StepBatch
    from megaprior.telemetry import MetricsLog
    from megaprior.train.engine import Engine
    from megaprior.train.settings import RunConfig
    from megaprior.train.step import Totals


@dataclass
class Stopwatch:
    """One step's seconds."""

    began: float
    waited: float = 0.0

    @staticmethod
    def start() -> Stopwatch:
        """The step begins, and with it the wait for its batch."""
        return Stopwatch(time.perf_counter())

    def batch_is_there(self) -> float:
        """The seconds that the batch was waited for."""
        self.waited = time.perf_counter() - self.began
        return self.waited

    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self.began


@dataclass(frozen=True)
class Instruments:
    """One process's; `log` is rank 0's."""

    guard: Guard
    own: OwnTime
    meter: Meter
    stragglers: Stragglers
    profiler: Profiler
    log: MetricsLog | None
    log_every: int
    last: int  # step of the run

    @staticmethod
    def of(cfg: RunConfig, engine: Engine, *, guard: Guard, log: MetricsLog | None) -> Instruments:
        """As the configuration wants them."""
        model: Any = engine.module.model
        place = engine.place
        return Instruments(
            guard=guard,
            own=OwnTime(model.device, world=place.world),
            meter=Meter(model, world=place.world, peak_tflops=cfg.peak_tflops),
            stragglers=Stragglers(cfg.guards),
            profiler=Profiler(cfg.profile, cfg.out, rank=place.rank),
            log=log,
            log_every=cfg.log_every,
            last=cfg.steps,
        )

    def report(
        self, step: int, batch: StepBatch, totals: Totals, *, verdict: Verdict, lr: float, stopwatch: Stopwatch
    ) -> None:
        """Log the step and what was unusual about it; a dropped step has its event in the place of its line."""
        seconds = stopwatch.seconds()
        slowest, slow = self.stragglers.judge(step, totals.own, seconds)
        for warning in (*verdict.warnings, *([slow] if slow else [])):
            say(warning)
        if self.log is None:
            return
        for event in verdict.events:
            self.log.write(event)
        if slow is not None and slowest is not None:
            self.log.write({"kind": "straggler", "step": step, **slowest.metrics()})
        if not verdict.skip and (step % self.log_every == 0 or step == self.last):
            speed = self.meter.metrics(batch, totals, seconds=seconds, waited=stopwatch.waited)
            values = {
                **totals.metrics(batch),
                "lr": lr,
                "micro_steps": len(batch.micro),
                **self.guard.metrics(),
                **speed,
            }
            self.log.write({"kind": "train", "step": step, **values, **(slowest.metrics() if slowest else {})})

"""What a run watches in its own numbers: losses and gradients that are not finite, loss spikes, gradient norms.

All ranks judge the same totals by the same history, so they decide alike without a word. The history is a function of the
steps and stands in every checkpoint, so a resumed run decides as the straight one would have.

    not finite   the step is dropped while `skip_budget` lasts, then the run stops; either way before the update
    spike        loss > median + spike_factor * spread of the last `window` losses; spread = max(1.4826 MAD, 1% of the median)
    norm         above norm_factor * median, or below median / vanish_factor, for `norm_steps` steps in a row

A dropped step counts as a step: its samples are not shown again, and the learning rate goes on.
"""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from megaprior.config import configclass
from megaprior.errors import MegapriorError

if TYPE_CHECKING:
    from megaprior.data.loader import StepBatch
    from megaprior.train.step import Totals

_LEAST = 16  # steps of history before anything is unusual
_MAD_TO_SIGMA = 1.4826  # of a normal distribution
_LEAST_SPREAD = 0.01  # of the median: a loss that hardly moves is no reason to see spikes

_Count = Annotated[int, Field(ge=0)]
_Steps = Annotated[int, Field(ge=1)]
_Factor = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Above1 = Annotated[float, Field(gt=1, allow_inf_nan=False)]


@configclass
class GuardConfig:
    """The defaults warn and leave the run as it is, and stop it at the first number that is not finite."""

    skip_budget: _Count = 0  # steps that the whole run may drop, restarts included
    spike_factor: _Factor = 8.0  # in spreads above the median; 0 looks for no spikes
    spike_action: Literal["log", "skip"] = "log"  # skip: within skip_budget; beyond it, spikes are logged
    norm_factor: _Above1 = 10.0
    vanish_factor: _Above1 = 1000.0
    norm_steps: _Steps = 3
    window: Annotated[int, Field(ge=_LEAST)] = 128
    straggler_factor: _Above1 = 1.5  # a rank is slow beyond so many times the median of the others
    straggler_steps: _Steps = 10  # over so many steps (their median)


@dataclass(frozen=True)
class Verdict:
    """What becomes of a step: whether it is dropped, lines for metrics.jsonl, and what a person should read."""

    skip: bool = False
    events: tuple[dict[str, Any], ...] = ()
    warnings: tuple[str, ...] = ()


class Guard:
    """Judges step after step; `state` is what the next process needs to go on."""

    def __init__(self, cfg: GuardConfig, state: dict[str, Any] | None = None) -> None:
        """`state` as an earlier process gave it; None begins a history."""
        before = state or {}
        self._cfg = cfg
        self.skipped: int = before.get("skipped", 0)
        self._losses: deque[float] = deque(before.get("losses", ()), maxlen=cfg.window)
        self._norms: deque[float] = deque(before.get("norms", ()), maxlen=cfg.window)
        self._streaks: dict[str, int] = dict(before.get("streaks", {"high": 0, "vanished": 0}))

    def state(self) -> dict[str, Any]:
        """Plain values that JSON gives back bit for bit."""
        history = {"losses": list(self._losses), "norms": list(self._norms)}
        return {"skipped": self.skipped, **history, "streaks": dict(self._streaks)}

    def metrics(self) -> dict[str, float]:
        """For a step's line in metrics.jsonl."""
        median = {"grad_norm_median": statistics.median(self._norms)} if self._norms else {}
        return {**median, "skipped_steps": self.skipped}

    def judge(self, step: int, batch: StepBatch, totals: Totals) -> Verdict:
        """Decide about a step before its update, and remember its numbers.

        Raises:
            MegapriorError: a loss or gradient is not finite and no dropped step is left in the budget. All ranks raise it.
        """
        ids = batch.sample_ids.tolist()
        if totals.fault is not None:
            return self._not_finite(step, ids, totals)
        spike, norm = self._spike(step, ids, totals.loss), self._norm(step, totals.norm)
        self._losses.append(totals.loss)
        self._norms.append(totals.norm)
        return Verdict(spike.skip, spike.events + norm.events, spike.warnings + norm.warnings)

    def _not_finite(self, step: int, ids: list[int], totals: Totals) -> Verdict:
        fault = totals.fault
        assert fault is not None
        what = f"step {step}: the {fault.what} is {fault.value} on rank {', '.join(map(str, fault.ranks))}"
        if self.skipped >= self._cfg.skip_budget:
            spent = f"; all {self.skipped} steps of guards.skip_budget are dropped" if self.skipped else ""
            raise MegapriorError(
                f"{what}{spent}; nothing was updated (`megaprior replay RUN --step {step}` repeats the step). Its sample ids: "
                + " ".join(map(str, ids))
            )
        said = {"reason": f"the {fault.what} is {fault.value}", "ranks": list(fault.ranks)}
        return self._drop(step, what, {**said, "sample_ids": ids})

    def _drop(self, step: int, what: str, details: dict[str, Any]) -> Verdict:
        self.skipped += 1
        event = {"kind": "skip", "step": step, "skipped_steps": self.skipped, **details}
        left = f"{self.skipped} of {self._cfg.skip_budget} that guards.skip_budget allows"
        warning = f"warning: {what}; the step is dropped ({left}); metrics.jsonl has its sample ids"
        return Verdict(True, (event,), (warning,))

    def _spike(self, step: int, ids: list[int], loss: float) -> Verdict:
        if len(self._losses) < _LEAST or not self._cfg.spike_factor:
            return Verdict()
        expected = statistics.median(self._losses)
        deviation = statistics.median(abs(value - expected) for value in self._losses)
        spread = max(_MAD_TO_SIGMA * deviation, _LEAST_SPREAD * abs(expected))
        if loss <= expected + self._cfg.spike_factor * spread:
            return Verdict()
        what = f"step {step}: the loss {loss:.4f} is a spike, {expected:.4f} was expected"
        details = {"loss": loss, "expected": expected, "spread": spread, "sample_ids": ids}
        if self._cfg.spike_action == "skip" and self.skipped < self._cfg.skip_budget:
            return self._drop(step, what, {"reason": "spike", "ranks": [], **details})
        warning = f"warning: {what}; metrics.jsonl has its sample ids"
        return Verdict(events=({"kind": "spike", "step": step, **details},), warnings=(warning,))

    def _norm(self, step: int, norm: float) -> Verdict:
        if len(self._norms) < _LEAST:
            return Verdict()
        median, steps = statistics.median(self._norms), self._cfg.norm_steps
        found = {
            "high": (norm > self._cfg.norm_factor * median, f"is above {self._cfg.norm_factor:g} times its median"),
            "vanished": (
                norm == 0 or norm < median / self._cfg.vanish_factor,
                f"is below 1/{self._cfg.vanish_factor:g} of its median",
            ),
        }
        events, warnings = [], []
        for which, (holds, words) in found.items():
            self._streaks[which] = self._streaks[which] + 1 if holds else 0
            if self._streaks[which] == steps:  # said once, until it has been as usual again
                events.append({"kind": "norm", "step": step, "what": which, "grad_norm": norm, "median": median})
                warnings.append(
                    f"warning: step {step}: the gradient norm {norm:.4g} {words} {median:.4g} for {steps} steps now"
                )
        return Verdict(events=tuple(events), warnings=tuple(warnings))

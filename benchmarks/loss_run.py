"""One case of benchmarks.loss: its arms are tried, checked, then timed in turns.

N rows, V vocabulary, H width.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.loss_arms import Arm, first_line, unavailable
from benchmarks.loss_cases import TITLES, Case, Problem, make_problem
from benchmarks.loss_check import Reference, bounds, errors, reference_of, refusal
from benchmarks.loss_timing import Clock, take_turns

GIB = 1 << 30


def run_case(
    case: Case, arms: Sequence[Arm], clock: Clock, options: argparse.Namespace, *, seed: int, last_call: float
) -> dict[str, Any]:
    """One case: check every arm, then time those that passed, taking turns. After `last_call` (of time.monotonic) no
    other arm is tried."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # a new shape is a new compilation, not the ninth of one, which would not be compiled
    problem = make_problem(case, clock.device, seed)
    reference = reference_of(problem)
    release(clock.device)
    records: list[dict[str, Any]] = []
    steps: dict[str, Callable[[], object]] = {}
    for arm in arms:
        fields = ("name", "ours", "computes", "sums", "inexact")
        record = {field: getattr(arm, field) for field in fields} | {"not_run": "", "refused": "", "ms": []}
        records.append(record)
        late = "" if time.monotonic() < last_call else "the budget was spent"
        record["not_run"] = late or _obstacle(arm, problem, clock, options)
        if not record["not_run"]:
            try:
                step = step_of(arm, problem)
                record.update(_checked(step, problem, reference, clock, inexact=bool(arm.inexact)))
                if not record["refused"]:
                    steps[arm.name] = step
            except Exception as error:  # out of memory, a compiler's fault, a missing module: the other arms go on
                record["not_run"] = first_line(error)
            release(clock.device)
        say(f"    {arm.name}: {record['not_run'] or record['refused'] or 'checked'}")
    samples, faults = _timed(steps, problem, clock, options)
    for record in records:
        record["ms"] = samples.get(record["name"], [])
        if record["name"] in faults:
            record["not_run"] = f"failed while timed: {first_line(faults[record['name']])}"
    return _describe(case, problem, reference, records)


def _checked(
    step: Callable[[], tuple[torch.Tensor, tuple[torch.Tensor, ...]]],
    problem: Problem,
    reference: Reference,
    clock: Clock,
    *,
    inexact: bool,
) -> dict[str, Any]:
    """An arm's first call, what it is off by, and, if it passes, its peak memory."""
    problem.restore()
    begun = time.monotonic()
    value, gradients = step()
    clock.settle()
    record: dict[str, Any] = {"first_call_s": round(time.monotonic() - begun, 2)}
    record["errors"] = errors(problem, reference, value, gradients)
    record["bounds"] = bounds(problem, reference, inexact=inexact)
    record["refused"] = refusal(record["errors"], record["bounds"])
    del value, gradients
    if not record["refused"]:
        problem.restore()
        record["peak_extra_bytes"] = clock.peak_extra_bytes(step)
    return record


def _timed(
    steps: dict[str, Callable[[], object]], problem: Problem, clock: Clock, options: argparse.Namespace
) -> tuple[dict[str, list[float]], dict[str, Exception]]:
    cuda = clock.device.type == "cuda"
    rounds = (3, 3) if options.quick else (7, 30) if cuda else (5, 15)
    seconds = 8.0 if cuda else 15.0
    return take_turns(clock, steps, before=problem.restore, seconds=seconds, rounds=rounds, warm=2 if cuda else 1)


def step_of(arm: Arm, problem: Problem) -> Callable[[], tuple[torch.Tensor, tuple[torch.Tensor, ...]]]:
    """What is timed: the arm's call and, where the operation asks for them, the gradients of all inputs."""
    call = arm.make(problem)

    def forward() -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        with torch.no_grad():
            return call(), ()

    def both() -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        loss = call()
        gradients = torch.autograd.grad(loss, problem.inputs)
        return loss.detach(), gradients

    return both if problem.case.operation in ("fused", "logits") else forward


def _obstacle(arm: Arm, problem: Problem, clock: Clock, options: argparse.Namespace) -> str:
    """Why the arm is not tried; empty when it is."""
    if any(part in arm.name for part in options.skip):
        return "left out by --skip"
    key = (arm.name, problem.case.operation, problem.case.weights)
    why = unavailable(arm, problem.case, clock.device) or options.trials.get(key, "")
    need = arm.whole_bytes * problem.case.rows * problem.case.vocabulary
    free = clock.free_bytes()
    if not why and need > free:
        why = f"needs {need / GIB:.0f} GiB for whole logits, {free / GIB:.0f} free"
    return why


def _describe(case: Case, problem: Problem, reference: Reference, records: list[dict[str, Any]]) -> dict[str, Any]:
    """A case as it is kept."""
    return {
        "name": case.name,
        "title": TITLES[case.operation],
        "operation": case.operation,
        "rows": case.rows,
        "loss_rows": case.loss_rows,
        "hidden": case.hidden,
        "vocabulary": case.vocabulary,
        "dtype": str(case.dtype)[6:],
        "weights": case.weights,
        "share": case.share,
        "sweep": case.sweep,
        "operations": case.operations,
        "floor_bytes": case.floor_bytes,
        "input_bytes": problem.input_bytes,
        "gradient_bytes": problem.input_bytes if reference.gradients else 0,
        "plain_errors": reference.plain,
        "arms": records,
    }


def release(device: torch.device) -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        try:
            torch.cuda.empty_cache()
        except RuntimeError as error:  # a device that has faulted: what was measured before must still be written
            say(f"    the device: {first_line(error)}")


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)

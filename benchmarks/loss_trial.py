"""Before a run on a GPU: every kernel that might fault the device, or hang it, is tried in a process of its own.

A fault of one kernel poisons the process's device context, and with it every arm that comes after; a hang ends the whole
run. So each group of arms first works on a small problem elsewhere. Those that fault, or do not come back, are left out
and named. The trial fills the compilers' caches on disk as well.

    python -m benchmarks.loss_trial DEVICE GROUP    # what a trial runs; prints a line of JSON after each arm
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.loss_arms import Arm, arms_of, first_line, unavailable
from benchmarks.loss_cases import Case, make_problem
from benchmarks.loss_run import step_of

GROUPS = ("ours, triton", "ours, cuda", "liger-kernel", "cut-cross-entropy", "quack-kernels")
LIMIT_S = 120.0
Key = tuple[str, str, str]  # arm, operation, weights


def trials(device: torch.device, groups: Sequence[str] = GROUPS, limit_s: float = LIMIT_S) -> dict[Key, str]:
    """Why an arm must not be tried in this process, for every one that must not; groups run side by side."""
    command = [sys.executable, "-m", "benchmarks.loss_trial", device.type]
    root = Path(__file__).resolve().parents[1]
    children = [
        subprocess.Popen([*command, group], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=root)
        for group in groups
    ]
    end = time.monotonic() + limit_s
    found: dict[Key, str] = {}
    for group, child in zip(groups, children, strict=True):
        try:
            output, _ = child.communicate(timeout=max(0.1, end - time.monotonic()))
            how = f"ended with exit status {child.returncode}"
        except subprocess.TimeoutExpired:
            child.kill()
            output, _ = child.communicate()
            how = f"did not come back within {limit_s:g} s"
        found.update(verdicts(list(planned(device, group)), output.splitlines(), how))
    return found


def verdicts(planned: Sequence[Key], lines: Sequence[str], how: str) -> dict[Key, str]:
    """What a trial's lines say: the first planned arm that is not among them is the one that `how` describes; those after
    it have not been tried."""
    ended = {tuple(json.loads(line)["arm"]): json.loads(line)["why"] for line in lines if line.startswith('{"arm"')}
    result = {key: f"in a trial: {ended[key]}" for key in planned if ended.get(key)}
    missing = [key for key in planned if key not in ended]
    for key in missing:
        first = f"not tried: before it, the trial of {missing[0][0]} {how}"
        result[key] = f"its trial {how}" if key == missing[0] else first
    return result


def cases() -> Iterator[Case]:
    """Small problems of every operation, in bfloat16; shapes that any of the kernels takes."""
    for operation in ("fused", "logits", "logprob", "forward"):
        for weights in ("uniform", "token") if operation in ("fused", "logits") else ("uniform",):
            width = 0 if operation == "logits" else 512
            yield Case(
                operation=operation, rows=256, hidden=width, vocabulary=4096, dtype=torch.bfloat16, weights=weights
            )


def planned(device: torch.device, group: str) -> dict[Key, tuple[Arm, Case]]:
    """The arms whose name begins with `group` and that can be tried here."""
    return {
        (arm.name, case.operation, case.weights): (arm, case)
        for case in cases()
        for arm in arms_of(case)
        if arm.name.startswith(group) and not unavailable(arm, case, device)
    }


def try_group(device: torch.device, group: str) -> None:
    """Run a group's arms, printing a line after each."""
    for key, (arm, case) in planned(device, group).items():
        why = ""
        try:
            step_of(arm, make_problem(case, device, seed=1))()
            if device.type == "cuda":
                torch.cuda.synchronize()
        except Exception as error:
            why = first_line(error)
        print(json.dumps({"arm": key, "why": why}), flush=True)


if __name__ == "__main__":
    try_group(torch.device(sys.argv[1]), sys.argv[2])

"""What benchmarks.data keeps of a measurement: cases, their arms, and a sample per round."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.data_child import Failed


@dataclass
class Arm:
    """One way to do a case's work.

    rounds: of each round what was done ("amount") in how many seconds ("cpu_s", "wall_s").
    refused: how its content differs from ours; not_run: why it could not run. Either way nothing of it is printed.
    base: what the case's target is held against; None for arms that are shown for orientation.
    """

    name: str
    what: str
    ours: bool = False
    base: bool = True
    rounds: list[dict[str, float]] = field(default_factory=list)
    refused: str = ""
    not_run: str = ""


@dataclass
class Case:
    """One comparison. `least`: our rate over the best base arm's that the target asks for; None without a target."""

    name: str
    title: str
    unit: str
    text: str
    target: str = ""
    least: float | None = None
    arms: list[Arm] = field(default_factory=list)
    seconds: float = 0.0

    def recorded(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


Measure = Callable[[Arm, int], dict[str, float]]


def take_turns(case: Case, rounds: int, measure: Measure, *, seed: int = 0) -> None:
    """Fill every arm's rounds: each round goes through the arms in another order; an arm that fails leaves the case."""
    order = random.Random(seed)
    for number in range(rounds):
        turn = [arm for arm in case.arms if not arm.not_run and not arm.refused]
        order.shuffle(turn)
        for arm in turn:
            try:
                arm.rounds.append(measure(arm, number))
            except Failed as error:
                arm.not_run, arm.rounds = str(error), []
        say(f"    {case.name}: round {number + 1} of {rounds}")


def checked(arms: Sequence[Arm], content: Callable[[Arm], str], ours: str) -> Iterator[Arm]:
    """The arms that can run and whose content, as one digest, is `ours`; the others are marked with the reason."""
    for arm in arms:
        if arm.not_run:
            continue
        try:
            found = content(arm)
        except (Failed, OSError, ValueError) as error:
            arm.not_run = f"{error}"
            continue
        if found == ours:
            yield arm
        else:
            arm.refused = f"its content is not ours (digest {found[:12]}, ours {ours[:12]})"


def say(text: str) -> None:
    """Progress, beside the report."""
    print(text, file=sys.stderr, flush=True)

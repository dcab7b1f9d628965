"""A part of a build, for job arrays: `--part 3/10` takes shards 3, 13, 23, ... of the plan, counted from 0."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from megaprior.errors import UsageError

T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """Part `number` of `of`, counted from 0 as Slurm's own examples (`--array=0-9`), SLURM_PROCID and MPI's ranks are."""

    number: int
    of: int

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    @property
    def lock(self) -> str:
        """Name of the file in the working folder that its builder holds."""
        return f"part-{self.number}-of-{self.of}.lock"

    def select(self, jobs: Sequence[T]) -> Sequence[T]:
        """Its share: neighbours go to different parts, so that a long tail of small inputs is spread."""
        return jobs[self.number :: self.of]

    def owns(self, index: int) -> bool:
        """Whether the shard at `index` of the plan is one of its own."""
        return index % self.of == self.number


def parse_part(text: str) -> Part:
    """`"3/10"` -> part 3 of 10.

    Raises:
        UsageError: not two whole numbers with a slash between, or no such part.
    """
    number, slash, of = text.partition("/")
    if not (slash and number.isdecimal() and of.isdecimal() and int(of)):
        raise UsageError(f"--part {text}: expected I/N, for example --part $SLURM_ARRAY_TASK_ID/10 with --array=0-9")
    part = Part(int(number), int(of))
    if part.number >= part.of:
        raise UsageError(
            f"--part {text}: {of} parts are counted from 0 to {part.of - 1}; submit with --array=0-{part.of - 1}"
        )
    return part

"""How a folder packs into rows, by the code that training packs with (megaprior.data.order, corpus, packing, loader).

    whole      segments of the folder best-fitted into rows at once: what rows of that length can hold of it
    training   global batches in training's order, split over ranks, each rank's part packed: what a step gets

A batch packs worse than the whole: its last row is what is left, and a rank has few segments to choose from. Lengths come
from the index. The folder is opened as training opens it (4 bytes a sample, 12 with images).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megaprior.data.corpus import Corpus
from megaprior.data.loader import plan_rows
from megaprior.data.order import Schedule
from megaprior.data.packing import pack_best_fit
from megaprior.data.shards import ShardSet
from megaprior.data.vision import VisionSpec
from megaprior.errors import DataError, UsageError

PACKED = 1 << 20  # segments packed as a whole at most: the first of a random order
STEPS = 200  # batches looked at, at most


@dataclass(frozen=True, kw_only=True)
class Plan:
    """As data.max_tokens, data.batch_size and data.pad_to of a training configuration, and its number of ranks."""

    max_tokens: int
    batch_size: int = 512
    ranks: int = 1
    pad_to: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        names = {"pack": self.max_tokens, "batch": self.batch_size, "ranks": self.ranks}
        for name, value in names.items():
            if value < 1:
                raise UsageError(f"--{name} {value}: at least 1")


def predict(folder: Path, plan: Plan, visions: Sequence[VisionSpec | None]) -> list[dict[str, Any]]:
    """Rows and fill for each way of showing images; None shows the captions alone, as a reference sees them.

    Raises:
        DataError: the folder holds no sample, or an image leaves no room in a row for its caption.
    """
    shards = ShardSet.open(folder)
    if not len(shards):
        raise DataError(f"{folder}: 0 samples, nothing to pack; build it again")
    found = []
    for vision in visions:
        corpus = Corpus([shards], spec=vision, max_tokens=plan.max_tokens, workers=1)
        try:
            found.append(_predict(corpus, plan))
        finally:
            corpus.close()
    return found


def _predict(corpus: Corpus, plan: Plan) -> dict[str, Any]:
    samples, spec = len(corpus.sets[0]), corpus.spec
    survey = corpus.survey(0)
    schedule = Schedule([samples], [1], plan.seed)
    geometry = None if spec is None else {name: spec.recorded()[name] for name in ("patch", "limit")}
    return {
        "max_tokens": plan.max_tokens,
        "vision": geometry,
        "mean_tokens": survey.mean_tokens,
        "cut": survey.cut,
        "whole": _whole(corpus, schedule, plan, samples),
        "training": _training(corpus, schedule, plan, samples),
    }


def _whole(corpus: Corpus, schedule: Schedule, plan: Plan, samples: int) -> dict[str, Any]:
    packed = min(samples, PACKED)
    _, ids = schedule.ids(0, packed)
    lengths = corpus.lengths(ids).segment
    filled = [int(lengths[row].sum()) for row in pack_best_fit(lengths.tolist(), plan.max_tokens)]
    rows, tokens = len(filled), sum(filled)
    full = (tokens - min(filled)) / ((rows - 1) * plan.max_tokens) if rows > 1 else tokens / plan.max_tokens
    return {
        "segments": packed,
        "tokens": tokens,
        "rows": rows,
        "fewest_rows": -(-tokens // plan.max_tokens),  # no packing can do with fewer
        "fill": tokens / (rows * plan.max_tokens),
        "fill_but_last": full,  # without the row that was left over: what many rows come to
        "rows_of_all": round(rows * samples / packed),
    }


def _training(corpus: Corpus, schedule: Schedule, plan: Plan, samples: int) -> dict[str, Any]:
    steps = max(1, min(STEPS, samples // plan.batch_size))
    rows, micro, real, padded = [], [], 0, 0
    for step in range(steps):
        _, ids = schedule.ids(step * plan.batch_size, (step + 1) * plan.batch_size)
        lengths = corpus.lengths(ids).segment.tolist()
        ranks = [plan_rows(lengths, rank=r, world=plan.ranks, max_tokens=plan.max_tokens) for r in range(plan.ranks)]
        filled = [sum(lengths[i] for i in row) for mine, _ in ranks for row in mine]
        dummies = sum(count - len(mine) for mine, count in ranks)
        rows.append(len(filled))
        micro.append(ranks[0][1])
        real += sum(filled)
        padded += sum(min(-(-tokens // plan.pad_to) * plan.pad_to, plan.max_tokens) for tokens in filled)
        padded += dummies * min(plan.pad_to, plan.max_tokens)
    return {
        "batch_size": plan.batch_size,
        "ranks": plan.ranks,
        "pad_to": plan.pad_to,
        "steps": steps,
        "rows_per_step": float(np.mean(rows)),
        "micro_steps": float(np.mean(micro)),
        "most_micro_steps": max(micro),
        "fill": real / padded,  # of the rows as they are computed, padded to a multiple of pad_to
        "fill_of_whole_rows": real / (sum(rows) * plan.max_tokens),
    }

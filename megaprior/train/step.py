"""What one step adds up to over all ranks: the numbers that decide whether it may update, and those that are logged.

Letters: N loss tokens of a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from megaprior.distributed import Announcement, Peers, digest

if TYPE_CHECKING:
    from collections.abc import Callable

    from megaprior.data.corpus import Corpus
    from megaprior.data.loader import StepBatch
    from megaprior.data.samples import Batch
    from megaprior.train.engine import Engine


@dataclass(frozen=True)
class Fault:
    """A number of the step that is not finite."""

    what: str  # "loss" or "gradient"
    value: float
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Totals:
    """One step over all ranks; `nll` and `tokens` by source."""

    loss: float
    norm: float  # of the gradient, before clipping
    nll: tuple[float, ...]
    tokens: tuple[int, ...]  # loss tokens that were seen
    sum_g: float
    dropped: int  # samples whose image could not be decoded: in D, without a gradient
    flat: int  # captions that the reference knows by heart
    fill: float  # real tokens / row tokens, mean over ranks
    patches: int  # image patches that were seen
    stop: bool
    fault: Fault | None = None
    own: tuple[tuple[float, ...], ...] = ()  # by rank, what `total` was given

    def metrics(self, batch: StepBatch) -> dict[str, float]:
        """For metrics.jsonl; with several sources also each one's NTP loss and share of D."""
        seen = sum(self.tokens)
        values = {"loss": self.loss, "ntp_loss": sum(self.nll) / max(seen, 1), "grad_norm": self.norm}
        if len(self.nll) > 1:
            for source, (nll, tokens) in enumerate(zip(self.nll, self.tokens, strict=True)):
                values[f"source{source}_ntp_loss"] = nll / max(tokens, 1)
                values[f"source{source}_share"] = batch.source_tokens[source] / batch.denominator
        counts = {"loss_tokens": seen, "denominator": batch.denominator, "sum_g": self.sum_g}
        return {**values, **counts, "fill": self.fill, "dropped": self.dropped, "flat": self.flat}


def announce(peers: Peers, batch: StepBatch, *, configuration: str) -> Announcement:
    """Send what must be equal on all ranks before they compute together."""
    return peers.announce(
        {
            "its sample ids": digest(batch.sample_ids.astype("<i8").tobytes()),
            "its loss tokens D": float(batch.denominator),
            "its number of rows": float(len(batch.micro)),
            "its data": digest(batch.config_digest),
            "its configuration": digest(configuration),
        }
    )


def row_sources(corpus: Corpus, row: Batch) -> torch.Tensor:
    """int64 [N]: the source of each loss token of a row."""
    return torch.from_numpy(np.repeat(corpus.source_of(row.sample_ids.numpy()), np.diff(row.loss_cu.numpy())))


def accumulate(
    engine: Engine, corpus: Corpus, batch: StepBatch, *, seed: int, announced: Announcement | None = None
) -> list[torch.Tensor]:
    """Forward and backward of all rows of a step; returns `row_sources` of each.

    Raises:
        MegapriorError: a rank differs in what `announced` says.
    """
    step = batch.step + 1
    torch.manual_seed(
        int(digest(seed, step, engine.place.rank))
    )  # randomness is a function of the step: nothing to save
    groups = [row_sources(corpus, row) for row in batch.micro]
    for i, (row, group) in enumerate(zip(batch.micro, groups, strict=True)):
        engine.accumulate(row, group, last=i + 1 == len(batch.micro))
        if i == 0 and announced is not None:  # it travelled meanwhile; a rank with other rows would hang after this
            announced.check(step)
    return groups


def total(
    peers: Peers,
    engine: Engine,
    batch: StepBatch,
    groups: list[torch.Tensor],
    *,
    stop: bool,
    own: Callable[[], list[float]] = list,
) -> Totals:
    """Add up the step over all ranks: the one wait for the device, and the numbers that all ranks decide by.

    `own` is called after that wait; the numbers it gives (as many on every rank) travel along.
    """
    sources = len(batch.source_tokens)
    tokens = torch.bincount(torch.cat(groups), minlength=sources).tolist()
    square, loss, *nll = engine.sums()
    patches = sum(len(row.patches) for row in batch.micro)
    others = [batch.sum_g, len(batch.dropped), batch.num_flat, batch.fill, patches, stop]
    shared = [square, loss, *nll, *tokens, *map(float, others)]
    gathered = peers.gather([*shared, *own()])
    table = [row[: len(shared)] for row in gathered]
    square, loss, *rest = (sum(column) for column in zip(*table, strict=True))
    sum_g, dropped, flat, fill, patches, stops = rest[2 * sources :]
    return Totals(
        loss=loss,
        norm=math.sqrt(square),
        nll=tuple(rest[:sources]),
        tokens=tuple(map(int, rest[sources : 2 * sources])),
        sum_g=sum_g,
        dropped=int(dropped),
        flat=int(flat),
        fill=fill / len(table),
        patches=int(patches),
        stop=stops > 0,
        fault=_fault(table),
        own=tuple(tuple(row[len(shared) :]) for row in gathered),
    )


def _fault(table: list[list[float]]) -> Fault | None:
    """What is not finite: a loss, which names its rank, before a gradient, which ranks have exchanged already."""
    for what, column in (("loss", 1), ("gradient", 0)):
        ranks = tuple(rank for rank, row in enumerate(table) if not math.isfinite(row[column]))
        if ranks:
            return Fault(what, table[ranks[0]][column], ranks)
    return None

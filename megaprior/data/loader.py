"""From shards to the micro-steps of one rank, as a pure function of the step.

    1. order      step -> sample ids of the global batch, whatever the world size       (order.py)
    2. lengths    ids -> tokens of each segment and D, from the index alone             (corpus.py)
    3. packing    lengths -> every rank's rows, so that all agree how many there are    (packing.py)
    4. read       this rank's ids -> tokens, scores, decoded patches                    (corpus.py)
    5. weighting  scores -> token weights g                                             (weighting.py)
    6. assemble   segments -> one Batch a row, dummies where other ranks have more rows (samples.py)

Background work only runs ahead of the loop; it holds no state that a resumed run would need.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field

from megaprior.config import configclass, dump_config
from megaprior.data.corpus import Corpus, Dropped
from megaprior.data.heldout import rows
from megaprior.data.manifest import read_build
from megaprior.data.order import Schedule
from megaprior.data.packing import pack_best_fit, split_balanced
from megaprior.data.prefetch import Prefetch
from megaprior.data.samples import Batch, Segment, assemble
from megaprior.data.shards import ShardSet
from megaprior.data.vision import VisionSpec
from megaprior.data.weighting import WeightingConfig, weigh
from megaprior.errors import DataError, UsageError
from megaprior.files import digest_bytes, digest_json
from megaprior.telemetry import say
from megaprior.tokenizer import Tokenizer

__all__ = ["DataConfig", "Loader", "SourceConfig", "StepBatch", "plan_rows", "rows"]

_Positive = Annotated[int, Field(ge=1)]


@configclass
class SourceConfig:
    """One shard folder; of every sum-of-weights samples, `weight` come from it."""

    path: str
    weight: Annotated[int, Field(ge=0)] = 1


@configclass
class DataConfig:
    """What is trained on, and how it becomes rows.

    `batch_size` counts samples of `train` per optimizer step over all ranks; the language mix `text` comes on top of it:
    `mix_ratio` times as many `mix_unit` as `train` has, by the means over the sources ("tokens" counts patches).
    """

    train: list[SourceConfig]
    text: list[SourceConfig] = Field(default_factory=list)
    heldout: str | None = None
    scores: str | None = "ref_logprob"
    batch_size: _Positive = 512
    max_tokens: Annotated[int, Field(ge=2)] = 8192
    pad_to: _Positive = 256
    mix_ratio: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    mix_unit: Literal["loss_tokens", "tokens", "samples"] = "loss_tokens"
    workers: _Positive = 2  # decoding threads
    prefetch: _Positive = 2  # steps prepared ahead
    cache_mb: Annotated[int, Field(ge=0)] = 256  # decoded patches kept for the next epoch


@dataclass(frozen=True)
class StepBatch:
    """One rank's part of one optimizer step, with what all ranks know about the whole of it."""

    step: int
    micro: tuple[Batch, ...]  # as many on every rank; dummies have no loss tokens
    denominator: int  # D of the global batch, at least 1
    sample_ids: np.ndarray  # int64 [n], the global batch in order; an epoch that ends inside it repeats ids
    segment_tokens: np.ndarray  # int64 [n], what each of them takes in a row, whichever rank has it
    pairs: int  # of the n, those that are shown with an image
    source_tokens: tuple[int, ...]  # D by source
    config_digest: str
    dropped: tuple[Dropped, ...]  # of this rank
    num_loss_tokens: int  # in this rank's rows
    num_flat: int  # captions of this rank whose every w is 0
    fill: float  # real tokens / row tokens of this rank
    sum_g: float  # sum of this rank's token weights

    def digest(self) -> str:
        """xxh3-128 of what must be equal on all ranks: step, sample ids, D, the number of micro-steps, the configuration.

        The sum of g is not in it: a rank reads the scores of its own part only. What g is a function of is covered: the
        configuration has alpha, length scaling, and the fingerprints of shards and scorer.
        """
        head = f"{self.step} {self.denominator} {len(self.micro)} {self.config_digest} "
        return digest_bytes(head.encode() + self.sample_ids.astype("<i8").tobytes())


def plan_rows(lengths: Sequence[int], *, rank: int, world: int, max_tokens: int) -> tuple[list[list[int]], int]:
    """This rank's rows, as positions in `lengths`, and the number of micro-steps that every rank runs (at least 1)."""
    packed = []
    for part in split_balanced(lengths, world):
        packed.append([[part[i] for i in row] for row in pack_best_fit([lengths[p] for p in part], max_tokens)])
    return packed[rank], max(1, *(len(rows) for rows in packed))


class Loader:
    """The batches of a run: `batch(step)` is a pure function, iterating prepares them in the background from `start_step` on.

    Attributes:
        sources: folder of each source, `train` first, then `text`; sample ids count through them.
        text_per_step: language-mix samples per step (not whole: a step has the floor or the ceiling of it).
        identity: what the batches are a function of, besides the step; equal on all ranks and for any world size.
        data_wait_s: seconds that the last `next` waited for its batch.
    """

    def __init__(
        self,
        cfg: DataConfig,
        *,
        seed: int,
        weighting: WeightingConfig,
        spec: VisionSpec | None,
        tokenizer: Tokenizer,
        rank: int = 0,
        world: int = 1,
        start_step: int = 0,
    ) -> None:
        """`spec` None trains on text only: images of pairs are not looked at.

        Raises:
            UsageError: no source to draw from; PRIOR weights without a score stream or without images.
            DataError: shards or scores are refused (see `ShardSet.open`), a source has no samples, an image is too long.
        """
        assert 0 <= rank < world, (rank, world)
        if weighting.kind == "prior" and (spec is None or cfg.scores is None):
            lack = "a model that sees images" if spec is None else "data.scores to name the score stream"
            raise UsageError(f"weighting.kind=prior needs {lack}; otherwise use weighting.kind=ntp")
        if not cfg.train:
            raise UsageError("data.train is empty: name at least one shard folder")
        self.cfg, self.weighting, self.rank, self.world, self.start_step = cfg, weighting, rank, world, start_step
        entries = [*cfg.train, *cfg.text]
        self.sources = [entry.path for entry in entries]
        sets = [
            _open(entry, scores=cfg.scores if weighting.kind == "prior" else None, tokenizer=tokenizer)
            for entry in entries
        ]
        self.corpus = Corpus(sets, spec=spec, max_tokens=cfg.max_tokens, cache_mb=cfg.cache_mb, workers=cfg.workers)
        self._bos_id = tokenizer.bos_id
        pairs = len(cfg.train)
        for entry, shards in zip(cfg.text, sets[pairs:], strict=True):
            if shards.kind != "text":
                raise DataError(
                    f"{entry.path}: data.text takes shards of text, these are {shards.kind}; list it under data.train"
                )
        self._train = Schedule([len(s) for s in sets[:pairs]], [e.weight for e in cfg.train], seed)
        self.text_per_step, self._text = self._mix(pairs, seed)
        self.identity = self._identity(seed)
        self._config_digest = digest_json(self.identity)
        self._running: Prefetch[StepBatch] | None = None
        self.data_wait_s = 0.0

    def sample_ids(self, step: int) -> np.ndarray:
        """int64 [n], the global batch of `step`: batch_size samples of `train`, then the language mix."""
        source, index = self._train.ids(step * self.cfg.batch_size, (step + 1) * self.cfg.batch_size)
        ids = self.corpus.starts[source] + index
        if self._text is None:
            return ids
        start, stop = (int(np.floor(s * self.text_per_step)) for s in (step, step + 1))
        source, index = self._text.ids(start, stop)
        return np.concatenate([ids, self.corpus.starts[len(self.cfg.train) + source] + index])

    def batch(self, step: int) -> StepBatch:
        """This rank's rows of `step`.

        Raises:
            DataError: a sample's scores are NaN, positive or of the wrong length.
        """
        ids = self.sample_ids(step)
        lengths = self.corpus.lengths(ids)
        rows, micro_steps = plan_rows(
            lengths.segment.tolist(), rank=self.rank, world=self.world, max_tokens=self.cfg.max_tokens
        )
        mine = np.array([i for row in rows for i in row], dtype=np.int64)
        found = self.corpus.read(ids[mine].tolist(), lengths.caption[mine].tolist())
        shown = {i: item for i, item in zip(mine.tolist(), found, strict=True) if isinstance(item, Segment)}
        kinds = [self.corpus.place(segment.sample_id)[0].score_kind for segment in shown.values()]
        weighted, flat = weigh(list(shown.values()), kinds, self.weighting)
        segments = dict(zip(shown, weighted, strict=True))
        denominator = max(int(lengths.loss.sum()), 1)
        micro = tuple(
            assemble(
                [segments[i] for i in row if i in segments],
                bos_id=self._bos_id,
                spec=self.corpus.spec,
                denominator=denominator,
                max_tokens=self.cfg.max_tokens,
                pad_to=self.cfg.pad_to,
            )
            for row in rows + [[]] * (micro_steps - len(rows))
        )
        source = self.corpus.source_of(ids)
        share = np.bincount(source, weights=lengths.loss, minlength=len(self.sources))
        return StepBatch(
            step=step,
            micro=micro,
            denominator=denominator,
            sample_ids=ids,
            segment_tokens=lengths.segment,
            pairs=sum(map(self.corpus.has_image, source.tolist())),
            source_tokens=tuple(int(tokens) for tokens in share),
            config_digest=self._config_digest,
            dropped=tuple(item for item in found if isinstance(item, Dropped)),
            num_loss_tokens=sum(len(row.targets) for row in micro),
            num_flat=flat,
            fill=sum(row.num_real_tokens for row in micro) / sum(len(row.input_ids) for row in micro),
            sum_g=float(sum(row.token_weight.sum(dtype=torch.float64) for row in micro)),
        )

    def describe(self, sample_id: int) -> str:
        """For messages: pairs/00000 sample 17 (key 000000017)."""
        return self.corpus.describe(sample_id)

    def __iter__(self) -> Iterator[StepBatch]:
        """Endless, from `start_step` on; a second call starts over and stops the work of the first."""
        if self._running is not None:
            self._running.close()
        # A thread starts on device 0, whatever this process was given.
        device = torch.cuda.current_device() if torch.cuda.is_available() else None
        steps = map(self.batch, count(self.start_step))
        prepared = steps if device is None else (_pinned(batch, device) for batch in steps)
        self._running = Prefetch(prepared, depth=self.cfg.prefetch)
        return self._timed(self._running)

    def _timed(self, batches: Prefetch[StepBatch]) -> Iterator[StepBatch]:
        for batch in batches:
            self.data_wait_s = batches.wait_s
            yield batch

    def close(self) -> None:
        """Stop all background work and wait for it to end."""
        if self._running is not None:
            self._running.close()
        self.corpus.close()

    # ------------------------------------------------------------ once, at the start

    def _mix(self, pairs: int, seed: int) -> tuple[float, Schedule | None]:
        """(text samples per step, their schedule), from the means of every source that is drawn from."""
        entries = [*self.cfg.train, *self.cfg.text]
        surveys = {i: self.corpus.survey(i) for i, entry in enumerate(entries) if entry.weight}
        for i, survey in surveys.items():
            if survey.cut:
                total, row = len(self.corpus.sets[i]), self.cfg.max_tokens
                say(
                    f"{entries[i].path}: {survey.cut:,} of {total:,} captions are cut to fit rows of data.max_tokens = {row:,}"
                )
        if not self.cfg.mix_ratio or not any(entry.weight for entry in self.cfg.text):
            return 0.0, None

        def mean(numbers: range) -> float:
            unit = {"loss_tokens": "mean_loss_tokens", "tokens": "mean_tokens"}.get(self.cfg.mix_unit)
            per = {i: getattr(surveys[i], unit) if unit else 1.0 for i in numbers if i in surveys}
            return sum(per[i] * entries[i].weight for i in per) / sum(entries[i].weight for i in per)

        per_step = self.cfg.mix_ratio * self.cfg.batch_size * mean(range(pairs)) / mean(range(pairs, len(entries)))
        ratio = f"{self.cfg.mix_ratio:g}x their {self.cfg.mix_unit.replace('_', ' ')}"
        say(f"language mix: {per_step:.2f} text samples beside each {self.cfg.batch_size} ({ratio})")
        sizes = [len(shards) for shards in self.corpus.sets[pairs:]]
        return per_step, Schedule(sizes, [e.weight for e in self.cfg.text], seed, first_source=pairs)

    def _identity(self, seed: int) -> dict[str, Any]:
        cfg = dump_config(self.cfg)
        sources = [
            {"build_id": shards.build_id, "samples": len(shards), "weight": entry.weight, "scorer": shards.scorer}
            for shards, entry in zip(self.corpus.sets, [*self.cfg.train, *self.cfg.text], strict=True)
        ]
        settings = {name: cfg[name] for name in ("batch_size", "max_tokens", "mix_ratio", "mix_unit", "pad_to")}
        spec = None if self.corpus.spec is None else self.corpus.spec.recorded()
        return {**settings, "seed": seed, "sources": sources, "vision": spec, "weighting": dump_config(self.weighting)}


def _open(entry: SourceConfig, *, scores: str | None, tokenizer: Tokenizer) -> ShardSet:
    kind = read_build(entry.path)["kind"]
    shards = ShardSet.open(entry.path, scores=scores if kind == "pairs" else None, tokenizer=tokenizer)
    if entry.weight and not len(shards):
        raise DataError(f"{entry.path}: 0 samples; remove this source from the configuration or build it again")
    return shards


def _pinned(batch: StepBatch, device: int) -> StepBatch:
    """Copied to the device without a wait: from pageable memory, a copy stops the host until all queued work is done."""
    with torch.cuda.device(device):
        return replace(batch, micro=tuple(row.pin_memory() for row in batch.micro))

"""One job to one shard: check every image once, tokenize every caption, and keep account of what is left out.

Letters: k tokens of a caption.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megaprior.data.images import ImageError, check_image, probe_size
from megaprior.data.shards import ShardWriter
from megaprior.data_tools.building.plan import Plan, ShardJob
from megaprior.data_tools.options import BuildOptions
from megaprior.data_tools.readers.records import open_samples
from megaprior.data_tools.readers.samples import Caption, Rejected, Sample, Turn, Words
from megaprior.files import atomic_write
from megaprior.tokenizer import Tokenizer

WORKING = ".building"  # folder inside the output while a build is under way
_TICK_SAMPLES = 16  # asking how far a file is read takes as long as reading a short caption
_BLOCK_SAMPLES, _BLOCK_LETTERS = 256, 1 << 18  # what is tokenized at once


def ledger_path(output: Path, prefix: str) -> Path:
    """Where a job notes what its shard left out, before the manifest says that it is done."""
    return output / WORKING / f"{prefix}.json"


def read_job(
    job: ShardJob, options: BuildOptions, tick: Callable[[int], None]
) -> Generator[Sample | Rejected, None, None]:
    """Every sample of a job's source, in order; `tick` is told the bytes read on the way."""
    options = replace(options, images=job.images)
    with open_samples(job.source, options, start=job.start, end=job.end) as (samples, consumed):
        done = 0
        for number, sample in enumerate(samples, 1):
            yield sample
            if number % _TICK_SAMPLES == 0:
                tick((here := consumed()) - done)
                done = here
        tick(consumed() - done)


def build_shard(
    job: ShardJob,
    plan: Plan,
    tokenizer: Tokenizer,
    output: Path,
    *,
    tick: Callable[[int], None] = lambda _: None,
    keep: Callable[[Sample | Rejected], Sample | Rejected | None] = lambda item: item,
) -> dict[str, Any]:
    """Write one shard and return its manifest; its bytes are a function of the job, the options and the tokenizer.

    `keep` may take a part of a sample, or nothing, of what is read.
    """
    left_out: list[Rejected] = []
    outside = 0
    with (
        _one_thread(),
        ShardWriter(
            output,
            job.prefix,
            tokenizer=tokenizer,
            build_id=plan.build_id,
            kind=plan.kind,
            source=job.recorded(),
            options=plan.options.recorded(),
        ) as writer,
    ):
        shard, whole = _Shard(writer, tokenizer, plan.options), plan.options.whole
        with closing(read_job(job, plan.options, tick)) as samples:
            for sample in filter(None, map(keep, samples)):
                if isinstance(sample, Rejected) or whole or in_subset(sample, plan.options):
                    left_out += shard.add(sample)
                else:
                    outside += 1
            left_out += shard.flush()
        for rejected in left_out:
            writer.quarantined(reason=rejected.reason.partition(":")[0])
        entries = [{"source": job.source.name, "sample": r.key, "reason": r.reason} for r in left_out]
        atomic_write(ledger_path(output, job.prefix), json.dumps({"quarantine": entries, "outside_subset": outside}))
        return writer.finish()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep the tokenizers library, which starts a thread a core for a batch, to this one: workers are the parallelism."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def in_subset(sample: Sample, options: BuildOptions) -> bool:
    """Whether the hash of its image (of its captions, where there is no image) falls into the subset.

    Equal images fall together whatever file they come from, so that disjoint subsets share no image.
    """
    if options.whole:
        return True
    content = sample.image or "\n".join(caption.text for caption in sample.captions).encode()
    start, end = options.subset
    # Scaling a float by 2^64 is exact, dividing the hash by it is not.
    return start * 2**64 <= xxhash.xxh3_64_intdigest(content) < end * 2**64


class _Shard:
    """Adds samples to a shard's writer: checks the image once, tokenizes every caption.

    Samples without images wait for each other: some tokenizers are faster on many captions at once.
    """

    def __init__(self, writer: ShardWriter, tokenizer: Tokenizer, options: BuildOptions) -> None:
        self._writer, self._tokenizer, self._options = writer, tokenizer, options
        self._check = check_image if options.check == "whole" else probe_size
        self._sizes: dict[str, tuple[int, int]] = {}
        self._annotated: bool | None = None
        self._waiting: list[Sample | Rejected] = []
        self._letters = 0

    def add(self, sample: Sample | Rejected) -> list[Rejected]:
        """Add the sample's captions, maybe later; returns what has to go to quarantine instead, in order."""
        if isinstance(sample, Sample):
            self._letters += sum([len(caption.text) for caption in sample.captions])
            if self._writer.kind == "pairs":
                self._waiting.append(sample)
                return self.flush()
            if sample.image is not None:  # it decided over the subset and need not be held
                sample = replace(sample, image=None)
        self._waiting.append(sample)
        full = len(self._waiting) >= _BLOCK_SAMPLES or self._letters >= _BLOCK_LETTERS
        return self.flush() if full else []

    def flush(self) -> list[Rejected]:
        """Add what waits; returns as `add`."""
        waiting, self._waiting, self._letters = self._waiting, [], 0
        if self._plain(waiting):
            return self._add_texts(waiting)
        if self._options.turns == "all":
            ids = None
        else:
            texts = [caption.text for sample in waiting if isinstance(sample, Sample) for caption in sample.captions]
            ids = iter(self._tokenizer.encode_batch(texts))
        left_out: list[Rejected] = []
        for sample in waiting:
            if isinstance(sample, Rejected):
                left_out.append(sample)
            else:
                left_out += self._add_sample(sample, ids)
        return left_out

    def _plain(self, waiting: Sequence[Sample | Rejected]) -> bool:
        """Whether these are captions and nothing else: no image, no conversation, no window, no annotation."""
        if self._writer.kind != "text" or self._options.documents or self._options.turns == "all" or self._annotated:
            return False
        return all(c.words is None for sample in waiting if isinstance(sample, Sample) for c in sample.captions)

    def _add_texts(self, waiting: Sequence[Sample | Rejected]) -> list[Rejected]:
        """What `flush` does, for `_plain` captions."""
        captions = [caption for sample in waiting if isinstance(sample, Sample) for caption in sample.captions]
        limit, eos = self._options.max_sequence, self._tokenizer.eos_id
        found = self._tokenizer.encode_batch([caption.text for caption in captions])
        truncated = 0
        for ids in found:
            ids.append(eos)
            if len(ids) > limit:
                del ids[limit:]
                truncated += 1
        if captions:
            self._annotated = False
            self._writer.add_texts([caption.key for caption in captions], found, truncated=truncated)
        return [sample for sample in waiting if isinstance(sample, Rejected)]

    def _add_sample(self, sample: Sample, ids: Iterator[list[int]] | None) -> list[Rejected]:
        """Add a sample; `ids` goes on with those of its captions, except for conversations, whose parts are tokenized."""
        encoded = [None if ids is None else next(ids) for _ in sample.captions]
        image: dict[str, Any] = {}
        if self._writer.kind == "pairs":
            assert sample.image is not None
            key = xxhash.xxh3_128_hexdigest(sample.image)
            try:
                size = self._sizes[key] = self._sizes.get(key) or self._check(sample.image)
            except ImageError as error:
                return [Rejected(key=sample.key, reason=f"image {error}")]
            image = {"image": sample.image, "image_size": size, "image_key": key}
        left_out: list[Rejected] = []
        for caption, found in zip(sample.captions, encoded, strict=True):
            refused = self._add_turns(caption, image) if found is None else self._add_caption(caption, found, image)
            if refused is not None:
                left_out.append(refused)
        return left_out

    def _add_caption(self, caption: Caption, ids: list[int], image: dict[str, Any]) -> Rejected | None:
        limit = self._options.max_sequence
        ids.append(self._tokenizer.eos_id)
        if self._options.documents:
            self._add_document(caption.key, ids)
            return None
        # The first caption decides for its shard: a stream of truths must cover every sample or none.
        if self._annotated is None:
            self._annotated = caption.words is not None
        classes = None
        if self._annotated:
            if caption.words is None:
                return Rejected(key=caption.key, reason="no words annotation: the first caption of its file has one")
            classes = token_classes(self._tokenizer.token_spans(caption.text, ids[:-1]), caption.words)[:limit]
        cut = len(ids) > limit
        self._writer.add(caption.key, ids[:limit] if cut else ids, word_class=classes, truncated=cut, **image)
        return None

    def _add_turns(self, caption: Caption, image: dict[str, Any]) -> Rejected | None:
        limit = self._options.max_sequence
        ids, spans = conversation_tokens(self._tokenizer, caption.turns or (Turn(text=caption.text, loss=True),))
        cut = len(ids) > limit
        spans = [(start, min(end, limit)) for start, end in spans if start < limit]
        if not spans:
            return Rejected(
                key=caption.key, reason=f"no answer within --max-sequence: {len(ids):,} tokens, {limit:,} fit"
            )
        self._writer.add(caption.key, ids[:limit], loss_spans=spans, truncated=cut, **image)
        return None

    def _add_document(self, key: str, ids: list[int]) -> None:
        limit = self._options.max_sequence
        windows = [ids[start : start + limit] for start in range(0, len(ids), limit)]
        for number, window in enumerate(windows):
            name = key if len(windows) == 1 else f"{key} part {number}"
            self._writer.add(name, window, end_document=number == len(windows) - 1)


def conversation_tokens(tokenizer: Tokenizer, turns: Sequence[Turn]) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids of a conversation, and the spans of its answers, each with an EOS of its own: where to stop is learnt too.

    Every turn is tokenized alone; a line end closes a prompt.
    """
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    for turn in turns:
        start = len(ids)
        ids += tokenizer.encode(turn.text) if turn.loss else tokenizer.encode(turn.text + "\n")
        if turn.loss:
            ids.append(tokenizer.eos_id)
            spans.append((start, len(ids)))
    # What follows the last answer has no loss and could only take room.
    return ids[: spans[-1][1]], spans


def token_classes(spans: Sequence[tuple[int, int]], words: Words) -> np.ndarray:
    """uint8 [k] for the tokens at byte `spans` and the closing EOS: the class of the word that fills most of a token.

    0 where no word is. Of two words that fill a token equally the lower class wins.
    """
    end = max((end for _, end in spans), default=0)
    at_byte = np.full(end, 255, np.uint8)
    for start, stop, value in words:
        at_byte[max(start, 0) : stop] = value
    counts = [np.bincount(part[part < 255], minlength=3) for part in (at_byte[start:stop] for start, stop in spans)]
    return np.array([*(int(count.argmax()) for count in counts), 0], np.uint8)

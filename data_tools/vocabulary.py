"""Captions of any input as text to train a tokenizer on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from megaprior.data_tools.building.plan import make_plan
from megaprior.data_tools.building.sharding import read_job
from megaprior.data_tools.options import BuildOptions
from megaprior.data_tools.readers.samples import Sample
from megaprior.errors import DataError
from megaprior.telemetry import say
from megaprior.tokenizer import Tokenizer, train_sentencepiece


def train_tokenizer(paths: Sequence[Path], output: Path, *, vocab_size: int, options: BuildOptions) -> Tokenizer:
    """Train on every usable caption, in order, and write `output`/tokenizer.model.

    Raises:
        DataError: the folder is not empty, or no caption could be read.
        UsageError: inputs and options do not fit each other, or the text cannot fill `vocab_size`.
    """
    if output.exists() and any(output.iterdir()):
        raise DataError(f"{output}: not empty; a tokenizer is never overwritten, choose another --output")
    plan = make_plan(paths, options, fingerprint="")
    skipped = 0

    def texts() -> Iterator[str]:
        nonlocal skipped
        for job in plan.jobs:
            for sample in read_job(job, options, lambda _: None):
                if isinstance(sample, Sample):
                    yield from (caption.text for caption in sample.captions)
                else:
                    skipped += 1

    tokenizer = train_sentencepiece(texts(), output, vocab_size=vocab_size)
    if skipped:
        say(f"{skipped:,} unusable captions were left out; `megaprior-data build` would name each")
    return tokenizer

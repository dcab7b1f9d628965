"""The sections of benchmarks.data in order, and the inputs that they share."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import data_inputs
from benchmarks.data_access import access_case
from benchmarks.data_case import Case
from benchmarks.data_child import run
from benchmarks.data_index import opening, ordering
from benchmarks.data_loader import loader_case
from benchmarks.data_pairs import pairs_case
from benchmarks.data_text import text_case

SECTIONS = ("text build", "pair build", "random access", "loader", "opening", "order")
Result = dict[str, Any]
Section = tuple[str, Callable[[Result], None]]


class Inputs:
    """What is measured on; made when first asked for."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.work = options, options.work
        self.generated = data_inputs.generated_tars(self.work, pairs=options.pairs, source=options.scenes)
        self.tokenizer = data_inputs.tokenizer_file(self.work, given=options.tokenizer, tars=self.generated)
        self.captions, self.distinct = data_inputs.captions_file(
            self.work, count=options.count, sources=options.captions, tars=self.generated, seed=options.seed
        )

    def shards(self, name: str, inputs: Sequence[Path], *extra: str) -> Path:
        """A shard folder of `inputs`, built anew: a kept one might be an older program's."""
        out = self.work / f"shards_{name}"
        run(["rm", "-rf", out])
        command: list[Any] = [sys.executable, "-m", "megaprior.data_tools.cli", "build", "--input", *inputs, *extra]
        run([*command, "--output", out, "--tokenizer", self.tokenizer, "--workers", "1"])
        return out


def sections(options: argparse.Namespace, inputs: Inputs) -> Iterator[Section]:
    """(name, what adds its measurement to a result), in order."""
    photos = [("photographs", options.tars)] if options.tars else []
    for tokenizer in [inputs.tokenizer, *([options.hf_tokenizer] if options.hf_tokenizer else [])]:
        yield "text build", _case(_text(options, inputs, tokenizer))
    for name, tars in [*photos, ("generated", inputs.generated)]:
        yield "pair build", _case(_pairs(options, inputs, name, tars))
    texts = ("--text", "--caption-column", "text")
    few = options.tars or inputs.generated[:2]
    yield (
        "random access",
        _case(
            lambda: access_case(
                options, "tokens", inputs.shards("captions", [inputs.captions], *texts), reads=options.reads
            )
        ),
    )
    yield (
        "random access",
        _case(lambda: access_case(options, "images", inputs.shards("access", few), reads=options.reads // 4)),
    )
    for name, tars in [*photos, ("generated", inputs.generated[:2])]:
        yield "loader", _case(_loader(options, inputs, name, tars))
    shards, samples = options.open
    yield (
        "opening",
        lambda result: result.update(opening=opening(options, inputs.tokenizer, shards=shards, samples=samples)),
    )
    yield "order", lambda result: result.update(ordering=ordering(options, steps=options.steps))


def _text(options: argparse.Namespace, inputs: Inputs, tokenizer: Path) -> Callable[[], Case]:
    return lambda: text_case(options, inputs.captions, inputs.distinct, tokenizer)


def _pairs(options: argparse.Namespace, inputs: Inputs, name: str, tars: list[Path]) -> Callable[[], Case]:
    return lambda: pairs_case(options, name, tars, inputs.tokenizer, rounds=options.rounds)


def _loader(options: argparse.Namespace, inputs: Inputs, name: str, tars: list[Path]) -> Callable[[], Case]:
    patch, limit = (32, 1024) if name == "photographs" else (16, 64)  # a full model's, and a small one's
    return lambda: loader_case(
        options,
        name,
        inputs.shards(f"loader_{name}", tars),
        inputs.tokenizer,
        batch=options.batch,
        patch=patch,
        limit=limit,
    )


def _case(make: Callable[[], Case]) -> Callable[[Result], None]:
    def add(result: Result) -> None:
        started = time.monotonic()
        case = make()
        case.seconds = round(time.monotonic() - started, 1)
        result["cases"].append(case.recorded())

    return add

"""What `megaprior-data` prints: tables, and captions token by token, coloured by importance once they are scored."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megaprior.data import manifest as mf
from megaprior.data.images import probe_size
from megaprior.data.shards import ShardSet
from megaprior.data_tools.building.build import QUARANTINE, PartBuilt, Preview
from megaprior.data_tools.readers.samples import Rejected
from megaprior.errors import UsageError
from megaprior.telemetry import printable
from megaprior.tokenizer import Tokenizer

DEFAULT_SCORES = "ref_logprob"
_DIGITS = "⁰¹²³⁴⁵⁶⁷⁸⁹"
_CLASSES = {1: "image-related", 2: "noise"}


def print_preview(preview: Preview) -> None:
    """The shards a build would write and what its first samples look like."""
    plan, console = preview.plan, _console()
    table = Table("shard", "input", "format", "MB", title=f"build {plan.build_id} ({plan.kind}, {preview.state})")
    for job in plan.jobs:
        table.add_row(job.prefix, printable(job.source.name), job.source.format, f"{job.bytes / 1e6:,.1f}")
    console.print(table)
    for item in preview.first:
        if isinstance(item, Rejected):
            _line(console, f"{item.key}: to quarantine: {item.reason}")
            continue
        image = f", image {'x'.join(map(str, probe_size(item.image)))}" if item.image and plan.kind == "pairs" else ""
        _line(console, f"{item.key}: {_count(len(item.captions), 'caption')}{image}")
        for caption in item.captions:
            _line(console, f"    {caption.text[:400]}")
    _line(console, "nothing was written (--dry-run)")


def print_built(folder: Path, build: dict[str, Any]) -> None:
    """What a build holds, what was left out and why, and what to do next."""
    counts, console = build["counts"], _console()
    held = _count(counts["samples"], "caption")
    if build["kind"] == "pairs":
        held += f" of {_count(counts['images'], 'image')}"
    elif counts["documents"] != counts["samples"]:
        held = f"{_count(counts['documents'], 'document')} in {_count(counts['samples'], 'window')}"
    _line(console, f"{folder}: {held}, {_count(counts['tokens'], 'token')}, {_count(counts['shards'], 'shard')}")
    if counts["truncated"]:
        limit = build["options"]["max_sequence"]
        _line(console, f"{_count(counts['truncated'], 'caption')} cut at {limit:,} tokens, without a closing EOS")
    if counts["outside_subset"]:
        _line(console, f"{_count(counts['outside_subset'], 'record')} outside the subset {build['options']['subset']}")
    if counts["quarantined"]:
        with open(folder / QUARANTINE, encoding="utf-8") as file:
            reasons = Counter(json.loads(line)["reason"].partition(":")[0] for line in file)
        why = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
        _line(console, f"{counts['quarantined']:,} quarantined, see {folder / QUARANTINE}: {why}")
    _line(console, f"next: megaprior-data verify {folder}")


def print_part(folder: Path, built: PartBuilt) -> None:
    """What a part has done and what has to follow."""
    console = _console()
    _line(console, f"{folder}: part {built.part}: {_count(built.shards, 'shard')} of {built.total:,}")
    if not built.complete:
        _line(console, f"next, when all {built.part.of} parts are done: megaprior-data join {folder}")


def print_verified(found: dict[Path, list[str]]) -> None:
    """One row a folder, then every problem on a line of its own."""
    console = _console()
    table = Table("folder", "kind", "samples", "tokens", "result")
    for folder, problems in found.items():
        row = ["?", "?", "?"]
        if not problems:
            build = mf.read_build(folder)
            row = [build["kind"], f"{build['counts']['samples']:,}", f"{build['counts']['tokens']:,}"]
        result = Text(_count(len(problems), "problem"), "bold red") if problems else Text("ok", "green")
        table.add_row(str(folder), *row, result)
    console.print(table)
    for problems in found.values():
        for problem in problems:
            _line(console, problem)


def print_samples(folder: Path, *, count: int, sample: int | None, scores: str | None) -> None:
    """Samples of a shard folder, `count` evenly spaced ones or one by its index.

    Raises:
        UsageError: there is no such sample.
        DataError: the shards or the scores cannot be opened.
    """
    if scores is None and all(
        (folder / f"{shard['prefix']}.{DEFAULT_SCORES}.json").exists() for shard in mf.read_build(folder)["shards"]
    ):
        scores = DEFAULT_SCORES
    shards, console = ShardSet.open(folder, scores=scores), _console()
    if sample is not None and not 0 <= sample < len(shards):
        raise UsageError(f"--sample {sample}: {folder} has samples 0 to {len(shards) - 1:,}")
    if count < 1:
        raise UsageError(f"-n {count}: at least 1")
    chosen = [sample] if sample is not None else np.linspace(0, len(shards) - 1, min(count, len(shards))).astype(int)
    tokenizer = shards.tokenizer()
    _line(console, f"{folder}: {len(shards):,} samples of kind {shards.kind}, build {shards.build_id}")
    if scores is not None:
        console.print(_legend(scores, console.color_system is not None), soft_wrap=True)
    for index in map(int, chosen):
        _line(console, "")
        _line(console, f"{index:,}: {shards.describe(index)}", style="bold")
        if shards.kind == "pairs":
            width, height = shards.image_sizes[index]  # pyright: ignore[reportOptionalSubscript]
            _line(console, f"image {width} x {height}, {len(shards.image(index)):,} bytes encoded")
        weights = None if scores is None else importance(shards.scores(index), kind=shards.score_kind or "")
        console.print(
            caption_text(shards.tokens(index), tokenizer, weights, colour=console.color_system is not None),
            soft_wrap=True,
        )
        if shards.has_word_class:
            _print_truth(console, shards.tokens(index), shards.word_class(index), tokenizer)


def importance(scores: np.ndarray, *, kind: str) -> np.ndarray:
    """w in [0, 1] of each token: 1 - exp(r) for log-probabilities r, else the importance over the caption's largest."""
    if kind == "logprob":
        return -np.expm1(np.minimum(scores, 0))
    top = float(scores.max(initial=0))
    return scores / top if top > 0 else np.ones_like(scores)


def caption_text(tokens: np.ndarray, tokenizer: Tokenizer, weights: np.ndarray | None, *, colour: bool) -> Text:
    """The caption token by token: shaded by weight, or with a small digit after each token where there is no colour."""
    text = Text()
    for position, token in enumerate(map(int, tokens)):
        shown = token_text(token, tokenizer)
        if weights is None:
            text.append(
                shown if colour else f"{'|' if position else ''}{shown}", "reverse" if colour and position % 2 else ""
            )
        elif colour:
            text.append(shown, _shade(float(weights[position])))
        else:
            text.append(f"{shown}{_DIGITS[min(9, int(10 * weights[position]))]}")
    return text


def token_text(token: int, tokenizer: Tokenizer) -> str:
    """What a token adds to the text, safe for a terminal: control characters and cut UTF-8 are spelled out."""
    raw = tokenizer.token_bytes(token)
    if not raw:
        return "<eos>" if token == tokenizer.eos_id else f"<{token}>"
    try:
        return printable(raw.decode())
    except UnicodeDecodeError:
        return f"<{raw.hex(' ')}>"


def _print_truth(console: Console, tokens: np.ndarray, classes: np.ndarray, tokenizer: Tokenizer) -> None:
    for value, name in _CLASSES.items():
        words = "".join(
            # a gap between two runs of the class shows that other words stand between them
            ("" if position and classes[position - 1] == value else " ...")
            + token_text(int(tokens[position]), tokenizer)
            for position in np.flatnonzero(classes == value)
        )
        _line(console, f"{name}:{words}")


def _legend(scores: str, colour: bool) -> Text:
    text = Text(f"importance w by {scores}: ")
    for digit in range(10):
        text.append(f" {digit / 10:.1f} " if colour else f"w{_DIGITS[digit]} ", _shade(digit / 9) if colour else "")
    return text.append(
        " 0 predictable without the image, 1 not" if colour else "tenths of w: 0 predictable, 9 surprising"
    )


def _shade(weight: float) -> str:
    fade = round(255 - 190 * min(1.0, max(0.0, weight)))
    return f"black on rgb(255,{fade},{fade})"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _line(console: Console, text: str, style: str = "") -> None:
    console.print(Text(printable(text), style), soft_wrap=True)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # rich itself would make `show | head` fail with exit code 1


def _console() -> Console:
    return _Console(highlight=False, emoji=False, markup=False)

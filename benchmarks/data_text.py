"""Captions to token streams: our build against Megatron-LM's preprocess_data.py, whole processes, the start-up taken off."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

from benchmarks.data_case import Arm, Case, say, take_turns
from benchmarks.data_child import Failed, Spent, run
from benchmarks.data_inputs import first_lines
from megaprior.data.indexed import IndexedStream
from megaprior.data.shards import ShardSet
from megaprior.files import digest_bytes

FEW = 200  # captions; what a run on so few takes is called start-up
OURS, MEGATRON = "ours", "Megatron-LM preprocess_data.py"


def text_case(options: argparse.Namespace, captions: Path, distinct: int, tokenizer: Path) -> Case:
    """Check the two, then let them take turns. `tokenizer` is a SentencePiece model, or a folder as transformers reads it."""
    with open(captions, encoding="utf-8") as file:
        count = sum(1 for _ in file)
    case = Case(
        name=f"text build, {'Hugging Face' if tokenizer.is_dir() else 'SentencePiece'}",
        title=f"Text build: {'a Hugging Face folder' if tokenizer.is_dir() else 'a SentencePiece model'}",
        unit="tokens",
        text=f"{count:,} captions ({distinct:,} different ones) of a jsonl, one tokenizer, one worker. Whole processes, less "
        f"what the same command takes on {FEW} captions. Megatron-LM's writes no keys and no digests and syncs nothing.",
        target="at least 2x Megatron-LM's tokens/s per core",
        least=2.0,
        arms=[
            Arm(OURS, "megaprior-data build --text --workers 1: tokens, keys, digests, manifest, fsync", ours=True),
            Arm(MEGATRON, "--workers 1 --append-eod: a process that tokenizes and one that writes; seconds of both"),
        ],
    )
    peer = case.arms[1]
    if options.megatron is None:
        peer.not_run = "--megatron DIR was not given"
    folder = options.work / "text"
    shutil.rmtree(folder, ignore_errors=True)
    files = {"all": captions, "few": first_lines(captions, FEW)}
    runs = {OURS: _ours, MEGATRON: _megatron}
    streams: dict[tuple[str, str], list[IndexedStream]] = {}

    def once(arm: Arm, size: str) -> Spent:
        out = folder / f"{size}_{'ours' if arm.ours else 'peer'}"
        shutil.rmtree(out, ignore_errors=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        spent, streams[arm.name, size] = runs[arm.name](options, files[size], out, tokenizer)
        return spent

    def measure(arm: Arm, number: int) -> dict[str, float]:
        small, large = once(arm, "few"), once(arm, "all")
        tokens = _count(streams[arm.name, "all"]) - _count(streams[arm.name, "few"])
        return {
            "amount": tokens,
            "cpu_s": max(large.cpu_s - small.cpu_s, 1e-3),
            "wall_s": max(
                large.wall_s - small.wall_s, 1e-3
            ),  # of tiny inputs on a busy machine it may come out negative
            "start_up_cpu_s": small.cpu_s,
        }

    say("text build: checking")
    for arm in case.arms:
        try:
            if not arm.not_run:
                once(arm, "all")
        except Failed as error:
            arm.not_run = str(error)
    if (peer.name, "all") in streams and not peer.not_run:
        peer.refused = _difference(streams[OURS, "all"], streams[MEGATRON, "all"])
    take_turns(case, options.rounds, measure, seed=options.seed)
    shutil.rmtree(folder, ignore_errors=True)
    return case


def _count(streams: list[IndexedStream]) -> int:
    return sum(int(stream.lengths.sum()) for stream in streams)


def _difference(ours: list[IndexedStream], theirs: list[IndexedStream]) -> str:
    """Empty when both hold the same ids in the same captions."""

    def content(streams: list[IndexedStream]) -> str:
        parts = [part for s in streams for part in (s.lengths.astype("<i4"), s.flat().astype("<i4"))]
        return digest_bytes(b"".join(part.tobytes() for part in parts))

    if _count(ours) != _count(theirs):
        return f"{_count(theirs):,} tokens, ours are {_count(ours):,}"
    return "" if content(ours) == content(theirs) else "its token ids are not ours"


def _ours(options: argparse.Namespace, source: Path, out: Path, tokenizer: Path) -> tuple[Spent, list[IndexedStream]]:
    command: list[Any] = [sys.executable, "-m", "megaprior.data_tools.cli", "build", "--input", source, "--text"]
    command += ["--caption-column", "text", "--output", out, "--tokenizer", tokenizer, "--workers", "1"]
    spent = run(command)
    return spent, [shard.streams["tokens"] for shard in ShardSet.open(out).shards]


def _megatron(
    options: argparse.Namespace, source: Path, out: Path, tokenizer: Path
) -> tuple[Spent, list[IndexedStream]]:
    out.mkdir()
    script = options.megatron / "tools" / "preprocess_data.py"
    command: list[Any] = [sys.executable, script, "--input", source, "--output-prefix", out / "peer"]
    kind = "HuggingFaceTokenizer" if tokenizer.is_dir() else "GPTSentencePieceTokenizer"
    command += ["--tokenizer-type", kind, "--tokenizer-model", tokenizer]
    command += ["--append-eod", "--workers", "1", "--log-interval", "1000000000"]
    spent = run(command, paths=[options.megatron, *options.peer_paths], cwd=options.megatron)
    return spent, [IndexedStream(out / "peer_text_document")]

"""Opening 1,000 shards, and the order and packing of indices that are far too large to shuffle in memory."""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from benchmarks.data_case import say
from benchmarks.data_child import run_json
from megaprior.data.shards import ShardWriter, write_build
from megaprior.tokenizer import Tokenizer, load_tokenizer

MIB = 1 << 20
SIZES = (10_000, 1_000_000, 100_000_000)
LIMIT_S, LIMIT_MB = 1.0, 50.0


def make_shards(work: Path, tokenizer: Tokenizer, *, shards: int, samples: int) -> Path:
    """A folder of small pair shards: rows of 4 to 35 tokens before one picture."""
    folder = work / f"shards_{shards}_{samples}"
    if (folder / "build.json").exists():
        return folder
    say(f"writing {shards:,} shards of {samples:,} samples")
    manifests = []
    picture = b"\xff\xd8\xff" + bytes(500)  # never decoded here
    rows = [[5 + (i * k) % 200 for k in range(3 + i % 32)] + [tokenizer.eos_id] for i in range(samples)]
    for number in range(shards):
        with ShardWriter(
            folder,
            f"{number:05d}",
            tokenizer=tokenizer,
            build_id="0" * 32,
            kind="pairs",
            source={"name": f"{number:05d}.tar"},
            options={},
        ) as writer:
            for i, row in enumerate(rows):
                writer.add(f"{i:09d}", row, image=picture, image_size=(64 + i % 64, 64), image_key="one")
            manifests.append(writer.finish())
    write_build(folder, build_id="0" * 32, shard_manifests=manifests, tokenizer=tokenizer, options={}, counts={})
    return folder


def opening(options: argparse.Namespace, tokenizer: Path, *, shards: int, samples: int) -> dict[str, Any]:
    """Seconds and memory of `ShardSet.open` in fresh processes, everything in the page cache."""
    folder = make_shards(options.work, load_tokenizer(tokenizer), shards=shards, samples=samples)
    request = {"do": "open", "folder": str(folder)}
    run_json("benchmarks.data_probe", request)
    rounds = []
    for number in range(options.rounds):
        rounds.append(run_json("benchmarks.data_probe", request))
        say(f"    opening: round {number + 1} of {options.rounds}")
    return {"shards": shards, "samples": samples, "rounds": rounds}


def ordering(options: argparse.Namespace, *, steps: int, batch: int = 512, row: int = 8192) -> dict[str, Any]:
    """Microseconds a sample and memory of order and packing, by the number of samples; sizes take turns."""
    sizes: dict[int, list[dict[str, float]]] = {size: [] for size in SIZES}
    for number in range(options.rounds):
        for size in SIZES:
            request = {"do": "order", "samples": size, "steps": steps, "batch": batch, "row": row, "seed": number}
            sizes[size].append(run_json("benchmarks.data_probe", request))
        say(f"    order and packing: round {number + 1} of {options.rounds}")
    return {"batch": batch, "row": row, "steps": steps, "sizes": {str(size): found for size, found in sizes.items()}}


def middle(rounds: list[dict[str, float]], name: str) -> float:
    """Median over the rounds."""
    return statistics.median(found[name] for found in rounds)

"""Samples by index: our readers against Megatron's on the same files, litdata, and webdataset front to back.

Every reader is a process of its own that keeps its data set open; they take turns on the same indices.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np

from benchmarks.data_case import Arm, Case, checked, say, take_turns
from benchmarks.data_child import Failed, Helper, run_json
from megaprior.data.shards import ShardSet

READER = Path(__file__).with_name("data_reader.py")
MEGATRON = "Megatron IndexedDataset"


def access_case(options: argparse.Namespace, what: str, shards: Path, *, reads: int) -> Case:
    """`what` is "tokens" (rows) or "images" (encoded bytes)."""
    streams = [str(shards / f"{s.prefix}.{what}") for s in ShardSet.open(shards).shards]
    arms = {
        "ours, ShardSet": ("shardset", "by index in the folder: finds the shard, then the row", [str(shards)]),
        "ours, IndexedStream": ("stream", "by index in the stream: what Megatron's reader does", streams),
        MEGATRON: ("megatron", "the same files, mapped", streams),
        "litdata StreamingDataset": ("litdata", "its own chunks of 64 MiB, local", None),
        "webdataset, sequential": ("webdataset", "tars, front to back, one member a sample", None),
    }
    total = len(ShardSet.open(shards))
    case = Case(
        name=f"random access, {what}",
        title=f"Random access: {'token rows' if what == 'tokens' else 'image bytes'}",
        unit="samples",
        text=f"{reads:,} reads a round, uniform over {total:,} samples in {len(streams)} shards, in the page cache; "
        "webdataset reads all samples in order instead. Rows come as arrays, images as bytes.",
        target="at least as fast as the fastest peer",
        least=1.0,
        arms=[Arm(name, how, ours=name.startswith("ours")) for name, (_, how, _) in arms.items()],
    )
    folder = options.work / f"access_{what}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    helpers: dict[str, Helper] = {}
    say(f"{case.name}: converting, checking")
    try:
        for arm in case.arms:
            kind, _, paths = arms[arm.name]
            try:
                helpers[arm.name] = _opened(options, arm, kind, what, paths, shards, folder)
            except Failed as error:
                arm.not_run = str(error)
        _refuse_others(case, helpers, folder, total)
        order = np.random.default_rng(options.seed)

        def measure(arm: Arm, number: int) -> dict[str, float]:
            file = folder / f"round_{number}.npy"
            if not file.exists():
                np.save(file, order.integers(0, total, reads))
            return helpers[arm.name].ask(indices=str(file))

        take_turns(case, options.rounds, measure, seed=options.seed)
    finally:
        for helper in helpers.values():
            helper.close()
        shutil.rmtree(folder, ignore_errors=True)
    return case


def _opened(
    options: argparse.Namespace, arm: Arm, kind: str, what: str, paths: list[str] | None, shards: Path, folder: Path
) -> Helper:
    """The arm's process, its data set open.

    Raises:
        Failed: the library is not there, or cannot open it.
    """
    places = [*options.peer_paths, *([options.megatron] if kind == "megatron" and options.megatron else [])]
    if paths is None:
        request = {"to": kind, "shards": str(shards), "what": what, "out": str(folder / kind)}
        paths = run_json("benchmarks.data_convert", request, paths=places)["paths"]
    return Helper(READER, {"kind": kind, "what": what, "paths": paths}, paths=places)


def _refuse_others(case: Case, helpers: dict[str, Helper], folder: Path, total: int) -> None:
    """Every sample once, in order, through every reader."""
    everything = folder / "everything.npy"
    np.save(everything, np.arange(total))

    def content(arm: Arm) -> str:
        return helpers[arm.name].ask(indices=str(everything), digest=True)["digest"]

    ours = content(case.arms[0])
    for _ in checked(case.arms, content, ours):
        pass

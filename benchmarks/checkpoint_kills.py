"""Kill training with SIGKILL at random moments of its saves, repeat the command, and compare every bit with a run left alone.

    python -m benchmarks.checkpoint --kills 40

Two ZeRO-3 ranks save after every step and keep the newest two checkpoints. Each kill hits one rank or both; either at a drawn
operation on a file (opening, renaming, removing) of a save or a deletion, or at a drawn moment after a save began. After
every kill

    nobody of the killed run is left after some seconds, and a rank that was not killed left with exit code 1;
    every folder with a checkpoint's name is complete, and every file in it has its digest;
    what was complete before is still there, or a newer one is;

and the run that is never killed and the one that always was end with the same losses and the same weights, and nothing else
in the folder. The first that does not hold ends the run.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.checkpoint_runs import TINY, make_shards, settings, start
from megaprior.train.checkpoint import complete_checkpoints, complete_steps

WORLD = 2
VICTIMS = (0, 1, None)  # a rank, or both at once
OPERATIONS = 120  # about two saves' worth on rank 0
_PATIENCE_S = 90.0


@dataclass
class Tally:
    """What the run went through."""

    kills: Counter[str] = field(default_factory=Counter)  # by victim and kind of moment
    left: Counter[str] = field(default_factory=Counter)  # what lay there after a kill
    too_late: int = 0  # a run that ended before its kill


def kill_and_compare(folder: Path, *, kills: int, seed: int) -> Tally:
    """Run everything in `folder`, which is empty.

    Raises:
        AssertionError: something that must hold does not; says what and after which kill.
    """
    shards, dice, tally = make_shards(folder), random.Random(seed), Tally()
    common = {"llama": TINY, "steps": 4 + 3 * kills}
    straight = settings(shards, folder / "straight", **common, save_every=1 << 30)
    values = settings(shards, folder / "killed", **common, save_every=1, keep_last=2)
    assert finish(start(straight, world=WORLD)) == [0] * WORLD, said(folder / "straight")
    newest = 0
    for number in range(kills):
        victim = dice.choice(VICTIMS)
        by_time = dice.random() < 0.5
        where = f"kill {number + 1} of {kills} (seed {seed})"
        if by_time:
            codes = _killed_by_time(values, victim, dice.randrange(1, 4), dice.uniform(0.0, 0.15))
        else:
            codes = _killed_by_operation(values, victim, dice.randrange(1, OPERATIONS))
        if codes == [0] * WORLD:
            tally.too_late += 1
            break
        for rank, code in enumerate(codes):
            hit = victim is None or rank == victim
            assert code in ((-signal.SIGKILL, 1) if hit else (1, 0)), f"{where}: rank {rank} left with {code}"
        tally.kills[
            f"{'both ranks' if victim is None else f'rank {victim}'}, {'moment' if by_time else 'operation'}"
        ] += 1
        newest = _check_what_is_left(folder / "killed", newest, where, tally)
    assert finish(start(values, world=WORLD)) == [0] * WORLD, said(folder / "killed")
    _compare(folder / "straight", folder / "killed", steps=common["steps"])
    return tally


def finish(processes: list[Any], *, patience_s: float = _PATIENCE_S) -> list[int]:
    """Exit codes of the ranks; one that hangs is killed and its code is None."""
    deadline = time.monotonic() + patience_s
    for process in processes:
        process.join(max(0.1, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        if process.exitcode is None:
            process.kill()
            process.join()
    return codes


def said(out: Path) -> str:
    """The end of what the ranks of a run said."""
    return "".join(path.read_text()[-2000:] for path in sorted(out.parent.glob(f"{out.name}.rank*.err")))


def _killed_by_operation(values: dict[str, Any], victim: int | None, number: int) -> list[int]:
    ranks = range(WORLD) if victim is None else [victim]
    processes = start(values, world=WORLD, operation=dict.fromkeys(ranks, number))
    deadline = time.monotonic() + _PATIENCE_S
    while victim is None and all(process.is_alive() for process in processes) and time.monotonic() < deadline:
        time.sleep(0.001)
    if victim is None and any(process.exitcode == -signal.SIGKILL for process in processes):
        for process in processes:
            process.kill()
    return finish(processes)


def _killed_by_time(values: dict[str, Any], victim: int | None, saves: int, after_s: float) -> list[int]:
    """Wait for the n-th save of this start to begin, and a little longer."""
    processes = start(values, world=WORLD)
    folder, deadline = Path(values["out"]) / "checkpoints", time.monotonic() + _PATIENCE_S
    before, seen = _names(folder), set()
    while len(seen) < saves and time.monotonic() < deadline and all(process.is_alive() for process in processes):
        seen |= {name.split(".tmp")[0].lstrip(".") for name in _names(folder) - before}
        time.sleep(0.001)
    time.sleep(after_s)
    for rank, process in enumerate(processes):
        if (victim is None or rank == victim) and process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
    return finish(processes)


def _names(folder: Path) -> set[str]:
    return set(os.listdir(folder)) if folder.is_dir() else set()


def _check_what_is_left(run: Path, newest: int, where: str, tally: Tally) -> int:
    found = complete_checkpoints(run, warn=False)
    named = {name for name in _names(run / "checkpoints") if not name.startswith(".")}
    assert {checkpoint.path.name for checkpoint in found} == named, (
        f"{where}: a half-written one has a checkpoint's name"
    )
    for checkpoint in found:
        checkpoint.verify("state")
        checkpoint.verify("model")
    now = max(complete_steps(run), default=0)
    assert now >= newest, f"{where}: the newest complete checkpoint was step {newest}, now it is {now}"
    hidden = len(_names(run / "checkpoints")) - len(named)
    tally.left["a half-written or half-deleted folder" if hidden else "complete checkpoints only"] += 1
    return now


def _compare(straight: Path, killed: Path, *, steps: int) -> None:
    one, other = (_losses(run) for run in (straight, killed))
    assert [step for step, _ in other] == list(range(1, steps + 1)), "every step stands in the metrics once"
    assert one == other, "losses differ"
    name = f"checkpoints/step_{steps:08d}/model/model.safetensors"
    assert (straight / name).read_bytes() == (killed / name).read_bytes(), "weights differ"
    assert sorted(_names(killed / "checkpoints")) == [f"step_{step:08d}" for step in (steps - 1, steps)]
    assert (killed / "latest").read_text() == f"step_{steps:08d}\n"
    assert not list(killed.glob(".*.tmp-*")), "a leftover"


def _losses(run: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if line["kind"] == "train"]

"""Ranks of a real run that hang, are frozen, are slow, or compute with something else: named, and the job ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from train_children import PARTITION_ALL, free_port, settings

from megaprior.train.watchdog import Whereabouts, blame


def there(doing: str = "step 3", beats: int = 4, at: str = "distributed.py:88 wait", waits: bool = True) -> Whereabouts:
    return Whereabouts(doing, beats, at, waits)


def test_who_is_to_blame() -> None:
    assert blame({0: there(), 2: there()}, world=3) == "rank 1 does not answer"
    assert blame({1: there()}, world=3) == "rank 0, 2 do not answer"
    busy = there(at="loader.py:9 read", waits=False)
    assert blame({0: there(), 1: busy}, world=2) == "rank 1 hangs in step 3 at loader.py:9 read, the others wait for it"
    late = there(doing="step 2", beats=3)
    found = blame({0: there(), 1: late}, world=2)
    assert found == "rank 1 hangs in step 2 at distributed.py:88 wait, the others are already at step 3"
    assert blame({0: there(), 1: there()}, world=2).startswith(
        "all ranks still answer, at distributed.py:88 wait (rank 0), "
    )


def ranks_of(spawn: Callable[..., Any], values: dict[str, Any], faults: list[dict[str, Any]]) -> list[Any]:
    """One process a rank, each with a fault of its own."""
    values = {**values, "engine": "zero3", "zero": PARTITION_ALL}
    shared = {"WORLD_SIZE": str(len(faults)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        spawn(
            values,
            {**fault, "environment": {**shared, "RANK": str(r), "LOCAL_RANK": str(r), **fault.get("environment", {})}},
        )
        for r, fault in enumerate(faults)
    ]


def said_by(out: Path, rank: int) -> str:
    return Path(f"{out}.rank{rank}.err").read_text()


@pytest.mark.slow
def test_a_rank_that_hangs_in_a_step_is_named_with_its_line(
    world: Path, tmp_path: Path, spawn: Callable[..., Any]
) -> None:
    out = tmp_path / "run"
    values = settings(world, out, steps=6, save_every=2, timeout_s=12.0)
    began = time.monotonic()
    processes = ranks_of(spawn, values, [{}, {"rows": 3, "sleep": 300}])
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [1, 1]
    assert time.monotonic() - began < 90
    for rank in range(2):
        said = said_by(out, rank)
        assert "rank 1 hangs in step " in said, said
        assert "at faults.py:" in said
        assert f"stacks are in {out}/stacks" in said
    assert "in counted" in (out / "stacks" / "rank1.txt").read_text()
    assert "in counted" not in (out / "stacks" / "rank0.txt").read_text()
    # Repeated without the fault, the run goes on: the stacks are no foreign files.
    again = ranks_of(spawn, values, [{}, {}])
    for process in again:
        process.join(120)
    assert [process.exitcode for process in again] == [0, 0]


@pytest.mark.slow
def test_a_frozen_rank_does_not_answer(world: Path, tmp_path: Path, spawn: Callable[..., Any]) -> None:
    values = settings(world, tmp_path / "run", steps=6, save_every=6, timeout_s=12.0)
    first, frozen = ranks_of(spawn, values, [{}, {"rows": 3, "signal": "SIGSTOP"}])
    try:
        first.join(120)
        assert first.exitcode == 1
        said = said_by(tmp_path / "run", 0)
        assert "rank 0 made no progress for 12 s during step " in said
        assert ": rank 1 does not answer; the job ends, stacks are in" in said
        assert frozen.exitcode is None
    finally:
        os.kill(frozen.pid, signal.SIGKILL)
        frozen.join(30)


@pytest.mark.slow
def test_a_slow_rank_is_named(world: Path, tmp_path: Path, spawn: Callable[..., Any]) -> None:
    out, steps = tmp_path / "run", 14
    values = settings(world, out, steps=steps, save_every=steps, guards={"straggler_steps": 6})
    processes = ranks_of(spawn, values, [{}, {"busy": 0.25}])
    for process in processes:
        process.join(180)
    assert [process.exitcode for process in processes] == [0, 0]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    warned = [line for line in lines if line["kind"] == "straggler"]
    named = [(line["slowest_rank"], line["slowest_part"]) for line in warned]
    assert named.count((1, "host")) == 1  # said once
    assert (0, "host") not in named  # the other parts are as this machine has them
    warned = [line for line in warned if line["slowest_part"] == "host"]
    assert warned[0]["step"] >= 6
    assert warned[0]["slowest_s"] > 0.25
    assert warned[0]["slowest_costs_s"] == pytest.approx(warned[0]["slowest_s"] - warned[0]["others_s"])
    train = [line for line in lines if line["kind"] == "train"]
    assert len(train) == steps
    assert all("slowest_s" in line and "slowest_rank" in line for line in train)
    assert f"warning: step {warned[0]['step']}: rank 1 is slow in its host time, " in said_by(out, 0)


@pytest.mark.slow
def test_ranks_that_compute_with_something_else_are_one_line(
    world: Path, tmp_path: Path, spawn: Callable[..., Any]
) -> None:
    values = settings(world, tmp_path / "run")
    processes = ranks_of(spawn, values, [{}, {"environment": {"MEGAPRIOR_LOSS_IMPL": "triton"}}])
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [2, 2]
    for rank in range(2):
        (line,) = [line for line in said_by(tmp_path / "run", rank).splitlines() if line.startswith("child:")]
        assert (
            "rank 1 has loss_kernels triton, rank 0 has torch: their sums would differ; give all machines the same"
            in line
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_environment_without_a_rank_is_one_line(world: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings(world, tmp_path / "run", engine="zero3")))
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK")}
    done = subprocess.run(
        [sys.executable, "-m", "megaprior.cli", "train", str(tmp_path / "run.yaml")],
        env={**environment, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(
        "megaprior: error: RANK, LOCAL_RANK not set while WORLD_SIZE is; set all"
    )

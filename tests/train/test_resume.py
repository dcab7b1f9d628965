"""Killed anywhere and repeated, a run ends with the losses and weights of the undisturbed one, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from train_children import config, settings, train

from megaprior.errors import CheckpointError, DataError, UsageError

STEPS, SAVE_EVERY = 6, 2
# What a metrics line says about the run itself; the rest are times.
FACTS = (
    "kind",
    "step",
    "loss",
    "ntp_loss",
    "grad_norm",
    "lr",
    "loss_tokens",
    "sum_g",
    "heldout_ntp",
    "heldout_ntp_above",
)


def run_settings(world: Path, out: Path, **changes: Any) -> dict[str, Any]:
    return settings(
        world, out, **{"steps": STEPS, "save_every": SAVE_EVERY, "eval_every": 3, "eval_batches": 1, **changes}
    )


def facts(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    # When a checkpoint was complete, and how long that took, is no fact of the training: a killed run lacks some of these.
    return [{key: line[key] for key in FACTS if key in line} for line in lines if line["kind"] != "save"]


def weights(out: Path, step: int = STEPS) -> dict[str, bytes]:
    tensors = load_file(out / "checkpoints" / f"step_{step:08d}" / "model" / "model.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def straight(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run."""
    out = tmp_path_factory.mktemp("runs") / "straight"
    assert train(config(run_settings(world, out))) == 0
    return out


def finish(process: Any) -> int:
    process.join(120)
    assert process.exitcode is not None, "the child hangs"
    return process.exitcode


@pytest.mark.parametrize(
    ("row", "background"), [(1, True), (4, False), (6, True), (6, False), (9, True), (12, True), (12, False)]
)
def test_killed_before_any_row_and_repeated(
    world: Path, straight: Path, spawn: Callable[..., Any], tmp_path: Path, row: int, background: bool
) -> None:
    # Two rows a step: odd numbers are the beginning of a step, even ones the middle of its accumulation.
    out = tmp_path / "run"
    values = run_settings(world, out, save_background=background)
    assert finish(spawn(values, {"rows": row})) == -signal.SIGKILL
    due = range(SAVE_EVERY, (row - 1) // 2 + 1, SAVE_EVERY)
    found = sorted(p.name for p in (out / "checkpoints").glob("step_*"))
    expected = [f"step_{step:08d}" for step in due]
    # The newest may not have been committed yet when it is written beside the training; the one before it was waited for.
    assert found == expected or (background and found == expected[:-1])
    assert train(config(values)) == 0
    assert facts(out) == facts(straight)
    assert weights(out) == weights(straight)
    assert json.loads((out / "summary.json").read_text())["restarts"] == (1 if found else 0)


def test_killed_at_any_file_of_a_save(world: Path, straight: Path, spawn: Callable[..., Any], tmp_path: Path) -> None:
    # One child after another, each killed a few file operations further into its first save, until one is not reached.
    out, kills = tmp_path / "run", 0
    for number in count(1, 4):
        shutil.rmtree(out, ignore_errors=True)
        values = run_settings(
            world, out, steps=2, eval_every=0
        )  # the rate warms up for two steps: as in the longer run
        code = finish(spawn(values, {"files": number, "below": "step_00000002"}))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        kills += 1
        whole = out / "checkpoints" / "step_00000002"
        assert not whole.exists() or (whole / "manifest.json").exists()
        assert train(config(values)) == 0
        assert weights(out, 2) == weights(straight, 2)
        assert [p.name for p in (out / "checkpoints").iterdir()] == ["step_00000002"]  # nothing half-written is left
        assert (out / "latest").read_text() == "step_00000002\n"
    assert kills >= 5


def test_a_save_that_cannot_be_written_leaves_the_earlier_ones(
    world: Path, straight: Path, spawn: Callable[..., Any], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    copy_at(straight, out, 2)
    before = weights(out, 2)
    assert finish(spawn(run_settings(world, out), {"largest": 300_000})) == 65
    said = Path(f"{out}.rank0.err").read_text()
    assert "step_00000004" in said
    assert "the earlier checkpoints are intact: free some space and repeat the command" in said
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step_00000002"]
    assert weights(out, 2) == before
    assert train(config(run_settings(world, out))) == 0
    assert facts(out) == facts(straight)
    assert weights(out) == weights(straight)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
@pytest.mark.parametrize("row", [1, 5, 8])
def test_a_signal_stops_at_the_next_step_boundary(
    world: Path, straight: Path, spawn: Callable[..., Any], tmp_path: Path, name: str, row: int
) -> None:
    out = tmp_path / "run"
    assert finish(spawn(run_settings(world, out), {"rows": row, "signal": name})) == 75
    step = (row + 1) // 2  # the step whose row it interrupted is finished, none after it is begun
    assert (out / "latest").read_text() == f"step_{step:08d}\n"
    assert [fact["step"] for fact in facts(out) if fact["kind"] == "train"] == list(range(1, step + 1))
    assert train(config(run_settings(world, out))) == 0
    assert facts(out) == facts(straight)
    assert weights(out) == weights(straight)


MOMENTS = {  # what it interrupts, and the step whose checkpoint it leaves
    "start": ({"files": 1, "below": "config.yaml"}, 1),
    "opening the shards": ({"files": 1, "below": "pairs/00000.json"}, 1),
    "evaluation": ({"heldout_rows": 1}, 4),  # after step 3
    "save": ({"files": 3, "below": "step_00000002"}, 3),
}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize(("name", "times"), [("SIGTERM", 1), ("SIGUSR1", 2)], ids=["SIGTERM", "SIGUSR1 twice"])
def test_a_signal_outside_a_step_stops_after_the_next(
    world: Path, straight: Path, spawn: Callable[..., Any], tmp_path: Path, moment: str, name: str, times: int
) -> None:
    out = tmp_path / "run"
    fault, step = MOMENTS[moment]
    assert finish(spawn(run_settings(world, out), {**fault, "signal": name, "times": times})) == 75
    assert (out / "latest").read_text() == f"step_{step:08d}\n"
    assert [fact["step"] for fact in facts(out) if fact["kind"] == "train"] == list(range(1, step + 1))
    assert train(config(run_settings(world, out))) == 0
    assert facts(out) == facts(straight)
    assert weights(out) == weights(straight)


def test_the_command_itself_leaves_with_75(world: Path, tmp_path: Path) -> None:
    """A scheduler's signal to `megaprior train` while it still imports: a checkpoint all the same, and one line."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run_settings(world, tmp_path / "run", steps=2000)))
    command = [sys.executable, "-m", "megaprior.cli", "train", str(tmp_path / "run.yaml"), "eval_every=0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not catches(process.pid, signal.SIGTERM):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 75, said
    assert said.splitlines()[-1] == (
        "megaprior: error: SIGTERM: stopped after step 1 with a checkpoint; repeat the command to go on"
    )
    assert (tmp_path / "run" / "latest").read_text() == "step_00000001\n"


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    mask = next(line for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(mask.split()[1], 16) >> (number - 1) & 1)


@pytest.mark.parametrize("delay", [0.0, 0.3, 0.6, 1.0])
def test_signals_at_odd_moments_twice_and_mixed(
    world: Path, spawn: Callable[..., Any], tmp_path: Path, delay: float
) -> None:
    out = tmp_path / "run"
    values = run_settings(world, out, steps=2000, save_every=7, eval_every=5)
    process = spawn(values)
    wait_for(out / "config.yaml", process)  # before it the process is not yet a trainer
    time.sleep(delay)
    os.kill(process.pid, signal.SIGUSR1)
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    assert finish(process) == 75
    newest = int((out / "latest").read_text().strip().removeprefix("step_"))
    assert facts(out)[-1]["step"] == newest  # nothing was computed that the checkpoint lacks


def wait_for(path: Path, process: Any) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.is_alive(), "the child ended early"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_finished_run_repeated_does_nothing(world: Path, straight: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in straight.rglob("*") if p.is_file() and p.name != "config.yaml"}
    assert train(config(run_settings(world, straight))) == 0
    assert {p: p.stat().st_mtime_ns for p in straight.rglob("*") if p.is_file() and p.name != "config.yaml"} == before


def test_a_run_killed_before_its_summary_gets_one(world: Path, straight: Path, tmp_path: Path) -> None:
    out = shutil.copytree(straight, tmp_path / "run")
    expected = json.loads((out / "summary.json").read_text())
    (out / "summary.json").unlink()
    assert train(config(run_settings(world, out))) == 0
    assert json.loads((out / "summary.json").read_text()) == expected


def copy_at(straight: Path, out: Path, step: int) -> None:
    """The run as it was after `step`, as far as a restart looks."""
    shutil.copytree(straight, out)
    for folder in (out / "checkpoints").iterdir():
        if folder.name > f"step_{step:08d}":
            shutil.rmtree(folder)


def test_resumed_at_any_step_equals_the_straight_run(world: Path, straight: Path, tmp_path: Path) -> None:
    every = tmp_path / "every"
    train(config(run_settings(world, every, save_every=1)))
    assert facts(every) == facts(straight)  # saving is not part of the trajectory
    for step in range(1, STEPS):
        out = tmp_path / f"from {step}"
        copy_at(every, out, step)
        assert train(config(run_settings(world, out, save_every=1))) == 0
        assert json.loads((out / "summary.json").read_text())["restarts"] == 1
        assert facts(out) == facts(straight)
        assert weights(out) == weights(straight)


def test_a_changed_configuration_is_refused_by_name(world: Path, straight: Path, tmp_path: Path) -> None:
    copy_at(straight, tmp_path / "run", 4)
    other = run_settings(world, tmp_path / "run", optim={"lr": 1e-3, "warmup_steps": 2})
    with pytest.raises(UsageError, match=r"optim\.lr=0\.003, the command says 0\.001"):
        train(config(other))
    longer = run_settings(world, tmp_path / "run", steps=8)  # a cosine over 8 steps is another one from step 3 on
    with pytest.raises(UsageError, match="steps=6, the command says 8"):
        train(config(longer))


def test_a_constant_rate_lets_a_run_be_prolonged(world: Path, tmp_path: Path) -> None:
    optim = {"lr": 3e-3, "schedule": "constant"}
    short, long = (run_settings(world, tmp_path / "a", steps=n, optim=optim, eval_every=0) for n in (2, 4))
    train(config(short))
    train(config(long))
    once = run_settings(world, tmp_path / "b", steps=4, optim=optim, eval_every=0)
    train(config(once))
    assert facts(tmp_path / "a") == facts(tmp_path / "b")
    assert weights(tmp_path / "a", 4) == weights(tmp_path / "b", 4)


def test_other_data_or_another_batch_size_are_refused(world: Path, straight: Path, tmp_path: Path) -> None:
    copy_at(straight, tmp_path / "run", 4)
    values = run_settings(world, tmp_path / "run")
    values["data"]["batch_size"] = 9
    with pytest.raises(CheckpointError, match="in batch_size: 9 now, 8 then"):
        train(config(values))
    values = run_settings(world, tmp_path / "run")
    values["data"]["train"][0]["path"] = str(world / "heldout")
    with pytest.raises(CheckpointError, match="in sources"):
        train(config(values))


def test_two_trainers_on_one_folder(world: Path, spawn: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = spawn(run_settings(world, out, steps=2000, eval_every=0))
    wait_for(out / "metrics.jsonl", process)
    with pytest.raises(DataError, match=f"pid {process.pid}"):
        train(config(run_settings(world, out, steps=2000)))
    process.kill()
    finish(process)


def test_a_folder_of_something_else_is_left_alone(world: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="not empty and not a run of ours"):
        train(config(run_settings(world, tmp_path)))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]

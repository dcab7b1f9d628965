"""Metrics survive kills, full disks and trackers that fail; progress is plain lines where there is no terminal."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megaprior import telemetry, trackers
from megaprior.errors import DataError
from megaprior.telemetry import MetricsLog, progress
from megaprior.trackers import TrackerConfig, open_trackers

# TensorBoard's own thread, when its folder is gone; it may come up in a later test.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
BOARD = TrackerConfig(tensorboard=True)
WANDB = TrackerConfig(tensorboard=False, wandb="prior")


def test_every_metrics_line_is_on_disk_at_once(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.write({"kind": "train", "step": 1, "loss": 2.5})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"kind": "train", "step": 1, "loss": 2.5}
    log.close()
    again = MetricsLog(tmp_path)
    again.write({"kind": "train", "step": 2, "loss": 2.25})
    again.close()
    assert steps(tmp_path) == [1, 2]


def steps(folder: Path) -> list[int]:
    """The steps of the whole lines of metrics.jsonl."""
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_number_that_json_cannot_hold_is_refused_where_others_reckon_with_it(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    for line in ({"loss": float("nan")}, {"kind": "train", "step": 1, "loss": float("inf")}):
        with pytest.raises(ValueError, match="not JSON compliant"):
            log.write(line)
    log.write({"kind": "skip", "step": 3, "loss": float("nan"), "norms": [1.0, float("-inf")], "ids": np.arange(2)})
    log.write({"kind": "spike", "step": 4, "loss": np.float32(0.5), "norm": torch.tensor(2.0), "of": {"max": np.inf}})
    log.close()
    assert [json.loads(line) for line in log.path.read_text().splitlines()] == [
        {"kind": "skip", "step": 3, "loss": "nan", "norms": [1.0, "-inf"], "ids": [0, 1]},
        {"kind": "spike", "step": 4, "loss": 0.5, "norm": 2.0, "of": {"max": "inf"}},
    ]


def test_a_full_disk_is_told_in_bytes(tmp_path: Path, small_disk: Callable[..., Any]) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with small_disk(folder, "16k"):
        log = MetricsLog(folder)
        with pytest.raises(DataError, match=r"disk full \([0-9,]+ bytes needed, [0-9,]+ bytes free\)"):
            for step in range(2000):
                log.write({"kind": "train", "step": step, "loss": 2.5})
        log.close()
        assert step > 100
        *whole, _ = (folder / "metrics.jsonl").read_text().split("\n")
        assert [json.loads(line)["step"] for line in whole] == list(range(step))


# ---------------------------------------------------------------- TensorBoard


def series(folder: Path, name: str) -> list[tuple[int, float]]:
    """What TensorBoard itself would show."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    return [(event.step, event.value) for event in board.Scalars(name)]


def test_tensorboard_shows_every_kind_and_after_a_resume_no_step_twice(tmp_path: Path) -> None:
    for start, last, loss in ((0, 7, 1.0), (5, 9, 2.0)):  # killed after step 7, resumed from the checkpoint of step 5
        log = MetricsLog(tmp_path, open_trackers(BOARD, tmp_path, start=start, config={}))
        for step in range(start + 1, last + 1):
            log.write({"kind": "train", "step": step, "loss": loss})
        log.write({"kind": "save", "step": last, "seconds": 0.25, "path": "checkpoints/x"})
        log.write({"kind": "warn", "message": "no step here"})
        log.close()
        time.sleep(1.1)  # TensorBoard orders its files by the second they were begun
    assert series(tmp_path, "train/loss") == [*((s, 1.0) for s in range(1, 6)), *((s, 2.0) for s in range(6, 10))]
    assert series(tmp_path, "save/seconds") == [(9, 0.25)]


def test_a_run_outlives_its_tensorboard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its folder is gone while the run goes on; its own thread notices when it next flushes."""
    (board,) = trackers = open_trackers(BOARD, tmp_path, start=0, config={})
    log = MetricsLog(tmp_path, trackers)
    shutil.rmtree(tmp_path / "tensorboard")
    with contextlib.suppress(Exception):
        board._writer.flush()
    for step in range(200):
        log.write({"kind": "train", "step": step, "loss": 1.0})
        if not log._trackers:
            break
        time.sleep(0.02)
    log.write({"kind": "train", "step": 1000, "loss": 1.0})
    log.close()
    assert steps(tmp_path) == [*range(step + 1), 1000]
    assert capsys.readouterr().err.count("TensorBoard is off from here on") == 1


def test_a_folder_that_cannot_hold_tensorboard_costs_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tensorboard").write_text("in the way")
    assert open_trackers(BOARD, tmp_path, start=0, config={}) == []
    assert capsys.readouterr().err.count("TensorBoard is off (") == 1


# ---------------------------------------------------------------- Weights & Biases

RECORDER = """
import json, os
from pathlib import Path

class Run:
    def __init__(self, order): self.file = open(Path(order["dir"]) / "shown.jsonl", "a")
    def log(self, values, step):
        {log}
    def finish(self):
        {finish}

def init(**order):
    {init}
    return Run(order)
"""
SHOW = "print(json.dumps([step, values]), file=self.file, flush=True)"


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`module(log="...", init="...", finish="...")` puts a package `wandb` with these bodies on the path of children."""

    def write(log: str = SHOW, init: str = "pass", finish: str = "pass") -> None:
        site = tmp_path / "site"
        site.mkdir(exist_ok=True)
        text = RECORDER
        for name, body in (("log", log), ("init", init), ("finish", finish)):
            text = text.replace("{" + name + "}", body)
        (site / "wandb.py").write_text(text)
        monkeypatch.setenv("PYTHONPATH", str(site), prepend=os.pathsep)
        monkeypatch.syspath_prepend(str(site))

    return write


def run(folder: Path, *, start: int = 0, last: int = 3) -> None:
    """A run of a few steps whose tracker is W&B."""
    log = MetricsLog(folder, open_trackers(WANDB, folder, start=start, config={"seed": 1}))
    for step in range(start + 1, last + 1):
        log.write({"kind": "train", "step": step, "loss": 1.0, "note": "text"})
        log.write({"kind": "save", "step": step - 1, "seconds": 0.5})
    log.close()


def test_wandb_sees_every_line_and_a_resumed_run_keeps_its_id(tmp_path: Path, module: Callable[..., None]) -> None:
    module(init='print(json.dumps(order), file=open(Path(order["dir"]) / "orders.jsonl", "a"))')
    run(tmp_path)
    run(tmp_path, start=3, last=4)
    shown = [json.loads(line) for line in (tmp_path / "shown.jsonl").read_text().splitlines()]
    assert shown == [line for s in range(1, 5) for line in ([s, {"train/loss": 1.0}], [s, {"save/seconds": 0.5}])]
    first, second = (json.loads(line) for line in (tmp_path / "orders.jsonl").read_text().splitlines())
    assert first == second
    assert (first["project"], first["mode"], first["name"]) == ("prior", "offline", tmp_path.name)
    assert first["config"] == {"seed": 1}
    assert first["id"] == (tmp_path / "wandb_id").read_text().strip()


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"init": 'raise OSError("no route to host")'}, "no route to host"),
        ({"log": 'if step == 2: raise RuntimeError("in the\\nmiddle")'}, "in the middle"),
        ({"finish": 'raise ValueError("at the end")'}, "at the end"),
        ({"log": "os.kill(os.getpid(), 9)"}, "its process ended with exit code -9"),
        ({"finish": "import time; time.sleep(600)"}, "it did not finish within 2 s"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_run_outlives_wandb(
    tmp_path: Path,
    module: Callable[..., None],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    fault: dict[str, str],
    words: str,
) -> None:
    module(**fault)
    monkeypatch.setattr(trackers, "_CLOSE_S", 2.0)
    run(tmp_path)
    assert steps(tmp_path) == [1, 0, 2, 1, 3, 2]
    said = [line for line in capfd.readouterr().err.splitlines() if line]
    assert len(said) == 1, said
    assert said[0].startswith("Weights & Biases is off from here on (")
    assert words in said[0]


def test_a_wandb_that_is_not_installed_costs_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [p for p in sys.path if not (Path(p) / "wandb").exists()])
    run(tmp_path)
    assert steps(tmp_path) == [1, 0, 2, 1, 3, 2]
    assert capfd.readouterr().err.splitlines() == [
        "Weights & Biases is off (the package wandb is not installed: pip install wandb); metrics.jsonl is complete without it"
    ]


def test_wandb_shows_what_a_killed_run_had_logged(tmp_path: Path, module: Callable[..., None]) -> None:
    module(finish='(Path(self.file.name).parent / "finished").touch()')
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom megaprior.telemetry import MetricsLog\n"
        "from megaprior.trackers import TrackerConfig, open_trackers\nout = Path(sys.argv[1])\n"
        "cfg = TrackerConfig(tensorboard=False, wandb='prior')\n"
        "log = MetricsLog(out, open_trackers(cfg, out, start=0, config={}))\n"
        "for step in range(1, 4):\n    log.write({'kind': 'train', 'step': step, 'loss': 1.0})\n"
        "os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)]).returncode == -9
    until = time.monotonic() + 30
    while not (tmp_path / "finished").exists():
        assert time.monotonic() < until
        time.sleep(0.05)
    shown = [json.loads(line)[0] for line in (tmp_path / "shown.jsonl").read_text().splitlines()]
    assert shown == [1, 2, 3]


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs the package wandb")
def test_the_real_wandb_needs_no_network_and_no_home(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/dev/null")
    run(tmp_path)
    run(tmp_path, start=3, last=4)
    assert capfd.readouterr().err == ""
    name = (tmp_path / "wandb_id").read_text().strip()
    kept = sorted((tmp_path / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb"))
    assert len(kept) == 2
    assert [path.read_bytes().count(b"train/loss") > 0 for path in kept] == [True, True]


# ---------------------------------------------------------------- progress


def test_progress_off_a_terminal_is_plain_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry, "_LINE_EVERY_S", 0.0)
    with progress(4, "score", "captions") as bar:
        bar.advance(2, note="perplexity 9.5")
    first = capsys.readouterr().err.splitlines()[0]
    assert first.startswith("score: 2 of 4 (50%) captions, ")
    assert first.endswith("perplexity 9.5")


def test_ranks_other_than_zero_are_silent(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    telemetry.say("hello")
    assert capsys.readouterr().err == ""

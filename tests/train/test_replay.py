"""A replayed step gives the batch, loss and gradient norm that were logged, from any earlier state."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from train_children import config, settings, train

from megaprior.errors import UsageError
from megaprior.train.replay import replay, replay_step


@pytest.fixture(scope="module")
def run(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    train(config(settings(world, out)))  # checkpoints after steps 3 and 6
    return out


def logged(run: Path, step: int) -> dict:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return next(line for line in lines if line["kind"] == "train" and line["step"] == step)


@pytest.mark.parametrize("step", [1, 2, 4, 6], ids=["first", "again from nothing", "after a checkpoint", "later"])
def test_it_equals_what_was_logged(run: Path, step: int) -> None:
    found, line = replay_step(run, step), logged(run, step)
    assert found.totals.loss == line["loss"]  # bit for bit: the same kernels on the same numbers
    assert found.totals.norm == line["grad_norm"]
    assert found.denominator == line["denominator"]
    assert found.totals.sum_g == line["sum_g"]
    assert len(found.sample_ids) in (12, 13)


def test_what_it_prints(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert replay(run, 4) == 0
    printed, line = capsys.readouterr().out, logged(run, 4)
    assert f"D {line['denominator']}" in printed
    assert f"loss {line['loss']:.9f}, gradient norm {line['grad_norm']:.9f}" in printed
    assert f"logged then: loss {line['loss']:.9f}" in printed


def test_steps_that_do_not_exist(run: Path, tmp_path: Path) -> None:
    for step in (0, 7):
        with pytest.raises(UsageError, match="the run's steps are 1 to 6"):
            replay_step(run, step)
    with pytest.raises(UsageError, match="not a run"):
        replay_step(tmp_path, 1)


def test_a_partitioned_state_names_the_steps_it_can_replay(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace("engine: local", "engine: zero3"))
    assert replay_step(copy, 4).totals.loss == pytest.approx(logged(run, 4)["loss"], rel=1e-6)  # needs model/ alone
    with pytest.raises(UsageError, match="only the steps that follow a checkpoint: 1, 4, 7"):
        replay_step(copy, 6)

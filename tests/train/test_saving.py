"""Saving beside the training: the same bits, a loop that goes on, a failure that stops it, and which checkpoints stay."""

from __future__ import annotations

import shutil
import signal
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from outcomes import lines
from safetensors.torch import load_file
from train_children import config, settings

from megaprior.distributed import Peers, Place
from megaprior.errors import CheckpointError, MegapriorError, UsageError
from megaprior.objectives.base import Step
from megaprior.telemetry import MetricsLog
from megaprior.train import assembly
from megaprior.train.checkpoint import complete_checkpoints, complete_steps, open_checkpoint
from megaprior.train.engine import LocalEngine
from megaprior.train.host_memory import available_memory, fits_in_memory
from megaprior.train.retention import superfluous
from megaprior.train.run import train
from megaprior.train.saving import Saver
from megaprior.train.snapshot import HostBuffers, Write

CONSTANT = {"lr": 3e-3, "schedule": "constant"}


def weights(out: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(out / "checkpoints" / f"step_{step:08d}" / "model" / "model.safetensors")


def test_beside_the_training_or_before_it_the_same_bits(world: Path, tmp_path: Path) -> None:
    for background in (False, True):
        out = tmp_path / str(background)
        train(config(settings(world, out, save_every=2, save_background=background)))
    one, other = tmp_path / "False", tmp_path / "True"
    assert [line["loss"] for line in lines(one, "train")] == [line["loss"] for line in lines(other, "train")]
    for step in (2, 4, 6):
        first, second = (open_checkpoint(out / "checkpoints" / f"step_{step:08d}") for out in (one, other))
        assert first.manifest["files"].keys() == second.manifest["files"].keys()
        name = "model/model.safetensors"
        assert first.manifest["files"][name] == second.manifest["files"][name]
        states = [torch.load(c.state / "local.pt", weights_only=True) for c in (first, second)]
        torch.testing.assert_close(states[1], states[0], rtol=0, atol=0)
    for out, background in ((one, False), (other, True)):
        saves = lines(out, "save")
        assert [(line["step"], line["background"]) for line in saves] == [(step, background) for step in (2, 4, 6)]
        for line in saves:
            assert line["stall_s"] > 0
            assert line["write_s"] > 0
            assert line["bytes"] == sum(
                path.stat().st_size
                for path in (out / "checkpoints" / f"step_{line['step']:08d}").rglob("*")
                if path.is_file() and path.name != "manifest.json"
            )


class SlowDisk(LocalEngine):
    """Its state has one more file, whose writing waits until it may."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.may_write = threading.Event()

    def snapshot_state(self, folder: Path, buffers: HostBuffers | None) -> list[Write]:
        def wait() -> None:
            assert self.may_write.wait(60)
            (folder / "late").write_text("")

        return [Write(folder / "late", wait), *super().snapshot_state(folder, buffers)]


class Bench:
    """A Saver on a real engine, and a disk as slow as a test needs it."""

    def __init__(self, world: Path, out: Path, **options: Any) -> None:
        cfg = config(settings(world, out, stage="textlm", model={"llama": SMALL}))
        tokenizer = assembly.open_tokenizer(cfg)
        module = Step(assembly.build_model(cfg, tokenizer), assembly.objective(cfg))
        self.engine = SlowDisk(module, cfg.optim, precision="fp32", device=torch.device("cpu"))
        self.may_write, self.log = self.engine.may_write, MetricsLog(out)
        common: dict[str, Any] = {
            "engine": self.engine,
            "peers": Peers(Place()),
            "tokenizer": tokenizer,
            "log": self.log,
        }
        self.saver = Saver(out, **common, facts=lambda: {"world": 1}, **options)

    def step(self) -> None:
        """Move every weight."""
        for parameter in self.engine.module.parameters():
            parameter.grad = torch.ones_like(parameter)
        self.engine.update(lr=0.1, scale=1.0)

    def now(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.engine.weights()}


SMALL = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
}


@pytest.fixture
def bench(world: Path, tmp_path: Path) -> Any:
    return lambda **options: Bench(world, tmp_path / "run", **options)


def test_training_goes_on_and_the_checkpoint_is_of_its_own_step(bench: Callable[..., Bench], tmp_path: Path) -> None:
    at, out = bench(), tmp_path / "run"
    at.step()
    first = at.now()
    with at.saver as saver:
        saver.save(1)
        saver.poll()
        at.step()  # while nothing of it is committed yet
        assert complete_steps(out) == []
        assert not (out / "latest").exists()
        second = at.now()
        threading.Timer(0.5, at.may_write.set).start()
        saver.save(2)  # waits for the one before
        assert complete_steps(out) == [1]
        at.step()
        saver.finish()
    assert sorted(complete_steps(out)) == [1, 2]
    for step, expected in ((1, first), (2, second)):
        torch.testing.assert_close(weights(out, step), expected, rtol=0, atol=0)
        state = torch.load(out / f"checkpoints/step_{step:08d}/state/local.pt", weights_only=True)["module"]
        torch.testing.assert_close({n: state[f"model.{n}"] for n in expected}, expected, rtol=0, atol=0)
    saves = lines(out, "save")
    assert saves[0]["wait_s"] < 0.2
    assert 0.2 < saves[1]["wait_s"] <= saves[1]["stall_s"]
    assert (out / "latest").read_text() == "step_00000002\n"


def test_in_the_foreground_nothing_goes_on_before_the_commit(bench: Callable[..., Bench], tmp_path: Path) -> None:
    at = bench(background=False)
    threading.Timer(0.3, at.may_write.set).start()
    at.saver.save(1)
    assert complete_steps(tmp_path / "run") == [1]
    assert lines(tmp_path / "run", "save")[0]["stall_s"] > 0.2


def test_a_failed_write_is_raised_at_the_next_boundary(bench: Callable[..., Bench], tmp_path: Path) -> None:
    at, out = bench(), tmp_path / "run"
    at.may_write.set()
    at.saver.save(1)
    at.saver.finish()
    at.may_write.clear()
    at.saver.save(2)
    at.saver.poll()
    folder = next((out / "checkpoints").glob(".step_00000002*"))
    shutil.rmtree(folder)  # somebody's clean-up script
    at.may_write.set()
    with pytest.raises(
        CheckpointError, match=r"step_00000002.*cannot be written .* bytes free\); the earlier checkpoints"
    ):
        wait_for_failure(at.saver)
    assert complete_steps(out) == [1]
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_00000001"]
    at.saver.poll()  # said once


def wait_for_failure(saver: Saver) -> None:
    for _ in range(200):
        saver.poll()
        time.sleep(0.02)


def test_an_error_of_the_run_still_commits_what_is_written(bench: Callable[..., Bench], tmp_path: Path) -> None:
    at = bench()
    threading.Timer(0.3, at.may_write.set).start()
    with pytest.raises(MegapriorError, match="loss is not finite"), at.saver as saver:
        saver.save(1)
        raise MegapriorError("loss is not finite")
    assert complete_steps(tmp_path / "run") == [1]


def test_copies_share_nothing_with_what_goes_on() -> None:
    tied = torch.arange(6.0).reshape(2, 3)
    state = {
        "a": [tied, {"b": tied.t()}],
        "c": (tied, 3),
        "d": torch.nn.Parameter(torch.ones(2)),
        "e": {"deep": [1, 2]},
    }
    buffers = HostBuffers()
    copied = buffers.copy_all(state)
    assert copied["a"][0] is copied["c"][0], "one tensor in two places stays one"
    tied.zero_()
    state["e"]["deep"].append(3)
    assert copied["a"][0].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert copied["a"][1]["b"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert copied["e"] == {"deep": [1, 2]}
    assert not copied["d"].requires_grad
    held = buffers.nbytes
    buffers.begin()
    again = buffers.copy_all(state)
    assert again["a"][0].data_ptr() == copied["a"][0].data_ptr(), "the memory is used again"
    assert buffers.nbytes == held
    assert again["a"][0].count_nonzero() == 0


def test_a_copy_that_does_not_fit_is_not_made(capsys: pytest.CaptureFixture[str]) -> None:
    assert 2**20 < available_memory() < 2**60
    assert fits_in_memory(1.0, Peers(Place()))
    assert not fits_in_memory(2.0**60, Peers(Place()))
    assert "this checkpoint is written before training goes on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("last", "every", "gone"),
    [
        (0, 0, []),
        (1, 0, [1, 2, 3, 4, 5, 6]),
        (3, 0, [1, 2, 3, 4]),
        (2, 3, [1, 2, 4, 5]),
        (7, 0, []),
        (100, 2, []),
        (1, 7, [1, 2, 3, 4, 5, 6]),
    ],
)
def test_which_checkpoints_go(last: int, every: int, gone: list[int]) -> None:
    assert superfluous([7, 1, 2, 3, 6, 5, 4], keep_last=last, keep_every=every) == gone


def test_a_run_keeps_the_last_and_every_nth(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(config(settings(world, out, steps=7, save_every=1, keep_last=2, keep_every=3, optim=CONSTANT)))
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == [f"step_0000000{n}" for n in (3, 6, 7)]
    assert (out / "latest").read_text() == "step_00000007\n"
    for checkpoint in complete_checkpoints(out):
        checkpoint.verify("state")
        checkpoint.verify("model")
    broken = out / "checkpoints" / "step_00000003" / "manifest.json"
    broken.unlink()
    (out / "notes").mkdir()
    train(config(settings(world, out, steps=8, save_every=1, keep_last=1, optim=CONSTANT)))
    # What is no complete checkpoint is nobody's to delete.
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == [f"step_0000000{n}" for n in (3, 8)]
    assert (out / "notes").is_dir()


@pytest.mark.parametrize(("below", "number"), [("local.pt", 5), ("model.safetensors", 5)])
def test_killed_in_a_deletion(world: Path, spawn: Callable[..., Any], tmp_path: Path, below: str, number: int) -> None:
    """Each save opens the file twice, to make it durable and for its digest; the fifth operation is its deletion."""
    out = tmp_path / "run"
    values = settings(world, out, steps=4, save_every=1, keep_last=1, optim=CONSTANT, data=small_data(world))
    child = spawn(values, {"files": number, "below": below})
    child.join(120)
    assert child.exitcode == -signal.SIGKILL
    assert complete_steps(out) == [2]
    hidden = [path.name for path in (out / "checkpoints").iterdir() if path.name.startswith(".")]
    assert len(hidden) == 1
    assert hidden[0].startswith(".step_00000001.tmp-")
    (out / ".latest.tmp-elsewhere-1").write_text("half")
    assert train(config(values)) == 0
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_00000004"]
    assert not list(out.glob(".*.tmp-*"))


def small_data(world: Path) -> dict[str, Any]:
    return {"train": [{"path": str(world / "pairs")}], "batch_size": 2, "max_tokens": 64, "pad_to": 32}


def test_old_checkpoints_make_room_on_a_small_disk(
    world: Path, tmp_path: Path, small_disk: Callable[[Path, str], AbstractContextManager[None]]
) -> None:
    probe = tmp_path / "probe"
    train(config(settings(world, probe, steps=1, save_every=1, optim=CONSTANT)))
    size = sum(path.stat().st_size for path in (probe / "checkpoints").rglob("*"))
    disk = tmp_path / "disk"
    disk.mkdir()
    with small_disk(disk, str(int(3.5 * size))):
        values = settings(world, disk / "run", steps=5, save_every=1, optim=CONSTANT)
        with pytest.raises(
            CheckpointError, match=r"disk full \([\d,]+ bytes needed, [\d,]+ bytes free\); earlier .* intact"
        ):
            train(config(values))
        kept = complete_steps(disk / "run")
        assert len(kept) >= 2
        for checkpoint in complete_checkpoints(disk / "run"):
            checkpoint.verify("state")
        # Room is made by hand, and with a rule the rest of the run fits.
        shutil.rmtree(disk / "run" / "checkpoints" / f"step_{min(kept):08d}")
        assert train(config({**values, "keep_last": 1})) == 0
        assert complete_steps(disk / "run") == [5]
        train(config(settings(world, tmp_path / "straight", steps=5, save_every=5, optim=CONSTANT)))
        torch.testing.assert_close(weights(disk / "run", 5), weights(tmp_path / "straight", 5), rtol=0, atol=0)


def test_rules_that_contradict_each_other_are_refused(world: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="keep_every is 500 but keep_last=0 keeps every checkpoint"):
        train(config(settings(world, tmp_path / "run", keep_every=500)))
    with pytest.raises(UsageError, match="keep_last is -1"):
        train(config(settings(world, tmp_path / "run", keep_last=-1)))

"""Checkpoints that are half-written, garbage, of another version or changed are never read."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from train_children import config, settings, train

from megaprior.errors import CheckpointError
from megaprior.files import digest_json
from megaprior.train.checkpoint import load_model_folder, newest, open_checkpoint, resolve_model

COMMON = {"save_every": 2, "optim": {"lr": 3e-3, "schedule": "constant"}}


@pytest.fixture(scope="module")
def trained(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints after steps 2 and 4."""
    out = tmp_path_factory.mktemp("runs") / "run"
    train(config(settings(world, out, steps=4, **COMMON)))
    return out


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it to spoil."""
    return shutil.copytree(trained, tmp_path / "run")


def folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


def test_the_layout(run: Path) -> None:
    checkpoint = open_checkpoint(folder(run, 4))
    assert checkpoint.step == 4
    assert checkpoint.manifest["engine"] == "local"
    listed = set(checkpoint.manifest["files"])
    found = {str(p.relative_to(checkpoint.path)) for p in checkpoint.path.rglob("*") if p.is_file()}
    assert listed | {"manifest.json"} == found
    assert {
        "model/config.json",
        "model/model.safetensors",
        "model/tokenizer/tokenizer.model",
        "state/local.pt",
    } <= listed
    assert not list(checkpoint.model.rglob("*.pt")) + list(checkpoint.model.rglob("*.bin"))
    assert (run / "latest").read_text() == "step_00000004\n"


def test_the_model_half_reloads_to_the_trained_weights(run: Path) -> None:
    state = torch.load(folder(run, 4) / "state" / "local.pt", weights_only=True)["module"]
    model = load_model_folder(run)
    assert not model.training
    found = model.state_dict()
    assert {f"model.{name}" for name in found} == set(state)
    for name, tensor in found.items():
        assert torch.equal(tensor, state[f"model.{name}"]), name


def spoil_missing_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def spoil_empty_manifest(path: Path) -> None:
    (path / "manifest.json").write_bytes(b"")


def spoil_garbage_manifest(path: Path) -> None:
    (path / "manifest.json").write_bytes(b"\x00\xff" * 100)


def spoil_newer_version(path: Path) -> None:
    body = json.loads((path / "manifest.json").read_text())
    body["version"] = 2
    body["digest"] = digest_json({k: v for k, v in body.items() if k != "digest"})
    (path / "manifest.json").write_text(json.dumps(body))


def spoil_missing_file(path: Path) -> None:
    (path / "model" / "model.safetensors").unlink()


def spoil_short_file(path: Path) -> None:
    file = path / "state" / "local.pt"
    file.write_bytes(file.read_bytes()[:-1])


SPOILED = [
    (spoil_missing_manifest, "no manifest"),
    (spoil_empty_manifest, "not a manifest"),
    (spoil_garbage_manifest, "manifest"),
    (spoil_newer_version, "version 2"),
    (spoil_missing_file, "missing, its manifest says"),
    (spoil_short_file, "bytes, its manifest says"),
]


@pytest.mark.parametrize(("spoil", "words"), SPOILED, ids=[spoil.__name__ for spoil, _ in SPOILED])
def test_an_incomplete_one_is_skipped_with_a_warning_and_refused_by_name(
    run: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], None], words: str
) -> None:
    spoil(folder(run, 4))
    found = newest(run)
    assert found is not None
    assert found.step == 2
    warned = capsys.readouterr().err
    assert "warning: skipped" in warned
    assert words in warned
    assert resolve_model(run) == folder(run, 2) / "model"
    for named in (folder(run, 4), folder(run, 4) / "model"):
        with pytest.raises(CheckpointError, match=words) as error:
            resolve_model(named)
        assert f"go on from the one before it, {folder(run, 2)}" in str(error.value)


@pytest.mark.parametrize(
    "content",
    [None, b"", b"\xff\x00garbage", b"step_99999999\n", b'{"version": 2, "step": 4}'],
    ids=["missing", "empty", "garbage", "absent", "newer"],
)
def test_latest_is_never_trusted_alone(run: Path, capsys: pytest.CaptureFixture[str], content: bytes | None) -> None:
    if content is None:
        (run / "latest").unlink()
    else:
        (run / "latest").write_bytes(content)
    found = newest(run)
    assert found is not None
    assert found.step == 4
    assert "going by the newest complete checkpoint, step_00000004" in capsys.readouterr().err


def test_no_complete_checkpoint_at_all(run: Path) -> None:
    for step in (2, 4):
        spoil_missing_manifest(folder(run, step))
    assert newest(run) is None
    with pytest.raises(CheckpointError, match="no complete checkpoint yet"):
        resolve_model(run)
    with pytest.raises(CheckpointError, match="there is no complete one before it"):
        open_checkpoint(folder(run, 2))


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def test_one_flipped_bit_is_refused_by_digest(world: Path, run: Path) -> None:
    weights = folder(run, 4) / "model" / "model.safetensors"
    flip(weights, -5)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: block 0 has digest .* the one before it"):
        resolve_model(run)
    resolve_model(folder(run, 2))

    flip(folder(run, 4) / "state" / "local.pt", 2000)
    flip(weights, -5)  # the other half is whole again
    with pytest.raises(CheckpointError, match=r"state/local\.pt: block 0"):
        train(config(settings(world, run, steps=6, **COMMON)))


def test_a_pickle_offered_as_weights_is_never_opened(run: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "executed",))

    model = shutil.copytree(folder(run, 4) / "model", tmp_path / "model")
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors"):
        resolve_model(model)
    state = folder(run, 4) / "state" / "local.pt"
    state.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match="bytes, its manifest says"):
        open_checkpoint(folder(run, 4))
    assert not (tmp_path / "executed").exists()


def test_a_folder_that_is_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a run, nor a checkpoint"):
        resolve_model(tmp_path)

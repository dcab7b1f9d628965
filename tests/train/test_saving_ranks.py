"""Saving under real ZeRO-3 ranks: the same bits beside the training and before it, a rank that cannot write, more and fewer
ranks, another base model, and files that would run code."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from outcomes import folder, lines, losses, model_bytes
from safetensors import safe_open
from train_children import hlvlm_settings, make_bases, settings

from megaprior.files import block_digests, read_manifest, write_manifest
from megaprior.train.checkpoint import FORMAT, MANIFEST, complete_checkpoints, complete_steps, open_checkpoint

CONSTANT = {"lr": 3e-3, "schedule": "constant"}
Launch = Callable[..., list[int]]


def said(out: Path, rank: int) -> str:
    return Path(f"{out}.rank{rank}.err").read_text()


@pytest.fixture(scope="module")
def values(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two ranks, saved after every second step."""
    return settings(world, tmp_path_factory.mktemp("runs") / "straight", steps=6, save_every=2, optim=CONSTANT)


@pytest.mark.slow
def test_two_ranks_save_beside_the_training(values: dict[str, Any], tmp_path: Path, launch: Launch) -> None:
    """Same bits in the foreground; a rank whose disk is full stops both; more files than a rank may write are never executed."""
    straight, other = Path(values["out"]), tmp_path / "foreground"
    assert launch(values) == [0, 0]
    assert launch({**values, "out": str(other), "save_background": False}) == [0, 0]
    assert losses(other) == losses(straight)
    assert model_bytes(other, 6) == model_bytes(straight, 6)
    assert [line["background"] for line in lines(straight, "save")] == [True] * 3
    manifests = [open_checkpoint(folder(out, 6)).manifest for out in (straight, other)]
    assert manifests[0]["files"].keys() == manifests[1]["files"].keys()
    states = [name for name in manifests[0]["files"] if name.endswith("_optim_states.pt")]
    assert len(states) == 2  # one per rank, and rank 0 vouches for the other's through its list
    complete_checkpoints(straight)[0].verify("state")

    # Rank 1 alone cannot write: neither goes on, the earlier checkpoint stands, and repeated the run ends with the same bits.
    out = tmp_path / "full"
    copy_at(straight, out, 2)
    stopped = {**values, "out": str(out)}
    assert launch(stopped, fault={"largest": 20_000, "only_rank": 1}) == [1, 65]
    assert "rank 1 failed: CheckpointError: " in said(out, 0)
    assert "the earlier checkpoints are intact: free some space and repeat the command" in said(out, 1)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_00000002"]
    assert launch(stopped) == [0, 0]
    assert losses(out) == losses(straight)
    assert model_bytes(out, 6) == model_bytes(straight, 6)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 1], ids=["as it lies", "through the universal format"])
def test_a_state_that_would_run_code_is_refused(
    values: dict[str, Any], world: Path, tmp_path: Path, launch: Launch, ranks: int
) -> None:
    """Even where somebody wrote a manifest that vouches for it."""
    out = tmp_path / "run"
    made = {**values, "out": str(out), "steps": 2}
    assert launch(made) == [0, 0]
    checkpoint = open_checkpoint(folder(out, 2))
    for path in checkpoint.state.rglob("*_optim_states.pt"):
        path.write_bytes(pickle.dumps(Evil(tmp_path / "executed")))
        name = str(path.relative_to(checkpoint.path))
        entry = {"bytes": path.stat().st_size, "blocks": block_digests(path)}
        body = read_manifest(checkpoint.path / MANIFEST, format=FORMAT)
        write_manifest(checkpoint.path / MANIFEST, {**body, "files": {**body["files"], name: entry}})
    assert launch({**made, "steps": 4}, world=ranks) == [65] * ranks
    assert "holds more than tensors and plain values" in said(out, 0)
    assert not (tmp_path / "executed").exists()


class Evil:
    """What a pickle may hold: a call."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["replicated", "partitioned"])
def test_an_mlp_from_one_rank_to_two_and_back(world: Path, tmp_path: Path, launch: Launch, placement: str) -> None:
    """The loss goes on as in the straight run, the frozen weights are the same bits throughout, and the checkpoints hold
    none of them; another base model is refused."""
    make_bases(tmp_path / "bases")
    out = tmp_path / "run"
    values = hlvlm_settings(world, tmp_path / "bases", out, steps=6, save_every=2, optim=CONSTANT)
    values["model"]["frozen"] = placement
    assert launch(values, world=1) == [0]
    straight = shutil.copytree(out, tmp_path / "straight")
    for ranks, back_to in ((2, 2), (1, 4)):
        for step in complete_steps(out):
            if step > back_to:
                shutil.rmtree(folder(out, step))
        assert launch(values, world=ranks) == [0] * ranks
        assert losses(out) == pytest.approx(losses(straight), rel=0, abs=2e-6)
    found = {c.step: c.manifest for c in complete_checkpoints(out)}
    assert [found[step]["world"] for step in (2, 4, 6)] == [1, 2, 1]
    assert {manifest["frozen"] for manifest in found.values()} == {
        open_checkpoint(folder(straight, 6)).manifest["frozen"]
    }
    check_that_only_the_mlp_is_kept(folder(out, 4))

    shutil.rmtree(folder(out, 6))
    make_bases(tmp_path / "others", tied=False)
    shutil.rmtree(tmp_path / "bases" / "lm")
    shutil.copytree(tmp_path / "others" / "lm", tmp_path / "bases" / "lm")
    assert launch(values, world=2) != [0, 0]
    assert "was trained on the language model" in said(out, 0)
    assert sorted(complete_steps(out)) == [2, 4]


def check_that_only_the_mlp_is_kept(checkpoint: Path) -> None:
    """Its size is that of the MLP: the weights, and three times as much of optimizer state, and what describes them."""
    with safe_open(checkpoint / "model" / "model.safetensors", framework="pt") as file:
        assert all(name.startswith("projector.") for name in file.keys())  # noqa: SIM118 (no mapping)
        weights = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    state = sum(path.stat().st_size for path in (checkpoint / "state").rglob("*.pt"))
    assert state < 3 * weights + 200_000
    assert (checkpoint / "model" / "model.safetensors").stat().st_size < weights + 10_000


def copy_at(straight: Path, out: Path, step: int) -> None:
    shutil.copytree(straight, out)
    for path in (out / "checkpoints").iterdir():
        if path.name > f"step_{step:08d}":
            shutil.rmtree(path)

"""Training an H-LVLM: only the MLP changes, with one process and under ZeRO-3, and a resume proves what is frozen."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from outcomes import losses
from safetensors.torch import load_file
from train_children import config, hlvlm_settings, make_bases, settings, uneven_data

from megaprior.errors import CheckpointError, DataError, UsageError
from megaprior.models.fingerprint import model_fingerprint
from megaprior.train.checkpoint import complete_checkpoints, load_model_folder
from megaprior.train.run import train


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `lm` (tied) and `tower`."""
    folder = tmp_path_factory.mktemp("bases")
    make_bases(folder)
    return folder


def model_files(out: Path, step: int) -> Path:
    return out / "checkpoints" / f"step_{step:08d}" / "model"


def test_only_the_mlp_changes_and_the_fingerprints_prove_it(world: Path, bases: Path, tmp_path: Path) -> None:
    before = {name: model_fingerprint(bases / name) for name in ("lm", "tower")}
    out = tmp_path / "run"
    train(config(hlvlm_settings(world, bases, out, eval_every=3)))
    first, last = (load_file(model_files(out, step) / "model.safetensors") for step in (3, 6))
    assert set(last) == {f"projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
    assert not any(torch.equal(first[name], last[name]) for name in last)
    manifests = [c.manifest for c in complete_checkpoints(out)]
    assert len({manifest["frozen"] for manifest in manifests}) == 1
    assert len(manifests[0]["frozen"]) == 32
    assert {name: model_fingerprint(bases / name) for name in before} == before
    said = json.loads((model_files(out, 6) / "config.json").read_text())["base"]
    assert {name: entry["fingerprint"] for name, entry in said.items()} == before
    whole = sum(file.stat().st_size for file in (out / "checkpoints" / "step_00000006").rglob("*") if file.is_file())
    assert whole < sum(file.stat().st_size for file in (bases / "lm").iterdir()), (
        "a checkpoint holds the MLP, not the models"
    )


def test_its_gradient_is_that_of_the_weighted_loss_on_images_it_sees(world: Path, bases: Path, tmp_path: Path) -> None:
    """PRIOR and NTP see the same batches and differ; a shuffled image would change the loss (the features matter)."""
    runs = {}
    for kind in ("ntp", "prior"):
        train(config(hlvlm_settings(world, bases, tmp_path / kind, weighting={"kind": kind}, steps=2, save_every=2)))
        runs[kind] = [json.loads(line) for line in (tmp_path / kind / "metrics.jsonl").read_text().splitlines()]
    assert runs["ntp"][0]["ntp_loss"] == runs["prior"][0]["ntp_loss"]
    assert runs["ntp"][0]["loss"] != runs["prior"][0]["loss"]
    assert runs["ntp"][0]["denominator"] == runs["prior"][0]["denominator"]


def test_packing_does_not_change_the_gradient(world: Path, bases: Path, tmp_path: Path) -> None:
    """One row of all samples, rows of a few, rows of one: the same losses over six updates."""
    found = []
    for name, tokens in (("whole", 512), ("some", 40), ("single", 17)):
        values = hlvlm_settings(world, bases, tmp_path / name)
        values["data"] |= {"max_tokens": tokens, "text": []}
        train(config(values))
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        found.append([(line["loss"], line["grad_norm"]) for line in lines if line["kind"] == "train"])
        assert (lines[0]["micro_steps"] == 1) is (name == "whole")
    for other in found[1:]:
        for (loss, norm), (loss2, norm2) in zip(found[0], other, strict=True):
            assert loss2 == pytest.approx(loss, abs=1e-5)
            assert norm2 == pytest.approx(norm, rel=1e-4)


def test_it_resumes_bit_for_bit(world: Path, bases: Path, tmp_path: Path) -> None:
    values = hlvlm_settings(world, bases, tmp_path / "straight")
    train(config(values))
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "straight", other)
    shutil.rmtree(other / "checkpoints" / "step_00000006")
    train(config({**values, "out": str(other)}))
    assert losses(other) == losses(tmp_path / "straight")
    one, two = ((model_files(out, 6) / "model.safetensors").read_bytes() for out in (tmp_path / "straight", other))
    assert one == two


def test_a_resume_on_another_base_model_is_refused(world: Path, bases: Path, tmp_path: Path) -> None:
    here = shutil.copytree(bases, tmp_path / "bases")
    values = hlvlm_settings(world, here, tmp_path / "run", steps=4, save_every=2)
    train(config(values))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000004")
    kept = shutil.copytree(here / "lm", tmp_path / "kept")
    make_bases(tmp_path / "others", tied=False)
    shutil.rmtree(here / "lm")
    shutil.copytree(tmp_path / "others" / "lm", here / "lm")
    with pytest.raises(DataError, match="was trained on the language model"):
        train(config(values))
    # Whoever edits the fingerprint in config.json by hand still meets the digest of what was frozen.
    shutil.rmtree(here / "lm")
    shutil.copytree(kept, here / "lm")
    train(config(values))
    assert len(losses(tmp_path / "run")) == 4


def test_frozen_weights_of_another_precision_are_refused(world: Path, bases: Path, tmp_path: Path) -> None:
    values = hlvlm_settings(world, bases, tmp_path / "run", steps=4, save_every=2)
    train(config(values))
    folder = tmp_path / "run" / "checkpoints" / "step_00000004"
    shutil.rmtree(folder)
    manifest = tmp_path / "run" / "checkpoints" / "step_00000002" / "manifest.json"
    from megaprior.files import read_manifest, write_manifest

    body = read_manifest(manifest, format="megaprior.checkpoint")
    write_manifest(manifest, {**body, "frozen": "0" * 32})
    with pytest.raises(CheckpointError, match=r"its frozen language model and vision tower were 0{32}.*restore"):
        train(config(values))


def test_what_cannot_be_is_refused_before_anything_is_read(world: Path, bases: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"model\.init"):
        train(config(settings(world, tmp_path / "a", stage="hlvlm")))
    with pytest.raises(UsageError, match="partitioned"):
        train(config(hlvlm_settings(world, bases, tmp_path / "b", model={"frozen": "partitioned"})))


def test_a_trained_model_is_loaded_by_its_run(world: Path, bases: Path, tmp_path: Path) -> None:
    train(config(hlvlm_settings(world, bases, tmp_path / "run", steps=2, save_every=2)))
    model = load_model_folder(tmp_path / "run")
    saved = load_file(model_files(tmp_path / "run", 2) / "model.safetensors")
    assert torch.equal(model.projector.linear_1.weight, saved["projector.linear_1.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["replicated", "partitioned"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_two_ranks_equal_one_process(
    world: Path,
    tmp_path: Path,
    launch: Callable[..., list[int]],
    spawn: Callable[..., Any],
    placement: str,
    tied: bool,
) -> None:
    """Frozen parts replicated or partitioned, rows without images and dummies on one rank, activation checkpointing.

    Where the frozen head is partitioned, the ranks' loss is that of the Triton kernels and the one process's the plain form.
    """
    make_bases(tmp_path / "bases", tied=tied)
    values = hlvlm_settings(
        world,
        tmp_path / "bases",
        tmp_path / "local",
        steps=20,
        save_every=10,
        eval_every=10,
        data=uneven_data(world, tmp_path),
        activation_checkpointing="full" if tied else "none",
    )
    single = spawn(values, {"gradients": str(tmp_path / "local.pt")})
    single.join(120)
    assert single.exitcode == 0
    both = {**values, "out": str(tmp_path / "both"), "model": {**values["model"], "frozen": placement}}
    fault = {"gradients": str(tmp_path / "both.pt")}
    environment = {"MEGAPRIOR_LOSS_IMPL": "triton" if placement == "partitioned" else "auto"}
    assert launch(both, fault=fault, environment=environment) == [0, 0]
    first, second = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("local", "both"))
    assert first.keys() == second.keys()
    assert len(first) == 4
    for name in first:
        torch.testing.assert_close(second[name], first[name], rtol=0, atol=1e-5, msg=name)
    assert losses(tmp_path / "both") == pytest.approx(losses(tmp_path / "local"), rel=0, abs=1e-5)
    one, other = (complete_checkpoints(tmp_path / name) for name in ("local", "both"))
    assert {c.manifest["frozen"] for c in one} == {c.manifest["frozen"] for c in other}, (
        "the same frozen bits everywhere"
    )
    kept = load_file(model_files(tmp_path / "both", 20) / "model.safetensors")
    assert all(name.startswith("projector.") for name in kept)
    # Another number of ranks resumes with the frozen weights it should have, which universal checkpoints leave out.
    shutil.rmtree(tmp_path / "both" / "checkpoints" / "step_00000020")
    assert launch(both, world=1) == [0]
    assert losses(tmp_path / "both") == pytest.approx(losses(tmp_path / "local"), rel=0, abs=2e-5)
    assert complete_checkpoints(tmp_path / "both")[0].manifest["frozen"] == one[0].manifest["frozen"]


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["replicated", "partitioned"])
def test_bf16_trains_like_fp32_at_first(
    world: Path, bases: Path, tmp_path: Path, launch: Callable[..., list[int]], placement: str
) -> None:
    values = hlvlm_settings(world, bases, tmp_path / "exact", save_every=6)
    train(config(values))
    model = {**values["model"], "frozen": placement, "frozen_dtype": "bfloat16"}
    assert launch({**values, "out": str(tmp_path / "half"), "model": model, "precision": "bf16"}) == [0, 0]
    assert losses(tmp_path / "half") == pytest.approx(losses(tmp_path / "exact"), rel=2e-2)
    assert losses(tmp_path / "half") != pytest.approx(losses(tmp_path / "exact"), rel=1e-5)

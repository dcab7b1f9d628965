"""Starting a run: what is refused before anything is touched, where models start from, what a run leaves behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from train_children import SIZES, config, settings, train, write_shards

from megaprior.config import load_config
from megaprior.errors import DataError, UsageError
from megaprior.tokenizer import train_sentencepiece
from megaprior.train.run import RunConfig


def textlm(world: Path, out: Path, **changes: object) -> dict:
    values = settings(world, out, stage="textlm", weighting={"kind": "ntp"}, model={"llama": SIZES}, **changes)
    values["data"] |= {"train": [{"path": str(world / "text")}], "text": [], "heldout": str(world / "text")}
    return values


def test_the_stages_follow_one_another(world: Path, tmp_path: Path) -> None:
    train(config(textlm(world, tmp_path / "text", steps=3)))
    reference = textlm(world, tmp_path / "reference", steps=3) | {
        "stage": "reference",
        "model": {"init": str(tmp_path / "text")},
    }
    train(config(reference))
    visual = {"init": str(tmp_path / "text" / "checkpoints" / "step_00000003"), "patch": 16, "limit": 32}
    train(config(settings(world, tmp_path / "visual", steps=3, model=visual)))
    folders = {
        name: tmp_path / name / "checkpoints" / "step_00000003" / "model" for name in ("text", "reference", "visual")
    }
    kinds = {name: json.loads((f / "config.json").read_text())["model_type"] for name, f in folders.items()}
    assert kinds == {"text": "llama", "reference": "llama", "visual": "megaprior_ulvlm"}
    # Three small steps do not take a model far from where it started: the visual one began with the text LM's weights.
    text, visual_weights = (load_file(folders[name] / "model.safetensors") for name in ("text", "visual"))
    for name, tensor in text.items():
        assert float((visual_weights[name] - tensor).abs().max()) < 0.02
    assert "patch_embed.weight" in visual_weights


def test_what_a_run_leaves_behind(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    values = settings(world, out, eval_every=6)
    train(config(values))
    assert load_config(RunConfig, out / "config.yaml") == config(values)
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["stage"], summary["steps"], summary["world"], summary["restarts"]) == ("ulvlm", 6, 1, 0)
    assert summary["train_sources"] == 1, "the language mix is none of them"
    assert summary["peak_memory_mib"] > 50
    assert summary["loss_tokens_per_s"] > 0
    assert summary["wall_s"] > 0
    assert summary["fingerprints"]["shards"] == ["pairs", "text"]
    assert summary["heldout"]["step"] == 6
    assert not (out / ".lock").exists()
    assert not (out / ".seen").exists()


def test_dry_run_touches_nothing(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = settings(world, tmp_path / "run")
    assert train(config(values), dry_run=True) == 0
    printed = capsys.readouterr().out
    layer = 4 * 32 * 32 + 3 * 32 * 48 + 2 * 32
    parameters = 2 * 300 * 32 + 2 * layer + 32 + 768 * 32
    assert f"{parameters:,} parameters, from random weights" in printed
    assert "step 1: 12 samples, 126 tokens, 70 of them in the loss, in at least 2 rows of at most 96 tokens" in printed
    assert not (tmp_path / "run").exists()


def test_another_tokenizer_is_refused_before_weights_are_read(world: Path, tmp_path: Path) -> None:
    train(config(textlm(world, tmp_path / "text", steps=3)))
    other = train_sentencepiece(
        [f"entirely other words, {n} of them" for n in range(50)], tmp_path / "tok", vocab_size=290
    )
    write_shards(tmp_path / "others", [np.array([9, 10, other.eos_id])] * 4, other, images=True)
    values = settings(world, tmp_path / "run", model={"init": str(tmp_path / "text"), "patch": 16, "limit": 32})
    values["data"]["train"] = [{"path": str(tmp_path / "others")}]
    plain = shutil.copytree(tmp_path / "text" / "checkpoints" / "step_00000003" / "model", tmp_path / "plain")
    (plain / "model.safetensors").write_bytes(b"reading this would fail in another way")
    values["model"]["init"] = str(plain)
    with pytest.raises(DataError, match="the vocabulary differs"):
        train(config(values))
    # The shards of one run must agree among themselves, too.
    mixed = settings(world, tmp_path / "run2")
    mixed["data"]["train"].append({"path": str(tmp_path / "others")})
    with pytest.raises(
        DataError, match=r"others: another tokenizer than that of the shards .*pairs: the vocabulary differs"
    ):
        train(config(mixed))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"eval_every": 5, "data.heldout": None}, "data.heldout names no shards"),
        ({"stage": "textlm"}, "trains on text alone"),
        ({"model.dtype": "bfloat16"}, "precision=bf16"),
        ({"steps": 0}, "steps"),
        ({"save_every": 0}, "save_every is 0"),
    ],
)
def test_what_cannot_work_is_refused_first(world: Path, tmp_path: Path, changes: dict, words: str) -> None:
    values = settings(world, tmp_path / "run")
    for name, value in changes.items():
        *parents, key = name.split(".")
        place = values
        for parent in parents:
            place = place[parent]
        place[key] = value
    with pytest.raises(UsageError, match=words):
        train(config(values))
    assert not (tmp_path / "run").exists()


def test_local_on_several_processes_is_refused(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="engine=local trains on one process, 2 were started"):
        train(config(settings(world, tmp_path / "run")))


def test_samples_do_not_depend_on_the_world_size(world: Path) -> None:
    from megaprior.train import assembly

    cfg = config(settings(world, Path("unused")))
    tokenizer = assembly.open_tokenizer(cfg)
    spec = assembly.vision_spec(assembly.build_model(cfg, tokenizer))
    loaders = [
        [assembly.open_loader(cfg, tokenizer, spec, rank=r, world=w, start=4) for r in range(w)] for w in (1, 2, 3)
    ]
    for step in (4, 5):
        expected = loaders[0][0].batch(step)
        for ranks in loaders:
            found = [loader.batch(step) for loader in ranks]
            assert all(np.array_equal(b.sample_ids, expected.sample_ids) for b in found)
            assert len({len(b.micro) for b in found}) == 1
            shown = torch.cat([row.sample_ids for b in found for row in b.micro])
            assert sorted(shown.tolist()) == sorted(expected.sample_ids.tolist())
    for ranks in loaders:
        for loader in ranks:
            loader.close()

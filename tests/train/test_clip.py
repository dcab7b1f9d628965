"""stage=clip through the real trainer: it learns, resumes, is refused what it cannot use, and runs on two ranks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from train_children import SIZES, config, settings, train, write_shards
from transformers import CLIPModel, LlamaConfig, LlamaForCausalLM

from megaprior import cli
from megaprior.errors import DataError, UsageError
from megaprior.files import read_manifest
from megaprior.retrieval import retrieval
from megaprior.tokenizer import load_tokenizer
from megaprior.train.run import replay

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
CLIP = {
    "policy": "square",
    "vision": {**SMALL, "image_size": 32, "patch_size": 16},
    "text": {**SMALL, "max_position_embeddings": 16},
    "projection_dim": 16,
}


def clip(world: Path, out: Path, *, data: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """`settings` of a two-tower model whose batch of 8 is one row."""
    model = {"preset": "tiny", "clip": {**CLIP, **changes.pop("clip", {})}}
    values = settings(world, out, stage="clip", weighting={"kind": "ntp"}, model=model, **changes)
    values["data"] |= {"text": [], "max_tokens": 256, "pad_to": 8, **(data or {})}
    return values


def losses(out: Path, key: str = "loss", kind: str = "train") -> list[float]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in found if line["kind"] == kind]


def weights(out: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(out / "checkpoints" / f"step_{step:08d}" / "model" / "model.safetensors")


def test_it_learns_the_pairs_and_finds_them_again(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tower"
    # The evaluation sees training pairs here, so that it must fall too.
    data = {"heldout": str(world / "pairs"), "batch_size": 20}
    train(config(clip(world, out, steps=60, save_every=60, eval_every=30, eval_batches=1, data=data)))
    first, last = losses(out)[0], losses(out)[-1]
    assert first > np.log(20)  # no better than chance among 20
    assert last < 0.6 * np.log(20)
    before, after = losses(out, "heldout_ntp", "eval")
    assert after < before
    assert losses(out, "ntp_loss") == pytest.approx(losses(out), abs=1e-5)  # one row a step

    assert cli.main(["evaluate", "--model", str(out), "--shards", str(world / "pairs")]) == 0
    said = capsys.readouterr().err
    assert "40 images, 40 captions: text to image R@1" in said
    body = read_manifest(out / "analysis" / "retrieval_pairs.json", format="megaprior.retrieval")
    assert (body["images"], body["captions"], body["checkpoint"]) == (40, 40, "step_00000060")
    assert body["text_to_image"]["r5"] > 2 * 5 / 40
    assert retrieval(out, world / "pairs") == body
    assert "already" in capsys.readouterr().err


def test_a_resumed_run_is_the_straight_one_and_replays(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    augmented = {"smallest_crop": 0.5, "flip": True, "drop_words": 0.2}
    train(config(clip(world, straight, clip=augmented)))
    shutil.copytree(straight, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step_00000006")
    train(config(clip(world, resumed, clip=augmented)))
    assert losses(resumed) == losses(straight)
    one, other = weights(straight, 6), weights(resumed, 6)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert CLIPModel.from_pretrained(straight / "checkpoints" / "step_00000006" / "model")
    capsys.readouterr()
    assert replay(straight, 5) == 0
    assert f"loss {losses(straight)[4]:.9f}" in capsys.readouterr().out


def test_an_hlvlm_stands_on_the_run(world: Path, tmp_path: Path) -> None:
    train(config(clip(world, tmp_path / "tower", steps=3)))
    LlamaForCausalLM(LlamaConfig(vocab_size=300, **SIZES)).save_pretrained(tmp_path / "lm")
    model = {"init": str(tmp_path / "lm"), "tower": {"init": str(tmp_path / "tower")}}
    values = settings(world, tmp_path / "hlvlm", stage="hlvlm", steps=3, model=model)
    train(config(values))
    told = json.loads((tmp_path / "hlvlm/checkpoints/step_00000003/model/config.json").read_text())
    assert told["image_policy"] == "square"
    assert told["image_seq_length"] == 4


def test_words_begin_as_a_language_models(world: Path, tmp_path: Path) -> None:
    lm = LlamaForCausalLM(LlamaConfig(vocab_size=300, **SIZES))
    lm.save_pretrained(tmp_path / "lm")
    load_tokenizer(world / "tokenizer").save(tmp_path / "lm" / "tokenizer")
    start = clip(world, tmp_path / "out", steps=1, clip={"words": str(tmp_path / "lm")}, optim={"lr": 1e-9})
    train(config(start))
    ours = weights(tmp_path / "out", 1)["text_model.embeddings.token_embedding.weight"][:300]
    theirs = lm.get_input_embeddings().weight.detach()
    theirs = theirs - theirs.mean(dim=0)
    assert torch.corrcoef(torch.stack((ours.flatten(), theirs.flatten())))[0, 1] > 0.9999
    assert ours.std().item() == pytest.approx(0.02, rel=0.05)
    with pytest.raises(UsageError, match="width 32, the text tower wants 300 of width 16"):
        text = {**CLIP["text"], "hidden_size": 16}
        train(config(clip(world, tmp_path / "no", clip={"words": str(tmp_path / "lm"), "text": text})))


def test_the_plan_says_what_is_cut_and_what_does_not_meet(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = {**CLIP["text"], "max_position_embeddings": 8}
    values = clip(world, tmp_path / "out", clip={"text": text}, data={"max_tokens": 24})
    train(config(values), dry_run=True)
    said = capsys.readouterr().out
    assert "of them in the vision tower" in said
    assert "captions are read up to token 8" in said
    assert "pairs meet only within a row: set data.max_tokens to" in said
    train(config(clip(world, tmp_path / "out")), dry_run=True)
    assert "meet only" not in capsys.readouterr().out


def test_other_data_and_other_questions_are_refused(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DataError, match="compares images with captions, these are shards of text"):
        train(config(clip(world, tmp_path / "out", data={"train": [{"path": str(world / "text")}]})))
    with pytest.raises(UsageError, match=r"weighting\.kind must be ntp"):
        train(config(clip(world, tmp_path / "out") | {"weighting": {"kind": "prior"}}))
    train(config(clip(world, tmp_path / "tower", steps=2)))
    (tmp_path / "probe.jsonl").touch()
    probe = ["--probe", str(tmp_path / "probe.jsonl"), "--output", str(tmp_path / "results.jsonl")]
    assert cli.main(["evaluate", "--model", str(tmp_path / "tower"), *probe]) == 2
    assert "it takes --shards alone" in capsys.readouterr().err
    assert cli.main(["evaluate", "--model", str(tmp_path / "tower"), "--shards", str(world / "text")]) == 2
    assert "retrieval needs held-out pairs" in capsys.readouterr().err


@pytest.mark.slow
def test_two_ranks_train_and_resume_with_dummies(world: Path, tmp_path: Path, launch: Callable[..., list[int]]) -> None:
    """Negatives come from a rank's own row, so that the losses are others than on one process."""
    tokenizer = load_tokenizer(world / "tokenizer")
    random = np.random.default_rng(5)
    # Batches of 5 over 2 ranks in short rows: one rank often has a row more, or a single pair in it.
    captions = [
        np.array([*random.integers(7, 240, n), tokenizer.eos_id]) for n in random.permutation([3] * 12 + [30] * 6)
    ]
    write_shards(tmp_path / "uneven", captions, tokenizer, images=True)
    data = {"train": [{"path": str(tmp_path / "uneven")}], "batch_size": 5, "max_tokens": 34}
    values = clip(world, tmp_path / "straight", data=data, eval_every=3)
    assert launch(values) == [0, 0]
    straight = tmp_path / "straight"
    out = shutil.copytree(straight, tmp_path / "resumed")
    shutil.rmtree(out / "checkpoints" / "step_00000006")
    assert launch({**values, "out": str(out)}) == [0, 0]
    assert losses(out) == losses(straight)
    assert losses(out, "heldout_ntp", "eval") == losses(straight, "heldout_ntp", "eval")
    assert len(set(losses(straight, "micro_steps"))) > 1
    one, other = weights(straight, 6), weights(out, 6)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert CLIPModel.from_pretrained(straight / "checkpoints" / "step_00000006" / "model")

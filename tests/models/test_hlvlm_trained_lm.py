"""The folder of an H-LVLM whose language model trained too: what lies in it, and who stands on it next."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from megaprior.errors import DataError
from megaprior.models.fingerprint import model_fingerprint
from megaprior.models.hlvlm_folder import build_hlvlm, load_hlvlm
from megaprior.models.lm import ModelConfig
from megaprior.models.load import load_model
from megaprior.models.vision import TowerConfig

IMAGE = 90  # the id of image tokens


@pytest.mark.parametrize("lm", ["lm", "lm_tied"])
def test_a_trained_language_model_is_a_text_lm_inside_the_folder(clip_folders, lm, tmp_path):
    tower = TowerConfig(init=str(clip_folders["clip"]))
    config = ModelConfig(init=str(clip_folders[lm]), tower=tower, trains="projector_and_lm", frozen_dtype="bfloat16")
    model = build_hlvlm(config, vocab_size=97, image_id=IMAGE, seed=1).eval()
    assert {p.dtype for p in model.parameters()} == {torch.float32}, "what trains is not in the frozen parts' dtype"
    assert {t.dtype for _, t in model.frozen_tensors()} == {torch.bfloat16}
    with torch.no_grad():
        model.lm.model.layers[0].mlp.up_proj.weight.mul_(1.5)
        model.lm.model.embed_tokens.weight.add_(0.1)
    own = tmp_path / "tree" / "own"
    model.save_pretrained(own)
    said = json.loads((own / "config.json").read_text())["base"]["lm"]
    assert said == {"fingerprint": model_fingerprint(own / "lm"), "given": "lm", "path": "lm"}
    assert set(load_file(own / "model.safetensors")) == {
        f"projector.linear_{i}.{k}" for i in (1, 2) for k in ("weight", "bias")
    }
    stock = LlamaForCausalLM.from_pretrained(own / "lm").state_dict()
    assert stock.keys() == model.lm.state_dict().keys()
    assert all(torch.equal(stock[name], tensor) for name, tensor in model.lm.state_dict().items())
    # The next stage stands on it, whether it trains it further or not, and the tree may move as a whole.
    digest = model_fingerprint(own)
    for name, trains in (("frozen", "projector"), ("further", "projector_and_lm")):
        start = ModelConfig(init=str(own), trains=trains, frozen_dtype="bfloat16" if name == "further" else "float32")
        again = build_hlvlm(start, vocab_size=97, image_id=IMAGE)
        assert {p.dtype for p in again.lm.parameters()} == {torch.float32}
        assert not any((p != q).any() for p, q in zip(again.lm.parameters(), model.lm.parameters(), strict=True))
        again.save_pretrained(tmp_path / "tree" / name)
    shutil.copytree(
        tmp_path / "tree" / "frozen", tmp_path / "elsewhere" / "deeper" / "frozen"
    )  # alone: found as it was named
    assert load_hlvlm(tmp_path / "elsewhere" / "deeper" / "frozen").places["lm"] == own / "lm"
    shutil.move(tmp_path / "tree", tmp_path / "moved")
    found = [load_model(tmp_path / "moved" / name) for name in ("own", "frozen", "further")]
    assert [kept.places["lm"].resolve().relative_to(tmp_path / "moved") for kept in found] == [
        Path("own/lm"),
        Path("own/lm"),
        Path("further/lm"),
    ]
    assert all(torch.equal(kept.lm.lm_head.weight, model.lm.lm_head.weight) for kept in found)
    assert model_fingerprint(tmp_path / "moved" / "own") == digest
    shutil.copy(clip_folders[lm] / "model.safetensors", tmp_path / "moved" / "own" / "lm")
    with pytest.raises(DataError, match=r"was trained on the language model \w{12}, but .*own/lm now holds"):
        load_hlvlm(tmp_path / "moved" / "own")

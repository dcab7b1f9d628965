"""Foreign folders as starting points: every tensor there again, nothing that is not understood let through."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from export_world import pictures, trainer_inputs
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, CLIPVisionModel, LlavaForConditionalGeneration

from megaprior.cli import main
from megaprior.data.images import decode_rgb
from megaprior.errors import DataError
from megaprior.importing import import_model
from megaprior.models.hlvlm import HLVLM
from megaprior.models.hlvlm_folder import build_hlvlm
from megaprior.models.lm import ModelConfig, build_text_lm
from megaprior.models.load import load_model
from megaprior.models.ulvlm import build_ulvlm
from megaprior.models.vision import TowerConfig
from megaprior.tokenizer import compare_fingerprints, load_model_tokenizer


def ids(world) -> dict:
    return {"vocab_size": world.tokenizer.vocab_size, "bos_id": 1, "eos_id": 2}


@pytest.mark.parametrize("kind", ["text", "text_tied", "ulvlm", "ulvlm_tied"])
def test_llamas_and_u_lvlms(world, exports, tmp_path, kind) -> None:
    done = import_model(exports(kind), tmp_path / "in")
    assert done.lines[0].endswith(f"model.init={tmp_path / 'in'}")
    config = ModelConfig(init=str(tmp_path / "in"))
    if kind.startswith("text"):
        again = build_text_lm(config, **ids(world))
    else:
        again = build_ulvlm(config, **ids(world), roles=None)
        assert "auto_map" not in json.loads((tmp_path / "in" / "config.json").read_text())
    before = load_model(world.folders[kind]).state_dict()
    assert before.keys() == again.state_dict().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in again.state_dict().items())
    assert compare_fingerprints(load_model_tokenizer(tmp_path / "in"), world.tokenizer) is None


@pytest.mark.parametrize("kind", ["hlvlm", "hlvlm_appended", "hlvlm_tied", "hlvlm_crop", "hlvlm_square"])
def test_llava_becomes_an_lm_a_tower_and_the_mlp_between_them(world, exports, tmp_path, kind) -> None:
    import_model(exports(kind), tmp_path / "in")
    model = load_model(tmp_path / "in" / "hlvlm")
    assert isinstance(model, HLVLM)
    before = load_model(world.folders[kind])
    assert model.config.image_policy == before.config.image_policy
    image, tokens = decode_rgb(pictures()["wide"]), world.tokenizer.encode("a photo of")
    llava = LlavaForConditionalGeneration.from_pretrained(exports(kind))
    processor = AutoProcessor.from_pretrained(exports(kind), backend="pil")
    with torch.no_grad():
        inputs = trainer_inputs(model, world.tokenizer, image, tokens)
        found = model.lm_head(model.states(**inputs).hidden)
        theirs = llava(**processor(images=image, text="<image>a photo of", return_tensors="pt")).logits[0]
        ours = before.lm_head(before.states(**trainer_inputs(before, world.tokenizer, image, tokens)).hidden)
    scale = float(ours.abs().max())
    assert (found - theirs).abs().max() < 2e-5 * scale
    assert (found[:, : ours.shape[1]] - ours).abs().max() < 2e-5 * scale
    config = ModelConfig(init=str(tmp_path / "in" / "lm"), tower=TowerConfig(init=str(tmp_path / "in" / "tower")))
    anew = build_hlvlm(config, vocab_size=world.tokenizer.vocab_size, image_id=None)
    assert anew.config.image_policy == before.config.image_policy
    shutil.move(tmp_path / "in", tmp_path / "moved")  # the three folders find each other wherever they lie together
    load_model(tmp_path / "moved" / "hlvlm")


def test_the_tower_of_a_two_tower_model(world, tmp_path) -> None:
    done = import_model(world.folders["clip"], tmp_path / "in")
    assert done.lines == (f"model.tower.init={tmp_path / 'in'}",)
    whole = load_file(world.folders["clip"] / "model.safetensors")
    again = CLIPVisionModel.from_pretrained(tmp_path / "in").state_dict()
    assert len(again) == sum(name.startswith("vision_model.") for name in whole)


def test_what_is_not_understood_is_refused(world, exports, tmp_path) -> None:
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    shutil.copy(exports("text") / "config.json", pickled)
    torch.save({"x": torch.ones(1)}, pickled / "pytorch_model.bin")
    with pytest.raises(
        DataError, match=r"no \*\.safetensors; weights in other formats can run code and are never loaded"
    ):
        import_model(pickled, tmp_path / "in")

    shutil.copytree(exports("text"), tmp_path / "more")
    weights = load_file(tmp_path / "more" / "model.safetensors")
    save_file({**weights, "extra.weight": torch.ones(2)}, tmp_path / "more" / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=r"has unknown 1 tensors, extra.weight among them"):
        import_model(tmp_path / "more", tmp_path / "in")
    weights.pop("model.norm.weight")
    save_file(weights, tmp_path / "more" / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=r"lacks 1 tensors, model.norm.weight among them"):
        import_model(tmp_path / "more", tmp_path / "in")

    shutil.copytree(exports("hlvlm"), tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    for change, words in (
        ({"vision_feature_layer": -1}, "vision_feature_layer is -1, an H-LVLM has -2"),
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy is 'full'"),
        ({"model_type": "mistral"}, "model_type is 'mistral'; what can be imported is one of"),
        ({"model_type": "megaprior_hlvlm"}, "is one of our own and needs no import"),
        ({"dtype": "int8"}, "dtype is 'int8'; float32, bfloat16 and float16 are read"),
    ):
        (tmp_path / "other" / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(DataError, match=words):
            import_model(tmp_path / "other", tmp_path / "in")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["more", "other", "pickled"]


def test_the_command_prints_the_lines_to_use(exports, tmp_path, capsys) -> None:
    assert main(["import", str(exports("hlvlm")), "--output", str(tmp_path / "in")]) == 0
    said = capsys.readouterr().out
    assert f"    stage=hlvlm model.init={tmp_path}/in/hlvlm\n" in said
    assert f"    stage=hlvlm model.init={tmp_path}/in/lm model.tower.init={tmp_path}/in/tower\n" in said


def test_notices_come_along(exports, tmp_path) -> None:
    shutil.copytree(exports("text"), tmp_path / "base")
    (tmp_path / "base" / "LICENSE").write_text("be kind\n")
    (tmp_path / "base" / "licenses" / "0_x").mkdir(parents=True)
    (tmp_path / "base" / "licenses" / "0_x" / "NOTICE").write_text("x\n")
    import_model(tmp_path / "base", tmp_path / "in")
    assert (tmp_path / "in" / "LICENSE").read_text() == "be kind\n"
    assert (tmp_path / "in" / "licenses" / "0_x" / "NOTICE").is_file()

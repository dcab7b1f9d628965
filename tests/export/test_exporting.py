"""What an export promises: the trainer's logits and captions from stock classes, and nothing at all where that fails."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from export_world import KINDS, pictures, trainer_inputs
from safetensors import safe_open
from transformers import AutoProcessor, AutoTokenizer, LlamaForCausalLM, LlavaForConditionalGeneration

from megaprior.cli import main
from megaprior.data.images import decode_rgb
from megaprior.errors import DataError, UsageError
from megaprior.export import checking, export, foreign, writing
from megaprior.models.lm import ModelConfig, build_text_lm
from megaprior.models.load import load_model
from megaprior.models.ulvlm import build_ulvlm
from megaprior.tokenizer import load_model_tokenizer

CAPTION = "a photo of 7 red squares"
SEEN = [kind for kind in KINDS if kind != "text" and kind != "text_tied"]
# Relative to the largest logit. Worst case measured: 0 for text and U-LVLM, 2.6e-6 for the H-LVLM (its pixels are normalized
# with other roundings).
TOLERANCE = 2e-5


def stock(folder: Path, kind: str):
    """(model, processor) as their users load them; the U-LVLM's own class stands for its file, which another test loads."""
    if kind.startswith("text"):
        return LlamaForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    if kind.startswith("hlvlm"):
        model = LlavaForConditionalGeneration.from_pretrained(folder)
        return model, AutoProcessor.from_pretrained(folder, backend="pil")
    opened = foreign.load_foreign(folder)
    return opened.model, opened.processor


def read(processor, kind: str, image, text: str) -> dict:
    if kind.startswith("text"):
        return dict(processor(text, return_tensors="pt"))
    if kind.startswith("hlvlm"):
        return dict(processor(images=image, text="<image>" + text, return_tensors="pt"))
    return dict(processor(images=image, text=text or None))


@pytest.mark.parametrize("kind", KINDS)
def test_a_stock_class_gives_the_trainers_logits(world, exports, kind) -> None:
    ours = load_model(world.folders[kind])
    model, processor = stock(exports(kind), kind)
    for name in ("wide", "high"):
        image = None if kind.startswith("text") else decode_rgb(pictures()[name])
        with torch.no_grad():
            states = ours.states(**trainer_inputs(ours, world.tokenizer, image, world.tokenizer.encode(CAPTION)))
            expected = ours.lm_head(states.hidden)
            found = model(**read(processor, kind, image, CAPTION)).logits[0, :, : expected.shape[1]]
        assert (found - expected).abs().max() < TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("kind", SEEN)
def test_greedy_captions_are_the_trainers_with_a_cache_and_without(world, exports, kind) -> None:
    ours = load_model(world.folders[kind])
    model, processor = stock(exports(kind), kind)
    image = decode_rgb(pictures()["wide"])
    silent = [token for token in model.generation_config.suppress_tokens if token < world.tokenizer.vocab_size]
    tokens: list[int] = []
    while len(tokens) < 12 and (not tokens or tokens[-1] != world.tokenizer.eos_id):
        with torch.no_grad():
            hidden = ours.states(**trainer_inputs(ours, world.tokenizer, image, tokens)).hidden
            logits = ours.lm_head(hidden[-1:])[0]
        logits[silent] = -torch.inf
        tokens.append(int(logits.argmax()))
    inputs = read(processor, kind, image, "")
    for cache in (True, False):
        found = model.generate(**inputs, max_new_tokens=12, do_sample=False, use_cache=cache)
        assert found[0, inputs["input_ids"].shape[1] :].tolist() == tokens


@pytest.mark.parametrize("kind", ["text", "ulvlm_tied", "hlvlm_appended", "hlvlm_tied"])
def test_bf16_is_the_same_model_rounded(world, kind, tmp_path) -> None:
    done = export(world.folders[kind], tmp_path / "out", dtype="bfloat16", max_shard_size="20KB")
    assert done["worst"] < TOLERANCE  # in fp32 arithmetic: measured at most 2.2e-6
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2
    exact = foreign.to_foreign(load_model(world.folders[kind]), world.tokenizer).model.state_dict()
    seen = foreign.load_foreign(tmp_path / "out", dtype="bfloat16").model.state_dict()
    assert exact.keys() == seen.keys()
    for name, tensor in seen.items():
        assert tensor.dtype == torch.bfloat16
        if exact[name].shape == tensor.shape and "embed_tokens" not in name and "lm_head" not in name:
            assert torch.equal(tensor, exact[name].bfloat16()), name
    stored = [name for path in shards for name in safe_open(path, "pt").keys()]  # noqa: SIM118
    assert len(stored) == len(set(stored)) == done["tensors"] - ("tied" in kind)


def test_an_export_says_what_it_is_and_is_a_starting_point(world, exports) -> None:
    folder = exports("text")
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == world.tokenizer.eos_id
    assert load_model_tokenizer(folder).files[0] == folder / "tokenizer" / "tokenizer.model"
    ids = {"vocab_size": world.tokenizer.vocab_size, "bos_id": 1, "eos_id": 2}
    again = build_text_lm(ModelConfig(init=str(folder)), **ids)
    assert all(
        torch.equal(a, b)
        for a, b in zip(again.parameters(), load_model(world.folders["text"]).parameters(), strict=True)
    )
    assert build_ulvlm(ModelConfig(init=str(exports("ulvlm"))), **ids, roles=None).config.patch == 8
    assert build_ulvlm(ModelConfig(init=str(folder), patch=8, limit=64), **ids, roles=world.tokenizer.reserved_roles())


def test_the_image_token_answers_to_its_name(world, exports) -> None:
    for kind, image_id in (("hlvlm", 3), ("hlvlm_appended", world.tokenizer.vocab_size)):
        theirs = AutoTokenizer.from_pretrained(exports(kind))
        assert theirs("<image>" + CAPTION)["input_ids"] == [1, image_id, *world.tokenizer.encode(CAPTION)]
        config = LlavaForConditionalGeneration.from_pretrained(exports(kind)).config
        assert config.image_token_id == image_id
        assert config.text_config.vocab_size == 330 + (kind == "hlvlm_appended")
    assert "has a new one with a row of its own" in (exports("hlvlm_appended") / "README.md").read_text()
    model = LlavaForConditionalGeneration.from_pretrained(exports("hlvlm_appended"))
    for weight in (model.get_input_embeddings().weight, model.lm_head.weight):
        assert (weight[330] - weight[:330].mean(0)).abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["text", "ulvlm", "hlvlm"])
def test_a_tensor_that_changes_on_its_way_is_found_and_nothing_is_left(world, tmp_path, monkeypatch, kind) -> None:
    write = writing._write

    def spoiled(other, folder, size):
        with torch.no_grad():
            next(iter(other.model.parameters())).view(-1)[5] += 1e-3
        write(other, folder, size)

    monkeypatch.setattr(writing, "_write", spoiled)
    with pytest.raises(
        DataError, match=r"out: tensor .* was .* before saving and is .* after reloading; nothing was written"
    ):
        export(world.folders[kind], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["text", "ulvlm", "hlvlm"])
def test_another_function_of_the_same_tensors_is_found(world, tmp_path, monkeypatch, kind) -> None:
    plain = foreign.plain
    monkeypatch.setattr(foreign, "plain", lambda config: {**plain(config), "rms_norm_eps": 1e-3})
    with pytest.raises(DataError, match=r"logits differ from the trainer's by .*, allowed is 0.0001"):
        export(world.folders[kind], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    assert export(world.folders[kind], tmp_path / "unchecked", check=False)["worst"] is None


def test_what_cannot_be_exported_is_refused(world, tmp_path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(DataError, match="there: exists already and is never overwritten"):
        export(world.folders["text"], tmp_path / "there")
    with pytest.raises(UsageError, match="--max-shard-size 5 apples: write a number and KB, MB or GB"):
        export(world.folders["text"], tmp_path / "out", max_shard_size="5 apples")
    with pytest.raises(DataError, match="a two-tower model is saved as transformers' own CLIPModel"):
        export(world.folders["clip"], tmp_path / "out")
    with pytest.raises(DataError, match="neither a run, nor a checkpoint, nor a Hugging Face folder"):
        export(tmp_path / "there", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there"]


def test_the_command_prints_what_to_do_next(world, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    assert main(["export", str(world.folders["ulvlm"]), "--output", str(out), "--dtype", "bfloat16"]) == 0
    said = capsys.readouterr()
    assert f"megaprior caption {out} IMAGE..." in said.out
    assert "trust_remote_code=True" in said.out
    assert "22 tensors equal, logits differ by at most" in said.err
    assert main(["export", str(world.folders["ulvlm"]), "--output", str(out)]) == 65
    assert f"{out}: exists already" in capsys.readouterr().err


@pytest.mark.slow
def test_the_printed_python_runs(exports, tmp_path) -> None:
    from PIL import Image

    Image.new("RGB", (50, 30), (200, 30, 20)).save(tmp_path / "photo.jpg")
    lines = [line.strip() for line in writing.next_steps(exports("hlvlm"), "hlvlm").splitlines()]
    script = "\n".join(lines[lines.index("from PIL import Image") :])
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_probe_is_compared_token_by_token(world) -> None:
    ours = checking.our_logits(load_model(world.folders["ulvlm"]), world.tokenizer)
    with pytest.raises(DataError, match=r"its processor makes .* tokens of the probe"):
        checking.compare_logits(ours, (ours[0][:-1], ours[1][:-1]), "out")
    other = ours[1].clone()
    other[3, 5] += 1.1e-4 * float(ours[1].abs().max())
    with pytest.raises(DataError, match="logits differ"):
        checking.compare_logits(ours, (ours[0], other), "out")

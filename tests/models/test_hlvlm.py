"""The H-LVLM: where features go, what trains, and which folders it stands on."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from megaprior.errors import DataError, UsageError
from megaprior.models.fingerprint import model_fingerprint
from megaprior.models.hlvlm import HLVLM
from megaprior.models.hlvlm_folder import build_hlvlm, load_hlvlm
from megaprior.models.lm import ModelConfig
from megaprior.models.load import load_model
from megaprior.models.vision import TowerConfig, load_clip_vision, to_pixels

IMAGE = 90  # the id of image tokens
P = 16  # tokens of an image


def config(folders, *, lm="lm", tower="clip", **changes) -> ModelConfig:
    return ModelConfig(init=str(folders[lm]), tower=TowerConfig(init=str(folders[tower])), **changes)


@pytest.fixture
def model(clip_folders) -> HLVLM:
    return build_hlvlm(config(clip_folders), vocab_size=97, image_id=IMAGE, seed=1).eval()


def segment(caption: list[int], *, image: bool = True) -> list[int]:
    return [1, *([IMAGE] * P if image else []), *caption, 2]


def row(*segments: list[int], seed: int = 0) -> dict:
    """Inputs of `states` for segments packed into a row; images of random pixels."""
    lengths = torch.tensor([len(s) for s in segments])
    ids = torch.tensor([token for s in segments for token in s])
    index = (ids == IMAGE).nonzero()[:, 0]
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_ids": ids,
        "position_ids": torch.cat([torch.arange(n) for n in lengths]),
        "cu_seqlens": torch.tensor([0, *lengths.cumsum(0)], dtype=torch.int32),
        "max_seqlen": int(lengths.max()),
        "patches": torch.randint(256, (len(index), 192), dtype=torch.uint8, generator=generator),
        "patch_index": index,
    }


def llava(model: HLVLM, folders, *, lm="lm") -> LlavaForConditionalGeneration:
    """transformers' own LLaVA with the same weights."""
    fields = model.config.to_dict()
    known = {name: fields[name] for name in LlavaConfig().to_dict() if name in fields and name != "model_type"}
    other = LlavaForConditionalGeneration(LlavaConfig(**known)).eval()
    other.model.vision_tower.load_state_dict(load_clip_vision(folders["clip"]).state_dict())
    other.model.multi_modal_projector.load_state_dict(model.projector.state_dict())
    other.model.language_model.load_state_dict(model.lm.model.state_dict())
    other.lm_head.load_state_dict(model.lm.lm_head.state_dict())
    return other


@pytest.mark.parametrize("lm", ["lm", "lm_tied"])
def test_logits_are_those_of_transformers_llava(clip_folders, lm):
    model = build_hlvlm(config(clip_folders, lm=lm), vocab_size=97, image_id=IMAGE, seed=1).eval()
    segments = [segment([5, 6, 7]), segment([8])]
    packed = row(*segments)
    with torch.no_grad():
        logits = model.lm_head(model.states(**packed).hidden)
        for number, ids in enumerate(segments):
            images = packed["patches"][number * P : (number + 1) * P]
            pixels = to_pixels(images, side=32, mean=tuple(model.config.image_mean), std=tuple(model.config.image_std))
            theirs = llava(model, clip_folders, lm=lm)(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0]
            start = int(packed["cu_seqlens"][number])
            # 1.4e-6 was the worst of logits up to 3 that was seen
            torch.testing.assert_close(logits[start : start + len(ids)], theirs, rtol=0, atol=2e-5)


def test_packed_equals_alone_and_no_caption_sees_its_neighbour(model):
    segments = [segment([5, 6, 7]), segment([8, 9], image=False), segment([10])]
    packed = row(*segments)
    images = [packed["patches"][:P], packed["patches"][:0], packed["patches"][P:]]
    with torch.no_grad():
        hidden = model.states(**packed).hidden.split(packed["cu_seqlens"].diff().tolist())
        for ids, image, found in zip(segments, images, hidden, strict=True):
            torch.testing.assert_close(found, model.states(**{**row(ids), "patches": image}).hidden, rtol=0, atol=2e-5)
        changed = {**packed, "patches": torch.cat([packed["patches"][:P], 255 - packed["patches"][P:]])}
        after = model.states(**changed).hidden.split(packed["cu_seqlens"].diff().tolist())
    assert torch.equal(after[0], hidden[0])
    assert (after[2] - hidden[2])[1:].abs().max() > 1e-3


def test_an_image_token_embeds_nothing_whatever_its_id(clip_folders):
    inputs = row(segment([5, 6]))
    beyond = {**inputs, "input_ids": torch.where(inputs["input_ids"] == IMAGE, 97, inputs["input_ids"])}
    one = build_hlvlm(config(clip_folders), vocab_size=97, image_id=IMAGE, seed=1).eval()
    other = build_hlvlm(config(clip_folders), vocab_size=97, image_id=None, seed=1).eval()
    assert other.config.image_token_index == 97, "the first id beyond the vocabulary"
    with torch.no_grad():
        assert torch.equal(one.states(**inputs).hidden, other.states(**beyond).hidden)


def test_states_tell_an_objective_where_the_image_is(model):
    inputs = row(segment([5]), segment([6]))
    states = model.states(**inputs, loss_index=torch.tensor([17, 18]))
    assert states.image_index.tolist() == inputs["patch_index"].tolist()
    assert states.loss_index.tolist() == [17, 18]
    assert states.vision.shape == (2 * P, 32)
    assert states.cls.shape == (2, 24)


def test_only_the_mlp_gets_a_gradient_and_only_it_is_saved(model, tmp_path):
    model.train()
    before = {name: tensor.clone() for name, tensor in model.frozen_tensors()}
    hidden = model.states(**row(segment([5, 6, 7]))).hidden
    loss, _ = model.lm_head(hidden[-4:-1], torch.tensor([6, 7, 2]), None, 3.0)
    loss.backward()
    assert [name for name, p in model.named_parameters()] == [
        f"projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")
    ]
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())
    assert all(tensor.grad is None and torch.equal(tensor, before[name]) for name, tensor in model.frozen_tensors())
    assert {name.split(".")[0] for name in before} == {"lm", "tower"}
    model.save_pretrained(tmp_path / "own")
    kept = sum(p.numel() * 4 for p in model.projector.parameters())
    assert kept < (tmp_path / "own" / "model.safetensors").stat().st_size < kept + 1000


@pytest.mark.parametrize("placement", ["replicated", "partitioned"])
def test_a_row_without_images_touches_every_trainable_parameter(clip_folders, placement):
    model = build_hlvlm(config(clip_folders, frozen=placement), vocab_size=97, image_id=IMAGE)
    looked = []
    model.tower.register_forward_hook(lambda *_: looked.append(1))
    for patches in (None, torch.empty(0, 192, dtype=torch.uint8)):
        inputs = {**row(segment([5, 6], image=False)), "patches": patches}
        loss, _ = model.lm_head(model.states(**inputs).hidden[:-1], torch.tensor([5, 6, 2]), None, 3.0)
        loss.backward()
        assert all(p.grad is not None and not p.grad.any() for p in model.projector.parameters())
    assert len(looked) == (2 if placement == "partitioned" else 0), "where it is partitioned, all ranks gather it alike"


def test_activation_checkpointing_changes_no_gradient(clip_folders):
    grads = []
    for checkpointed in (False, True):
        model = build_hlvlm(config(clip_folders), vocab_size=97, image_id=IMAGE, seed=1)
        if checkpointed:
            model.checkpoint_activations()
        hidden = model.states(**row(segment([5, 6, 7]))).hidden
        model.lm_head(hidden[-4:-1], torch.tensor([6, 7, 2]), None, 3.0)[0].backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(*grads)


def test_its_folder_gives_it_back_and_names_what_it_stands_on(clip_folders, model, tmp_path):
    root = tmp_path / "tree"
    for name in ("lm", "clip"):
        shutil.copytree(clip_folders[name], root / name)
    here = {name: root / name for name in ("lm", "clip")}
    first = build_hlvlm(config(here), vocab_size=97, image_id=IMAGE, seed=1).eval()
    first.save_pretrained(root / "run" / "own")
    digest = model_fingerprint(root / "run" / "own")
    said = json.loads((root / "run" / "own" / "config.json").read_text())["base"]
    assert said["lm"]["fingerprint"] == model_fingerprint(here["lm"])
    assert said["tower"] == {
        "fingerprint": model_fingerprint(here["clip"]),
        "given": str(here["clip"]),
        "path": "../../clip",
    }
    shutil.move(root, tmp_path / "moved")  # the whole tree may move
    kept = load_model(tmp_path / "moved" / "run" / "own")
    assert isinstance(kept, HLVLM)
    inputs = row(segment([5, 6]))
    with torch.no_grad():
        assert torch.equal(kept.states(**inputs).hidden, first.states(**inputs).hidden)
    assert model_fingerprint(tmp_path / "moved" / "run" / "own") == digest, "which does not depend on the place"
    again = build_hlvlm(ModelConfig(init=str(tmp_path / "moved" / "run" / "own")), vocab_size=97, image_id=5)
    assert again.training
    assert again.config.image_token_index == IMAGE, "as it was trained"


def test_a_trained_model_sees_as_it_was_trained_whatever_its_towers_folder_says_now(clip_folders, tmp_path):
    shutil.copytree(clip_folders["clip"], tmp_path / "clip")
    here = {**clip_folders, "clip": tmp_path / "clip"}
    first = build_hlvlm(config(here), vocab_size=97, image_id=IMAGE, seed=1).eval()
    first.save_pretrained(tmp_path / "own")
    (tmp_path / "clip" / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.9] * 3, "size": 32}))
    kept, inputs = load_hlvlm(tmp_path / "own"), row(segment([5, 6]))
    assert kept.preprocessing == first.preprocessing
    with torch.no_grad():
        assert torch.equal(kept.states(**inputs).hidden, first.states(**inputs).hidden)


def test_another_base_model_is_refused(clip_folders, tmp_path):
    for name in ("lm", "clip"):
        shutil.copytree(clip_folders[name], tmp_path / name)
    here = {name: tmp_path / name for name in ("lm", "clip")}
    build_hlvlm(config(here), vocab_size=97, image_id=IMAGE).save_pretrained(tmp_path / "own")
    shutil.copy(clip_folders["lm_tied"] / "model.safetensors", tmp_path / "lm")
    with pytest.raises(DataError, match=r"was trained on the language model \w{12}, but .*lm now holds \w{12}"):
        load_hlvlm(tmp_path / "own")
    shutil.rmtree(tmp_path / "lm")
    with pytest.raises(DataError, match=r"its language model was .*lm, which is not there; put it back"):
        load_hlvlm(tmp_path / "own")
    shutil.copytree(clip_folders["lm"], tmp_path / "lm")
    with pytest.raises(DataError, match=r"was trained on the vision tower \w{12}.*drop model\.tower\.init"):
        other = TowerConfig(init=str(clip_folders["vision"]))
        build_hlvlm(ModelConfig(init=str(tmp_path / "own"), tower=other), vocab_size=97, image_id=IMAGE)


def test_weights_that_are_not_the_projectors_are_refused(clip_folders, tmp_path):
    build_hlvlm(config(clip_folders), vocab_size=97, image_id=IMAGE).save_pretrained(tmp_path / "own")
    (tmp_path / "own" / "model.safetensors").unlink()
    with pytest.raises(DataError, match="holds nothing"):
        load_hlvlm(tmp_path / "own")
    with pytest.raises(DataError, match="an H-LVLM is 'megaprior_hlvlm'"):
        load_hlvlm(clip_folders["lm"])


def test_what_is_missing_is_named(clip_folders):
    with pytest.raises(UsageError, match=r"model\.tower\.init"):
        build_hlvlm(ModelConfig(init=str(clip_folders["lm"])), vocab_size=97, image_id=IMAGE)
    with pytest.raises(UsageError, match=r"model\.init"):
        build_hlvlm(ModelConfig(preset="tiny"), vocab_size=97, image_id=IMAGE)
    with pytest.raises(DataError, match="has 97 embeddings, the tokenizer has 98 ids"):
        build_hlvlm(config(clip_folders), vocab_size=98, image_id=IMAGE)


def test_image_tokens_begin_about_as_long_as_words(model):
    states = model.states(**row(segment([5]), segment([6])))
    words = model.lm.model.embed_tokens.weight
    assert 0.2 < states.vision.square().mean().sqrt() / words.square().mean().sqrt() < 5
    assert not model.projector.linear_2.bias.any()


def test_frozen_parts_may_be_bf16_under_an_fp32_mlp(clip_folders):
    exact = build_hlvlm(config(clip_folders), vocab_size=97, image_id=IMAGE, seed=1).eval()
    half = build_hlvlm(config(clip_folders, frozen_dtype="bfloat16"), vocab_size=97, image_id=IMAGE, seed=1).eval()
    assert half.projector.linear_1.weight.dtype == torch.float32
    assert {t.dtype for _, t in half.frozen_tensors()} == {torch.bfloat16}
    inputs = row(segment([5, 6, 7]))
    with torch.no_grad():
        one, other = (m.states(**inputs).hidden.float() for m in (exact, half))
    assert (one - other).norm() / one.norm() < 0.03  # bf16 keeps 8 bits


@pytest.mark.parametrize("lm", ["lm", "lm_tied"])
def test_in_instruction_tuning_the_language_model_trains_too(clip_folders, lm):
    model = build_hlvlm(config(clip_folders, lm=lm, trains="projector_and_lm"), vocab_size=97, image_id=IMAGE, seed=1)
    alone = build_hlvlm(config(clip_folders, lm=lm), vocab_size=97, image_id=IMAGE, seed=1)
    assert model.num_parameters() == alone.num_parameters()
    inputs = row(segment([5, 6, 7]))
    hidden = model.states(**inputs).hidden
    assert torch.equal(hidden, alone.states(**inputs).hidden), "the same model"
    model.lm_head(hidden[-4:-1], torch.tensor([6, 7, 2]), None, 3.0)[0].backward()
    names = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum()}
    assert names == {"projector", "language_model"}
    assert all(p.grad is not None for p in model.parameters())
    assert {name.split(".")[0] for name, _ in model.frozen_tensors()} == {"tower"}
    assert not any(tensor.requires_grad for _, tensor in model.frozen_tensors())
    model.lm_head(model.states(**row(segment([5], image=False))).hidden[:1], torch.tensor([5]))[0].backward()
    model.train(False)
    assert not model.lm.training
    model.train()
    assert model.lm.training
    assert not model.tower.training

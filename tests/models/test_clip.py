"""The two-tower model: what it saves is transformers' own CLIPModel, which gives the embeddings that were trained."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, CLIPModel

from megaprior.data.samples import Batch, Segment, assemble
from megaprior.data.vision import VisionSpec
from megaprior.errors import DataError, UsageError
from megaprior.models.augmentation import Augmentation
from megaprior.models.clip import Clip, Temperature, build_clip, load_clip
from megaprior.models.clip_config import ClipConfig
from megaprior.models.vision import load_tower, read_preprocessing

SMALL = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**SMALL, "image_size": 32, "patch_size": 8, "initializer_factor": 4.0}
TEXT = {**SMALL, "max_position_embeddings": 12, "initializer_factor": 4.0}
IDS = {"vocab_size": 97, "bos_id": 1, "eos_id": 2}
CAPTIONS = ([5, 90, 7, 2], [8, 2], [9] * 14 + [2], [2])  # the third is longer than the text tower


def small(**changes: object) -> Clip:
    config = ClipConfig(vision=VISION, text=TEXT, projection_dim=16, **changes)
    return build_clip(config, init=None, preset="tiny", dtype="float32", **{**IDS, "seed": 1})


def pictures(count: int) -> list[Image.Image]:
    random = np.random.default_rng(3)
    return [Image.fromarray(random.integers(0, 256, (40, 52, 3), dtype=np.uint8)) for _ in range(count)]


def row(model: Clip, images: list[Image.Image], captions: tuple[list[int], ...] = CAPTIONS) -> Batch:
    spec = VisionSpec.of(model.config)
    assert spec is not None
    segments = [
        Segment(
            i,
            np.array(c),
            np.ones(len(c), np.float32),
            grid=spec.grid(p.size),
            patches=spec.patches(p, spec.grid(p.size)),
        )
        for i, (c, p) in enumerate(zip(captions, images, strict=True))
    ]
    return assemble(segments, bos_id=1, spec=spec, denominator=20, max_tokens=256, pad_to=16)


@pytest.mark.parametrize("policy", ["crop", "square", "pad"])
def test_a_stock_clip_of_the_saved_folder_gives_our_embeddings(tmp_path, policy):
    model, images = small(policy=policy).eval(), pictures(4)
    model.save_pretrained(tmp_path)
    states = model.states(**row(model, images).inputs)

    stock, pixels = CLIPModel.from_pretrained(tmp_path), AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    ids = torch.full((4, 12), 97)  # the end's id also fills up; BOS leads
    for i, caption in enumerate(CAPTIONS):
        words = [1, *caption][:-1][:11]
        ids[i, : len(words)] = torch.tensor(words)
    with torch.no_grad():
        out = stock(input_ids=ids, **pixels(images, return_tensors="pt"))
    torch.testing.assert_close(states.images, out.image_embeds, rtol=0, atol=2e-6)  # 3e-7 measured
    torch.testing.assert_close(states.captions, out.text_embeds, rtol=0, atol=2e-6)
    logits = states.scale * states.images @ states.captions.T
    torch.testing.assert_close(logits, out.logits_per_image, rtol=0, atol=5e-5)


def test_the_end_has_an_id_of_its_own_where_eos_is_two():
    """A stock text tower whose eos_token_id is 2 reads a caption at its largest id."""
    assert small().config.text_config.eos_token_id == 97
    other = build_clip(
        ClipConfig(text=TEXT), init=None, preset="tiny", dtype="float32", vocab_size=97, bos_id=1, eos_id=3
    )
    assert (other.config.text_config.eos_token_id, other.vocabulary) == (3, 97)


def test_a_saved_folder_loads_again_and_is_a_tower(tmp_path):
    model = small(policy="pad").eval()
    model.save_pretrained(tmp_path)
    batch = row(model, pictures(4))
    again = load_clip(tmp_path)
    assert VisionSpec.of(again.config) == VisionSpec.of(model.config)
    assert torch.equal(again.states(**batch.inputs).images, model.states(**batch.inputs).images)
    tower = load_tower(tmp_path, read_preprocessing(tmp_path, "auto"))
    features, _ = tower(batch.patches)
    assert features.shape == (4, 16, 24)


def test_neighbours_in_the_row_do_not_matter():
    model, images = small().eval(), pictures(4)
    together = model.states(**row(model, images).inputs)
    for i in range(4):
        alone = model.states(**row(model, images[i : i + 1], CAPTIONS[i : i + 1]).inputs)
        torch.testing.assert_close(alone.captions[0], together.captions[i], rtol=0, atol=1e-6)
        torch.testing.assert_close(alone.images[0], together.images[i], rtol=0, atol=1e-6)


def test_a_row_without_pairs_touches_everything():
    model = small()
    states = model.states(**row(model, [], ()).inputs)
    assert states.images.shape == states.captions.shape == (0, 16)
    (states.scale * (states.images.sum() + states.captions.sum())).backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_the_temperature_stops_at_a_hundred_and_comes_back(tmp_path):
    for value, expected in ((2.0, math.exp(2)), (4.7, 100.0)):
        module = Temperature(torch.tensor(value))
        scale = module()
        assert scale.item() == pytest.approx(expected)
        scale.backward()
        assert module.logit_scale.grad.item() == pytest.approx(expected)
    model = small()
    model.temperature.logit_scale.data.fill_(5.0)
    model.save_pretrained(tmp_path)
    assert CLIPModel.from_pretrained(tmp_path).logit_scale.exp().item() == pytest.approx(100)


# ---------------------------------------------------------------- augmentation


def test_augmentation_shows_parts_of_the_image_and_only_in_training():
    ramp = torch.linspace(0, 1, 32).expand(64, 3, 32, 32).contiguous()  # brighter to the right
    torch.manual_seed(0)
    seen = Augmentation(smallest_crop=0.25, flip=True).images(ramp)
    assert seen.shape == ramp.shape
    assert seen.min() >= 0
    assert seen.max() <= 1
    slopes = (seen[:, 0, 0, -1] - seen[:, 0, 0, 0]) / 1
    assert 16 < (slopes < 0).sum() < 48  # every other one mirrored
    widths = slopes.abs()
    assert 0.35 < widths.min() < 0.6  # sqrt(0.25 * 3/4) = 0.43
    assert widths.max() > 0.9
    torch.manual_seed(0)
    assert torch.equal(seen, Augmentation(smallest_crop=0.25, flip=True).images(ramp))
    assert torch.equal(ramp, Augmentation().images(ramp))
    model = small(smallest_crop=0.3).eval()
    batch = row(model, pictures(4))
    assert torch.equal(model.states(**batch.inputs).images, model.states(**batch.inputs).images)
    model.train()
    assert not torch.equal(model.states(**batch.inputs).images, model.states(**batch.inputs).images)


def test_hidden_words_leave_the_end_in_its_place():
    ids = torch.randint(3, 90, (400, 20))
    ids[:, 0], ids[:, 15:] = 1, 97
    torch.manual_seed(0)
    seen = Augmentation(drop_words=0.3).captions(ids, hidden_id=1, end_id=97)
    assert torch.equal(seen[:, 15:], ids[:, 15:])
    changed = seen != ids
    assert torch.all(seen[changed] == 1)
    assert 0.27 < changed[:, 1:15].float().mean() < 0.33
    assert Augmentation().captions(ids, hidden_id=1, end_id=97) is ids


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("config", "preset", "message"),
    [
        (ClipConfig(), None, "set model.preset to one of tiny"),
        (ClipConfig(), "paper", "set model.preset to one of tiny"),
        (ClipConfig(vision={"hiden_size": 3}), "tiny", "unknown key 'hiden_size'; did you mean 'hidden_size'"),
        (ClipConfig(vision={"hidden_size": "wide"}), "tiny", "model.clip.vision"),
        (ClipConfig(vision={"image_size": 60}), "tiny", "60 pixels in patches of 16"),
        (ClipConfig(vision={"num_hidden_layers": 1}), "tiny", "1 layers"),
    ],
)
def test_impossible_sizes_are_refused(config, preset, message):
    with pytest.raises(UsageError, match=message):
        build_clip(config, init=None, preset=preset, dtype="float32", **IDS)


def test_other_folders_are_refused(tmp_path, clip_folders):
    model = small()
    model.save_pretrained(tmp_path)
    start = {"init": str(tmp_path), "preset": None, "dtype": "float32"}
    again = build_clip(ClipConfig(), **start, **IDS)
    assert again.training
    assert torch.equal(again.visual_projection.weight, model.visual_projection.weight)
    with pytest.raises(UsageError, match="sizes, which are for random weights"):
        build_clip(ClipConfig(vision=VISION), **start, **IDS)
    with pytest.raises(DataError, match="captions end in id 97 of 98, this tokenizer's in 120"):
        build_clip(ClipConfig(), **start, **{**IDS, "vocab_size": 120})
    with pytest.raises(DataError, match="model_type is 'llama', a two-tower model is a 'clip'"):
        load_clip(clip_folders["lm"])

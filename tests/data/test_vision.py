"""Layouts of an image's tokens, and the squares a tower sees: bit for bit those of transformers' Pillow processors."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from megaprior.data.corpus import Corpus
from megaprior.data.samples import Segment, assemble
from megaprior.data.shards import ShardSet
from megaprior.data.vision import PatchSpec, TowerSpec, VisionSpec, segment_length, square
from megaprior.errors import DataError

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
FILL = tuple(int(255 * value) for value in MEAN)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise and a slope, so that neither an offset of a pixel nor another filter can pass."""
    random = np.random.default_rng(seed)
    slope = np.linspace(0, 200, width)[None, :, None] + np.linspace(0, 40, height)[:, None, None]
    return Image.fromarray((slope + random.integers(0, 16, (height, width, 3))).clip(0, 255).astype(np.uint8))


def processor(policy: str, side: int):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    crop = {"height": side, "width": side}
    if policy == "square":
        return CLIPImageProcessorPil(size=crop, do_center_crop=False, crop_size=crop)
    if policy == "pad":
        return LlavaImageProcessorPil(size={"shortest_edge": side}, crop_size=crop, do_pad=True)
    return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=crop)


@pytest.mark.parametrize("policy", ["square", "pad", "crop"])
@given(width=st.integers(1, 90), height=st.integers(1, 90), side=st.sampled_from([16, 24, 42]))
@settings(max_examples=25, deadline=None)
def test_a_square_is_the_processors_bit_for_bit(policy, width, height, side):
    image = picture(width, height)
    ours = np.asarray(square(image, side=side, policy=policy, fill=FILL))
    (theirs,) = processor(policy, side)(image, do_rescale=False, do_normalize=False)["pixel_values"]
    np.testing.assert_array_equal(ours.transpose(2, 0, 1), theirs)


@pytest.mark.parametrize("size", [(336, 336), (500, 375), (40, 333), (1, 7)])
def test_each_policy_keeps_what_it_says(size):
    width, height = size
    full = picture(width, height)
    assert {square(full, side=28, policy=p, fill=FILL).size for p in ("square", "pad", "crop")} == {(28, 28)}
    padded = np.asarray(square(Image.new("RGB", size, "white"), side=28, policy="pad", fill=FILL))
    if width != height:
        corner = padded[0, 0]
        assert corner.tolist() == list(FILL), "the border has the processor's colour"
    assert padded[14, 14].max() > 200 or min(size) * 28 < max(size), "the middle is the picture"


def tower(image_id: int | None = 9) -> TowerSpec:
    return TowerSpec(side=32, patch=16, policy="pad", fill=FILL, image_id=image_id)


def test_every_image_takes_one_token_a_patch():
    spec = tower()
    assert spec.grid((500, 20)) == spec.grid((3, 900)) == (2, 2)
    assert spec.tokens((500, 20)) == 4
    assert segment_length(spec, (500, 20), 5) == 1 + 4 + 5
    ids, offsets = spec.layout(2, 2)
    assert ids.tolist() == [9, 9, 9, 9]
    assert offsets.tolist() == [0, 1, 2, 3]


def test_patches_put_together_again_are_the_square():
    image, spec = picture(50, 20), tower()
    patches = spec.patches(image, spec.grid(image.size))
    assert patches.shape == (4, spec.patch_values)
    assert patches.dtype == np.uint8
    whole = patches.reshape(2, 2, 16, 16, 3).transpose(0, 2, 1, 3, 4).reshape(32, 32, 3)
    np.testing.assert_array_equal(whole, np.asarray(square(image, side=32, policy="pad", fill=FILL)))


def test_a_row_holds_the_images_of_its_captions():
    spec = tower()
    images = [spec.patches(picture(40, 30, seed), (2, 2)) for seed in (0, 1)]
    weight = np.ones(3, np.float32)
    segments = [Segment(i, np.array([20, 21, 2]), weight, grid=(2, 2), patches=images[i]) for i in (0, 1)]
    row = assemble(segments, bos_id=1, spec=spec, denominator=6, max_tokens=64, pad_to=1)
    assert row.input_ids.tolist() == [1, 9, 9, 9, 9, 20, 21, 2] * 2
    assert row.patch_index.tolist() == [1, 2, 3, 4, 9, 10, 11, 12]
    np.testing.assert_array_equal(row.patches.numpy(), np.concatenate(images))
    assert row.loss_index.tolist() == [4, 5, 6, 12, 13, 14], "the last image token predicts the first word"


def test_a_row_too_short_for_the_tower_is_refused_with_the_remedy(write_shards, content):
    shards = ShardSet.open(write_shards("few", content([[5, 2]], sizes=[(40, 30)])))
    corpus = Corpus([shards], spec=tower(), max_tokens=5)
    remedy = (
        r"takes 6 tokens, a row holds 5; raise max_tokens to at least 6 or take a tower that sees fewer than 4 patches"
    )
    with pytest.raises(DataError, match=remedy):
        corpus.survey(0)
    corpus.close()


def test_an_image_may_take_no_place_in_the_row():
    spec = tower(image_id=None)
    patches = spec.patches(picture(40, 30), (2, 2))
    segment = Segment(0, np.array([20, 2]), np.ones(2, np.float32), grid=(2, 2), patches=patches)
    row = assemble([segment], bos_id=1, spec=spec, denominator=2, max_tokens=64, pad_to=1)
    assert row.input_ids.tolist() == [1, 20, 2]
    assert len(row.patch_index) == 0
    assert len(row.patches) == 4


def test_a_configuration_says_how_its_model_sees():
    roles = {"patch": 3, "start": 4, "row": 5, "end": 6}
    assert VisionSpec.of(SimpleNamespace(patch=2, limit=8, vision_roles=roles)) == PatchSpec(2, 8, 3, 4, 5, 6)
    vision = SimpleNamespace(image_size=32, patch_size=16)
    seen = SimpleNamespace(image_policy="pad", image_mean=list(MEAN), vision_config=vision)
    assert VisionSpec.of(seen) == tower(image_id=None)
    assert VisionSpec.of(SimpleNamespace(**vars(seen), image_token_index=9)) == tower()
    assert VisionSpec.of(SimpleNamespace(hidden_size=8)) is None


def test_what_a_manifest_keeps_comes_back_from_json_as_it_was():
    import json

    for spec in (tower(), PatchSpec(2, 8, 3, 4, 5, 6)):
        assert json.loads(json.dumps(spec.recorded())) == spec.recorded()

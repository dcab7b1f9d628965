"""The vision tower: CLIP's own features from our patches, and folders as transformers writes them."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import CLIPVisionModel

from megaprior.errors import DataError, UsageError
from megaprior.models.vision import (
    CLIP_MEAN,
    CLIP_STD,
    Preprocessing,
    load_clip_vision,
    load_tower,
    read_preprocessing,
    read_vision_config,
    to_pixels,
)

DEFAULT = Preprocessing("crop", CLIP_MEAN, CLIP_STD)


def cut(pixels: np.ndarray, patch: int) -> torch.Tensor:
    """uint8 [H, W, 3] -> patches [P, 3 * patch^2]."""
    grid = len(pixels) // patch
    parts = pixels.reshape(grid, patch, grid, patch, 3).transpose(0, 2, 1, 3, 4)
    return torch.from_numpy(parts.reshape(grid * grid, -1).copy())


@pytest.mark.parametrize("kind", ["clip", "vision"])
def test_features_are_clips_hidden_states_before_the_last(clip_folders, kind):
    folder = clip_folders[kind]
    tower, whole = load_tower(folder, DEFAULT), load_clip_vision(folder)
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    patches = torch.cat([cut(image, 8) for image in images])
    features, cls = tower(patches)

    mean, std = (np.array(v) for v in (CLIP_MEAN, CLIP_STD))
    pixels = torch.tensor(((images / 255 - mean) / std).transpose(0, 3, 1, 2), dtype=torch.float32)
    ours = to_pixels(patches, side=32, mean=CLIP_MEAN, std=CLIP_STD)
    torch.testing.assert_close(ours, pixels, rtol=0, atol=1e-6)
    with torch.no_grad():
        expected = whole(ours, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(features, expected[:, 1:], rtol=0, atol=1e-5)
    torch.testing.assert_close(cls, expected[:, 0], rtol=0, atol=1e-5)
    assert not features.requires_grad
    assert not any(p.requires_grad for p in tower.parameters())


def test_both_folders_hold_the_same_tower(clip_folders):
    one, other = (load_clip_vision(clip_folders[kind]).state_dict() for kind in ("clip", "vision"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("said", "policy"),
    [
        # openai/clip-vit-large-patch14-336 as published
        ({"crop_size": 336, "do_center_crop": True, "do_resize": True, "resample": 3, "size": 336}, "crop"),
        ({"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True}, "crop"),
        ({"size": {"height": 32, "width": 32}, "do_center_crop": False}, "square"),
        ({"size": {"shortest_edge": 32}, "do_pad": True}, "pad"),
    ],
)
def test_the_policy_is_read_from_the_folder(tmp_path, said, policy):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**said, "image_mean": [0.5, 0.25, 0.125]}))
    assert read_preprocessing(tmp_path, "auto") == Preprocessing(policy, (0.5, 0.25, 0.125), CLIP_STD)
    assert read_preprocessing(tmp_path, "pad").policy == "pad"


def test_what_no_policy_does_is_refused(tmp_path):
    path = tmp_path / "preprocessor_config.json"
    assert read_preprocessing(tmp_path, "auto") == DEFAULT
    path.write_text(json.dumps({"size": {"shortest_edge": 32}, "do_center_crop": False}))
    with pytest.raises(DataError, match=r"neither squares, pads nor crops.*model\.tower\.policy"):
        read_preprocessing(tmp_path, "auto")
    assert read_preprocessing(tmp_path, "square").policy == "square"
    path.write_text(json.dumps({"size": 32, "resample": 2}))
    with pytest.raises(UsageError, match="resample 2"):
        read_preprocessing(tmp_path, "auto")
    path.write_text("<html>")
    with pytest.raises(DataError, match="not an image processor's configuration"):
        read_preprocessing(tmp_path, "auto")


def test_other_folders_are_refused(clip_folders, tmp_path):
    with pytest.raises(DataError, match="a vision tower is one of clip, clip_vision_model"):
        read_vision_config(clip_folders["lm"])
    shutil.copytree(clip_folders["vision"], tmp_path / "gone")
    (tmp_path / "gone" / "model.safetensors").unlink()
    with pytest.raises(DataError, match="no readable safetensors"):
        load_clip_vision(tmp_path / "gone")
    torch.save(
        CLIPVisionModel.from_pretrained(clip_folders["vision"]).state_dict(), tmp_path / "gone/pytorch_model.bin"
    )
    with pytest.raises(DataError, match="no readable safetensors"):
        load_clip_vision(tmp_path / "gone")

"""The vision tower of an H-LVLM: a frozen CLIP vision model, and where it is read from.

A tower's folder is one of transformers' own, of a whole CLIPModel or of a CLIPVisionModel; what its preprocessor_config.json
says of mean, deviation and image policy is taken from there.

Letters: I images, P patches of an image, D = 3 * patch * patch values of a patch, W width of the tower.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from megaprior.config import configclass
from megaprior.errors import DataError, UsageError
from megaprior.models.folder import load_whole, model_type

# OpenAI's CLIP, for a folder that does not say.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
KINDS = ("clip", "clip_vision_model")

Policy = Literal["square", "pad", "crop"]


@configclass
class TowerConfig:
    """The frozen vision tower of an H-LVLM.

    Attributes:
        init: a run of stage=clip, a checkpoint of one, or a Hugging Face folder of a CLIPModel or CLIPVisionModel.
        policy: how an image becomes a square: "square" squeezes it, "pad" puts it on one (LLaVA-1.5), "crop" cuts one out of
            its middle (CLIP); "auto" takes what the folder says, else "crop".
    """

    init: str | None = None
    policy: Literal["auto", "square", "pad", "crop"] = "auto"


@dataclass(frozen=True)
class Preprocessing:
    """What happens to an image before a tower: `policy` makes it a square, then (x / 255 - mean) / std per channel."""

    policy: Policy
    mean: tuple[float, ...]
    std: tuple[float, ...]


class VisionTower(nn.Module):
    """CLIP up to the layer before its last, whose output LLaVA reads; frozen, and never differentiated.

    The last layer and the final norm are not kept: nothing reads them.
    """

    def __init__(self, clip: CLIPVisionModel, *, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.config = clip.config
        self.embeddings, self.pre_layrnorm, self.encoder = clip.embeddings, clip.pre_layrnorm, clip.encoder
        self.encoder.layers = self.encoder.layers[:-1]
        self.side, self._mean, self._std = square_side(clip.config), tuple(mean), tuple(std)
        self.requires_grad_(False)
        self.eval()

    @torch.no_grad()
    def forward(self, patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 [I * P, D] -> (patch features [I, P, W], CLS features [I, W]) of CLIP's hidden_states[-2]."""
        dtype = next(self.parameters()).dtype  # ZeRO-3 would gather a weight that is named here
        pixels = to_pixels(patches, side=self.side, mean=self._mean, std=self._std)
        hidden = self.pre_layrnorm(self.embeddings(pixels.to(dtype)))
        hidden = self.encoder(inputs_embeds=hidden).last_hidden_state
        return hidden[:, 1:], hidden[:, 0]


def to_pixels(patches: torch.Tensor, *, side: int, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """Patches of squares, uint8 [I * P, D], each (height, width, channel) -> normalized pixels, float32 [I, 3, side, side]."""
    patch = round((patches.shape[1] // 3) ** 0.5)
    grid = side // patch
    parts = patches.view(-1, grid, grid, patch, patch, 3)  # [I, row, column, height, width, channel]
    images = parts.permute(0, 5, 1, 3, 2, 4).reshape(-1, 3, side, side).float()
    scale, shift = _affine(mean, std, patches.device)
    return torch.addcmul(shift, images, scale)


@lru_cache(maxsize=16)
def _affine(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, shift) of (x / 255 - mean) / std, float32 [3, 1, 1] each; made once, since a copy to a device is a wait."""
    with torch.inference_mode(False):  # kept for later calls, which may need gradients
        means, deviations = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (mean, std))
        return (1 / (255 * deviations)).float().to(device), (-means / deviations).float().to(device)


def load_tower(folder: Path | str, preprocessing: Preprocessing, *, dtype: str = "float32") -> VisionTower:
    """The tower of a folder, every tensor accounted for.

    Raises:
        DataError: the folder is no CLIP, or weights are missing or ill-shaped.
    """
    return VisionTower(load_clip_vision(folder, dtype=dtype), mean=preprocessing.mean, std=preprocessing.std)


def load_clip_vision(folder: Path | str, *, dtype: str = "float32") -> CLIPVisionModel:
    """The whole vision model of a CLIP folder; the text side of a two-tower model is left where it is."""
    read_vision_config(folder)
    other = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")
    return load_whole(CLIPVisionModel, folder, dtype=dtype, others=other)


def read_vision_config(folder: Path | str) -> CLIPVisionConfig:
    """The vision configuration of a CLIP folder.

    Raises:
        DataError: another kind of model, or patches that do not cover the square.
    """
    kind = model_type(folder)
    if kind not in KINDS:
        raise DataError(f"{folder}: model_type is {kind!r}, a vision tower is one of {', '.join(KINDS)}")
    config = CLIPVisionConfig.from_pretrained(folder, local_files_only=True)
    if square_side(config) % square_side(config, patch=True) or config.num_hidden_layers < 2:
        raise DataError(
            f"{folder}: {config.num_hidden_layers} layers, {config.image_size} pixels in patches of {config.patch_size}: a tower "
            "has at least 2 layers and whole patches"
        )
    return config


def square_side(config: CLIPVisionConfig, *, patch: bool = False) -> int:
    """Pixels of a side of the image, or of a patch; transformers also allows oblongs, which no CLIP has."""
    side = config.patch_size if patch else config.image_size
    if not isinstance(side, int):
        raise DataError(
            f"a tower sees squares in square patches, this one {config.image_size} in {config.patch_size} pixels"
        )
    return side


def patches_per_side(config: CLIPVisionConfig) -> int:
    """The root of the number of an image's tokens."""
    return square_side(config) // square_side(config, patch=True)


def read_preprocessing(folder: Path | str, policy: Literal["auto", "square", "pad", "crop"]) -> Preprocessing:
    """From the folder's preprocessor_config.json, with `policy` laid over it; CLIP's own where the folder does not say.

    Raises:
        DataError: the file asks for something that no policy does, or is no such file.
        UsageError: it scales other than bicubically.
    """
    path = Path(folder) / "preprocessor_config.json"
    if not path.is_file():
        return Preprocessing("crop" if policy == "auto" else policy, CLIP_MEAN, CLIP_STD)
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        mean, std = tuple(said.get("image_mean", CLIP_MEAN)), tuple(said.get("image_std", CLIP_STD))
        found = _policy(said)
    except (ValueError, AttributeError, TypeError) as error:
        raise DataError(f"{path}: not an image processor's configuration ({error})") from None
    if policy == "auto":
        if found is None:
            raise DataError(
                f"{path}: neither squares, pads nor crops as any policy does; name one with model.tower.policy"
            )
        policy = found
    if said.get("resample", 3) != 3:
        raise UsageError(f"{path}: resample {said['resample']}; images are scaled bicubically (3): change it there")
    return Preprocessing(policy, mean, std)


def image_processor(side: int, preprocessing: Preprocessing) -> Any:
    """transformers' own, with Pillow, that makes of any image the pixels that a tower of `side` pixels sees."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    whole, mean, std = {"height": side, "width": side}, list(preprocessing.mean), list(preprocessing.std)
    edge = whole if preprocessing.policy == "square" else {"shortest_edge": side}
    if preprocessing.policy == "pad":
        return LlavaImageProcessorPil(size=edge, crop_size=whole, do_pad=True, image_mean=mean, image_std=std)
    crop = preprocessing.policy == "crop"
    return CLIPImageProcessorPil(size=edge, crop_size=whole, do_center_crop=crop, image_mean=mean, image_std=std)


def _policy(said: dict[str, Any]) -> Policy | None:
    """The policy that an image processor's configuration describes."""
    size = said.get("size", {})
    if said.get("do_pad") and said.get("do_resize", True):
        return "pad"
    if not isinstance(size, dict) or "shortest_edge" in size:
        return "crop" if said.get("do_center_crop", True) else None
    return "square" if size.get("height") == size.get("width") else None

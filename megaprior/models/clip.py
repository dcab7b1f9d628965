"""The small two-tower model: transformers' CLIP over our tokenizer's ids, trained where no pre-trained tower can be had.

What it saves is a stock CLIPModel's folder, whose own `forward` gives the embeddings that were trained, and whose vision
model is the tower of an H-LVLM.

A caption ends in an id that no other token has, because CLIP reads its embedding there. That is the tokenizer's EOS, except
where EOS is 2: for that id, a stock CLIPTextModel takes the largest id of the caption for its end, so one id more is put
behind the vocabulary.

Letters: T tokens of a row, I images and captions, P patches of an image, D values of a patch, L positions of the text tower,
E width of an embedding.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from pydantic import Field
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from megaprior.config import configclass
from megaprior.errors import DataError, UsageError
from megaprior.models.augmentation import Augmentation
from megaprior.models.folder import load_whole, model_type, quiet
from megaprior.models.outputs import PairStates
from megaprior.models.presets import CLIP_PRESETS
from megaprior.models.vision import CLIP_MEAN, CLIP_STD, Preprocessing, image_processor, read_preprocessing, to_pixels

MOST_SCALE = 100.0  # of the inverse temperature, as CLIP's authors have it
_LEGACY_EOS = 2
_MULTIPLE = 8  # caption lengths are rounded up to it: fewer shapes, which kernels cache
_TEMPERATURE = "temperature.logit_scale"


@configclass
class ClipConfig:
    """The two-tower model of stage=clip.

    Attributes:
        vision, text: fields of transformers' CLIPVisionConfig and CLIPTextConfig laid over the preset, for random weights.
        projection_dim: width of the embeddings; None takes the preset's.
        policy: how an image becomes a square, see `TowerConfig`.
        smallest_crop: training shows a random part of each image, of at least this share of its area; 1 shows all of it.
        flip: training mirrors every other image; never where captions tell left from right.
    """

    vision: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)
    projection_dim: int | None = None
    policy: Literal["square", "pad", "crop"] = "crop"
    smallest_crop: Annotated[float, Field(gt=0, le=1)] = 1.0
    flip: bool = False


class Temperature(nn.Module):
    """The learned inverse temperature; a module of its own, because ZeRO-3 gathers a parameter where its module runs."""

    def __init__(self, logit_scale: nn.Parameter) -> None:
        super().__init__()
        self.logit_scale = logit_scale

    def forward(self) -> torch.Tensor:
        """exp(logit_scale), at most 100, 0-d; beyond the limit the gradient still flows, so that it can come back."""
        excess = (self.logit_scale - math.log(MOST_SCALE)).clamp(min=0).detach()
        return (self.logit_scale.float() - excess).exp()


class Clip(nn.Module):
    """Both towers of a CLIPModel, reading packed rows: BOS caption EOS of each pair, and the images beside the row.

    `config`, `device` and `save_pretrained` are as those of `TextLM`; `state_dict` has CLIPModel's names but for the temperature.
    """

    def __init__(self, clip: CLIPModel, preprocessing: Preprocessing, augmentation: Augmentation | None = None) -> None:
        super().__init__()
        self.text_model, self.vision_model = clip.text_model, clip.vision_model
        self.text_projection, self.visual_projection = clip.text_projection, clip.visual_projection
        self.temperature = Temperature(clip.logit_scale)
        self.config: Any = clip.config  # transformers types the two parts of it as dictionaries too
        self.preprocessing = preprocessing
        # Where VisionSpec looks for them; the folder's preprocessor_config.json says the same.
        self.config.image_policy, self.config.image_mean = preprocessing.policy, list(preprocessing.mean)
        self.augmentation = augmentation or Augmentation()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.visual_projection.weight.device

    @property
    def positions(self) -> int:
        """L, the tokens of the longest caption that is read whole, BOS and EOS included."""
        return self.config.text_config.max_position_embeddings

    @property
    def vocabulary(self) -> int:
        """Token embeddings of the text tower."""
        return self.config.text_config.vocab_size

    def num_parameters(self) -> int:
        """Of both towers."""
        return sum(p.numel() for p in self.parameters())

    def states(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        *,
        patches: torch.Tensor | None = None,
        patch_index: torch.Tensor | None = None,
        loss_index: torch.Tensor | None = None,
    ) -> PairStates:
        """Embeddings of the pairs of one packed row; `input_ids`, `cu_seqlens` and `max_seqlen` as in `TextLM.states`.

        `patches` uint8 [I * P, D] are those of the images of the row's first I segments, in order. A row without images still
        runs both towers, because all ranks of ZeRO-3 must run all modules alike: its embeddings are [0, E], with a gradient.
        """
        vision = self.config.vision_config
        grid = vision.image_size // vision.patch_size
        count = 0 if patches is None else len(patches) // grid**2
        if patches is None or not count:
            patches = torch.zeros(grid**2, 3 * vision.patch_size**2, dtype=torch.uint8, device=self.device)
        images = self.embed_images(patches)[:count]
        captions = self.embed_captions(self.pad(input_ids, cu_seqlens, max_seqlen, max(count, 1)))[:count]
        return PairStates(images=images, captions=captions, scale=self.temperature())

    def pad(self, input_ids: torch.Tensor, cu_seqlens: torch.Tensor, longest: int, count: int) -> torch.Tensor:
        """The first `count` segments of a row as int64 [count, <= L], each closed and filled up with the end's id.

        A caption longer than L loses its last tokens, not its end, which is where it is read.
        """
        width = min(-(-longest // _MULTIPLE) * _MULTIPLE, self.positions)
        starts = cu_seqlens[:count, None].long()  # [I, 1]
        lengths = cu_seqlens[1 : count + 1, None].long() - starts
        place = torch.arange(width, device=input_ids.device)  # [L]
        ids = input_ids[(starts + place).clamp(max=len(input_ids) - 1)]
        return ids.masked_fill(place >= lengths.clamp(max=width) - 1, self.config.text_config.eos_token_id)

    def embed_images(self, patches: torch.Tensor) -> torch.Tensor:
        """uint8 [I * P, D] -> float32 [I, E], of length 1."""
        side, said = self.config.vision_config.image_size, self.preprocessing
        pixels = to_pixels(patches, side=side, mean=said.mean, std=said.std)
        if self.training:
            pixels = self.augmentation(pixels)
        seen = self.vision_model(pixel_values=pixels.to(self.visual_projection.weight.dtype)).pooler_output
        return nn.functional.normalize(self.visual_projection(seen).float(), dim=-1)

    def embed_captions(self, ids: torch.Tensor) -> torch.Tensor:
        """int64 [I, L], as `pad` makes them -> float32 [I, E], of length 1."""
        read = self.text_model(input_ids=ids).pooler_output
        return nn.functional.normalize(self.text_projection(read).float(), dim=-1)

    def checkpoint_activations(self) -> None:
        """Keep only each layer's input for backward and compute the rest again."""
        for tower in (self.text_model, self.vision_model):
            tower.gradient_checkpointing_enable({"use_reentrant": False})

    def save_pretrained(
        self,
        save_directory: Path | str,
        *,
        state_dict: dict[str, torch.Tensor] | None = None,
        max_shard_size: str = "5GB",
    ) -> None:
        """Write a stock CLIPModel's folder, and preprocessor_config.json as transformers' image processors have it."""
        weights = {_stock_name(n): t for n, t in (state_dict or self.state_dict()).items()}
        weights["logit_scale"] = weights["logit_scale"].clamp(max=math.log(MOST_SCALE))
        with torch.device("meta"), quiet():
            stock = CLIPModel(self.config)
        with quiet():
            stock.save_pretrained(save_directory, state_dict=weights, max_shard_size=max_shard_size)
        image_processor(self.config.vision_config.image_size, self.preprocessing).save_pretrained(save_directory)


def build_clip(
    config: ClipConfig,
    *,
    init: str | None,
    preset: str | None,
    dtype: str,
    vocab_size: int,
    bos_id: int,
    eos_id: int,
    seed: int = 0,
) -> Clip:
    """A two-tower model from a CLIPModel's folder, or from random weights that are a function of the seed; in training mode.

    Raises:
        UsageError: the configuration names no model, sizes beside a folder, or sizes that do not fit together.
        DataError: the folder is no CLIPModel, or has fewer embeddings than the tokenizer has ids.
    """
    described = describe_clip(config, init=init, preset=preset, vocab_size=vocab_size, bos_id=bos_id, eos_id=eos_id)
    augmentation = Augmentation(config.smallest_crop, config.flip)
    if init is not None:
        model = load_clip(init, dtype=dtype)
        model.augmentation = augmentation
        return model.train()
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        clip = CLIPModel(described)
    model = Clip(clip, Preprocessing(config.policy, CLIP_MEAN, CLIP_STD), augmentation)
    return model.to(getattr(torch, dtype)).train()


def describe_clip(
    config: ClipConfig, *, init: str | None, preset: str | None, vocab_size: int, bos_id: int, eos_id: int
) -> CLIPConfig:
    """The configuration of the model that `build_clip` makes, with its image policy; no weight is read.

    Raises:
        UsageError, DataError: as `build_clip`.
    """
    end_id = vocab_size if eos_id == _LEGACY_EOS else eos_id
    if init is not None:
        if config.vision or config.text or config.projection_dim:
            raise UsageError(f"model.clip has sizes, which are for random weights, but model.init={init}: drop one")
        found = read_clip_config(init)
        text: Any = found.text_config
        if text.vocab_size < vocab_size or text.eos_token_id != end_id:
            raise DataError(
                f"{init}: its captions end in id {text.eos_token_id} of {text.vocab_size}, this tokenizer's in {end_id}: not "
                "this tokenizer's model"
            )
        return found
    if preset not in CLIP_PRESETS:
        raise UsageError(
            f"stage=clip trains a small tower: set model.preset to one of {', '.join(CLIP_PRESETS)} (a pre-trained one needs no "
            "training: name it with model.tower.init in stage=hlvlm)"
        )
    base = CLIP_PRESETS[preset]
    width = config.projection_dim or base.projection_dim
    ids = {
        "vocab_size": max(vocab_size, end_id + 1),
        "bos_token_id": bos_id,
        "eos_token_id": end_id,
        "pad_token_id": end_id,
    }
    common = {"projection_dim": width}
    text = _sizes(CLIPTextConfig, "text", {**base.text, **config.text, **ids, **common})
    vision = _sizes(CLIPVisionConfig, "vision", {**base.vision, **config.vision, **common})
    if vision.image_size % vision.patch_size or vision.num_hidden_layers < 2:
        raise UsageError(
            f"model.clip.vision: {vision.num_hidden_layers} layers, {vision.image_size} pixels in patches of "
            f"{vision.patch_size}; a tower has at least 2 layers and whole patches"
        )
    described = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=width)
    described.image_policy, described.image_mean = config.policy, list(CLIP_MEAN)
    return described


def load_clip(folder: Path | str, *, dtype: str = "float32", backend: Any = "auto") -> Clip:
    """A two-tower model from a CLIPModel's folder, whoever saved it, in evaluation mode; `backend` is of packed rows' models.

    Raises:
        DataError: no such folder, not a CLIPModel, no safetensors, or weights missing or of another shape.
    """
    read_clip_config(folder)
    clip = load_whole(CLIPModel, folder, dtype=dtype)
    return Clip(clip, read_preprocessing(folder, "auto")).eval()


def read_clip_config(folder: Path | str) -> CLIPConfig:
    """The configuration of a CLIPModel's folder, with its image policy.

    Raises:
        DataError: another kind of model.
    """
    kind = model_type(folder)
    if kind != CLIPConfig.model_type:
        raise DataError(f"{folder}: model_type is {kind!r}, a two-tower model is a {CLIPConfig.model_type!r}")
    config, seen = CLIPConfig.from_pretrained(folder, local_files_only=True), read_preprocessing(folder, "auto")
    config.image_policy, config.image_mean = seen.policy, list(seen.mean)
    return config


def _sizes(kind: type[Any], name: str, values: dict[str, Any]) -> Any:
    """A configuration of transformers', which itself takes any key without a word."""
    known = [item.name for item in fields(kind)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise UsageError(
                f"model.clip.{name}: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else "")
            )
    try:
        return kind(**values)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise UsageError(f"model.clip.{name}: {' '.join(str(error).split())}") from None


def _stock_name(name: str) -> str:
    return "logit_scale" if name == _TEMPERATURE else name

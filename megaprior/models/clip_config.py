"""What a small two-tower model is described by: sizes, the end of a caption, what happens to an image.

A caption ends in an id that no other token has, because CLIP reads its embedding there. That is the tokenizer's EOS, except
where EOS is 2: for that id, a stock CLIPTextModel takes the largest id of the caption for its end, so one id more is put
behind the vocabulary.
"""

from __future__ import annotations

import difflib
from dataclasses import field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from huggingface_hub.errors import StrictDataclassError
from pydantic import Field
from transformers import CLIPConfig, CLIPTextConfig, CLIPVisionConfig

from megaprior.config import configclass
from megaprior.errors import DataError, UsageError
from megaprior.models.folder import model_type
from megaprior.models.presets import CLIP_PRESETS
from megaprior.models.vision import CLIP_MEAN, read_preprocessing

_LEGACY_EOS = 2


@configclass
class ClipConfig:
    """The two-tower model of stage=clip.

    Attributes:
        vision, text: fields of transformers' CLIPVisionConfig and CLIPTextConfig laid over the preset, for random weights.
        projection_dim: width of the embeddings; None takes the preset's.
        policy: how an image becomes a square, see `TowerConfig`.
        smallest_crop: training shows a random part of each image, of at least this share of its area; 1 shows all of it.
        flip: training mirrors every other image; never where captions tell left from right.
        drop_words: the share of a caption's tokens that training hides (BOS stands there), so that no rare word names an image.
        words: a text LM of the same tokenizer and of the text tower's width, whose token embeddings are where random weights
            begin; few captions do not teach what words mean.
    """

    vision: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)
    projection_dim: int | None = None
    policy: Literal["square", "pad", "crop"] = "crop"
    smallest_crop: Annotated[float, Field(gt=0, le=1)] = 1.0
    flip: bool = False
    drop_words: Annotated[float, Field(ge=0, lt=1)] = 0.0
    words: str | None = None


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

"""The small two-tower model: transformers' CLIP over our tokenizer's ids, trained where no pre-trained tower can be had.

What it saves is a stock CLIPModel's folder, whose own `forward` gives the embeddings that were trained, and whose vision
model is the tower of an H-LVLM.

Letters: T tokens of a row, I images and captions, P patches of an image, D values of a patch, L positions of the text tower,
E width of an embedding.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CLIPModel, LlamaForCausalLM

from megaprior.errors import UsageError
from megaprior.models.augmentation import Augmentation
from megaprior.models.clip_config import ClipConfig, describe_clip, read_clip_config
from megaprior.models.folder import load_whole, quiet, read_llama_config
from megaprior.models.outputs import PairStates
from megaprior.models.recompute import Recompute, checkpoint_layers
from megaprior.models.vision import CLIP_MEAN, CLIP_STD, Preprocessing, image_processor, read_preprocessing, to_pixels

MOST_SCALE = 100.0  # of the inverse temperature, as CLIP's authors have it
_MULTIPLE = 8  # caption lengths are rounded up to it: fewer shapes, which kernels cache
_TEMPERATURE = "temperature.logit_scale"


class Temperature(nn.Module):
    """The learned inverse temperature; a module of its own, because ZeRO-3 gathers a parameter where its module runs, and
    of one dimension, because DeepSpeed sends none without."""

    def __init__(self, logit_scale: torch.Tensor) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(logit_scale.detach().reshape(1))

    def forward(self) -> torch.Tensor:
        """exp(logit_scale), at most 100, 0-d; beyond the limit the gradient still flows, so that it can come back."""
        value = self.logit_scale.float()
        return (value - (value - math.log(MOST_SCALE)).clamp(min=0).detach()).exp().squeeze(0)


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
        return next(self.parameters()).device

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
        ids = self.pad(input_ids, cu_seqlens, max_seqlen, max(count, 1))
        if self.training:
            text = self.config.text_config
            ids = self.augmentation.captions(ids, hidden_id=text.bos_token_id, end_id=text.eos_token_id)
        captions = self.embed_captions(ids)[:count]
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
            pixels = self.augmentation.images(pixels)
        dtype = next(self.parameters()).dtype  # ZeRO-3 would gather a weight that is named here
        seen = self.vision_model(pixel_values=pixels.to(dtype)).pooler_output
        return nn.functional.normalize(self.visual_projection(seen).float(), dim=-1)

    def embed_captions(self, ids: torch.Tensor) -> torch.Tensor:
        """int64 [I, L], as `pad` makes them -> float32 [I, E], of length 1."""
        read = self.text_model(input_ids=ids).pooler_output
        return nn.functional.normalize(self.text_projection(read).float(), dim=-1)

    def checkpoint_activations(self, mode: Recompute = "full") -> None:
        """Compute each layer of both towers again in backward, see `megaprior.models.recompute`."""
        for tower in (self.text_model, self.vision_model):
            checkpoint_layers(tower, mode)

    def save_pretrained(
        self,
        save_directory: Path | str,
        *,
        state_dict: dict[str, torch.Tensor] | None = None,
        max_shard_size: str = "5GB",
    ) -> None:
        """Write a stock CLIPModel's folder, and preprocessor_config.json as transformers' image processors have it."""
        weights = {_stock_name(n): t for n, t in (state_dict or self.state_dict()).items()}
        weights["logit_scale"] = weights["logit_scale"].clamp(max=math.log(MOST_SCALE)).reshape(())
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
    augmentation = Augmentation(config.smallest_crop, config.flip, config.drop_words)
    if init is not None:
        model = load_clip(init, dtype=dtype)
        model.augmentation = augmentation
        return model.train()
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        clip = CLIPModel(described)
    if config.words is not None:
        _read_words(clip.text_model.embeddings.token_embedding.weight, config.words, vocab_size)
    model = Clip(clip, Preprocessing(config.policy, CLIP_MEAN, CLIP_STD), augmentation)
    return model.to(getattr(torch, dtype)).train()


@torch.no_grad()
def _read_words(weight: torch.Tensor, folder: str, vocab_size: int) -> None:
    """Replace the tokenizer's rows of `weight` by a text LM's, centred and at the size that they had at random."""
    read_llama_config(folder)
    found: torch.Tensor = load_whole(LlamaForCausalLM, folder, dtype="float32").get_input_embeddings().weight
    if len(found) < vocab_size or found.shape[1] != weight.shape[1]:
        raise UsageError(
            f"model.clip.words={folder}: {len(found):,} token embeddings of width {found.shape[1]}, the text tower wants "
            f"{vocab_size:,} of width {weight.shape[1]}: set model.clip.text.hidden_size, or drop it"
        )
    centred = found[:vocab_size] - found[:vocab_size].mean(dim=0)
    weight[:vocab_size] = centred * (weight.std() / centred.std())


def load_clip(folder: Path | str, *, dtype: str = "float32", backend: Any = "auto") -> Clip:
    """A two-tower model from a CLIPModel's folder, whoever saved it, in evaluation mode; `backend` is of packed rows' models.

    Raises:
        DataError: no such folder, not a CLIPModel, no safetensors, or weights missing or of another shape.
    """
    read_clip_config(folder)
    clip = load_whole(CLIPModel, folder, dtype=dtype)
    return Clip(clip, read_preprocessing(folder, "auto")).eval()


def _stock_name(name: str) -> str:
    return "logit_scale" if name == _TEMPERATURE else name

"""The U-LVLM for `transformers` alone: configuration, model and processor in one file that travels with an export.

`megaprior export` copies this file beside the weights, and `trust_remote_code=True` loads it from there. So it imports torch,
transformers, numpy and PIL only; what megaprior has in rooms of its own (the size of an image, its patches) stands here a
second time, and a test holds both to the same pixels.

Letters: B sequences, T tokens of a sequence, P patches, D = 3 * patch * patch values of a patch, H width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn
from transformers import BatchFeature, LlamaConfig, LlamaForCausalLM, ProcessorMixin

# ImageNet's mean and standard deviation of R, G, B, for pixels in [0, 1].
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)


class ULVLMConfig(LlamaConfig):
    """A LlamaConfig with the geometry of patches and the ids of the four vision roles.

    Attributes:
        patch: side of a patch, in pixels.
        limit: longest image side after scaling, in pixels.
        vision_roles: token ids of "patch", "start", "row" and "end".
    """

    model_type = "megaprior_ulvlm"

    patch: int = 32
    limit: int = 1024
    vision_roles: dict[str, int] | None = None


def normalize_pixels(patches: torch.Tensor) -> torch.Tensor:
    """uint8 [P, D], each row (height, width, channel) -> float32 [P, D]: (x / 255 - mean) / std of its channel."""
    scale, shift = _affine(patches.device)
    return torch.addcmul(shift, patches.unflatten(1, (-1, 3)), scale).flatten(1)


@lru_cache(maxsize=8)
def _affine(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.inference_mode(False):  # kept for later calls, which may need gradients
        mean, std = torch.tensor(_MEAN, dtype=torch.float64), torch.tensor(_STD, dtype=torch.float64)
        return (1 / (255 * std)).float().to(device), (-mean / std).float().to(device)


class ULVLMForCausalLM(LlamaForCausalLM):
    """Llama that reads raw patches: each one, through one linear map, is added to the embedding of its patch token."""

    config_class = ULVLMConfig
    config: ULVLMConfig

    def __init__(self, config: ULVLMConfig) -> None:
        super().__init__(config)
        self.patch_embed = nn.Linear(3 * config.patch**2, config.hidden_size, bias=False)
        self.post_init()

    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor | None = None,
        patches: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """As LlamaForCausalLM, with images.

        Args:
            input_ids: int64 [B, T].
            patches: uint8 [B, P, D] in the order of the patch tokens of each sequence; where a sequence has fewer than P,
                the rest is ignored. None for text, and in later steps of generation with a cache.
            attention_mask, position_ids, inputs_embeds, logits_to_keep: as LlamaForCausalLM's. `generate` looks for the names.
            kwargs: the rest of LlamaForCausalLM's (its cache, labels), whose names differ between releases of transformers.

        Raises:
            ValueError: a sequence has more patch tokens than patches.
        """
        if patches is not None and inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds, input_ids = self.embed_images(input_ids, patches), None
        llama: Any = super()
        return llama.forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    def embed_images(self, input_ids: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """Token embeddings [B, T, H] with each patch added at its token."""
        assert self.config.vision_roles is not None
        seats = input_ids == self.config.vision_roles["patch"]
        counts = seats.sum(1)  # [B]
        if int(counts.max()) > patches.shape[1]:
            raise ValueError(
                f"a sequence has {int(counts.max())} patch tokens, but {patches.shape[1]} patches were given"
            )
        embeds = self.model.embed_tokens(input_ids)
        taken = patches[torch.arange(patches.shape[1], device=patches.device) < counts[:, None]]
        pixels = normalize_pixels(taken).to(self.patch_embed.weight.dtype)
        index = seats.flatten().nonzero()[:, 0]
        values = self.patch_embed(pixels).to(embeds.dtype)
        return embeds.flatten(0, 1).index_add(0, index, values).view_as(embeds)

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        patches: torch.Tensor | None = None,
        is_first_iteration: bool = False,
        use_cache: bool | None = True,
        **kwargs: Any,  # under this name, or `generate` takes no input but those above
    ) -> dict[str, Any]:
        """The patches enter once; without a cache, at every step."""
        llama: Any = super()
        inputs = llama.prepare_inputs_for_generation(
            input_ids, is_first_iteration=is_first_iteration, use_cache=use_cache, **kwargs
        )
        if is_first_iteration or not use_cache:
            inputs["patches"] = patches
        return inputs


class ULVLMProcessor(ProcessorMixin):
    """Images to `BOS <vision> row <vrow_sep> row ... </vision>` and patches, as the model was trained to read them."""

    def __init__(
        self,
        tokenizer: Any = None,
        patch: int = 32,
        limit: int = 1024,
        vision_roles: dict[str, int] | None = None,
        chat_template: str | None = None,
    ) -> None:
        """`patch`, `limit`, `vision_roles`: as in the model's configuration."""
        self.patch, self.limit, self.vision_roles = patch, limit, vision_roles
        super().__init__(tokenizer, chat_template=chat_template)

    def __call__(  # type: ignore[override]
        self,
        images: Image.Image | np.ndarray | Sequence[Image.Image | np.ndarray] | None = None,
        text: str | Sequence[str] | None = None,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """One sequence per image (or per text), padded on the left to equal length.

        Args:
            images: PIL pictures, or uint8 arrays [height, width, 3]; one per sequence.
            text: the beginning of each caption; None asks for a whole caption.
            return_tensors: "pt" is what there is.

        Returns:
            input_ids and attention_mask int64 [B, T], and for images patches uint8 [B, P, D].
        """
        if return_tensors != "pt":
            raise ValueError(f"return_tensors is {return_tensors!r}; only 'pt' is supported")
        given: Any = images
        shown = [] if given is None else list(given) if isinstance(given, list | tuple) else [given]
        texts = [] if text is None else [text] if isinstance(text, str) else list(text)
        if shown and texts and len(shown) != len(texts):
            raise ValueError(f"{len(shown)} images and {len(texts)} texts: give one text per image")
        rows, pixels = [], []
        for at in range(max(len(shown), len(texts))):
            ids = [self.tokenizer.bos_token_id]
            if shown:
                tokens, patches = self.read_image(shown[at])
                ids += tokens
                pixels.append(torch.from_numpy(patches))
            if texts:
                ids += self.tokenizer(texts[at], add_special_tokens=False)["input_ids"]
            rows.append(torch.tensor(ids))
        pad = self.tokenizer.pad_token_id
        data = {
            "input_ids": nn.utils.rnn.pad_sequence(
                rows,
                batch_first=True,
                padding_value=self.tokenizer.eos_token_id if pad is None else pad,
                padding_side="left",
            ),
            "attention_mask": nn.utils.rnn.pad_sequence(
                [torch.ones_like(row) for row in rows], batch_first=True, padding_side="left"
            ),
        }
        if pixels:
            data["patches"] = nn.utils.rnn.pad_sequence(pixels, batch_first=True)
        return BatchFeature(data)

    def read_image(self, image: Image.Image | np.ndarray) -> tuple[list[int], np.ndarray]:
        """(ids of the image with its separators, patches uint8 [P, D]) of one image."""
        picture = to_rgb(image if isinstance(image, Image.Image) else Image.fromarray(image))
        size = target_size(*picture.size, patch=self.patch, limit=self.limit)
        columns, rows = size[0] // self.patch, size[1] // self.patch
        assert self.vision_roles is not None
        patch, start, row, end = (self.vision_roles[role] for role in ("patch", "start", "row", "end"))
        body = ([patch] * columns + [row]) * rows
        return [start, *body[:-1], end], patchify(picture, patch=self.patch, size=size)

    @property
    def model_input_names(self) -> list[str]:
        """The names that `__call__` returns."""
        return ["input_ids", "attention_mask", "patches"]


def target_size(width: int, height: int, *, patch: int, limit: int) -> tuple[int, int]:
    """(W, H) that an image is resized to: multiples of `patch`, the long side at most `limit`, no side below one patch."""
    long, short = max(width, height), min(width, height)
    long_to = min(limit, -(-long // patch) * patch)
    short_to = -(-short * long_to // (long * patch)) * patch
    return (long_to, short_to) if width >= height else (short_to, long_to)


def patchify(image: Image.Image, *, patch: int, size: tuple[int, int]) -> np.ndarray:
    """Resize to `size` = (W, H) and cut: uint8 [P, D], row by row, each patch flattened as (height, width, channel)."""
    width, height = size
    if image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    pixels = np.asarray(image, np.uint8).reshape(height // patch, patch, width // patch, patch, 3)
    return pixels.transpose(0, 2, 1, 3, 4).reshape(-1, patch * patch * 3)


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB as in training: EXIF rotation applied, alpha over white, 16-bit grey to its upper 8 bits."""
    picture = ImageOps.exif_transpose(image)
    if picture.mode.startswith("I"):  # Pillow's own conversion clips at 255
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert("RGB")
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture if picture.mode == "RGB" else picture.convert("RGB")

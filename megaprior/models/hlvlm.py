"""H-LVLM: a frozen vision tower, a language model, and between them a small MLP.

The MLP alone trains in pre-training; in instruction tuning the language model does too ("projector_and_lm").

A segment is BOS, P image tokens, caption, EOS. The embeddings of the image tokens are not read: the projected features of the
tower's patches stand in their place, one for one (LLaVA).

What trains is inside the module that an engine gets. What is frozen lives outside it ("replicated": every process holds all of
it, nothing of it is gathered, saved or differentiated), or inside it too ("partitioned": ZeRO-3 spreads it over the ranks, where
it would not fit).

Letters: T tokens of a row, I images, P patches of an image, D values of a patch, W width of the tower, H of the language model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import LlavaConfig
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from megaprior.models.fingerprint import model_fingerprint
from megaprior.models.head import LossHead
from megaprior.models.lm import TextLM, Trains
from megaprior.models.outputs import States
from megaprior.models.recompute import Recompute
from megaprior.models.vision import Preprocessing, VisionTower, patches_per_side, square_side

FROZEN = "frozen."  # what the names of partitioned frozen parameters begin with
LANGUAGE_MODEL = "language_model."  # what those of a language model that trains begin with
WEIGHTS = "model.safetensors"
LM_FOLDER = "lm"  # of a language model that was trained, beside the MLP's file


class HLVLMConfig(LlavaConfig):
    """A LlavaConfig with what happens to an image before the tower, and where the two frozen models are.

    Attributes:
        image_policy, image_mean, image_std: see `megaprior.models.vision.Preprocessing`.
        base: "lm" and "tower" -> {"fingerprint": of that model, "given": its folder as it was named, "path": the same seen from
            the folder of this file, so that a tree of runs can be moved as a whole}. A language model that was trained with the
            MLP is at "lm", inside that folder.
    """

    model_type = "megaprior_hlvlm"

    image_policy: str | None = None
    image_mean: list[float] | None = None
    image_std: list[float] | None = None
    base: dict[str, dict[str, str]] | None = None

    @property
    def preprocessing(self) -> Preprocessing:
        """What happens to an image before the tower, as it was in training."""
        return Preprocessing(self.image_policy, tuple(self.image_mean or ()), tuple(self.image_std or ()))  # type: ignore[arg-type]


class HLVLM(nn.Module):
    """The MLP, and what it connects.

    `states`, `lm_head`, `config` and `device` are as those of `TextLM`; `state_dict` holds the projector, a language model that
    trains under "language_model.", and where the frozen parts are partitioned those too, under "frozen.".
    """

    def __init__(
        self,
        config: HLVLMConfig,
        *,
        lm: TextLM,
        tower: VisionTower,
        placement: Literal["replicated", "partitioned"],
        trains: Trains = "projector",
    ) -> None:
        super().__init__()
        self.config = config
        self.places: dict[str, Path] = {}  # where "lm" and "tower" were read from
        self.projector = LlavaMultiModalProjector(config)
        # Plain dicts: torch registers nothing of them.
        self._parts: dict[str, nn.Module] = {"lm": lm, "tower": tower}
        self.trains_lm = trains == "projector_and_lm"
        if self.trains_lm:
            self.language_model = lm
        self.frozen_parts = {name: part for name, part in self._parts.items() if part is tower or not self.trains_lm}
        for part in self.frozen_parts.values():
            part.requires_grad_(False)
        self.partitioned = placement == "partitioned"
        if self.partitioned:
            self.frozen = nn.ModuleDict(self.frozen_parts)
        self.train()

    @property
    def lm(self) -> TextLM:
        """The language model."""
        return self._parts["lm"]  # type: ignore[return-value]

    @property
    def tower(self) -> VisionTower:
        """The vision tower, without the last layer."""
        return self._parts["tower"]  # type: ignore[return-value]

    @property
    def lm_head(self) -> LossHead:
        """The language model's head."""
        return self.lm.lm_head  # type: ignore[return-value]

    @property
    def preprocessing(self) -> Preprocessing:
        """See `HLVLMConfig`."""
        return self.config.preprocessing

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.projector.parameters()).device

    def num_parameters(self) -> int:
        """Of the projector, the language model and what is kept of the tower."""
        parts = (self.projector, *self._parts.values())
        return sum(p.numel() for part in parts for p in part.parameters())

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
    ) -> States:
        """Hidden states of one packed row; arguments as in `TextLM.states`.

        `patches` uint8 [I * P, D] are those of whole images, `patch_index` int64 [I * P] their tokens' positions. `vision` of the
        result is the projected features [I * P, H], `cls` the tower's CLS features [I, W].
        """
        features, cls = self._see(patches)
        # Not by naming a weight: ZeRO-3 would gather it on the spot, on ranks that come this way and not on others.
        vision = self.projector(features.to(next(self.projector.parameters()).dtype))
        if patch_index is None:
            patch_index = input_ids.new_empty(0)
        # The id of an image token may lie beyond the vocabulary; what it would embed is overwritten anyway.
        embeds = self.lm.model.embed_tokens(input_ids.index_fill(0, patch_index, 0))
        embeds = embeds.index_copy(0, patch_index, vision.to(embeds.dtype))
        hidden = self.lm.run(embeds, position_ids, cu_seqlens, max_seqlen)
        return States(hidden=hidden, loss_index=loss_index, image_index=patch_index, vision=vision, cls=cls)

    def _see(self, patches: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(features [I * P, W], CLS [I, W]) of the images of a row, which may be none."""
        if patches is not None and len(patches):
            features, cls = self.tower(patches)
            return features.flatten(0, 1), cls
        config = self.tower.config
        if self.partitioned:  # all ranks must gather all modules alike: look at a black image and forget it
            count = patches_per_side(config) ** 2
            values = 3 * square_side(config, patch=True) ** 2
            black = torch.zeros(count, values, dtype=torch.uint8, device=self.device)
            features, cls = self.tower(black)
            return features.flatten(0, 1)[:0], cls[:0]
        empty = torch.empty(0, config.hidden_size, device=self.device)
        return empty, empty

    def checkpoint_activations(self, mode: Recompute = "full") -> None:
        """Compute each layer of the language model again in backward, see `megaprior.models.recompute`."""
        self.lm.checkpoint_activations(mode)

    def train(self, mode: bool = True) -> HLVLM:
        """The tower stays in evaluation mode; the language model follows, since checkpointing heeds it (it has no dropout)."""
        super().train(mode)
        self.lm.train(mode)
        self.tower.eval()
        return self

    def frozen_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of every frozen parameter, tied ones once; partitioned ones as they are on this rank."""
        for part, module in self.frozen_parts.items():
            for name, tensor in module.named_parameters():
                yield f"{part}.{name}", tensor

    def save_pretrained(
        self,
        save_directory: Path | str,
        *,
        state_dict: dict[str, torch.Tensor] | None = None,
        max_shard_size: str = "5GB",
    ) -> None:
        """Write what was trained, for hlvlm_folder.py: the projector and the configuration, a few MB, and beside them the
        language model where it trains, as a text LM's own folder. `max_shard_size` is TextLM's.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        weights = self.state_dict() if state_dict is None else state_dict
        projector = {n: t.contiguous() for n, t in weights.items() if not n.startswith((FROZEN, LANGUAGE_MODEL))}
        save_file(projector, folder / WEIGHTS, metadata={"format": "pt"})
        base = {name: dict(entry) for name, entry in (self.config.base or {}).items()}
        for name, place in self.places.items():
            base[name]["path"] = os.path.relpath(place.resolve(), folder.resolve())
        if self.trains_lm:
            lm = {n.removeprefix(LANGUAGE_MODEL): t for n, t in weights.items() if n.startswith(LANGUAGE_MODEL)}
            self.lm.save_pretrained(folder / LM_FOLDER, state_dict=lm, max_shard_size=max_shard_size)
            found = model_fingerprint(folder / LM_FOLDER)
            base["lm"] = {"fingerprint": found, "given": LM_FOLDER, "path": LM_FOLDER}
        self.config.base = base
        self.config.architectures = [type(self).__name__]
        self.config.save_pretrained(folder)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> HLVLM:
        """As torch's own (`to`, `bfloat16`, ...), for what lies outside the module too."""
        super()._apply(fn, recurse)
        if not self.partitioned:
            for module in self.frozen_parts.values():
                module._apply(fn, recurse)
        return self

"""H-LVLM: a frozen vision tower, a frozen language model, and between them the one thing that trains, a small MLP.

A segment is BOS, P image tokens, caption, EOS. The embeddings of the image tokens are not read: the projected features of the
tower's patches stand in their place, one for one (LLaVA).

What is frozen lives outside the module that an engine gets ("replicated": every process holds all of it, nothing of it is
gathered, saved or differentiated), or inside it ("partitioned": ZeRO-3 spreads it over the ranks, where it would not fit).

Letters: T tokens of a row, I images, P patches of an image, D values of a patch, W width of the tower, H of the language model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlavaConfig
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from megaprior.errors import DataError, UsageError
from megaprior.models.attention import Backend
from megaprior.models.fingerprint import model_fingerprint
from megaprior.models.folder import model_type, read_llama_config
from megaprior.models.head import LossHead
from megaprior.models.lm import ModelConfig, TextLM, check_vocabulary, load_text_lm
from megaprior.models.outputs import States
from megaprior.models.vision import VisionTower, load_tower, read_preprocessing, read_vision_config

FROZEN = "frozen."  # what the names of partitioned frozen parameters begin with
_WEIGHTS = "model.safetensors"


class HLVLMConfig(LlavaConfig):
    """A LlavaConfig with what happens to an image before the tower, and where the two frozen models are.

    Attributes:
        image_policy, image_mean, image_std: see `megaprior.models.vision.Preprocessing`.
        base: "lm" and "tower" -> {"fingerprint": of that model, "given": its folder as it was named, "path": the same seen from
            the folder of this file, so that a tree of runs can be moved as a whole}.
    """

    model_type = "megaprior_hlvlm"

    image_policy: str | None = None
    image_mean: list[float] | None = None
    image_std: list[float] | None = None
    base: dict[str, dict[str, str]] | None = None


class HLVLM(nn.Module):
    """The MLP, and what it connects.

    `states`, `lm_head`, `config` and `device` are as those of `TextLM`; `state_dict` holds the projector, and where the frozen
    parts are partitioned those too, under "frozen.".
    """

    def __init__(
        self, config: HLVLMConfig, *, lm: TextLM, tower: VisionTower, placement: Literal["replicated", "partitioned"]
    ) -> None:
        super().__init__()
        self.config = config
        self.places: dict[str, Path] = {}  # where "lm" and "tower" were read from
        self.projector = LlavaMultiModalProjector(config)
        lm.requires_grad_(False)
        frozen = {"lm": lm, "tower": tower}
        self.partitioned = placement == "partitioned"
        if self.partitioned:
            self.frozen = nn.ModuleDict(frozen)
        self.frozen_parts: dict[str, nn.Module] = frozen  # a plain dict: torch registers nothing of it
        self.train()

    @property
    def lm(self) -> TextLM:
        """The language model."""
        return self.frozen_parts["lm"]  # type: ignore[return-value]

    @property
    def tower(self) -> VisionTower:
        """The vision tower, without the last layer."""
        return self.frozen_parts["tower"]  # type: ignore[return-value]

    @property
    def lm_head(self) -> LossHead:
        """The language model's head."""
        return self.lm.lm_head  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.projector.linear_1.weight.device

    def num_parameters(self) -> int:
        """Of the projector, the language model and what is kept of the tower."""
        parts = (self.projector, *self.frozen_parts.values())
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
        vision = self.projector(features.to(self.projector.linear_1.weight.dtype))
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
            count = (config.image_size // config.patch_size) ** 2
            black = torch.zeros(count, 3 * config.patch_size**2, dtype=torch.uint8, device=self.device)
            features, cls = self.tower(black)
            return features.flatten(0, 1)[:0], cls[:0]
        empty = torch.empty(0, config.hidden_size, device=self.device)
        return empty, empty

    def checkpoint_activations(self) -> None:
        """Keep only each layer's input of the language model for backward, and compute the rest again."""
        self.lm.checkpoint_activations()

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
        """Write the projector and the configuration: a few MB, read by `load_hlvlm`. `max_shard_size` is TextLM's."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        weights = self.state_dict() if state_dict is None else state_dict
        kept = {name: tensor.contiguous() for name, tensor in weights.items() if not name.startswith(FROZEN)}
        save_file(kept, folder / _WEIGHTS, metadata={"format": "pt"})
        for name, place in self.places.items():
            assert self.config.base is not None
            self.config.base[name]["path"] = os.path.relpath(place.resolve(), folder.resolve())
        self.config.architectures = [type(self).__name__]
        self.config.save_pretrained(folder)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> HLVLM:
        """As torch's own (`to`, `bfloat16`, ...), for what lies outside too."""
        super()._apply(fn, recurse)
        if not self.partitioned:
            for module in self.frozen_parts.values():
                module._apply(fn, recurse)
        return self


# ---------------------------------------------------------------- building and loading


def build_hlvlm(config: ModelConfig, *, vocab_size: int, image_id: int | None, seed: int = 0) -> HLVLM:
    """An H-LVLM from a language model's folder and a tower's, with a projector drawn from the seed; or from its own folder.

    Args:
        vocab_size: ids of the tokenizer.
        image_id: id that the tokenizer reserves for image tokens; None takes the first beyond the language model's vocabulary,
            for which an export adds a row.

    Raises:
        UsageError: a folder is not named.
        DataError: a folder does not hold such a model, or an H-LVLM's language model or tower is not the one it was trained on.
    """
    if config.init is None:
        raise UsageError("stage=hlvlm trains an MLP onto a language model: name its folder or run with model.init")
    if model_type(config.init) == HLVLMConfig.model_type:
        if config.tower.init is not None:
            _refuse_other_tower(config)
        model = load_hlvlm(
            config.init,
            dtype=config.dtype,
            backend=config.attention,
            frozen=config.frozen_dtype,
            placement=config.frozen,
        )
        check_vocabulary(model.lm, vocab_size, source=config.init)
        return model.train()
    if config.tower.init is None:
        raise UsageError(
            "stage=hlvlm needs a vision tower: name its folder, or a run of stage=clip, with model.tower.init"
        )
    described = describe_hlvlm(config, image_id=image_id)
    places = {"lm": Path(config.init), "tower": Path(config.tower.init)}
    described.base = {n: {"fingerprint": model_fingerprint(p), "given": str(p)} for n, p in places.items()}
    lm = load_text_lm(config.init, dtype=config.frozen_dtype, backend=config.attention)
    check_vocabulary(lm, vocab_size, source=config.init)
    tower = load_tower(
        config.tower.init, read_preprocessing(config.tower.init, config.tower.policy), dtype=config.frozen_dtype
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = HLVLM(described, lm=lm, tower=tower, placement=config.frozen)
        _begin_at_words_scale(model)
    model.places = places
    model.projector.to(getattr(torch, config.dtype))
    return model.train()


@torch.no_grad()
def _begin_at_words_scale(model: HLVLM) -> None:
    """Draw the MLP's last layer so that image tokens begin about as long as the language model's word embeddings.

    torch's own start makes them some ten times longer; an update of given size then turns them ten times less, and images are
    learned about half as fast (docs/notebook.md).
    """
    words = model.lm.model.embed_tokens.weight.float().square().mean().sqrt().item()
    last = model.projector.linear_2
    last.weight.normal_(0, words / last.in_features**0.5)
    if last.bias is not None:
        last.bias.zero_()


def describe_hlvlm(config: ModelConfig, *, image_id: int | None) -> HLVLMConfig:
    """The configuration of the model that `build_hlvlm` makes of two folders; no weight is read."""
    assert config.init is not None
    assert config.tower.init is not None
    text, vision = read_llama_config(config.init), read_vision_config(config.tower.init)
    seen = read_preprocessing(config.tower.init, config.tower.policy)
    return HLVLMConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=text.vocab_size if image_id is None else image_id,
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        image_policy=seen.policy,
        image_mean=list(seen.mean),
        image_std=list(seen.std),
        tie_word_embeddings=text.tie_word_embeddings,
    )


def load_hlvlm(
    folder: Path | str,
    *,
    dtype: str = "float32",
    backend: Backend = "auto",
    frozen: str | None = None,
    placement: Literal["replicated", "partitioned"] = "replicated",
) -> HLVLM:
    """An H-LVLM from a folder that one was saved to, in evaluation mode; `dtype` of the projector, `frozen` of the rest.

    Raises:
        DataError: no such folder, another kind of model, weights missing or ill-shaped, or a language model or tower that is
            gone or is another one.
    """
    folder = Path(folder)
    config = read_hlvlm_config(folder)
    places = {name: find_base(folder, config, name) for name in ("lm", "tower")}
    lm = load_text_lm(places["lm"], dtype=frozen or dtype, backend=backend)
    preprocessing = read_preprocessing(places["tower"], config.image_policy)  # type: ignore[arg-type]
    tower = load_tower(places["tower"], preprocessing, dtype=frozen or dtype)
    model = HLVLM(config, lm=lm, tower=tower, placement=placement)
    model.places = places
    saved = load_file(folder / _WEIGHTS) if (folder / _WEIGHTS).is_file() else {}
    expected = {f"projector.{name}": tensor.shape for name, tensor in model.projector.state_dict().items()}
    found = {name: tensor.shape for name, tensor in saved.items()}
    if found != expected:
        raise DataError(
            f"{folder / _WEIGHTS}: holds {found or 'nothing'}, the projector is {expected}: not this model's folder"
        )
    model.projector.load_state_dict({name.removeprefix("projector."): tensor for name, tensor in saved.items()})
    model.projector.to(getattr(torch, dtype))
    return model.eval()


def read_hlvlm_config(folder: Path | str) -> HLVLMConfig:
    """The configuration of an H-LVLM's folder.

    Raises:
        DataError: another kind of model, or one that does not say what it stands on.
    """
    kind = model_type(folder)
    if kind != HLVLMConfig.model_type:
        raise DataError(f"{folder}: model_type is {kind!r}, an H-LVLM is {HLVLMConfig.model_type!r}")
    config = HLVLMConfig.from_pretrained(folder, local_files_only=True)
    if sorted(config.base or {}) != ["lm", "tower"]:
        raise DataError(f'{folder}/config.json: names no language model and tower under "base"; train it again')
    return config


def find_base(folder: Path | str, config: HLVLMConfig, part: Literal["lm", "tower"] | str) -> Path:
    """The folder of the language model ("lm") or the vision tower ("tower") that an H-LVLM stands on, compared by fingerprint.

    Raises:
        DataError: it is not there, or it is another model; names both fingerprints.
    """
    assert config.base is not None
    entry = config.base[part]
    candidates = (Path(folder) / entry["path"], Path(entry["given"]))
    place = next((place for place in candidates if (place / "config.json").is_file()), None)
    what = {"lm": "language model", "tower": "vision tower"}[part]
    if place is None:
        raise DataError(f"{folder}: its {what} was {entry['given']}, which is not there; put it back, or a link to it")
    found = model_fingerprint(place)
    if found != entry["fingerprint"]:
        raise DataError(
            f"{folder}: was trained on the {what} {entry['fingerprint'][:12]}, but {place} now holds {found[:12]}: its MLP "
            "means nothing to another model; put the former back"
        )
    return place


def _refuse_other_tower(config: ModelConfig) -> None:
    assert config.init is not None
    assert config.tower.init is not None
    trained, named = read_hlvlm_config(config.init).base, model_fingerprint(config.tower.init)
    assert trained is not None
    if trained["tower"]["fingerprint"] != named:
        raise DataError(
            f"{config.init}: was trained on the vision tower {trained['tower']['fingerprint'][:12]}, model.tower.init="
            f"{config.tower.init} is {named[:12]}: drop model.tower.init"
        )

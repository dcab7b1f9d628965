"""The text LM: transformers' own Llama that reads packed rows and computes its loss in its head.

Text LM, reference LM and U-LVLM are this class. What it saves is a stock Hugging Face folder, and it starts from one.

Letters: T tokens of a row, S segments, N loss tokens, P patches, H width, V vocabulary.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import LlamaConfig, LlamaForCausalLM

from megaprior.config import configclass
from megaprior.errors import DataError, UsageError
from megaprior.models.attention import ATTENTION, Backend, make_packing, register
from megaprior.models.clip_config import ClipConfig
from megaprior.models.folder import from_folder, quiet, read_llama_config
from megaprior.models.head import LossHead
from megaprior.models.outputs import States
from megaprior.models.presets import PRESETS, Preset
from megaprior.models.recompute import Recompute, checkpoint_layers
from megaprior.models.vision import TowerConfig

Model = TypeVar("Model", bound="TextLM")
Trains = Literal["projector", "projector_and_lm"]


@configclass
class ModelConfig:
    """Where a model comes from and how it runs.

    Attributes:
        init: Hugging Face folder with Llama weights (safetensors) or one of ours; None starts from random weights.
        preset: sizes by name, for random weights; its patch and limit count with `init` too.
        llama: fields of transformers' LlamaConfig laid over the preset, for random weights.
        patch: side of a patch in pixels; None takes the preset's (else 32).
        limit: longest image side in pixels after scaling, a multiple of `patch`; None takes the preset's (else 1,024).
        vision_roles: "auto" uses ids that the tokenizer reserves, "append" adds four rows to embedding and head.
        dtype: of the parameters; of an H-LVLM, of those that train.
        attention: backend of packed attention.
        tower: the vision tower of an H-LVLM.
        trains: of an H-LVLM: its MLP ("projector"), or the language model too ("projector_and_lm", for instruction tuning).
        frozen: an H-LVLM's frozen parts on every process ("replicated"), or spread over the ranks of ZeRO-3 ("partitioned") where
            they would not fit; gathering them twice a row costs more than computing with them.
        frozen_dtype: of those parts.
        clip: the two-tower model of stage=clip.
    """

    init: str | None = None
    preset: Literal["tiny", "paper"] | None = None
    llama: dict[str, Any] = field(default_factory=dict)
    patch: int | None = None
    limit: int | None = None
    vision_roles: Literal["auto", "append"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    attention: Backend = "auto"
    tower: TowerConfig = field(default_factory=TowerConfig)
    trains: Trains = "projector"
    frozen: Literal["replicated", "partitioned"] = "replicated"
    frozen_dtype: Literal["float32", "bfloat16"] = "float32"
    clip: ClipConfig = field(default_factory=ClipConfig)

    @property
    def sizes(self) -> Preset:
        """The preset with this configuration's fields laid over it."""
        base = PRESETS[self.preset or "paper"]
        llama = {**(base.llama if self.preset else {}), **self.llama}
        return Preset(llama=llama, patch=self.patch or base.patch, limit=self.limit or base.limit)


class TextLM(LlamaForCausalLM):
    """LlamaForCausalLM with packed attention and a head that returns the loss.

    `forward`, `generate` and the state-dict names are transformers' own; training and scoring call `states` and `lm_head`.
    """

    def __init__(self, config: LlamaConfig) -> None:
        register()
        config._attn_implementation = ATTENTION
        super().__init__(config)
        LossHead.adopt(self.lm_head)
        self.attention: Backend = "auto"

    def set_output_embeddings(self, new_embeddings: torch.nn.Linear) -> None:
        """As transformers does it (it resizes a vocabulary with a new Linear); the head stays a LossHead."""
        self.lm_head = LossHead.adopt(new_embeddings)

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
        """Hidden states of one packed row.

        Args:
            input_ids: int64 [T].
            position_ids: int64 [T], from 0 in each segment.
            cu_seqlens: int32 [S+1] segment boundaries from 0 to T; no token sees another segment.
            max_seqlen: tokens of the longest segment.
            patches: uint8 [P, 3 * patch * patch], rows flattened as (height, width, channel); a text LM takes none.
            patch_index: int64 [P] position in the row of each patch, all different.
            loss_index: int64 [N] position whose hidden state predicts loss token n; handed through.
        """
        hidden = self.run(self.embed(input_ids, patches, patch_index), position_ids, cu_seqlens, max_seqlen)
        return States(hidden=hidden, loss_index=loss_index, image_index=patch_index)

    def run(
        self, embeds: torch.Tensor, position_ids: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int
    ) -> torch.Tensor:
        """The last hidden states [T, H], after the final norm, of a packed row of embeddings [T, H]; see `states`."""
        kind = embeds.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else embeds.dtype
        output = self.model(
            inputs_embeds=embeds[None],
            position_ids=position_ids[None],
            # transformers hands a 4-D mask through as it is: so it builds none, and looks for no packing in position_ids
            # (which would wait for the device).
            attention_mask=embeds.new_empty(1, 1, 0, 0),
            use_cache=False,
            packing=make_packing(cu_seqlens, max_seqlen, backend=self.attention, dtype=dtype),
        )
        return output.last_hidden_state[0]

    def embed(
        self, input_ids: torch.Tensor, patches: torch.Tensor | None, patch_index: torch.Tensor | None
    ) -> torch.Tensor:
        """Token embeddings [T, H]."""
        assert patches is None or not len(patches), "a text LM reads no patches"
        return self.model.embed_tokens(input_ids)

    def checkpoint_activations(self, mode: Recompute = "full") -> None:
        """Compute each layer again in backward, see `megaprior.models.recompute`."""
        checkpoint_layers(self, mode)

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: Path | str,
        *,
        state_dict: dict[str, torch.Tensor] | None = None,
        max_shard_size: str = "5GB",
    ) -> None:
        """As transformers' own; a text LM is saved under the name of transformers' class, which is what it is."""
        with quiet():
            super().save_pretrained(save_directory, state_dict=state_dict, max_shard_size=max_shard_size)
        self.name_architecture()
        self.config.save_pretrained(save_directory)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> TextLM:
        """As torch's own (`to`, `bfloat16`, ...), except that the rotary frequencies stay fp32 whoever casts the model.

        Rounded to bf16 they are off by up to 0.4%: tens of radians at the end of a long row.
        """
        rotary: Any = self.model.rotary_emb
        exact = rotary.inv_freq
        super()._apply(fn, recurse)
        if rotary.inv_freq.dtype != exact.dtype:
            rotary.inv_freq = exact.to(rotary.inv_freq.device)
        return self

    def name_architecture(self) -> None:
        """Write into the configuration the class that other programs should load this model with."""
        self.config.architectures = [LlamaForCausalLM.__name__]


def build_text_lm(config: ModelConfig, *, vocab_size: int, bos_id: int, eos_id: int, seed: int = 0) -> TextLM:
    """A text LM from `config.init`, or from random weights (std 0.02) that are a function of the seed; in training mode.

    Raises:
        UsageError: the configuration names no model, or sizes beside a folder.
        DataError: the folder is not a Llama, lacks weights, or has fewer embeddings than the tokenizer has ids.
    """
    llama = start_config(config, vocab_size=vocab_size, bos_id=bos_id, eos_id=eos_id)
    if config.init is None:
        model = from_scratch(TextLM, llama, config, seed=seed)
    else:
        model = from_folder(TextLM, config.init, dtype=config.dtype, backend=config.attention)
    check_vocabulary(model, vocab_size, source=config.init or "model.llama")
    model.name_architecture()
    return model.train()


def load_text_lm(folder: Path | str, *, dtype: str = "float32", backend: Backend = "auto") -> TextLM:
    """A text LM from a Hugging Face folder of model_type "llama", whoever saved it; in evaluation mode.

    Raises:
        DataError: no such folder, not a Llama, no safetensors, or weights missing or of another shape.
    """
    read_llama_config(folder)
    model = from_folder(TextLM, folder, dtype=dtype, backend=backend)
    model.name_architecture()
    return model


def start_config(config: ModelConfig, *, vocab_size: int, bos_id: int, eos_id: int) -> LlamaConfig:
    """The LlamaConfig of the text LM that `config` starts from: of its folder, or of random weights.

    Raises:
        UsageError, DataError: as `build_text_lm`.
    """
    if config.init is not None:
        if config.llama:
            raise UsageError(
                f"model.llama={config.llama} is for random weights, but model.init={config.init}: drop one"
            )
        return read_llama_config(config.init)
    llama = config.sizes.llama
    if not llama:
        raise UsageError(
            "no model is given: set model.init to a folder, or model.preset to one of " + ", ".join(PRESETS)
        )
    names = [item.name for item in fields(LlamaConfig)]  # LlamaConfig itself takes any key without a word
    for key in llama:
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1)
            raise UsageError(f"model.llama: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    known = {"vocab_size": vocab_size, "bos_token_id": bos_id, "eos_token_id": eos_id}
    try:
        return LlamaConfig(**{**known, **llama})
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise UsageError(f"model.llama: {' '.join(str(error).split())}") from None


def from_scratch(kind: type[Model], llama: LlamaConfig, config: ModelConfig, *, seed: int) -> Model:
    """Random weights as transformers draws them, from a generator of their own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(llama)
    model.attention = config.attention
    return model.to(getattr(torch, config.dtype))


def check_vocabulary(model: Any, vocab_size: int, *, source: str) -> None:
    """Refuse a model that has no embedding for some of the tokenizer's ids (spare rows are usual and welcome)."""
    rows = model.config.get_text_config().vocab_size
    if rows < vocab_size:
        raise DataError(
            f"{source}: has {rows} embeddings, the tokenizer has {vocab_size} ids: not this tokenizer's model"
        )

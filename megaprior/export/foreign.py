"""Our models as the classes that other programs load, with the processor that feeds them.

    text or reference LM   LlamaForCausalLM, a tokenizer
    U-LVLM                 ULVLMForCausalLM and ULVLMProcessor, from a file that travels with the weights
    H-LVLM                 LlavaForConditionalGeneration, LlavaProcessor

Weights go through the modules' own state dicts, never by names written here: those differ in memory, on disk and between
releases of transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoProcessor,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from megaprior.errors import DataError
from megaprior.models import ulvlm_portable
from megaprior.models.folder import load_whole, model_type, quiet
from megaprior.models.hlvlm import HLVLM
from megaprior.models.lm import TextLM
from megaprior.models.ulvlm import ULVLM
from megaprior.models.ulvlm_portable import ULVLMConfig, ULVLMForCausalLM, ULVLMProcessor
from megaprior.models.vision import image_processor, load_clip_vision
from megaprior.telemetry import say
from megaprior.tokenizer import Tokenizer
from megaprior.tokenizer.hugging_face import name_control, to_hugging_face

IMAGE_TOKEN = "<image>"
PORTABLE = "modeling_megaprior_ulvlm"  # the module that an export of a U-LVLM carries

# What belongs to the folder a configuration came from, not to the model.
_PASSING = ("model_type", "architectures", "transformers_version", "dtype", "auto_map", "base", "_name_or_path")


@dataclass(frozen=True)
class Foreign:
    """A model as others see it.

    Attributes:
        kind: "text", "ulvlm" or "hlvlm".
        model: of transformers' class or of the portable file's, in evaluation mode.
        processor: a processor; for a text LM its tokenizer.
        appended: the image token has a row that the trained model lacks.
    """

    kind: Literal["text", "ulvlm", "hlvlm"]
    model: Any
    processor: Any
    appended: bool = False

    @property
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer."""
        return self.processor if self.kind == "text" else self.processor.tokenizer

    def inputs(self, image: Any, text: str = "") -> dict[str, Any]:
        """What the model reads for a caption that begins with `text`; `image` is an RGB picture, None for a text LM."""
        if self.kind == "text":
            found = self.processor(text, return_tensors="pt")
        elif self.kind == "ulvlm":
            found = self.processor(images=image, text=text or None)
        else:
            found = self.processor(images=image, text=self.processor.image_token + text, return_tensors="pt")
        return dict(found)

    def code(self) -> Path | None:
        """The Python file that the model's folder must carry."""
        return Path(ulvlm_portable.__file__) if self.kind == "ulvlm" else None


def to_foreign(ours: TextLM | HLVLM, tokenizer: Tokenizer) -> Foreign:
    """The same weights in another class; nothing is copied but an appended row.

    Raises:
        DataError: the tokenizer cannot be written as tokenizer.json.
    """
    if isinstance(ours, HLVLM):
        return _llava(ours, tokenizer)
    return _ulvlm(ours, tokenizer) if isinstance(ours, ULVLM) else _text(ours, tokenizer)


def load_foreign(folder: Path, *, dtype: str = "float32") -> Foreign:
    """An export, or a stock folder of the same classes. No code of the folder runs: the U-LVLM's is our own copy.

    Raises:
        DataError: another kind of model, weights missing or left over, or no processor.
    """
    kind = model_type(folder)
    classes = {"llama": LlamaForCausalLM, "llava": LlavaForConditionalGeneration}
    classes[ULVLMConfig.model_type] = ULVLMForCausalLM
    if kind not in classes:
        raise DataError(f"{folder}: model_type is {kind!r}, an export is one of {', '.join(sorted(classes))}")
    try:
        with quiet():
            if kind == "llava":
                processor = AutoProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
            else:
                processor = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: no processor: {' '.join(str(error).split())[:200]}") from None
    model = load_whole(classes[kind], folder, dtype=dtype)
    if kind == "llava":
        return Foreign("hlvlm", model, processor)
    if kind == "llama":
        return Foreign("text", model, processor)
    return Foreign("ulvlm", model, _processor(model.config, processor))


# ---------------------------------------------------------------- the three kinds


def _text(ours: TextLM, tokenizer: Tokenizer) -> Foreign:
    config = LlamaConfig(**{**plain(ours.config), "bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id})
    model = shell(LlamaForCausalLM, config)
    model.load_state_dict(ours.state_dict(), assign=True)
    return Foreign("text", _finished(model, tokenizer, silent=()), _fast(tokenizer, config.max_position_embeddings))


def _ulvlm(ours: ULVLM, tokenizer: Tokenizer) -> Foreign:
    config = ULVLMConfig(**{**plain(ours.config), "bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id})
    classes = {"AutoModelForCausalLM": ULVLMForCausalLM, "AutoModelForImageTextToText": ULVLMForCausalLM}
    classes |= {"AutoConfig": ULVLMConfig, "AutoProcessor": ULVLMProcessor}
    config.auto_map = {auto: f"{PORTABLE}.{kind.__name__}" for auto, kind in classes.items()}
    model = shell(ULVLMForCausalLM, config)
    model.load_state_dict(ours.state_dict(), assign=True)
    assert config.vision_roles is not None
    silent = tuple(config.vision_roles.values())
    processor = _processor(config, _fast(tokenizer, config.max_position_embeddings))
    processor.auto_map = {"AutoProcessor": config.auto_map["AutoProcessor"]}  # type: ignore[attr-defined]
    return Foreign("ulvlm", _finished(model, tokenizer, silent=silent), processor)


def _llava(ours: HLVLM, tokenizer: Tokenizer) -> Foreign:
    tower = load_clip_vision(ours.places["tower"], dtype=str(ours.lm.dtype).removeprefix("torch."))
    image_id, rows = ours.config.image_token_index, ours.lm.config.vocab_size
    if image_id >= rows:  # the tokenizer reserves none: the first id after the tokenizer's own, spare row or new one
        image_id = min(tokenizer.vocab_size, rows)
    text = {**plain(ours.lm.config), "bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    config = LlavaConfig(
        text_config=LlamaConfig(**text),
        vision_config=tower.config,
        image_token_index=image_id,
        image_seq_length=ours.config.image_seq_length,
        projector_hidden_act=ours.config.projector_hidden_act,
        vision_feature_layer=ours.config.vision_feature_layer,
        vision_feature_select_strategy=ours.config.vision_feature_select_strategy,
        multimodal_projector_bias=ours.config.multimodal_projector_bias,
        tie_word_embeddings=ours.lm.config.tie_word_embeddings,
    )
    model = shell(LlavaForConditionalGeneration, config)
    model.model.vision_tower.load_state_dict(tower.state_dict(), assign=True)
    model.model.multi_modal_projector.load_state_dict(ours.projector.state_dict(), assign=True)
    model.model.language_model.load_state_dict(ours.lm.model.state_dict(), assign=True)
    model.lm_head.load_state_dict(ours.lm.lm_head.state_dict(), assign=True)
    model.tie_weights()
    if image_id == rows:
        _append_row(model)
        say(f"the tokenizer reserves no id for images: {IMAGE_TOKEN} becomes id {image_id}, with a row of its own")
    fast = _fast(tokenizer, config.text_config.max_position_embeddings, image_id=image_id)  # type: ignore[union-attr]
    processor = LlavaProcessor(
        image_processor(ours.tower.side, ours.preprocessing),
        fast,
        patch_size=tower.config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,
    )
    return Foreign("hlvlm", _finished(model, tokenizer, silent=(image_id,)), processor, appended=image_id == rows)


# ---------------------------------------------------------------- parts


def plain(config: Any) -> dict[str, Any]:
    """A configuration's own fields, without what belongs to the folder it came from."""
    return {name: value for name, value in config.to_dict().items() if name not in _PASSING}


def shell(kind: type[Any], config: Any) -> Any:
    """The module without weights: parameters on the meta device, buffers (rotary frequencies, positions) real."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return kind(config)


def _finished(model: Any, tokenizer: Tokenizer, *, silent: tuple[int, ...]) -> Any:
    """Tied, frozen, and with its generation settings: `silent` ids (image tokens) are no words of a caption."""
    model.tie_weights()
    missing = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    assert not missing, missing
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.eos_id,
        suppress_tokens=sorted(silent) or None,
    )
    return model.requires_grad_(False).eval()


def _append_row(model: Any) -> None:
    """One row more in embedding and head, at the mean of the others, where it disturbs their probabilities least."""
    rows = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(rows + 1, mean_resizing=False)
    weights = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    with torch.no_grad():
        for weight in {id(weight): weight for weight in weights}.values():  # one, where they are tied
            weight[rows:] = weight[:rows].double().mean(0).to(weight.dtype)


def _fast(tokenizer: Tokenizer, length: int, *, image_id: int | None = None) -> Any:
    model = to_hugging_face(tokenizer)
    if image_id is not None:
        model = name_control(model, image_id, IMAGE_TOKEN)
    eos = model.id_to_token(tokenizer.eos_id)
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        bos_token=model.id_to_token(tokenizer.bos_id),
        eos_token=eos,
        pad_token=eos,
        padding_side="left",
        model_max_length=length,
        clean_up_tokenization_spaces=False,
    )


def _processor(config: Any, fast: Any) -> ULVLMProcessor:
    return ULVLMProcessor(fast, patch=config.patch, limit=config.limit, vision_roles=config.vision_roles)

"""From a run configuration to what its model is made of: configurations of transformers, parameters by name and size.

Nothing is downloaded and no weight is read. Where a folder that the configuration names is not there, its config.json alone
may be given, or a model's name; what was assumed is said.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import CLIPVisionConfig, LlamaConfig

from megaprior.errors import DataError, UsageError
from megaprior.models.flops import ModelShape, shape_of
from megaprior.models.folder import model_type
from megaprior.models.hlvlm import HLVLMConfig
from megaprior.models.hlvlm_folder import find_base, read_hlvlm_config
from megaprior.models.lm import TextLM, start_config
from megaprior.models.ulvlm import ULVLM, ULVLMConfig
from megaprior.models.vision import read_vision_config
from megaprior.train.settings import RunConfig

Kind = Literal["text", "ulvlm", "hlvlm"]

_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
}
# Fields of the published config.json files, as far as sizes depend on them.
NAMED: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        **_LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
    "llama-3.2-3b": {
        **_LLAMA,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
    "clip-vit-l-336": {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
    },
}
# How the folders of published models are usually called.
_FOLDERS = {
    "meta-llama-3-8b": "llama-3-8b",
    "llama-3-8b": "llama-3-8b",
    "llama-3.2-3b": "llama-3.2-3b",
    "clip-vit-large-patch14-336": "clip-vit-l-336",
    "clip-vit-l-336": "clip-vit-l-336",
}


@dataclass(frozen=True)
class Described:
    """A model by its sizes.

    Attributes:
        lm, tower: configurations; tower None without one.
        patch, limit: side of a U-LVLM's patches and of its images, in pixels; 0 without.
        shape: for counting FLOPs.
        trained, frozen: elements of each parameter by name.
        projector_only: whether the language model is frozen.
        notes: what was assumed.
    """

    kind: Kind
    lm: LlamaConfig
    tower: CLIPVisionConfig | None
    patch: int
    limit: int
    shape: ModelShape
    trained: dict[str, int]
    frozen: dict[str, int]
    projector_only: bool
    notes: tuple[str, ...]

    @property
    def image_tokens(self) -> int:
        """P of an image in an H-LVLM."""
        return self.shape.patches


def describe(
    cfg: RunConfig, *, model_config: str | None, tower_config: str | None, vocabulary: int | None
) -> Described:
    """The model that `cfg` trains.

    Args:
        model_config, tower_config: a config.json, a folder with one, or a name of `NAMED`, for what the configuration names and
            is not there.
        vocabulary: of the tokenizer, for random weights; None takes Llama-3's.

    Raises:
        UsageError: the stage is not of a language model, or a model is not there and none of this says what it is.
        DataError: a config.json is of another kind.
    """
    if cfg.stage == "clip":
        raise UsageError("stage=clip trains a small two-tower model; megaprior plan is for language models")
    notes: list[str] = []
    base = model_config
    if base is None and cfg.model.init is not None and not (Path(cfg.model.init) / "config.json").is_file():
        base = _guess(
            cfg.model.init, "model.init", notes, "llama-3-8b" if cfg.stage != "hlvlm" else None, "--model-config"
        )
    if cfg.stage == "hlvlm":
        return _hlvlm(cfg, base, tower_config, notes)
    patch, limit = cfg.model.sizes.patch, cfg.model.sizes.limit
    if base is None and cfg.model.init is not None and model_type(cfg.model.init) == ULVLMConfig.model_type:
        read = ULVLMConfig.from_pretrained(cfg.model.init, local_files_only=True)
        lm, patch, limit = LlamaConfig.from_dict({**read.to_dict(), "model_type": "llama"}), read.patch, read.limit
    elif base is not None:
        lm = _llama(base)
    else:
        lm = start_config(cfg.model, vocab_size=vocabulary or _LLAMA["vocab_size"], bos_id=0, eos_id=0)
    if cfg.stage != "ulvlm":
        return text_lm(lm, notes=tuple(notes))
    return ulvlm(lm, patch=patch, limit=limit, notes=tuple(notes))


def text_lm(lm: LlamaConfig, *, notes: tuple[str, ...] = ()) -> Described:
    """A text LM or reference LM."""
    with torch.device("meta"):
        model = TextLM(lm)
    return Described("text", lm, None, 0, 0, shape_of(lm), _sizes(model), {}, False, notes)


def ulvlm(lm: LlamaConfig, *, patch: int, limit: int, notes: tuple[str, ...] = ()) -> Described:
    """A U-LVLM; `patch` and `limit` in pixels."""
    fields = {name: value for name, value in lm.to_dict().items() if name != "model_type"}
    ours = ULVLMConfig(**fields, patch=patch, limit=limit)
    with torch.device("meta"):
        model = ULVLM(ours)
    return Described("ulvlm", lm, None, patch, limit, shape_of(ours), _sizes(model), {}, False, notes)


def hlvlm(lm: LlamaConfig, tower: CLIPVisionConfig, *, projector_only: bool, notes: tuple[str, ...] = ()) -> Described:
    """An H-LVLM; what of the tower is never run is not kept."""
    from transformers import CLIPVisionModel, LlavaConfig
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    described = LlavaConfig(text_config=lm, vision_config=tower)
    with torch.device("meta"):
        text, seen, projector = TextLM(lm), CLIPVisionModel(tower), LlavaMultiModalProjector(described)
    last = f"encoder.layers.{tower.num_hidden_layers - 1}."
    vision = {n: k for n, k in _sizes(seen).items() if last not in n and "post_layernorm" not in n}
    trained = {f"projector.{name}": count for name, count in _sizes(projector).items()}
    frozen = {f"tower.{name}": count for name, count in vision.items()}
    words = {f"lm.{name}": count for name, count in _sizes(text).items()}
    (frozen if projector_only else trained).update(words)
    return Described("hlvlm", lm, tower, 0, 0, shape_of(described), trained, frozen, projector_only, notes)


def _hlvlm(cfg: RunConfig, base: str | None, tower_config: str | None, notes: list[str]) -> Described:
    init, tower_init = cfg.model.init, cfg.model.tower.init
    if base is None and init is not None and model_type(init) == HLVLMConfig.model_type:
        read = read_hlvlm_config(init)
        base, tower_init = str(find_base(init, read, "lm")), str(find_base(init, read, "tower"))
    lm = _llama(base or str(init))
    if tower_config is None and tower_init is not None and not (Path(tower_init) / "config.json").is_file():
        tower_config = _guess(tower_init, "model.tower.init", notes, None, "--tower-config")
    if tower_config is None and tower_init is None:
        raise UsageError(
            "stage=hlvlm needs a vision tower: name its folder with model.tower.init, or its sizes with --tower-config"
        )
    tower = _clip_vision(tower_config) if tower_config is not None else read_vision_config(str(tower_init))
    return hlvlm(lm, tower, projector_only=cfg.model.trains == "projector", notes=tuple(notes))


def _guess(named: str, key: str, notes: list[str], otherwise: str | None, flag: str) -> str:
    """The published model that a folder which is not there probably holds."""
    known = _FOLDERS.get(Path(named).name.lower()) or otherwise
    if known is None:
        raise UsageError(
            f"{key}={named}: no such folder; say what it holds with {flag} (config.json, or {', '.join(NAMED)})"
        )
    notes.append(f"{key}={named} is not here: planned as {known} ({flag} says otherwise)")
    return known


def _llama(given: str) -> LlamaConfig:
    fields = _fields(given)
    if fields.get("model_type") != "llama":
        raise DataError(f"{given}: model_type is {fields.get('model_type')!r}, a language model is a 'llama'")
    return LlamaConfig.from_dict(fields)


def _clip_vision(given: str) -> CLIPVisionConfig:
    fields = _fields(given)
    inner = fields.get("vision_config", fields)
    if fields.get("model_type") not in ("clip", "clip_vision_model"):
        raise DataError(
            f"{given}: model_type is {fields.get('model_type')!r}, a tower is a 'clip' or 'clip_vision_model'"
        )
    return CLIPVisionConfig.from_dict(inner)


def _fields(given: str) -> dict[str, Any]:
    if given in NAMED:
        return dict(NAMED[given])
    path = Path(given) / "config.json" if Path(given).is_dir() else Path(given)
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise UsageError(f"{given}: neither a config.json nor one of {', '.join(NAMED)}") from None
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from None
    return fields


def _sizes(module: torch.nn.Module) -> dict[str, int]:
    """Elements of each parameter, tied ones once."""
    return {name: parameter.numel() for name, parameter in module.named_parameters()}

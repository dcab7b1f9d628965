"""`megaprior import`: folders of other programs, and our own exports, as starting points for training.

    Llama          DIR                     model.init=DIR
    CLIP           DIR                     model.tower.init=DIR
    U-LVLM         DIR                     model.init=DIR
    LLaVA          DIR/lm DIR/tower        model.init=DIR/lm model.tower.init=DIR/tower
                   DIR/hlvlm               model.init=DIR/hlvlm, the MLP included

Safetensors only, and every tensor accounted for: what is not understood is refused, never dropped.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoProcessor, CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, LlavaForConditionalGeneration

from megaprior.errors import DataError
from megaprior.export.card import LICENSES, NOTICES
from megaprior.export.checking import compare_tensors, tensor_digests
from megaprior.export.foreign import plain, shell
from megaprior.files import atomic_folder
from megaprior.models.fingerprint import model_fingerprint
from megaprior.models.folder import load_whole, model_type, quiet
from megaprior.models.hlvlm import HLVLM, HLVLMConfig
from megaprior.models.hlvlm_folder import load_hlvlm
from megaprior.models.lm import load_text_lm
from megaprior.models.ulvlm import load_ulvlm
from megaprior.models.ulvlm_portable import ULVLMConfig
from megaprior.models.vision import KINDS, VisionTower, load_clip_vision, read_preprocessing
from megaprior.telemetry import say
from megaprior.tokenizer import load_model_tokenizer
from megaprior.train.checkpoint import resolve_model

_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class Imported:
    """What an import made: the number of tensors in it, and the configuration lines that use it."""

    tensors: int
    lines: tuple[str, ...]


def import_model(source: Path | str, output: Path | str) -> Imported:
    """Convert a folder of a known kind into starting points, in the dtype it has.

    Raises:
        DataError: `output` exists; the folder is of another kind, has no safetensors, lacks tensors or has unknown ones; or what
            was written does not read back equal. Nothing is left behind then.
    """
    source, output = resolve_model(source), Path(output)
    kind = model_type(source)
    makers = {LlamaConfig.model_type: _text, ULVLMConfig.model_type: _ulvlm, "llava": _llava}
    makers |= dict.fromkeys(KINDS, _tower)
    if kind == HLVLMConfig.model_type:
        raise DataError(f"{source}: is one of our own and needs no import; start from it with model.init={source}")
    if kind not in makers:
        raise DataError(f"{source}: model_type is {kind!r}; what can be imported is one of {', '.join(sorted(makers))}")
    with atomic_folder(output) as folder:
        found = makers[kind](source, folder, output)
        _copy_notices(source, folder)
    say(f"{output}: {found.tensors} tensors equal to those of {source}")
    return found


# ---------------------------------------------------------------- one kind each


def _text(source: Path, folder: Path, output: Path) -> Imported:
    dtype = _dtype(source)
    return _own(load_text_lm(source, dtype=dtype), source, folder, dtype, load_text_lm, f"model.init={output}")


def _ulvlm(source: Path, folder: Path, output: Path) -> Imported:
    dtype = _dtype(source)
    model = load_ulvlm(source, dtype=dtype)
    if hasattr(model.config, "auto_map"):
        delattr(model.config, "auto_map")  # names a file that belongs to exports
    return _own(model, source, folder, dtype, load_ulvlm, f"stage=ulvlm model.init={output}")


def _own(model: Any, source: Path, folder: Path, dtype: str, load: Any, line: str) -> Imported:
    model.save_pretrained(folder)
    load_model_tokenizer(source).save(folder / "tokenizer")
    before = tensor_digests(model)
    compare_tensors(before, tensor_digests(load(folder, dtype=dtype)), str(source))
    return Imported(len(before), (line,))


def _tower(source: Path, folder: Path, output: Path) -> Imported:
    dtype = _dtype(source)
    tower = load_clip_vision(source, dtype=dtype)
    with quiet():
        tower.save_pretrained(folder)
    if (source / _PROCESSOR_FILES[0]).is_file():
        shutil.copyfile(source / _PROCESSOR_FILES[0], folder / _PROCESSOR_FILES[0])
    before = tensor_digests(tower)
    compare_tensors(before, tensor_digests(load_clip_vision(folder, dtype=dtype)), str(source))
    return Imported(len(before), (f"model.tower.init={output}",))


def _llava(source: Path, folder: Path, output: Path) -> Imported:
    dtype = _dtype(source)
    llava = load_whole(LlavaForConditionalGeneration, source, dtype=dtype)
    _check_llava(llava.config, source)
    tokenizer = load_model_tokenizer(source)
    lm = shell(LlamaForCausalLM, LlamaConfig(**plain(llava.config.text_config)))
    lm.config.tie_word_embeddings = llava.config.tie_word_embeddings
    lm.model.load_state_dict(llava.model.language_model.state_dict(), assign=True)
    lm.lm_head.load_state_dict(llava.lm_head.state_dict(), assign=True)
    lm.tie_weights()
    with quiet():
        lm.save_pretrained(folder / "lm")
        llava.model.vision_tower.save_pretrained(folder / "tower")
        AutoProcessor.from_pretrained(source, local_files_only=True, backend="pil").image_processor.save_pretrained(
            folder / "tower"
        )
    tokenizer.save(folder / "lm" / "tokenizer")
    model = _connect(llava, folder, output, dtype)
    model.save_pretrained(folder / "hlvlm")
    tokenizer.save(folder / "hlvlm" / "tokenizer")
    _compare_llava(llava, folder, dtype, str(source))
    whole = f"stage=hlvlm model.init={output}/hlvlm"
    anew = f"stage=hlvlm model.init={output}/lm model.tower.init={output}/tower"
    return Imported(len(tensor_digests(llava)), (whole, anew))


def _connect(llava: Any, folder: Path, output: Path, dtype: str) -> HLVLM:
    """The H-LVLM that stands on the two folders just written."""
    places = {name: folder / name for name in ("lm", "tower")}
    seen = read_preprocessing(places["tower"], "auto")
    config = HLVLMConfig(
        **plain(llava.config),
        image_policy=seen.policy,
        image_mean=list(seen.mean),
        image_std=list(seen.std),
        base={n: {"fingerprint": model_fingerprint(p), "given": str(output / n)} for n, p in places.items()},
    )
    tower = VisionTower(load_clip_vision(places["tower"], dtype=dtype), mean=seen.mean, std=seen.std)
    lm = load_text_lm(places["lm"], dtype=dtype)
    model = HLVLM(config, lm=lm, tower=tower, placement="replicated")
    model.places = places
    model.projector.load_state_dict(llava.model.multi_modal_projector.state_dict(), assign=True)
    return model


def _compare_llava(llava: Any, folder: Path, dtype: str, where: str) -> None:
    again = load_hlvlm(folder / "hlvlm", dtype=dtype)
    tower = load_clip_vision(folder / "tower", dtype=dtype)
    for before, after in (
        (llava.model.language_model, again.lm.model),
        (llava.lm_head, again.lm.lm_head),
        (llava.model.multi_modal_projector, again.projector),
        (llava.model.vision_tower, tower),
    ):
        compare_tensors(tensor_digests(before), tensor_digests(after), where)


def _check_llava(config: Any, source: Path) -> None:
    """Refuse a LLaVA that reads another layer, or another kind of tower or language model, than the H-LVLM does."""
    for name, found, wanted in (
        ("text_config.model_type", config.text_config.model_type, LlamaConfig.model_type),
        ("vision_config.model_type", config.vision_config.model_type, CLIPVisionConfig.model_type),
        ("vision_feature_layer", config.vision_feature_layer, -2),
        ("vision_feature_select_strategy", config.vision_feature_select_strategy, "default"),
    ):
        if found != wanted:
            raise DataError(f"{source}: {name} is {found!r}, an H-LVLM has {wanted!r}; it cannot be one")


# ---------------------------------------------------------------- parts


def _dtype(source: Path) -> str:
    """The dtype that the folder's configuration names; "float32" where it names none."""
    fields = json.loads((source / "config.json").read_text(encoding="utf-8"))
    named = fields.get("dtype") or fields.get("torch_dtype") or fields.get("text_config", {}).get("dtype") or "float32"
    if named not in ("float32", "bfloat16", "float16"):
        raise DataError(f"{source}: dtype is {named!r}; float32, bfloat16 and float16 are read")
    return named


def _copy_notices(source: Path, folder: Path) -> None:
    """What the source says about itself and its licence, beside the weights: an export's card looks for it there."""
    for pattern in (*NOTICES, "README.md"):
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
    if (source / LICENSES).is_dir():
        shutil.copytree(source / LICENSES, folder / LICENSES)

"""Building an H-LVLM from the folders of a language model and a tower, and reading its own folder back.

Its folder holds what was trained: the MLP, and where the language model trained with it that one too, in a text LM's folder
inside. What it stands on is named by fingerprint; another model in that place is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file

from megaprior.errors import DataError, UsageError
from megaprior.models.attention import Backend
from megaprior.models.fingerprint import model_fingerprint
from megaprior.models.folder import model_type, read_llama_config
from megaprior.models.hlvlm import HLVLM, LM_FOLDER, WEIGHTS, HLVLMConfig
from megaprior.models.lm import ModelConfig, Trains, check_vocabulary, load_text_lm
from megaprior.models.vision import load_tower, patches_per_side, read_preprocessing, read_vision_config


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
            trains=config.trains,
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
    lm_dtype = config.dtype if config.trains == "projector_and_lm" else config.frozen_dtype
    lm = load_text_lm(config.init, dtype=lm_dtype, backend=config.attention)
    check_vocabulary(lm, vocab_size, source=config.init)
    tower = load_tower(config.tower.init, described.preprocessing, dtype=config.frozen_dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = HLVLM(described, lm=lm, tower=tower, placement=config.frozen, trains=config.trains)
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
        image_seq_length=patches_per_side(vision) ** 2,
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
    trains: Trains = "projector",
) -> HLVLM:
    """An H-LVLM from a folder that one was saved to, in evaluation mode; `dtype` of what trains, `frozen` of the rest.

    Raises:
        DataError: no such folder, another kind of model, weights missing or ill-shaped, or a language model or tower that is
            gone or is another one.
    """
    folder = Path(folder)
    config = read_hlvlm_config(folder)
    places = {name: find_base(folder, config, name) for name in ("lm", "tower")}
    assert config.base is not None
    if config.base["lm"]["given"] == LM_FOLDER:  # whoever stands on this one next names it from afar
        config.base["lm"]["given"] = str(places["lm"])
    lm_dtype = dtype if trains == "projector_and_lm" else frozen or dtype
    lm = load_text_lm(places["lm"], dtype=lm_dtype, backend=backend)
    tower = load_tower(places["tower"], config.preprocessing, dtype=frozen or dtype)
    model = HLVLM(config, lm=lm, tower=tower, placement=placement, trains=trains)
    model.places = places
    saved = load_file(folder / WEIGHTS) if (folder / WEIGHTS).is_file() else {}
    expected = {f"projector.{name}": tensor.shape for name, tensor in model.projector.state_dict().items()}
    found = {name: tensor.shape for name, tensor in saved.items()}
    if found != expected:
        raise DataError(
            f"{folder / WEIGHTS}: holds {found or 'nothing'}, the projector is {expected}: not this model's folder"
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


def find_base(folder: Path | str, config: HLVLMConfig, part: str) -> Path:
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

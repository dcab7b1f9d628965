"""From a configuration to the parts of a run: tokenizer, model, the engine's one module, loader."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megaprior.data.loader import Loader
from megaprior.data.manifest import read_build, refuse_other_tokenizer, tokenizer_entry
from megaprior.data.vision import VisionSpec
from megaprior.errors import DataError
from megaprior.models.clip import Clip, build_clip
from megaprior.models.clip_config import ClipConfig
from megaprior.models.compiling import compile_layers
from megaprior.models.hlvlm import HLVLM
from megaprior.models.hlvlm_folder import build_hlvlm
from megaprior.models.lm import TextLM, build_text_lm
from megaprior.models.ulvlm import build_ulvlm
from megaprior.models.vision import TowerConfig
from megaprior.objectives.base import Objective, Step
from megaprior.objectives.clip import ClipContrast
from megaprior.objectives.weighted_ntp import WeightedNTP
from megaprior.telemetry import say
from megaprior.tokenizer import Tokenizer, load_model_tokenizer, load_tokenizer
from megaprior.train.checkpoint import resolve_model
from megaprior.train.engine import LocalEngine
from megaprior.train.pairs import refuse_text
from megaprior.train.settings import RunConfig
from megaprior.train.zero3_config import resolve_extras

if TYPE_CHECKING:
    from megaprior.distributed import Peers
    from megaprior.train.engine import Engine

Model = TextLM | HLVLM | Clip


def resolve_init(cfg: RunConfig) -> RunConfig:
    """`model.init`, `.tower.init` and `.clip.words` as the Hugging Face folders that they mean (a run: its newest checkpoint)."""
    of = cfg.model
    init, tower, words = (None if p is None else str(resolve_model(p)) for p in (of.init, of.tower.init, of.clip.words))
    model = replace(of, init=init, tower=replace(of.tower, init=tower), clip=replace(of.clip, words=words))
    return replace(cfg, model=model)


def started_from(cfg: RunConfig, folder: Path) -> RunConfig:
    """`cfg` with its model read from `folder`, one that this run saved itself."""
    of = cfg.model.clip  # how to augment stays; sizes have no place beside a folder
    clip = ClipConfig(smallest_crop=of.smallest_crop, flip=of.flip, drop_words=of.drop_words)
    sizes = {"llama": {}, "preset": None, "patch": None, "limit": None, "tower": TowerConfig(), "clip": clip}
    model = replace(cfg.model, init=str(folder), **sizes)
    return replace(cfg, model=model)


def open_tokenizer(cfg: RunConfig) -> Tokenizer:
    """The tokenizer that shards and starting model share, compared before any weight is read.

    Raises:
        DataError: two of them differ; names the folder and the field that does.
    """
    first = Path(cfg.data.train[0].path) / "tokenizer"
    tokenizer, whose = load_tokenizer(first), f"the shards {cfg.data.train[0].path}"
    if cfg.model.init is not None:
        try:
            tokenizer = load_model_tokenizer(cfg.model.init)
            whose = f"the model {cfg.model.init}"
        except DataError:
            say(f"warning: {cfg.model.init} carries no tokenizer; whether it is that of the shards cannot be checked")
    if cfg.model.clip.words is not None:
        words = cfg.model.clip.words
        refuse_other_tokenizer(words, tokenizer_entry(load_model_tokenizer(words)), tokenizer_entry(tokenizer), whose)
    heldout = [cfg.data.heldout] if cfg.data.heldout is not None else []
    for path in [*(source.path for source in [*cfg.data.train, *cfg.data.text]), *heldout]:
        refuse_other_tokenizer(path, read_build(path)["tokenizer"], tokenizer_entry(tokenizer), whose)
    return tokenizer


def build_model(cfg: RunConfig, tokenizer: Tokenizer) -> Model:
    """The stage's model in training mode, from `model.init` or from random weights.

    Raises:
        UsageError, DataError: as `build_text_lm`, `build_ulvlm`, `build_hlvlm` and `build_clip`.
    """
    ids = {"vocab_size": tokenizer.vocab_size, "bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}
    if cfg.stage == "ulvlm":
        model = build_ulvlm(cfg.model, **ids, roles=tokenizer.reserved_roles(), seed=cfg.seed)
    elif cfg.stage == "hlvlm":
        model = build_hlvlm(cfg.model, vocab_size=tokenizer.vocab_size, image_id=image_id(tokenizer), seed=cfg.seed)
    elif cfg.stage == "clip":
        of = cfg.model
        model = build_clip(of.clip, init=of.init, preset=of.preset, dtype=of.dtype, **ids, seed=cfg.seed)
    else:
        model = build_text_lm(cfg.model, **ids, seed=cfg.seed)
    if cfg.activation_checkpointing != "none":
        model.checkpoint_activations(cfg.activation_checkpointing)
    if cfg.compile:
        assert not isinstance(model, Clip)
        compile_layers(
            model.lm if isinstance(model, HLVLM) else model, recomputed=cfg.activation_checkpointing == "full"
        )
    return model


def image_id(tokenizer: Tokenizer) -> int | None:
    """The id that an H-LVLM's image tokens have; None where the tokenizer reserves none."""
    return (tokenizer.reserved_roles() or {}).get("patch")


def vision_spec(model: Model) -> VisionSpec | None:
    """How the model sees images; None for a text LM."""
    return VisionSpec.of(model.config)


def open_loader(
    cfg: RunConfig, tokenizer: Tokenizer, spec: VisionSpec | None, *, rank: int = 0, world: int = 1, start: int = 0
) -> Loader:
    """The run's batches from the one after `start` updates on."""
    loader = Loader(
        cfg.data,
        seed=cfg.seed,
        weighting=cfg.weighting,
        spec=spec,
        tokenizer=tokenizer,
        rank=rank,
        world=world,
        start_step=start,
    )
    if cfg.stage == "clip":
        refuse_text(loader)
    return loader


def objective(cfg: RunConfig) -> Objective:
    """What the stage minimises."""
    return ClipContrast() if cfg.stage == "clip" else WeightedNTP()


def local_engine(cfg: RunConfig, model: Model, *, groups: int) -> LocalEngine:
    """Plain PyTorch on one process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module = Step(model, objective(cfg))
    return LocalEngine(module, cfg.optim, precision=cfg.precision, device=device, groups=groups)


def build_engine(cfg: RunConfig, model: Model, *, peers: Peers, groups: int, universal: bool) -> Engine:
    """The configured engine; `universal` says that its state comes from another number of ranks."""
    if cfg.engine == "local":
        return local_engine(cfg, model, groups=groups)
    from megaprior.train.zero3 import Zero3Engine

    return Zero3Engine(
        Step(model, objective(cfg)),
        cfg.optim,
        peers=peers,
        precision=cfg.precision,
        extras=resolve_extras(cfg.zero),
        groups=groups,
        universal=universal,
    )

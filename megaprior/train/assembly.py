"""From a configuration to the parts of a run: tokenizer, model, the engine's one module, loader."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megaprior.data.loader import Loader
from megaprior.data.manifest import read_build, refuse_other_tokenizer, tokenizer_entry
from megaprior.data.vision import PatchSpec, VisionSpec
from megaprior.errors import DataError
from megaprior.models.folder import model_type
from megaprior.models.lm import TextLM, build_text_lm, start_config
from megaprior.models.ulvlm import ULVLM, ULVLMConfig, build_ulvlm
from megaprior.objectives.base import Step
from megaprior.objectives.weighted_ntp import WeightedNTP
from megaprior.telemetry import say
from megaprior.tokenizer import Tokenizer, load_model_tokenizer, load_tokenizer
from megaprior.train.checkpoint import resolve_model
from megaprior.train.engine import LocalEngine
from megaprior.train.settings import RunConfig

if TYPE_CHECKING:
    from megaprior.distributed import Peers
    from megaprior.train.engine import Engine


def resolve_init(cfg: RunConfig) -> RunConfig:
    """`model.init` as the Hugging Face folder that it means (a run: its newest complete checkpoint)."""
    if cfg.model.init is None:
        return cfg
    return replace(cfg, model=replace(cfg.model, init=str(resolve_model(cfg.model.init))))


def started_from(cfg: RunConfig, folder: Path) -> RunConfig:
    """`cfg` with its model read from `folder`, one that this run saved itself."""
    return replace(cfg, model=replace(cfg.model, init=str(folder), llama={}, preset=None, patch=None, limit=None))


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
    heldout = [cfg.data.heldout] if cfg.data.heldout is not None else []
    for path in [*(source.path for source in [*cfg.data.train, *cfg.data.text]), *heldout]:
        refuse_other_tokenizer(path, read_build(path)["tokenizer"], tokenizer_entry(tokenizer), whose)
    return tokenizer


def build_model(cfg: RunConfig, tokenizer: Tokenizer) -> TextLM:
    """The stage's model in training mode, from `model.init` or from random weights.

    Raises:
        UsageError, DataError: as `build_text_lm` and `build_ulvlm`.
    """
    ids = {"vocab_size": tokenizer.vocab_size, "bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}
    if cfg.stage == "ulvlm":
        model = build_ulvlm(cfg.model, **ids, roles=tokenizer.reserved_roles(), seed=cfg.seed)
    else:
        model = build_text_lm(cfg.model, **ids, seed=cfg.seed)
    if cfg.activation_checkpointing == "full":
        model.checkpoint_activations()
    return model


def vision_spec(model: TextLM) -> VisionSpec | None:
    """How the model sees images; None for a text LM."""
    return VisionSpec.of(model.config)


def open_loader(
    cfg: RunConfig, tokenizer: Tokenizer, spec: VisionSpec | None, *, rank: int = 0, world: int = 1, start: int = 0
) -> Loader:
    """The run's batches from the one after `start` updates on."""
    return Loader(
        cfg.data,
        seed=cfg.seed,
        weighting=cfg.weighting,
        spec=spec,
        tokenizer=tokenizer,
        rank=rank,
        world=world,
        start_step=start,
    )


def local_engine(cfg: RunConfig, model: TextLM, *, groups: int) -> LocalEngine:
    """Plain PyTorch on one process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module = Step(model, WeightedNTP())
    return LocalEngine(module, cfg.optim, precision=cfg.precision, device=device, groups=groups)


def build_engine(cfg: RunConfig, model: TextLM, *, peers: Peers, groups: int, universal: bool) -> Engine:
    """The configured engine; `universal` says that its state comes from another number of ranks."""
    if cfg.engine == "local":
        return local_engine(cfg, model, groups=groups)
    from megaprior.train.zero3 import Zero3Engine, read_extras

    extras = read_extras(cfg.zero) if isinstance(cfg.zero, Path) else cfg.zero
    module = Step(model, WeightedNTP())
    return Zero3Engine(
        module, cfg.optim, peers=peers, precision=cfg.precision, extras=extras, groups=groups, universal=universal
    )


def describe_plan(cfg: RunConfig, *, world: int) -> str:
    """What a run would do, for --dry-run: read from configurations and indexes, no weight is touched."""
    tokenizer = open_tokenizer(cfg)
    parameters, spec = _shape(cfg, tokenizer)
    loader = open_loader(cfg, tokenizer, spec, world=world)
    try:
        ids = loader.sample_ids(0)
        lengths = loader.corpus.lengths(ids)
    finally:
        loader.close()
    row = cfg.data.max_tokens
    loss, tokens = int(lengths.loss.sum()), int(lengths.segment.sum())
    return "\n".join(
        [
            f"stage {cfg.stage}: engine {cfg.engine}, {world} process(es), {cfg.precision}, out {cfg.out}",
            f"model: {parameters:,} parameters, from {cfg.model.init or 'random weights'}",
            f"data: {', '.join(loader.sources)}; {sum(len(s) for s in loader.corpus.sets):,} samples",
            f"step 1: {len(ids)} samples, {tokens:,} tokens, {loss:,} of them in the loss, "
            f"in at least {-(-tokens // row)} rows of at most {row:,} tokens",
            f"run: {cfg.steps:,} steps, about {cfg.steps * loss:,} loss tokens; weighting {cfg.weighting.kind}; "
            f"lr {cfg.optim.lr:g} {cfg.optim.schedule}; a checkpoint every {cfg.save_every:,} steps",
        ]
    )


def _shape(cfg: RunConfig, tokenizer: Tokenizer) -> tuple[int, VisionSpec | None]:
    """(parameters, vision geometry) of the stage's model, built without memory for its weights."""
    with torch.device("meta"):
        if cfg.model.init is not None and model_type(cfg.model.init) == ULVLMConfig.model_type:
            model: TextLM = ULVLM(ULVLMConfig.from_pretrained(cfg.model.init, local_files_only=True))
            return model.num_parameters(), vision_spec(model)
        llama = start_config(
            cfg.model, vocab_size=tokenizer.vocab_size, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id
        )
        model = TextLM(llama)
    if cfg.stage != "ulvlm":
        return model.num_parameters(), None
    patch, limit = cfg.model.sizes.patch, cfg.model.sizes.limit
    return model.num_parameters() + 3 * patch**2 * llama.hidden_size, PatchSpec(patch, limit, 0, 1, 2, 3)

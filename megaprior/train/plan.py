"""What a run would do, for --dry-run: read from configurations and indexes, no weight is touched."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from megaprior.data.vision import VisionSpec
from megaprior.models.clip_config import describe_clip
from megaprior.models.folder import model_type
from megaprior.models.hlvlm import HLVLMConfig
from megaprior.models.hlvlm_folder import describe_hlvlm, read_hlvlm_config
from megaprior.models.lm import TextLM, start_config
from megaprior.models.ulvlm import ULVLM, ULVLMConfig
from megaprior.tokenizer import VISION_ROLES, Tokenizer
from megaprior.train.assembly import image_id, open_loader, open_tokenizer
from megaprior.train.pairs import contrast_notes
from megaprior.train.settings import RunConfig

if TYPE_CHECKING:
    from transformers import CLIPConfig


def describe_plan(cfg: RunConfig, *, world: int) -> str:
    """The run in a few lines: model, data, the first step, and the whole; `cfg` is resolved (`assembly.resolve_init`)."""
    tokenizer = open_tokenizer(cfg)
    clip: Any = None
    if cfg.stage == "clip":
        parameters, clip = _clip_shape(cfg, tokenizer)
        spec = VisionSpec.of(clip)
    else:
        parameters, spec = _shape(cfg, tokenizer)
    loader = open_loader(cfg, tokenizer, spec, world=world)
    try:
        positions = clip.text_config.max_position_embeddings if clip else 0
        notes = contrast_notes(loader, positions=positions, world=world) if clip else []
        ids = loader.sample_ids(0)
        lengths = loader.corpus.lengths(ids)
    finally:
        loader.close()
    row = cfg.data.max_tokens
    loss, tokens = int(lengths.loss.sum()), int(lengths.segment.sum())
    return "\n".join(
        [
            f"stage {cfg.stage}: engine {cfg.engine}, {world} process(es), {cfg.precision}, out {cfg.out}",
            f"model: {parameters}, from {cfg.model.init or 'random weights'}",
            f"data: {', '.join(loader.sources)}; {sum(len(s) for s in loader.corpus.sets):,} samples",
            f"step 1: {len(ids)} samples, {tokens:,} tokens, {loss:,} of them in the loss, "
            f"in at least {-(-tokens // row)} rows of at most {row:,} tokens",
            f"run: {cfg.steps:,} steps, about {cfg.steps * loss:,} loss tokens; weighting {cfg.weighting.kind}; "
            f"lr {cfg.optim.lr:g} {cfg.optim.schedule}; a checkpoint every {cfg.save_every:,} steps",
            *notes,
        ]
    )


def _shape(cfg: RunConfig, tokenizer: Tokenizer) -> tuple[str, VisionSpec | None]:
    """(parameters in words, vision geometry) of the stage's model, built without memory for its weights."""
    if cfg.stage == "hlvlm":
        return _hlvlm_shape(cfg, tokenizer)
    with torch.device("meta"):
        if cfg.model.init is not None and model_type(cfg.model.init) == ULVLMConfig.model_type:
            model: Any = ULVLM(ULVLMConfig.from_pretrained(cfg.model.init, local_files_only=True))
            return f"{model.num_parameters():,} parameters", VisionSpec.of(model.config)
        llama = start_config(
            cfg.model, vocab_size=tokenizer.vocab_size, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id
        )
        if cfg.stage == "ulvlm":
            fields = {name: value for name, value in llama.to_dict().items() if name != "model_type"}
            sizes, ids = cfg.model.sizes, range(len(VISION_ROLES))  # any ids: none is looked up
            roles = dict(zip(VISION_ROLES, ids, strict=True))
            model = ULVLM(ULVLMConfig(**fields, patch=sizes.patch, limit=sizes.limit, vision_roles=roles))
        else:
            model = TextLM(llama)
    return f"{model.num_parameters():,} parameters", VisionSpec.of(model.config)


def _clip_shape(cfg: RunConfig, tokenizer: Tokenizer) -> tuple[str, CLIPConfig]:
    from transformers import CLIPModel

    ids = {"vocab_size": tokenizer.vocab_size, "bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}
    config = describe_clip(cfg.model.clip, init=cfg.model.init, preset=cfg.model.preset, **ids)
    with torch.device("meta"):
        model = CLIPModel(config)
    seen = sum(p.numel() for p in model.vision_model.parameters())
    return f"{model.num_parameters():,} parameters, {seen:,} of them in the vision tower", config


def _hlvlm_shape(cfg: RunConfig, tokenizer: Tokenizer) -> tuple[str, VisionSpec | None]:
    from transformers import LlavaForConditionalGeneration

    assert cfg.model.init is not None
    if model_type(cfg.model.init) == HLVLMConfig.model_type:
        config = read_hlvlm_config(cfg.model.init)
    else:
        config = describe_hlvlm(cfg.model, image_id=image_id(tokenizer))
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.requires_grad_(False)
    if cfg.model.trains == "projector":
        model.model.language_model.requires_grad_(False)
        model.lm_head.requires_grad_(False)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"{trained:,} parameters that train, of {model.num_parameters():,}", VisionSpec.of(config)

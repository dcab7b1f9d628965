"""U-LVLM: one causal Transformer that reads raw image patches beside text; no vision encoder.

A segment is BOS <vision> row <vrow_sep> row ... </vision> caption EOS. Every patch has a patch token in `input_ids`, and its
pixels, through one linear map, are added to that token's embedding.

Letters: T tokens of a row, P patches, D = 3 * patch * patch values of a patch, H width.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from megaprior.errors import DataError, UsageError
from megaprior.models.attention import Backend
from megaprior.models.folder import from_folder, model_type
from megaprior.models.lm import ModelConfig, TextLM, check_vocabulary, from_scratch, start_config
from megaprior.models.ulvlm_portable import ULVLMConfig, normalize_pixels

ROLES = ("patch", "start", "row", "end")


class ULVLM(TextLM):
    """The text LM plus `patch_embed`, a Linear(D, H) without bias."""

    config_class = ULVLMConfig
    config: ULVLMConfig

    def __init__(self, config: ULVLMConfig) -> None:
        super().__init__(config)
        self.patch_embed = nn.Linear(3 * config.patch**2, config.hidden_size, bias=False)
        self.post_init()

    def embed(
        self, input_ids: torch.Tensor, patches: torch.Tensor | None, patch_index: torch.Tensor | None
    ) -> torch.Tensor:
        """Token embeddings with each patch added at its token: [T, H].

        A row without patches goes through `patch_embed` too, with P = 0: under ZeRO-3 all ranks must touch all modules.
        """
        embeds = self.model.embed_tokens(input_ids)
        if patches is None or patch_index is None or not len(patches):
            patches = input_ids.new_empty(0, self.patch_embed.in_features, dtype=torch.uint8)
            patch_index = input_ids.new_empty(0)
        pixels = normalize_pixels(patches).to(embeds.dtype)
        return embeds.index_add(0, patch_index, self.patch_embed(pixels).to(embeds.dtype))

    def name_architecture(self) -> None:
        """Only this class reads the folder."""
        self.config.architectures = [type(self).__name__]


def build_ulvlm(
    config: ModelConfig, *, vocab_size: int, bos_id: int, eos_id: int, roles: dict[str, int] | None, seed: int = 0
) -> ULVLM:
    """A U-LVLM from a text LM's folder, from its own folder, or from random weights, in training mode.

    From a text LM all weights are kept and `patch_embed` is drawn from the seed (std 0.02).

    Args:
        vocab_size: ids of the tokenizer.
        roles: ids that the tokenizer reserves for the four roles, None where it has none. A folder of our own keeps the
            roles it was trained with.

    Raises:
        UsageError: no ids for the roles and `vision_roles` is not "append", or a patch size that cannot be.
        DataError: the folder does not hold such a model.
    """
    own = config.init is not None and model_type(config.init) == ULVLMConfig.model_type
    if own:
        model = _continue(config)
    else:
        if roles is None and config.vision_roles != "append":
            raise UsageError(
                f"the tokenizer reserves no ids for the vision roles ({', '.join(ROLES)}): "
                "rerun with model.vision_roles=append, which appends four rows"
            )
        model = _begin(config, vocab_size=vocab_size, bos_id=bos_id, eos_id=eos_id, seed=seed)
    check_vocabulary(model, vocab_size, source=config.init or "model.llama")
    if not own:
        model.config.vision_roles = append_roles(model) if config.vision_roles == "append" else roles
    _check(model.config, source=config.init or "model")
    model.name_architecture()
    return model.train()


def load_ulvlm(folder: Path | str, *, dtype: str = "float32", backend: Backend = "auto") -> ULVLM:
    """A U-LVLM from a folder that one was saved to, in evaluation mode.

    Raises:
        DataError: no such folder, another kind of model, no safetensors, or weights missing or of another shape.
    """
    kind = model_type(folder)
    if kind != ULVLMConfig.model_type:
        raise DataError(f"{folder}: model_type is {kind!r}, a U-LVLM is {ULVLMConfig.model_type!r}")
    model = from_folder(ULVLM, folder, dtype=dtype, backend=backend)
    _check(model.config, source=str(folder))
    return model


def append_roles(model: TextLM) -> dict[str, int]:
    """Append four rows to embedding and head, at the mean of the rows there; their ids by role.

    The mean is where a new token disturbs the old ones' probabilities least.
    """
    rows = model.config.vocab_size
    model.resize_token_embeddings(rows + len(ROLES), mean_resizing=False)
    weights = {id(w): w for w in (model.model.embed_tokens.weight, model.lm_head.weight)}  # one, where they are tied
    with torch.no_grad():
        for weight in weights.values():
            weight[rows:] = weight[:rows].double().mean(0).to(weight.dtype)
    return {role: rows + i for i, role in enumerate(ROLES)}


def _continue(config: ModelConfig) -> ULVLM:
    assert config.init is not None
    model = load_ulvlm(config.init, dtype=config.dtype, backend=config.attention)
    stored, wanted = model.config.patch, config.sizes.patch
    if (config.patch or config.preset) and stored != wanted:
        raise UsageError(
            f"{config.init}: was trained with {stored}-pixel patches, model.patch is {wanted}: use {stored}"
        )
    if config.limit:
        model.config.limit = config.limit
    return model


def _begin(config: ModelConfig, *, vocab_size: int, bos_id: int, eos_id: int, seed: int) -> ULVLM:
    llama = start_config(config, vocab_size=vocab_size, bos_id=bos_id, eos_id=eos_id).to_dict()
    for name in ("model_type", "architectures", "transformers_version", "dtype"):
        llama.pop(name, None)
    ours = ULVLMConfig(**llama, patch=config.sizes.patch, limit=config.sizes.limit)
    if config.init is None:
        return from_scratch(ULVLM, ours, config, seed=seed)
    fresh = {"patch_embed.weight"}
    return from_folder(
        ULVLM, config.init, dtype=config.dtype, backend=config.attention, llama=ours, fresh=fresh, seed=seed
    )


def _check(config: ULVLMConfig, *, source: str) -> None:
    if config.limit % config.patch:
        raise UsageError(
            f"{source}: limit {config.limit} is not a multiple of patch {config.patch}: images end on a whole patch"
        )
    roles = config.vision_roles or {}
    if sorted(roles) != sorted(ROLES) or len(set(roles.values())) != len(ROLES):
        raise DataError(f"{source}: vision roles {roles} must give {', '.join(ROLES)} four different ids")
    if max(roles.values()) >= config.vocab_size:
        raise DataError(
            f"{source}: vision roles {roles} lie beyond its {config.vocab_size} embeddings: "
            "rerun with model.vision_roles=append, which appends four rows"
        )

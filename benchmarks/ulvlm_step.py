"""A training step of the tiny U-LVLM on CPU against a plain transformers loop: caption tokens per second and peak memory.

    python -m benchmarks.ulvlm_step --shards shards/flickr8k --tokenizer tokenizer.model.v1

ours   packed rows, attention per segment, a chunked head that sees loss tokens only
plain  stock LlamaForCausalLM: one right-padded batch, its own SDPA and loss, logits for all positions

How the two are compared: side_by_side.py. Letters: B batch, T padded tokens, P patches.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import transformers
from torch import nn

from benchmarks.side_by_side import Arm, Ours, Plain, run, vision_spec
from megaprior.models.lm import ModelConfig
from megaprior.models.ulvlm import ULVLM, build_ulvlm
from megaprior.tokenizer import Tokenizer

LR = 1e-4


class PlainModule(nn.Module):
    """Stock Llama with the U-LVLM's weights, and its patch projection."""

    def __init__(self, model: ULVLM) -> None:
        super().__init__()
        fields = model.config.to_dict()
        fields = {name: fields[name] for name in transformers.LlamaConfig().to_dict() if name in fields}
        fields.pop("model_type")
        self.lm = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields))
        weights = model.state_dict()
        self.patch_embed = nn.Linear(model.patch_embed.in_features, model.config.hidden_size, bias=False)
        self.patch_embed.load_state_dict({"weight": weights.pop("patch_embed.weight")})
        self.lm.load_state_dict(weights)
        assert model.config.vision_roles is not None
        self.patch_id = model.config.vision_roles["patch"]

    def forward(
        self, input_ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor, patches: torch.Tensor
    ) -> torch.Tensor:
        """input_ids, mask, labels int64 [B, T], patches uint8 [P, 3 * patch^2] -> mean loss, 0-d."""
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        pixels = ((patches.view(len(patches), -1, 3) / 255 - mean) / std).flatten(1)
        embeds = self.lm.get_input_embeddings()(input_ids)
        embeds = embeds.index_put((input_ids == self.patch_id,), self.patch_embed(pixels), accumulate=True)
        return self.lm(inputs_embeds=embeds, attention_mask=mask, labels=labels, use_cache=False).loss


def new_model(tokenizer: Tokenizer) -> ULVLM:
    """The tiny U-LVLM with four appended roles, the same for both arms."""
    config = ModelConfig(preset="tiny", vision_roles="append")
    ids = {"vocab_size": tokenizer.vocab_size, "bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}
    return build_ulvlm(config, **ids, roles=None, seed=0)


def arms(options: argparse.Namespace, tokenizer: Tokenizer) -> dict[str, Callable[[], Arm]]:
    """See `side_by_side.run`."""

    def plain() -> Plain:
        model = new_model(tokenizer)
        return Plain(options, tokenizer, PlainModule(model), vision_spec(model), lr=LR)

    return {"ours": lambda: Ours(options, tokenizer, new_model(tokenizer), lr=LR), "plain": plain}


if __name__ == "__main__":
    run(
        "ulvlm_step",
        doc=__doc__,
        title="A training step of the tiny U-LVLM on CPU",
        arms=arms,
        model="4 layers of width 128 with four appended roles, patches of 16 pixels, all of it trained.",
    )

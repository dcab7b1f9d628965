"""A training step of a small H-LVLM on CPU against a plain LLaVA loop: caption tokens per second and peak memory.

    python -m benchmarks.hlvlm_step --shards shards/flickr8k --tokenizer tokenizer.model.v1

ours   packed rows, attention per segment, a chunked head that sees loss tokens only and makes no gradient for a frozen weight
plain  stock LlavaForConditionalGeneration: one right-padded batch, its own SDPA and loss, logits for all positions

Both freeze tower and language model and train the MLP; both run the tower on every image of every step. How the two are
compared: side_by_side.py. Letters: B batch, T padded tokens, P patches.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlavaConfig, LlavaForConditionalGeneration

from benchmarks.side_by_side import Arm, Ours, Plain, run, vision_spec
from megaprior.models.hlvlm import HLVLM
from megaprior.models.hlvlm_folder import build_hlvlm
from megaprior.models.lm import ModelConfig, build_text_lm
from megaprior.models.vision import TowerConfig, load_clip_vision, to_pixels
from megaprior.tokenizer import Tokenizer

LR = 1e-3
SIDE, PATCH = 160, 16  # 100 tokens an image
UNKNOWN = 0  # SentencePiece's <unk>, which no caption has: LLaVA looks for image tokens by their id


class PlainLlava(nn.Module):
    """LLaVA with the weights of an H-LVLM, its MLP alone trained."""

    def __init__(self, model: HLVLM) -> None:
        super().__init__()
        fields = model.config.to_dict()
        known = {name: fields[name] for name in LlavaConfig().to_dict() if name in fields and name != "model_type"}
        self.llava = LlavaForConditionalGeneration(LlavaConfig(**known)).requires_grad_(False)
        self.llava.model.vision_tower.load_state_dict(load_clip_vision(model.places["tower"]).state_dict())
        self.llava.model.language_model.load_state_dict(model.lm.model.state_dict())
        self.llava.lm_head.load_state_dict(model.lm.lm_head.state_dict())
        projector = self.llava.model.multi_modal_projector
        projector.load_state_dict(model.projector.state_dict())
        projector.requires_grad_(True)
        self.seen = model.preprocessing

    def forward(
        self, input_ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor, patches: torch.Tensor
    ) -> torch.Tensor:
        """input_ids, mask, labels int64 [B, T], patches uint8 [B * P, 3 * patch^2] -> mean loss, 0-d."""
        pixels = to_pixels(patches, side=SIDE, mean=self.seen.mean, std=self.seen.std)
        return self.llava(input_ids=input_ids, pixel_values=pixels, attention_mask=mask, labels=labels).loss


def new_model(tokenizer: Tokenizer, folder: Path) -> HLVLM:
    """A tiny language model and a tower of 4 layers of width 128, random, read from folders as a user's would be."""
    ids = {"vocab_size": tokenizer.vocab_size, "bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}
    lm, tower = folder / "lm", folder / "tower"
    build_text_lm(ModelConfig(preset="tiny"), **ids, seed=0).save_pretrained(lm)
    torch.manual_seed(1)
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=SIDE, patch_size=PATCH)).save_pretrained(tower)
    config = ModelConfig(init=str(lm), tower=TowerConfig(init=str(tower)))
    return build_hlvlm(config, vocab_size=tokenizer.vocab_size, image_id=UNKNOWN, seed=0)


def arms(options: argparse.Namespace, tokenizer: Tokenizer) -> dict[str, Callable[[], Arm]]:
    """See `side_by_side.run`."""

    def ours() -> Ours:
        with TemporaryDirectory() as folder:
            return Ours(options, tokenizer, new_model(tokenizer, Path(folder)), lr=LR)

    def plain() -> Plain:
        with TemporaryDirectory() as folder:
            model = new_model(tokenizer, Path(folder))
            return Plain(options, tokenizer, PlainLlava(model), vision_spec(model), lr=LR)

    return {"ours": ours, "plain": plain}


if __name__ == "__main__":
    run(
        "hlvlm_step",
        doc=__doc__,
        title="A training step of a small H-LVLM on CPU",
        arms=arms,
        model="A frozen language model and a frozen tower, 4 layers of width 128 each, and the MLP between them, which trains; "
        f"{(SIDE // PATCH) ** 2} tokens an image.",
    )

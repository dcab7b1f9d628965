"""Small models of every kind in their folders, with a tokenizer each, and pictures to show them (imported by name)."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from megaprior.data.samples import Segment, assemble
from megaprior.data.vision import VisionSpec
from megaprior.tokenizer import Tokenizer, train_sentencepiece

TEXT = [f"a photo of {n} red squares and one blue circle at dusk" for n in range(64)]
KINDS = (
    "text",
    "text_tied",
    "ulvlm",
    "ulvlm_tied",
    "hlvlm",
    "hlvlm_appended",
    "hlvlm_tied",
    "hlvlm_crop",
    "hlvlm_square",
)
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}


@dataclass(frozen=True)
class World:
    """Folders of models by kind, and the tokenizer of all of them."""

    folders: dict[str, Path]
    tokenizer: Tokenizer


def make_world(root: Path) -> World:
    """Every kind of `KINDS`, and "clip"."""
    from transformers import CLIPConfig, CLIPModel

    from megaprior.models.hlvlm_folder import build_hlvlm
    from megaprior.models.lm import ModelConfig, build_text_lm
    from megaprior.models.ulvlm import build_ulvlm
    from megaprior.models.vision import TowerConfig

    tokenizer = train_sentencepiece(TEXT, root / "tokenizer", vocab_size=330)
    roles = tokenizer.reserved_roles()
    assert roles is not None
    ids = {"vocab_size": tokenizer.vocab_size, "bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}
    torch.manual_seed(7)
    small = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    vision = {**small, "image_size": 32, "patch_size": 8, "initializer_factor": 4.0}
    text = {**small, "vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(root / "clip")
    for kind in KINDS:
        sizes = {**SIZES, "tie_word_embeddings": kind.endswith("tied")}
        if kind.startswith("text"):
            model = build_text_lm(ModelConfig(llama=sizes), **ids)
        elif kind.startswith("ulvlm"):
            model = build_ulvlm(ModelConfig(llama=sizes, patch=8, limit=64), **ids, roles=roles)
        else:
            lm = root / ("text_tied" if kind.endswith("tied") else "text")
            policy = {"hlvlm_crop": "crop", "hlvlm_square": "square"}.get(kind, "pad")
            tower = TowerConfig(init=str(root / "clip"), policy=policy)
            image_id = None if kind == "hlvlm_appended" else roles["patch"]
            model = build_hlvlm(
                ModelConfig(init=str(lm), tower=tower), vocab_size=tokenizer.vocab_size, image_id=image_id
            )
        model.save_pretrained(root / kind)
        tokenizer.save(root / kind / "tokenizer")
    return World({name: root / name for name in (*KINDS, "clip")}, tokenizer)


def pictures() -> dict[str, bytes]:
    """Files of many shapes and kinds: wide, high, one pixel high, transparent, grey with 16 bits, palette, rotated by EXIF."""
    random = np.random.default_rng(0)

    def noise(width: int, height: int, channels: int = 3) -> Image.Image:
        small = random.integers(0, 256, (7, 5, channels), dtype=np.uint8)
        return Image.fromarray(small).resize((width, height), Image.Resampling.BILINEAR)

    def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
        file = io.BytesIO()
        image.save(file, kind, **options)
        return file.getvalue()

    turned = Image.Exif()
    turned[0x0112] = 6
    grey = Image.fromarray(random.integers(0, 65536, (20, 33), dtype=np.uint16))
    return {
        "square": encoded(noise(40, 40)),
        "wide": encoded(noise(90, 31)),
        "high": encoded(noise(33, 71), "JPEG"),
        "thin": encoded(noise(50, 1)),
        "large": encoded(noise(333, 200), "JPEG"),
        "transparent": encoded(noise(45, 30, 4)),
        "grey": encoded(grey),
        "palette": encoded(noise(30, 50).convert("P"), "GIF"),
        "turned": encoded(noise(70, 30), "JPEG", exif=turned),
    }


def trainer_inputs(model: object, tokenizer: Tokenizer, image: Image.Image | None, tokens: list[int]) -> dict:
    """What the trainer's `states` reads for BOS, image, `tokens`."""
    spec = VisionSpec.of(model.config)  # type: ignore[attr-defined]
    segment = Segment(0, np.array(tokens, dtype=np.int64), np.ones(len(tokens), np.float32))
    if spec is not None and image is not None:
        grid = spec.grid(image.size)
        segment = Segment(0, segment.tokens, segment.token_weight, grid=grid, patches=spec.patches(image, grid))
    return assemble([segment], bos_id=tokenizer.bos_id, spec=spec, denominator=1, max_tokens=4096, pad_to=1).inputs

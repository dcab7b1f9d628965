"""Small Llamas and packed rows for the models' tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig


@dataclass(frozen=True)
class Row:
    """A packed row of random tokens and its segments."""

    segments: tuple[torch.Tensor, ...]

    @property
    def inputs(self) -> dict:
        """The first four arguments of `states`."""
        lengths = torch.tensor([len(s) for s in self.segments])
        return {
            "input_ids": torch.cat(self.segments),
            "position_ids": torch.cat([torch.arange(n) for n in lengths]),
            "cu_seqlens": torch.tensor([0, *lengths.cumsum(0)], dtype=torch.int32),
            "max_seqlen": int(lengths.max()),
        }


@pytest.fixture
def row() -> Callable[[Sequence[int]], Row]:
    """`row([3, 5])` is a row of two segments of random tokens below 97."""

    def make(lengths: Sequence[int]) -> Row:
        generator = torch.Generator().manual_seed(0)
        return Row(tuple(torch.randint(97, (n,), generator=generator) for n in lengths))

    return make


def small_llama(**changes: object) -> LlamaConfig:
    """Two layers of width 32, grouped heads, 97 tokens; weights large enough to matter."""
    sizes = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
    }
    return LlamaConfig(**{**sizes, **changes})


@pytest.fixture
def llama() -> Callable[..., LlamaConfig]:
    """`llama(tie_word_embeddings=True)`: see `small_llama`."""
    return small_llama


@pytest.fixture(scope="session")
def clip_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders as transformers writes them, random weights: "clip" (both towers), "vision" (of the same), "lm" and "lm_tied"."""
    from transformers import CLIPConfig, CLIPModel, CLIPVisionModel, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("bases")
    torch.manual_seed(3)
    small = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    vision = {**small, "image_size": 32, "patch_size": 8, "initializer_factor": 4.0}
    text = {**small, "vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder / "clip")
    CLIPVisionModel.from_pretrained(folder / "clip").save_pretrained(folder / "vision")
    for name, tied in (("lm", False), ("lm_tied", True)):
        LlamaForCausalLM(small_llama(tie_word_embeddings=tied)).save_pretrained(folder / name)
    return {name: folder / name for name in ("clip", "vision", "lm", "lm_tied")}

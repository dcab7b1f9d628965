"""Small Llamas and packed rows for the models' tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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


@pytest.fixture
def llama() -> Callable[..., LlamaConfig]:
    """`llama(tie_word_embeddings=True)`: two layers of width 32, grouped heads, 97 tokens; weights large enough to matter."""

    def make(**changes: object) -> LlamaConfig:
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

    return make

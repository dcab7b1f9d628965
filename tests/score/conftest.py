"""Shards of random captions and a small reference LM in a folder, for the scorer's tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megaprior.data.shard_writer import ShardWriter, write_build
from megaprior.tokenizer import Tokenizer, train_sentencepiece


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """300 ids: 1 BOS, 2 EOS, bytes, and some words."""
    text = [f"a photo of {n} red squares and one blue circle at dusk" for n in range(64)]
    return train_sentencepiece(text, tmp_path_factory.mktemp("tokenizer"), vocab_size=300)


@pytest.fixture(scope="session")
def save_reference(tokenizer: Tokenizer) -> Callable[..., Path]:
    """`save_reference(folder, seed=0)` saves two layers of width 32 with their tokenizer; weights large enough to matter."""
    from megaprior.models.lm import ModelConfig, build_text_lm

    def save(folder: Path, *, seed: int = 0) -> Path:
        sizes = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "initializer_range": 0.2,
        }
        model = build_text_lm(
            ModelConfig(llama=sizes),
            vocab_size=tokenizer.vocab_size,
            bos_id=tokenizer.bos_id,
            eos_id=tokenizer.eos_id,
            seed=seed,
        )
        model.save_pretrained(folder)
        tokenizer.save(folder / "tokenizer")
        return folder

    return save


@pytest.fixture(scope="session")
def reference(save_reference: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reference LM's folder."""
    return save_reference(tmp_path_factory.mktemp("models") / "reference")


@pytest.fixture
def write_captions(tmp_path: Path, tokenizer: Tokenizer) -> Callable[..., Path]:
    """`write_captions("pairs", captions=120, shards=2, longest=40)` writes text shards of random ids and returns the folder."""

    def write(name: str, *, captions: int = 120, shards: int = 2, longest: int = 40, seed: int = 0) -> Path:
        folder = tmp_path / name
        random = np.random.default_rng(seed)
        manifests = []
        for number in range(shards):
            writer = ShardWriter(
                folder, f"{number:05}", tokenizer=tokenizer, build_id=name, kind="text", source={}, options={}
            )
            with writer:
                for i in range(captions // shards):
                    ids = random.integers(7, tokenizer.vocab_size, random.integers(0, longest))
                    writer.add(f"key{i}", np.append(ids, tokenizer.eos_id))
                manifests.append(writer.finish())
        write_build(folder, build_id=name, shard_manifests=manifests, tokenizer=tokenizer, options={}, counts={})
        return folder

    return write

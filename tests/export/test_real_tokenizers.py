"""Exports with the tokenizers of real models: stock AutoTokenizer, real captions, and where the image token goes."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from export_world import SIZES, pictures
from transformers import AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration

from megaprior.data.images import decode_rgb
from megaprior.export import export
from megaprior.export.foreign import load_foreign
from megaprior.models.hlvlm_folder import build_hlvlm
from megaprior.models.lm import ModelConfig, build_text_lm
from megaprior.models.ulvlm import build_ulvlm
from megaprior.models.vision import TowerConfig
from megaprior.tokenizer import load_tokenizer

NARROW = {**SIZES, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}


def captions(shared: Callable[[str], Path], count: int) -> list[str]:
    with gzip.open(shared("capsfusion_10k") / "capsfusion_example.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line)["laion_2b"] for _, line in zip(range(count), file, strict=False)]


@pytest.mark.parametrize("name", ["mistral/tokenizer.model.v1", "llama3", "gpt2"])
def test_autotokenizer_gives_the_ids_of_training(shared, tmp_path, name) -> None:
    tokenizer = load_tokenizer(shared("tokenizers") / name)
    ids = {"vocab_size": tokenizer.vocab_size, "bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}
    build_text_lm(ModelConfig(llama=NARROW), **ids).save_pretrained(tmp_path / "model")
    tokenizer.save(tmp_path / "model" / "tokenizer")
    assert export(tmp_path / "model", tmp_path / "out")["worst"] < 1e-5
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = captions(shared, 1000)
    assert theirs(texts)["input_ids"] == [[tokenizer.bos_id, *found] for found in tokenizer.encode_batch(texts)]
    assert [theirs.decode(tokenizer.encode(text)) for text in texts[:50]] == texts[:50]
    assert ("Built with Meta Llama 3" in (tmp_path / "out" / "README.md").read_text()) == (name == "llama3")


@pytest.mark.slow
def test_a_u_lvlm_on_llama_3s_reserved_ids(shared, tmp_path) -> None:
    tokenizer = load_tokenizer(shared("tokenizers") / "llama3")
    ids = {"vocab_size": tokenizer.vocab_size, "bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}
    model = build_ulvlm(ModelConfig(llama=NARROW, patch=8, limit=64), **ids, roles=tokenizer.reserved_roles())
    model.save_pretrained(tmp_path / "model")
    tokenizer.save(tmp_path / "model" / "tokenizer")
    assert export(tmp_path / "model", tmp_path / "out", dtype="bfloat16")["worst"] < 1e-5
    found = load_foreign(tmp_path / "out").processor(images=decode_rgb(pictures()["wide"]))["input_ids"][0].tolist()
    assert (found[0], found[1], found[2], found[-1]) == (128_000, 128_253, 128_252, 128_255)


@pytest.mark.parametrize(
    ("name", "rows", "image_id"),
    [
        ("v1", 32_000, 32_000),  # a row more
        ("v1", 32_064, 32_000),  # a spare row
        pytest.param("llama3", 128_256, 128_252, marks=pytest.mark.slow),  # a reserved id
    ],
)
def test_an_h_lvlm_with_and_without_a_reserved_id(shared, world, tmp_path, name, rows, image_id) -> None:
    tokenizer = load_tokenizer(shared("tokenizers") / ("llama3" if name == "llama3" else "mistral/tokenizer.model.v1"))
    roles = tokenizer.reserved_roles()
    ids = {"vocab_size": tokenizer.vocab_size, "bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}
    sizes = {**NARROW, "vocab_size": rows}
    build_text_lm(ModelConfig(llama=sizes), **ids).save_pretrained(tmp_path / "lm")
    config = ModelConfig(init=str(tmp_path / "lm"), tower=TowerConfig(init=str(world.folders["clip"])))
    model = build_hlvlm(config, vocab_size=tokenizer.vocab_size, image_id=roles["patch"] if roles else None)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save(tmp_path / "model" / "tokenizer")
    assert export(tmp_path / "model", tmp_path / "out")["worst"] < 1e-5
    processor = AutoProcessor.from_pretrained(tmp_path / "out", backend="pil")
    image = decode_rgb(pictures()["wide"])
    inputs = processor(images=image, text="<image>two red squares", return_tensors="pt")
    expected = [tokenizer.bos_id, *[image_id] * 16, *tokenizer.encode("two red squares")]
    assert inputs["input_ids"][0].tolist() == expected
    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert theirs.config.text_config.vocab_size == max(rows, image_id + 1)
    assert theirs(**inputs).logits.isfinite().all()

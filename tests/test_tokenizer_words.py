"""Word by word gives the ids of SentencePiece itself, and is used only where it must."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from megaprior.tokenizer import words
from megaprior.tokenizer.words import WordByWord, splits_at_words

TEXT = [
    "a small red square to the left of it",
    "two blue circles, e\u0301t\u00e9 \u6771\u4eac 12 1/2",
    "<s> is text",
] * 9
LETTERS = "  \u2581ab .,0\t\n\u00a0\u0301\u00e9\u6771\0<s>\U0001f389"


def model(**changes: object) -> bytes:
    out = io.BytesIO()
    sizes = {"vocab_size": 320, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2}
    faithful = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    SentencePieceTrainer.train(sentence_iterator=iter(TEXT), model_writer=out, **{**sizes, **faithful, **changes})
    return out.getvalue()


@pytest.fixture(scope="module")
def models(shared: Callable[[str], Path]) -> dict[str, tuple[SentencePieceProcessor, WordByWord]]:
    folder = shared("tokenizers") / "mistral"
    real = {name: (folder / name).read_bytes() for name in ("tokenizer.model.v1",)}
    real["v3"] = (folder / "mistral_instruct_tokenizer_240323.model.v3").read_bytes()
    found = {}
    for name, data in {**real, "own": model(), "symbols": model(user_defined_symbols=["b.", "<s"])}.items():
        assert splits_at_words(data), name
        whole = SentencePieceProcessor(model_proto=data)
        found[name] = whole, WordByWord(whole.encode)
    return found


@settings(max_examples=300, deadline=None)
@given(text=st.one_of(st.text(LETTERS, max_size=40), st.lists(st.text(max_size=8)).map(" ".join)))
def test_the_ids_are_those_of_the_whole_text(
    models: dict[str, tuple[SentencePieceProcessor, WordByWord]], text: str
) -> None:
    for whole, by_word in models.values():
        assert by_word(text) == by_word(text) == whole.encode(text)


def test_real_captions(
    models: dict[str, tuple[SentencePieceProcessor, WordByWord]], shared: Callable[[str], Path]
) -> None:
    with gzip.open(shared("capsfusion_10k") / "capsfusion_example.jsonl.gz", "rt", encoding="utf-8") as file:
        captions = [json.loads(line)["laion_2b"] for line in islice(file, 2000)]
    for whole, by_word in models.values():
        assert [by_word(text) for text in captions] == whole.encode(captions)


def test_a_full_memory_changes_no_id(
    models: dict[str, tuple[SentencePieceProcessor, WordByWord]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(words, "_MOST_WORDS", 2)
    whole, _ = models["own"]
    by_word = WordByWord(whole.encode)
    for text in TEXT:
        assert by_word(text) == whole.encode(text)
    assert len(by_word._known) == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "unigram", "vocab_size": 290},
        {"normalization_rule_name": "nmt_nfkc"},
        {"remove_extra_whitespaces": True},
        {"add_dummy_prefix": False},
        {"treat_whitespace_as_suffix": True},
        {"split_by_whitespace": False},
        {"user_defined_symbols": ["a\u2581small"]},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_other_models_are_encoded_whole(changes: dict[str, object]) -> None:
    assert not splits_at_words(model(**changes))

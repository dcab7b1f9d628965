"""Every adapter on real files and on small ones made here; expected values are the formats' own published behaviour."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megaprior.errors import DataError, UsageError
from megaprior.tokenizer import (
    Tokenizer,
    compare_fingerprints,
    load_model_tokenizer,
    load_tokenizer,
    train_sentencepiece,
)
from megaprior.tokenizer.formats import Llama3

TEXT = [
    "A small red square to the left of a blue circle, free download",
    "Two blue circles on a plain background, high quality stock photo 1234",
    "The cat sat on the mat; it's a café in Zürich, naïve and déjà vu",
    "don't stop: 3.14 and 2.71, see <image> or <s> or [INST] for more",
] * 8
CONTROL_NAMES = "<s> </s> <unk> <|begin_of_text|> <|eot_id|> <|endoftext|> [INST] <vpatch> <vision> </vision>"
AWKWARD = ["", " ", "a", "  two  spaces ", "tab\tand\r\nnewline\n", "a\0b", "a\u2581b \u2581", CONTROL_NAMES]
AWKWARD += ["e\u0301 \u00a0 👩‍🚀 東京"]
REAL = {
    "mistral-v1": "mistral/tokenizer.model.v1",
    "mistral-v3": "mistral/mistral_instruct_tokenizer_240323.model.v3",
    "llama3": "llama3",
    "gpt2": "gpt2",
}


@pytest.fixture(scope="module")
def real(shared: Callable[[str], Path]) -> dict[str, Tokenizer]:
    return {name: load_tokenizer(shared("tokenizers") / path) for name, path in REAL.items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_sentencepiece(TEXT, tmp_path_factory.mktemp("trained"), vocab_size=400)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a byte-level tokenizer.json and, in `pair`, the same as vocabulary and merges."""
    import tokenizers

    folder = tmp_path_factory.mktemp("byte_level")
    model = tokenizers.ByteLevelBPETokenizer()
    model.train_from_iterator(TEXT, vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False)
    (folder / "pair").mkdir()
    model.save_model(str(folder / "pair"))
    model.enable_truncation(4)
    model.enable_padding(length=16)
    model.save(str(folder / "tokenizer.json"))
    return folder


def as_tokenizer_json(source: Tokenizer, folder: Path, *, by_score: bool = True) -> Path:
    """A SentencePiece BPE model as tokenizer.json: a merge ranks by its piece's score, or by its id as converters that
    forget scores do."""
    from sentencepiece import SentencePieceProcessor
    from tokenizers import AddedToken, decoders, models, normalizers
    from tokenizers import Tokenizer as Model

    model = SentencePieceProcessor(model_file=str(source.files[0]))
    ids = {model.id_to_piece(i): i for i in range(model.vocab_size())}
    merges = []
    for piece, i in ids.items():
        if not (model.is_control(i) or model.is_unknown(i) or model.is_byte(i)):
            rank = -model.get_score(i) if by_score else i
            merges += [
                (rank, piece[:k], piece[k:]) for k in range(1, len(piece)) if {piece[:k], piece[k:]} <= ids.keys()
            ]
    merges.sort(key=lambda merge: merge[0])
    converted = Model(
        models.BPE(ids, [merge[1:] for merge in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    converted.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    converted.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    controls = [piece for piece, i in ids.items() if model.is_control(i)]
    converted.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in controls])
    folder.mkdir(parents=True, exist_ok=True)
    converted.save(str(folder / "tokenizer.json"))
    return folder


def captions(shared: Callable[[str], Path]) -> Iterator[str]:
    with gzip.open(shared("capsfusion_10k") / "capsfusion_example.jsonl.gz", "rt", encoding="utf-8") as file:
        for _, line in zip(range(400), file, strict=False):
            yield json.loads(line)["laion_2b"]


def check_spans(tokenizer: Tokenizer, text: str) -> None:
    ids = [*tokenizer.encode(text), tokenizer.eos_id]
    spans, raw = tokenizer.token_spans(text, ids), text.encode()
    assert len(spans) == len(ids)
    assert b"".join(raw[start:end] for start, end in spans) == raw
    edges = [0, *(end for _, end in spans)]
    assert [start for start, _ in spans] == edges[:-1]
    assert spans[-1] == (len(raw), len(raw))


# ---------------------------------------------------------------- what the formats say


def test_published_ids(real: dict[str, Tokenizer]) -> None:
    assert real["llama3"].encode("hello world") == [15339, 1917]
    assert real["gpt2"].encode("hello world") == [31373, 995]
    assert real["mistral-v1"].encode("Hello world") == [22557, 1526]
    assert {name: (t.vocab_size, t.bos_id, t.eos_id) for name, t in real.items()} == {
        "mistral-v1": (32_000, 1, 2),
        "mistral-v3": (32_768, 1, 2),
        "llama3": (128_256, 128_000, 128_001),
        "gpt2": (50_257, 50_256, 50_256),
    }


def test_gpt2_files_give_the_ids_of_tiktokens_own_reader(
    real: dict[str, Tokenizer], shared: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tiktoken import Encoding
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    folder = shared("tokenizers") / "gpt2"
    ranks = data_gym_to_mergeable_bpe_ranks(str(folder / "vocab.bpe"), str(folder / "encoder.json"))
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    oracle = Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    texts = [*captions(shared), *AWKWARD]
    assert real["gpt2"].encode_batch(texts) == [oracle.encode_ordinary(text) for text in texts]
    assert all(real["gpt2"].token_bytes(rank) == piece for piece, rank in ranks.items())


def test_control_tokens_are_never_parsed(real: dict[str, Tokenizer], trained: Tokenizer, byte_level: Path) -> None:
    for tokenizer in [*real.values(), trained, load_tokenizer(byte_level)]:
        ids = tokenizer.encode(CONTROL_NAMES)
        assert all(tokenizer.token_bytes(i) for i in ids)
        assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == CONTROL_NAMES


def test_reserved_roles(real: dict[str, Tokenizer], trained: Tokenizer) -> None:
    assert real["llama3"].reserved_roles() == {"patch": 128_252, "start": 128_253, "row": 128_254, "end": 128_255}
    assert trained.reserved_roles() == {"patch": 3, "start": 4, "row": 5, "end": 6}
    assert [real[name].reserved_roles() for name in ("mistral-v1", "mistral-v3", "gpt2")] == [None, None, None]


# ---------------------------------------------------------------- spans


def test_spans_conserve_real_captions(real: dict[str, Tokenizer], shared: Callable[[str], Path]) -> None:
    texts = [*captions(shared), *AWKWARD]
    for tokenizer in real.values():
        assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
        for text in texts:
            check_spans(tokenizer, text)


def test_texts_spell_the_caption_and_spread_characters_appear_whole(trained: Tokenizer) -> None:
    for caption in ["a red square", "Zoë met a 🎉 at dusk", "", "  two  spaces"]:
        ids = [*trained.encode(caption), trained.eos_id, trained.vocab_size]
        texts = trained.texts(ids)
        assert len(texts) == len(ids)
        assert "".join(texts) == caption
        assert texts[-2:] == ["", ""]
    party = trained.encode("🎉")
    assert [text for text in trained.texts(party) if text.strip()] == ["🎉"]
    assert len(party) >= 4  # four bytes, none of them a character
    assert trained.texts(party[:-1])[-1] == "\ufffd", "a character cut at the end"


def test_spans_conserve_awkward_text(trained: Tokenizer, byte_level: Path, tmp_path: Path) -> None:
    for tokenizer in (trained, load_tokenizer(byte_level), load_tokenizer(as_tokenizer_json(trained, tmp_path))):
        for text in [*AWKWARD, *TEXT]:
            check_spans(tokenizer, text)
            decoded = tokenizer.decode(tokenizer.encode(text))
            assert decoded.replace("\u2581", " ") == text.replace("\u2581", " ")


def test_spans_by_hand(trained: Tokenizer, real: dict[str, Tokenizer]) -> None:
    assert real["gpt2"].token_spans("a red  dog", real["gpt2"].encode("a red  dog")) == [
        (0, 1),
        (1, 5),
        (5, 6),
        (6, 10),
    ]
    # "\u2581" is a token of its own here, the dummy prefix: it stands for no byte of the text. Then four bytes.
    assert trained.token_spans("🎉!", trained.encode("🎉")) == [(0, 0), (0, 1), (1, 2), (2, 3), (3, 4)]
    # U+2581 takes three bytes in the text, though the token spells one space.
    assert trained.token_spans("\u2581é", trained.encode("\u2581é"))[-1][1] == 5


def test_spans_of_other_ids_are_refused(trained: Tokenizer) -> None:
    with pytest.raises(DataError, match="do not spell 'a red square'"):
        trained.token_spans("a red square", trained.encode("a blue square"))


# ---------------------------------------------------------------- fingerprints


def test_llama3_ranks_and_tokenizer_json_agree(
    real: dict[str, Tokenizer], tmp_path: Path, shared: Callable[[str], Path]
) -> None:
    from transformers.convert_slow_tokenizer import TikTokenConverter

    names = ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{i}|>" for i in range(254))]
    converter = TikTokenConverter(str(real["llama3"].files[0]), pattern=Llama3.PATTERN, extra_special_tokens=names)
    converter.converted().save(str(tmp_path / "tokenizer.json"))
    converted = load_tokenizer(tmp_path)
    assert converted.fingerprint == real["llama3"].fingerprint
    assert converted.reserved_roles() == real["llama3"].reserved_roles()
    texts = [*captions(shared), *AWKWARD]
    assert converted.encode_batch(texts) == real["llama3"].encode_batch(texts)


@pytest.mark.parametrize("name", ["mistral-v1", "trained"])
def test_sentencepiece_and_tokenizer_json_agree(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    source = request.getfixturevalue("trained") if name == "trained" else request.getfixturevalue("real")[name]
    converted = load_tokenizer(as_tokenizer_json(source, tmp_path / "right"))
    assert compare_fingerprints(source, converted) is None
    assert converted.fingerprint == source.fingerprint
    assert converted.reserved_roles() == source.reserved_roles()


def test_a_conversion_that_merges_spaces_otherwise_is_told_apart(real: dict[str, Tokenizer], tmp_path: Path) -> None:
    """Mistral scores its pieces of blanks last, whatever their ids; a converter that ranks by id splits "  Here" otherwise."""
    converted = load_tokenizer(as_tokenizer_json(real["mistral-v1"], tmp_path, by_score=False))
    assert converted.encode("a red square") == real["mistral-v1"].encode("a red square")
    assert compare_fingerprints(converted, real["mistral-v1"]) == "ids of the probe text"


def test_byte_level_pair_and_tokenizer_json_agree(byte_level: Path) -> None:
    pair, whole = load_tokenizer(byte_level / "pair"), load_tokenizer(byte_level)
    assert pair.fingerprint == whole.fingerprint
    assert load_tokenizer(byte_level / "pair" / "merges.txt").fingerprint == pair.fingerprint
    # Truncation to 4 and padding to 16, which this tokenizer.json asks for, are not ours to apply.
    assert [len(ids) for ids in whole.encode_batch(TEXT)] == [len(ids) for ids in pair.encode_batch(TEXT)]


def test_the_field_that_differs_is_named(real: dict[str, Tokenizer]) -> None:
    one = real["gpt2"].identity()
    assert compare_fingerprints(one, real["gpt2"]) is None
    for field, name in (
        ("vocab", "vocabulary"),
        ("bos", "BOS id"),
        ("eos", "EOS id"),
        ("probe", "ids of the probe text"),
    ):
        assert compare_fingerprints(one, {**one, field: "other"}) == name
    assert compare_fingerprints(real["mistral-v1"], real["mistral-v3"]) == "vocabulary"
    assert len({tokenizer.fingerprint for tokenizer in real.values()}) == len(real)


def test_saved_files_are_found_again(
    real: dict[str, Tokenizer], trained: Tokenizer, byte_level: Path, tmp_path: Path
) -> None:
    whole = load_tokenizer(byte_level)
    for number, tokenizer in enumerate([*real.values(), trained, whole]):
        tokenizer.save(tmp_path / str(number))
        assert load_tokenizer(tmp_path / str(number)).fingerprint == tokenizer.fingerprint
    assert sorted(file.name for file in (tmp_path / "3").iterdir()) == ["merges.txt", "vocab.json"]


# ---------------------------------------------------------------- BOS and EOS of a tokenizer.json


def test_bos_and_eos_come_from_the_configuration(byte_level: Path, trained: Tokenizer, tmp_path: Path) -> None:
    folder = as_tokenizer_json(trained, tmp_path)
    assert (load_tokenizer(folder).bos_id, load_tokenizer(folder).eos_id) == (1, 2)
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps({"bos_token": "</s>", "eos_token": {"content": "<vision>", "special": True}}))
    changed = load_tokenizer(folder)
    assert (changed.bos_id, changed.eos_id) == (2, 4)
    assert compare_fingerprints(changed, trained) == "BOS id"
    changed.save(tmp_path / "carried")
    assert load_tokenizer(tmp_path / "carried").fingerprint == changed.fingerprint
    config.write_text(json.dumps({"bos_token": "<start>"}))
    with pytest.raises(DataError, match=r"none of <start> is in the vocabulary; give the name as bos_token"):
        load_tokenizer(folder)
    config.write_text("<html>")
    with pytest.raises(DataError, match=r"tokenizer_config\.json: not a tokenizer configuration"):
        load_tokenizer(folder)


def test_a_models_tokenizer_lies_in_its_own_folder_or_beside_the_weights(
    trained: Tokenizer, byte_level: Path, tmp_path: Path
) -> None:
    trained.save(tmp_path / "beside")
    assert load_model_tokenizer(tmp_path / "beside").fingerprint == trained.fingerprint
    load_tokenizer(byte_level).save(tmp_path / "beside" / "tokenizer")
    assert load_model_tokenizer(tmp_path / "beside").fingerprint == load_tokenizer(byte_level).fingerprint


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("content", "looks"),
    [
        (b"", "an empty file"),
        (b"\x1f\x8b\x08\x00rest", "gzip"),
        (b"<!DOCTYPE html><html>", "an HTML page"),
        (b"\n<html><body>Sign in</body>", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
        (b"\x80\x04\x95rest", "pickle, which is never loaded"),
        (b"PK\x03\x04rest", "PyTorch checkpoint"),
        (b'{"model": "no"}', "not a tokenizer: it looks like JSON text"),
        (b"\n\x0e\n\x05<unk>\x15cut", "damaged SentencePiece"),
        (b"any text at all", "it begins with b'any text at all'"),
        (b"IQ== 0\nIg== 1\n!!!! 2\n", "line 3 is not 'base64 rank'"),
        (b"IQ== 0\nIg== 1\n", "2 tiktoken ranks, but only Llama-3's 128,000"),
    ],
)
def test_garbage_is_refused_saying_what_it_looks_like(content: bytes, looks: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(DataError) as refusal:
        load_tokenizer(path)
    assert looks in str(refusal.value)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_cut_model_is_refused(trained: Tokenizer, tmp_path: Path) -> None:
    whole = trained.files[0].read_bytes()
    for length in (10, len(whole) // 2, len(whole) - 1):
        (tmp_path / "tokenizer.model").write_bytes(whole[:length])
        with pytest.raises(DataError):
            load_tokenizer(tmp_path)


def test_paths_that_hold_no_one_tokenizer_are_refused(tmp_path: Path, byte_level: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        load_tokenizer(tmp_path / "absent.model")
    with pytest.raises(DataError, match="no tokenizer here"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_bytes((byte_level / "pair" / "vocab.json").read_bytes())
    with pytest.raises(DataError, match=r"merges\.txt: missing"):
        load_tokenizer(tmp_path)
    (tmp_path / "merges.txt").write_bytes(b"\x00\x01 garbage")
    with pytest.raises(DataError, match="not a GPT-2 tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.json").unlink()
    (tmp_path / "a.model").touch()
    (tmp_path / "b.model").touch()
    with pytest.raises(DataError, match=r"holds 2 tokenizers \(a\.model, b\.model\); name one"):
        load_tokenizer(tmp_path)


def test_a_vocabulary_that_is_not_byte_level_is_refused(byte_level: Path, tmp_path: Path) -> None:
    model = json.loads((byte_level / "tokenizer.json").read_text(encoding="utf-8"))
    model["model"]["vocab"]["東"] = len(model["model"]["vocab"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(model))
    with pytest.raises(DataError, match="token '東' is not spelled as byte-level BPE spells bytes"):
        load_tokenizer(tmp_path)
    model["decoder"] = model["pre_tokenizer"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(model))
    with pytest.raises(DataError, match="neither byte-level BPE nor SentencePiece"):
        load_tokenizer(tmp_path)


def test_a_million_blanks_are_text(real: dict[str, Tokenizer]) -> None:
    text = "a" + " " * 1_000_000 + "b"
    for name in ("llama3", "mistral-v1"):
        assert real[name].decode(real[name].encode(text)) == text


# ---------------------------------------------------------------- training


def test_training_repeats_to_the_byte_and_reserves_the_roles(trained: Tokenizer, tmp_path: Path) -> None:
    again = train_sentencepiece(iter(TEXT), tmp_path / "again", vocab_size=400)
    assert again.files[0].read_bytes() == trained.files[0].read_bytes()
    assert (again.vocab_size, again.bos_id, again.eos_id) == (400, 1, 2)
    assert [again.token_bytes(i) for i in range(7)] == [b""] * 7
    assert [again.token_bytes(i) for i in again.encode("1234")] == [b" ", b"1", b"2", b"3", b"4"]


def test_training_that_cannot_work_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no text to train"):
        train_sentencepiece(["", " \n"], tmp_path, vocab_size=400)
    with pytest.raises(UsageError, match="no tokenizer of 100000 tokens from this text: Vocabulary size too high"):
        train_sentencepiece(TEXT, tmp_path, vocab_size=100_000)
    with pytest.raises(UsageError, match="no tokenizer of 100 tokens from this text"):
        train_sentencepiece(TEXT, tmp_path, vocab_size=100)
    assert not list(tmp_path.iterdir())


def test_importing_is_light() -> None:
    heavy = {"sentencepiece", "tiktoken", "tokenizers", "transformers", "torch", "numpy"}
    script = f"import sys, megaprior.tokenizer; print(sorted({heavy!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

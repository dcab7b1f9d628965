"""Our tokenizers as `tokenizers` models: the same ids for every text, BOS in front, control tokens by name."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megaprior.errors import DataError
from megaprior.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from megaprior.tokenizer.hugging_face import check_same, name_control, to_hugging_face

TEXT = [
    "A small red square to the left of a blue circle, free download",
    "Two blue circles on a plain background, high quality stock photo 1234",
    "The cat sat on the mat; it's a café in Zürich, naïve and déjà vu",
    "don't stop: 3.14 and 2.71, see <image> or <s> or [INST] for more ===== ---- !!!!!!! aaaa",
] * 8
AWKWARD = ["", " ", "a", "  two  spaces ", "tab\tand\r\nnewline\n", "a\0b", "a\u2581b \u2581", "<s> </s> <unk> [INST]"]
AWKWARD += ["e\u0301 \u00a0 👩‍🚀 東京", *(character * n for character in "=-a !" for n in range(1, 24))]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_sentencepiece(TEXT, tmp_path_factory.mktemp("trained"), vocab_size=400)


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Tokenizer]:
    from sentencepiece import SentencePieceTrainer

    def make(**options: object) -> Tokenizer:
        file = io.BytesIO()
        known = {
            "vocab_size": 380,
            "hard_vocab_limit": False,
            "byte_fallback": True,
            "minloglevel": 2,
            "num_threads": 1,
        }
        SentencePieceTrainer.train(sentence_iterator=iter(TEXT), model_writer=file, **{**known, **options})
        path = tmp_path_factory.mktemp("spm") / "tokenizer.model"
        path.write_bytes(file.getvalue())
        return load_tokenizer(path)

    return make


def saved(tokenizer: Tokenizer, folder: Path) -> Path:
    """Its tokenizer.json, with the tokenizer_config.json that names BOS and EOS."""
    model = to_hugging_face(tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    model.save(str(folder / "tokenizer.json"))
    names = {"bos_token": model.id_to_token(tokenizer.bos_id), "eos_token": model.id_to_token(tokenizer.eos_id)}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder / "tokenizer.json"


def differing(tokenizer: Tokenizer, file: Path, texts: list[str]) -> list[str]:
    check_same(file, tokenizer)
    ours, theirs = tokenizer.encode_batch(texts), load_tokenizer(file).encode_batch(texts)
    return [text for text, one, other in zip(texts, ours, theirs, strict=True) if one != other]


def test_our_own_kind(trained: Tokenizer, tmp_path: Path) -> None:
    assert differing(trained, saved(trained, tmp_path), [*TEXT, *AWKWARD]) == []


@pytest.mark.parametrize("options", [{}, {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}])
def test_sentencepiece_with_and_without_normalization(sentencepiece, tmp_path, options) -> None:
    tokenizer = sentencepiece(model_type="bpe", **options)
    assert differing(tokenizer, saved(tokenizer, tmp_path), [*TEXT, *(t for t in AWKWARD if "\0" not in t)]) == []


def test_a_model_without_a_space_in_front(sentencepiece, tmp_path) -> None:
    tokenizer = sentencepiece(model_type="bpe", add_dummy_prefix=False, normalization_rule_name="identity")
    file = saved(tokenizer, tmp_path)
    assert differing(tokenizer, file, TEXT) == []
    assert load_tokenizer(file).decode(tokenizer.encode("a cat")) == "a cat"


def test_gpt2s_pair_and_a_tokenizer_json_pass_through(tmp_path: Path) -> None:
    import tokenizers

    model = tokenizers.ByteLevelBPETokenizer()
    model.train_from_iterator(TEXT, vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False)
    (tmp_path / "pair").mkdir()
    model.save_model(str(tmp_path / "pair"))
    model.save(str(tmp_path / "tokenizer.json"))
    for source in (tmp_path / "pair", tmp_path / "tokenizer.json"):
        tokenizer = load_tokenizer(source)
        file = saved(tokenizer, tmp_path / f"new_{source.stem}")
        assert differing(tokenizer, file, [*TEXT, *AWKWARD]) == []
        assert to_hugging_face(tokenizer).encode("<|endoftext|>").ids == [0, 0]  # BOS, and EOS by its name


def test_bos_comes_first_and_control_tokens_answer_to_their_names(trained: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    saved(trained, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    caption = "A small red square"
    assert theirs(caption)["input_ids"] == [trained.bos_id, *trained.encode(caption)]
    assert theirs("</vision>" + caption)["input_ids"] == [trained.bos_id, 6, *trained.encode(caption)]
    assert theirs.decode(trained.encode(caption)) == caption
    assert trained.encode("</vision>") != [6]  # never in ours: a caption is text


def test_a_control_token_takes_another_name(trained: Tokenizer) -> None:
    roles = trained.reserved_roles()
    assert roles is not None
    model = name_control(to_hugging_face(trained), roles["patch"], "<image>")
    assert model.encode("<image>A cat").ids == [trained.bos_id, roles["patch"], *trained.encode("A cat")]
    assert model.get_vocab_size() == trained.vocab_size
    longer = name_control(to_hugging_face(trained), trained.vocab_size, "<image>")
    assert longer.encode("<image>A cat").ids == [trained.bos_id, trained.vocab_size, *trained.encode("A cat")]
    assert longer.get_vocab_size() == trained.vocab_size + 1
    with pytest.raises(DataError, match="</vision> is id 6 of this tokenizer, 3 was to be called so"):
        name_control(to_hugging_face(trained), roles["patch"], "</vision>")


def test_a_file_that_tokenizes_differently_is_found_out(trained: Tokenizer, tmp_path: Path) -> None:
    file = saved(trained, tmp_path)
    state = json.loads(file.read_text())
    state["model"]["merges"] = state["model"]["merges"][-5:]
    file.write_text(json.dumps(state))
    with pytest.raises(DataError, match=r"as tokenizer.json it would have another ids of the probe text"):
        check_same(file, trained)


def test_a_model_that_no_tokenizer_json_can_follow_is_refused(sentencepiece) -> None:
    with pytest.raises(DataError, match=r"writes spaces behind words"):
        to_hugging_face(sentencepiece(model_type="bpe", treat_whitespace_as_suffix=True))
    with pytest.raises(DataError, match=r"not BPE; as tokenizer.json it would tokenize some captions differently"):
        to_hugging_face(sentencepiece(model_type="unigram"))


# ---------------------------------------------------------------- the real ones


def captions(shared: Callable[[str], Path]) -> Iterator[str]:
    with gzip.open(shared("capsfusion_10k") / "capsfusion_example.jsonl.gz", "rt", encoding="utf-8") as file:
        for _, line in zip(range(1500), file, strict=False):
            yield from (value for value in json.loads(line).values() if isinstance(value, str))
    for path in sorted(shared("cc3m_val").glob("*.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            yield from (line.split("\t")[0] for _, line in zip(range(2000), file, strict=False))


@pytest.mark.parametrize(
    "name",
    ["mistral/tokenizer.model.v1", "mistral/mistral_instruct_tokenizer_240323.model.v3", "llama3", "gpt2"],
)
def test_real_captions_keep_their_ids(shared: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    tokenizer = load_tokenizer(shared("tokenizers") / name)
    texts = [*captions(shared), *AWKWARD]
    assert len(texts) > 6000
    file = saved(tokenizer, tmp_path)
    assert differing(tokenizer, file, texts) == []
    assert load_tokenizer(file).reserved_roles() == tokenizer.reserved_roles()

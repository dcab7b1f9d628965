"""Log-probabilities over bytes: by hand, against a byte-by-byte oracle in exact arithmetic, and between real tokenizers."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import pairwise, permutations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaprior.data_tools.transfer.byte_scores import Spelled, Spelling, in_common, refusal, spread, transferred
from megaprior.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece

REAL = {
    "mistral-v1": "mistral/tokenizer.model.v1",
    "mistral-v3": "mistral/mistral_instruct_tokenizer_240323.model.v3",
    "llama3": "llama3",
    "gpt2": "gpt2",
}
LINES = ["A small red square to the left of a blue circle, café 東京", "don't stop: 3.14 and 2.71 <s> 👩‍🚀"] * 8
AWKWARD = [
    "a",
    "  two  spaces ",
    " leading",
    "tab\tand\r\nnewline\n",
    "a\u2581b \u2581",
    "\u2581",
    "\u2581\u2581x\u2581",
    "<s> </s> <unk> <|eot_id|> <|endoftext|>",
    "e\u0301 \u00a0 👩‍🚀 東京",
    "東京",
    "ﬁne ½ Ⅻ",
]


def edges(*places: int) -> np.ndarray:
    return np.array(places, np.int64)


def spelled(data: bytes, *places: int, closed: bool = True) -> Spelled:
    return Spelled(data, edges(*places), closed)


def by_bytes(scores: list[float], source: list[int], target: list[int]) -> list[Fraction]:
    """The definition: each byte gets its token's share, each target token the sum of its bytes."""
    share: dict[int, Fraction] = {}
    waiting = Fraction(0)
    for score, (start, end) in zip(scores, pairwise(source), strict=True):
        waiting += Fraction(score)
        for byte in range(start, end):
            share[byte] = waiting / (end - start)
        waiting = waiting if start == end else Fraction(0)
    share[source[-1] - 1] += waiting  # nothing with bytes follows
    return [sum((share[byte] for byte in range(a, b)), Fraction(0)) for a, b in pairwise(target)]


@pytest.fixture(scope="module")
def words(shared: Callable[[str], Path]) -> dict[str, Tokenizer]:
    return {name: load_tokenizer(shared("tokenizers") / path) for name, path in REAL.items()}


@pytest.fixture(scope="module")
def real(words: dict[str, Tokenizer]) -> dict[str, Spelling]:
    return {name: Spelling(tokenizer) for name, tokenizer in words.items()}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    """A SentencePiece model with byte fallback and a byte-level one, made here."""
    import tokenizers

    folder = tmp_path_factory.mktemp("tokenizers")
    model = tokenizers.ByteLevelBPETokenizer()
    model.train_from_iterator(LINES, vocab_size=330, special_tokens=["<|endoftext|>"], show_progress=False)
    model.save_model(str(folder))
    pieces = train_sentencepiece(LINES, folder / "pieces", vocab_size=360)
    return {"pieces": pieces, "bytes": load_tokenizer(folder / "vocab.json")}


# ---------------------------------------------------------------- by hand


def test_scores_follow_their_bytes() -> None:
    # "The quick" + EOS: The | quick | $  ->  Th | e q | uick | $
    found = spread(np.array([-3.0, -6.0, -0.5]), edges(0, 3, 9, 10), edges(0, 2, 5, 9, 10))
    assert found.tolist() == [-2.0, -1.0 - 2.0, -4.0, -0.5]


def test_an_edge_that_is_off_by_one_byte_changes_the_scores() -> None:
    scores, source = np.array([-2.0, -9.0, -1.0]), edges(0, 2, 5, 6)
    assert spread(scores, source, edges(0, 1, 4, 5, 6)).tolist() == [-1.0, -7.0, -3.0, -1.0]
    assert spread(scores, source, edges(0, 2, 4, 5, 6)).tolist() == [-2.0, -6.0, -3.0, -1.0]


def test_a_token_without_bytes_announces_the_next_one() -> None:
    assert spread(np.array([-1.0, -2.0, -3.0]), edges(0, 0, 2, 3), edges(0, 1, 2, 3)).tolist() == [-1.5, -1.5, -3.0]
    assert spread(np.array([-1.0, -2.0, -3.0]), edges(0, 0, 0, 1), edges(0, 1)).tolist() == [-6.0]
    assert spread(np.array([-2.0, -4.0]), edges(0, 2, 2), edges(0, 1, 2)).tolist() == [-3.0, -3.0]


def test_a_target_token_without_bytes_is_certain() -> None:
    assert spread(np.array([-2.0, -3.0]), edges(0, 2, 3), edges(0, 0, 2, 3)).tolist() == [0.0, -2.0, -3.0]


def test_impossible_tokens_reach_all_who_share_a_byte_and_no_other() -> None:
    found = spread(np.array([-1.0, -np.inf, -3.0]), edges(0, 2, 5, 6), edges(0, 1, 3, 4, 5, 6))
    assert found.tolist() == [-0.5, -np.inf, -np.inf, -np.inf, -3.0]
    stored = transferred(np.array([-1.0, -np.inf], np.float32), spelled(b"abc", 0, 3, 4), spelled(b"abc", 0, 1, 3, 4))
    assert stored[-1] == -np.inf
    assert np.isfinite(stored[:-1]).all()


def test_a_cut_target_takes_its_part() -> None:
    source, target = spelled(b"abcdef", 0, 2, 6, 7), spelled(b"abc", 0, 1, 3, closed=False)
    assert refusal(source, target) is None
    assert transferred(np.array([-2, -8, -5], np.float32), source, target).tolist() == [-1.0, -3.0]


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        (spelled(b"ab", 0, 2, 3), spelled(b"ab", 0, 1, 2, 3), None),
        (spelled(b"ab", 0, 2, 3), spelled(b"ac", 0, 2, 3), "different"),
        (spelled(b"abc", 0, 3, 4), spelled(b"ab", 0, 2, 3), "different"),
        (spelled(b"ab", 0, 2, 3), spelled(b"abc", 0, 3, 4), "different"),
        (spelled(b"ab", 0, 2, 3), spelled(b"abc", 0, 3, closed=False), "different"),
        (spelled(b"abc", 0, 3, 4), spelled(b"ab", 0, 2, closed=False), None),
        (spelled(b"abc", 0, 3, 4), spelled(b"abc", 0, 3, closed=False), None),
        (spelled(b"ab", 0, 2, closed=False), spelled(b"abc", 0, 3, 4), "truncated"),
        (spelled(b"abc", 0, 3, closed=False), spelled(b"abc", 0, 3, 4), "truncated"),
        (spelled(b"abc", 0, 3, closed=False), spelled(b"abc", 0, 1, 3, closed=False), None),
        (spelled(b"ab", 0, 2, closed=False), spelled(b"abc", 0, 3, closed=False), "truncated"),
        (spelled(b"ab", 0, 2, closed=False), spelled(b"xbc", 0, 3, 4), "different"),
    ],
)
def test_who_may_take_whose_scores(source: Spelled, target: Spelled, expected: str | None) -> None:
    assert refusal(source, target) == expected


# ---------------------------------------------------------------- the definition, and what is conserved

cuts = st.lists(st.integers(0, 24), max_size=12)


@st.composite
def two_spellings(draw: st.DrawFn) -> tuple[list[float], list[int], list[int]]:
    """Scores of any size and two cuts of 24 bytes and EOS; equal edges are tokens without bytes."""
    source, target = ([0, *sorted(draw(cuts)), 24, 25] for _ in range(2))
    number = st.floats(-1e4, 0, width=32) | st.floats(np.float32(-1e-3), 0, width=32)
    return draw(st.lists(number, min_size=len(source) - 1, max_size=len(source) - 1)), source, target


@settings(max_examples=300, deadline=None)
@given(two_spellings())
def test_agrees_with_the_definition_byte_by_byte(case: tuple[list[float], list[int], list[int]]) -> None:
    scores, source, target = case
    exact = by_bytes(scores, source, target)
    found = spread(np.array(scores, np.float32), edges(*source), edges(*target))
    # 25 terms of 3 roundings each
    np.testing.assert_allclose(found, [float(value) for value in exact], rtol=80 * 2**-53, atol=1e-300)
    stored = transferred(np.array(scores, np.float32), spelled(bytes(24), *source), spelled(bytes(24), *target))
    assert stored.dtype == np.float32
    assert (stored <= 0).all()
    np.testing.assert_allclose(stored, found, rtol=len(target) * 2**-24, atol=1e-44)
    check_total(np.array(scores, np.float32), stored)


def check_total(given: np.ndarray, stored: np.ndarray) -> None:
    """The promise: totals agree to within half a unit in the last place of the largest stored number."""
    missing = sum(map(Fraction, given.tolist())) - sum(map(Fraction, stored.tolist()))
    unit = Fraction(float(np.spacing(np.abs(stored).max())))
    assert abs(missing) <= unit / 2 * (1 + Fraction(1, 2**20)), float(missing / unit)  # fsum rounds once, to float64


def test_rounding_alone_would_not_conserve() -> None:
    """The bound is no accident of float32: without the correction a long caption drifts by many units."""
    scores = -np.random.default_rng(0).uniform(3, 4, 2048).astype(np.float32)
    source, target = np.arange(0, 7 * 2048 + 1, 7), np.append(np.arange(0, 7 * 2048, 5), 7 * 2048)
    exact = spread(scores, source, target)
    drift = abs(math.fsum(exact.astype(np.float32).tolist()) - math.fsum(scores.tolist()))
    stored = transferred(scores, Spelled(b"", source, True), Spelled(b"", target, True))
    assert drift > 2 * np.spacing(np.abs(stored).max())
    check_total(scores, stored)


def test_equal_edges_keep_every_bit() -> None:
    scores = -np.random.default_rng(1).exponential(3, 300).astype(np.float32)
    place = np.concatenate([[0], np.cumsum(np.random.default_rng(2).integers(1, 14, 300))])
    assert transferred(scores, Spelled(b"", place, True), Spelled(b"", place, True)).tobytes() == scores.tobytes()


# ---------------------------------------------------------------- tokenizers


def ids_of(tokenizer: Tokenizer, text: str) -> np.ndarray:
    return np.array([*tokenizer.encode(text), tokenizer.eos_id])


def check_spelling(spelling: Spelling, tokenizer: Tokenizer, text: str) -> Spelled:
    """The tokenizer's own account of its spans is the same, but for EOS, which here has a byte."""
    ids = ids_of(tokenizer, text)
    found = spelling.spell(ids)
    assert isinstance(found, Spelled)
    assert found.closed
    assert len(found.edges) == len(ids) + 1
    assert found.edges[-1] == found.edges[-2] + 1 == len(found.data) + 1
    if "\u2581" not in text:
        assert found.data == text.encode()
        assert list(pairwise(found.edges.tolist()))[:-1] == tokenizer.token_spans(text, ids[:-1].tolist())
    return found


def check_transfer(
    text: str, names: tuple[str, str], tokenizers: dict[str, Tokenizer], spellings: list[Spelling], seed: int = 0
) -> None:
    one, two = (check_spelling(s, tokenizers[n], text) for s, n in zip(spellings, names, strict=True))
    one, two = in_common(one, two, folds=(spellings[0].folds_spaces, spellings[1].folds_spaces))
    assert refusal(one, two) is None, text
    if spellings[0].folds_spaces != spellings[1].folds_spaces:
        assert one.data == two.data == text.encode()
    scores = -np.random.default_rng(seed).exponential(3, len(one.edges) - 1).astype(np.float32)
    stored = transferred(scores, one, two)
    check_total(scores, stored)
    assert stored[-1] == pytest.approx(scores[-1], rel=len(stored) * 2**-24)
    exact = by_bytes(scores.tolist(), one.edges.tolist(), two.edges.tolist())
    np.testing.assert_allclose(stored, [float(value) for value in exact], rtol=len(stored) * 2**-24, atol=1e-44)


text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=30)
spaced = st.lists(text | st.sampled_from(["\u2581", " ", "  ", "é", "東", "👩‍🚀", "the "]), min_size=1, max_size=8).map(
    "".join
)


@settings(max_examples=250, deadline=None)
@given(text=spaced, seed=st.integers(0, 99))
def test_any_text_is_conserved(small: dict[str, Tokenizer], text: str, seed: int) -> None:
    for names in permutations(small, 2):
        check_transfer(text, names, small, [Spelling(small[name]) for name in names], seed)


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_text_is_conserved(small: dict[str, Tokenizer], text: str) -> None:
    for names in permutations(small, 2):
        check_transfer(text, names, small, [Spelling(small[name]) for name in names])


def captions(shared: Callable[[str], Path]) -> Iterator[str]:
    with gzip.open(shared("capsfusion_10k") / "capsfusion_example.jsonl.gz", "rt", encoding="utf-8") as file:
        for _, line in zip(range(80), file, strict=False):
            record = json.loads(line)
            yield from (record["laion_2b"].strip(), record["capsfusion"].strip())


@pytest.mark.parametrize("names", list(permutations(REAL, 2)), ids="-to-".join)
def test_real_captions_are_conserved_between_real_tokenizers(
    names: tuple[str, str], real: dict[str, Spelling], words: dict[str, Tokenizer], shared: Callable[[str], Path]
) -> None:
    spellings = [real[name] for name in names]
    for number, caption in enumerate([*captions(shared), *AWKWARD]):
        if caption:
            check_transfer(caption, names, words, spellings, number)


def test_mistral_writes_its_dummy_space_as_a_token_where_no_piece_has_it(
    real: dict[str, Spelling], words: dict[str, Tokenizer]
) -> None:
    """東京: \u2581, 東, 京 - the first token has no byte of the caption, and its score goes to 東."""
    found = check_spelling(real["mistral-v1"], words["mistral-v1"], "東京")
    assert found.edges.tolist() == [0, 0, 3, 6, 7]


def test_a_character_spread_over_tokens_is_cut_between_its_bytes(
    real: dict[str, Spelling], words: dict[str, Tokenizer]
) -> None:
    found = check_spelling(real["gpt2"], words["gpt2"], "東")
    assert len(found.edges) > 3
    assert set(found.edges.tolist()) <= {0, 1, 2, 3, 4}


def test_ids_without_bytes_are_told_by_their_place(small: dict[str, Tokenizer]) -> None:
    tokenizer = small["pieces"]
    ids = tokenizer.encode("a b")
    assert Spelling(tokenizer).spell(np.array([*ids, 0, tokenizer.eos_id])) == len(ids)  # 0 is <unk>
    assert Spelling(tokenizer).spell(np.array([tokenizer.eos_id, *ids])) == 0  # EOS is EOS at the end only
    cut = Spelling(tokenizer).spell(np.array(ids))
    assert isinstance(cut, Spelled)
    assert not cut.closed
    assert cut.edges[-1] == 3

from __future__ import annotations

import pytest

from megaprior.data_tools.options import BuildOptions
from megaprior.data_tools.readers.captions import record_captions
from megaprior.data_tools.readers.samples import Caption, Rejected, Unfit, clean_text, parse_record


def captions(record: dict, **options: object) -> list[Caption]:
    kept, refused = record_captions("k", record, BuildOptions(**options))  # type: ignore[arg-type]
    assert not refused
    return kept


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not JSON"),
        ("{'a': 1}", "not JSON"),
        ("[" * 100_000, "not JSON"),  # deeper than Python's stack
        ('{"a": ' + "9" * 10_000 + "}", "not JSON"),  # more digits than Python converts
        ("[1]", "not a JSON object: a list"),
        ("null", "not a JSON object: null"),
        ("3.5", "not a JSON object: a number"),
    ],
)
def test_lines_that_are_no_record(text: str, reason: str) -> None:
    with pytest.raises(Unfit, match=reason):
        parse_record(text)


def test_which_column_holds_the_captions() -> None:
    record = {"caption": "one", "captions": ["a", "b"], "alt": "x"}
    assert captions(record) == [Caption(key="k#0", text="a"), Caption(key="k#1", text="b")]
    assert captions(record, captions="first") == [Caption(key="k", text="one")]
    assert captions(record, caption_column="alt") == [Caption(key="k", text="x")]
    assert captions({"captions": ["a", "b"]}, captions="first") == [Caption(key="k#0", text="a")]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"text": "x", "n": 1}, "no column 'caption': the record has 'text', 'n'"),
        ({"caption": None}, "column 'caption' of a wrong type: null"),
        ({"caption": 7}, "column 'caption' of a wrong type: a number"),
        ({"caption": {"en": "x"}}, "column 'caption' of a wrong type: an object"),
        ({"captions": []}, "column 'captions' is an empty list"),
        ({"caption": ""}, "caption is empty"),
        ({"caption": " \t\u00a0\n"}, "caption is blank"),
        ({"caption": "a\0b"}, "NUL character: at position 1"),
        ({"caption": "ab\ud800"}, r"lone surrogate: U\+D800 at position 2"),
    ],
)
def test_records_without_a_usable_caption(record: dict, reason: str) -> None:
    with pytest.raises(Unfit, match=reason):
        record_captions("k", record, BuildOptions())


def test_one_bad_caption_of_several_does_not_cost_the_others() -> None:
    kept, refused = record_captions("k", {"captions": ["a", " ", None, "d"]}, BuildOptions())
    assert [caption.key for caption in kept] == ["k#0", "k#3"]
    assert refused == [
        Rejected(key="k#1", reason="caption is blank"),
        Rejected(key="k#2", reason="column 'captions' of a wrong type: item 2 is null, expected a string"),
    ]


@pytest.mark.parametrize("text", ["<image>", "<|eot_id|>", "</s>", "<vision>", "\x1b[31m"])
def test_control_tokens_spelled_in_a_caption_are_text(text: str) -> None:
    assert clean_text(text) == text


def test_blanks_around_a_caption_go_and_the_words_move_along() -> None:
    text = "\u00a0é red dog "  # no-break space and é are two bytes each
    assert captions({"caption": text, "words": [[2, 4, 0], [5, 8, 1]]}) == [
        Caption(key="k", text="é red dog", words=((0, 2, 0), (3, 6, 1)))
    ]


@pytest.mark.parametrize(
    "words", ["x", [[0, 3]], [[0, 4, 1]], [[-1, 2, 1]], [[2, 2, 1]], [[0, 3, 3]], [[0, 3, True]], [[0, 1.5, 1]], [None]]
)
def test_words_that_do_not_fit_their_caption(words: object) -> None:
    with pytest.raises(Unfit, match="words do not fit"):
        record_captions("k", {"caption": "dog", "words": words}, BuildOptions())


def test_documents_keep_their_blanks() -> None:
    assert captions({"caption": "\n a\n"}, documents=True) == [Caption(key="k", text="\n a\n")]

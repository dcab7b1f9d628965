"""What every reader yields: a sample with its captions, or the reason why there is none."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

WORD_CLASSES = 3  # 0 boilerplate, 1 image-related, 2 noise

Words = tuple[tuple[int, int, int], ...]
Record = dict[str, Any]


class Unfit(Exception):
    """Why one record cannot become a sample: it goes to quarantine and the work goes on."""

    @property
    def reason(self) -> str:
        return str(self)


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What one side says in a conversation; `loss` tells whether it is learnt (an answer) or given (a prompt)."""

    text: str
    loss: bool


@dataclass(kw_only=True, slots=True)  # not frozen: setting each field around the guard takes 3 times as long
class Caption:
    """One caption; `words` holds (start byte, end byte, class) over its UTF-8 where the truth is known.

    `turns` are the parts of a conversation, of which `text` is the whole; empty for a caption.
    """

    key: str
    text: str
    words: Words | None = None
    turns: tuple[Turn, ...] = ()


@dataclass(kw_only=True, slots=True)
class Sample:
    """One source record: its captions and the image they share, as its encoded file; None for text."""

    key: str
    captions: tuple[Caption, ...]
    image: bytes | None = None


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """A record, or one of its captions, that goes to quarantine; `reason` is "category" or "category: detail"."""

    key: str
    reason: str


def parse_json(text: str) -> Any:
    """One JSON value.

    Raises:
        Unfit: not JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unfit(f"not JSON: {str(error)[:120]}") from None


def parse_record(text: str) -> Record:
    """One JSON object.

    Raises:
        Unfit: not JSON, or not an object.
    """
    record = parse_json(text)
    if not isinstance(record, dict):
        raise Unfit(f"not a JSON object: {json_type(record)}")
    return record


def json_type(value: Any) -> str:
    """What JSON calls the type of `value`."""
    names = {type(None): "null", bool: "true/false", str: "a string", list: "a list", dict: "an object", bytes: "bytes"}
    return names.get(type(value), "a number")


def clean_text(text: str) -> str:
    """`text` itself, when it can be tokenized.

    Raises:
        Unfit: blank, a NUL character, or a lone surrogate, which has no UTF-8.
    """
    if not text.strip():
        raise Unfit("caption is empty" if not text else "caption is blank")
    if "\0" in text:
        raise Unfit(f"NUL character: at position {text.index(chr(0))}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Unfit(f"lone surrogate: U+{ord(text[error.start]):04X} at position {error.start}") from None
    return text


def checked_caption(key: str, text: str, words: Any, *, keep_blanks: bool = False) -> Caption:
    """A caption without the blanks around it, and its `words` annotation moved along.

    Raises:
        Unfit: the text cannot be tokenized (`clean_text`), or the annotation does not fit it.
    """
    clean_text(text)
    if keep_blanks:
        return Caption(key=key, text=text)
    # Blanks around a caption are an accident of its file, not words to learn; the annotation moves along.
    stripped = text.strip()
    if words is None:
        return Caption(key=key, text=stripped)
    shift, limit = len(text[: text.index(stripped)].encode()), len(text.encode())
    if not isinstance(words, list):
        raise Unfit(f"words do not fit: {json_type(words)}, expected a list of [start_byte, end_byte, class]")
    moved = []
    for word in words:
        whole = isinstance(word, list) and len(word) == 3 and all(type(part) is int for part in word)
        if not whole or not 0 <= word[0] < word[1] <= limit or not 0 <= word[2] < WORD_CLASSES:
            raise Unfit(
                f"words do not fit: {str(word)[:60]}, expected [start_byte, end_byte, class] in {limit} bytes, class 0-2"
            )
        moved.append((word[0] - shift, word[1] - shift, word[2]))
    return Caption(key=key, text=stripped, words=tuple(moved))

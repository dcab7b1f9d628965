"""What every reader yields: a sample with its captions, or the reason why there is none."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from megaprior.data_tools.options import BuildOptions

WORD_CLASSES = 3  # 0 boilerplate, 1 image-related, 2 noise

Words = tuple[tuple[int, int, int], ...]


class Unfit(Exception):
    """Why one record cannot become a sample: it goes to quarantine and the work goes on."""

    @property
    def reason(self) -> str:
        return str(self)


@dataclass(frozen=True, kw_only=True)
class Caption:
    """One caption; `words` holds (start byte, end byte, class) over its UTF-8 where the truth is known."""

    key: str
    text: str
    words: Words | None = None


@dataclass(frozen=True, kw_only=True)
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


def parse_record(text: str) -> dict[str, Any]:
    """One JSON object.

    Raises:
        Unfit: not JSON, or not an object.
    """
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unfit(f"not JSON: {str(error)[:120]}") from None
    if not isinstance(record, dict):
        raise Unfit(f"not a JSON object: {json_type(record)}")
    return record


def json_type(value: Any) -> str:
    """What JSON calls the type of `value`."""
    names = {type(None): "null", bool: "true/false", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")


def record_captions(key: str, record: dict[str, Any], options: BuildOptions) -> tuple[list[Caption], list[Rejected]]:
    """The captions of a record under the options, and those refused.

    Several captions of one record are keyed `key#0`, `key#1`, ...

    Raises:
        Unfit: the column is missing or of a wrong type, or the `words` annotation does not fit the caption.
    """
    column = caption_column(record, options)
    if column not in record:
        raise Unfit(f"no column '{column}': the record has {', '.join(map(repr, record)) or 'none'}")
    value = record[column]
    if isinstance(value, str):
        return [Caption(key=key, **_checked(value, record.get("words"), options))], []
    if not isinstance(value, list):
        raise Unfit(f"column '{column}' of a wrong type: {json_type(value)}, expected a string or a list of strings")
    if not value:
        raise Unfit(f"column '{column}' is an empty list")
    kept, refused = [], []
    for number, text in enumerate(value[:1] if options.captions == "first" else value):
        name = f"{key}#{number}"
        try:
            if not isinstance(text, str):
                raise Unfit(f"column '{column}' of a wrong type: item {number} is {json_type(text)}, expected a string")
            kept.append(Caption(key=name, **_checked(text, None, options)))
        except Unfit as unfit:
            refused.append(Rejected(key=name, reason=unfit.reason))
    return kept, refused


def caption_column(record: dict[str, Any], options: BuildOptions) -> str:
    """The column that holds a record's captions."""
    if options.caption_column is not None:
        return options.caption_column
    order = ("captions", "caption") if options.captions == "all" else ("caption", "captions")
    return next((name for name in order if name in record), "caption")


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


def _checked(text: str, words: Any, options: BuildOptions) -> dict[str, Any]:
    clean_text(text)
    if options.documents:
        return {"text": text}
    # Blanks around a caption are an accident of its file, not words to learn; the annotation moves along.
    stripped = text.strip()
    if words is None:
        return {"text": stripped}
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
    return {"text": stripped, "words": tuple(moved)}

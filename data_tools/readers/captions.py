"""Which captions a record gives: from one column or several, all of them or one, a conversation's answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import xxhash

from megaprior.data_tools.options import BuildOptions
from megaprior.data_tools.readers.conversations import COLUMNS, Conversation, is_conversation, parse_conversation
from megaprior.data_tools.readers.samples import Caption, Record, Rejected, Unfit, checked_caption, json_type

_ORDER, _FIRST_ORDER = ("captions", "caption", *COLUMNS), ("caption", "captions", *COLUMNS)


def caption_columns(columns: Iterable[str], options: BuildOptions) -> tuple[str, ...]:
    """The columns that hold a record's captions: those asked for, else captions, caption, conversations or messages."""
    if asked := options.caption_columns:
        return asked
    there = columns if isinstance(columns, dict) else set(columns)
    for name in _FIRST_ORDER if options.captions == "first" else _ORDER:
        if name in there:
            return (name,)
    return ("caption",)


def record_captions(key: str, record: Record, options: BuildOptions) -> tuple[list[Caption], list[Rejected]]:
    """The captions of a record under the options, and those refused.

    The captions of a list are keyed `key#0`, `key#1`, ...; those of several columns `key#COLUMN`.

    Raises:
        Unfit: of a single column: it is missing or of a wrong type, or the `words` annotation does not fit the caption.
    """
    columns = caption_columns(record, options)
    if len(columns) == 1 and type(text := record.get(columns[0])) is str:  # nearly always, so without detours
        return [checked_caption(key, text, record.get("words"), keep_blanks=options.documents)], []
    kept: list[Caption] = []
    refused: list[Rejected] = []
    for column in columns:
        name = f"{key}#{column}" if len(columns) > 1 else key
        try:
            found = list(_column(name, column, record, record.get("words") if name == key else None, options))
        except Unfit as unfit:
            if len(columns) == 1:
                raise
            found = [Rejected(key=name, reason=unfit.reason)]
        kept += [item for item in found if isinstance(item, Caption)]
        refused += [item for item in found if isinstance(item, Rejected)]
    if not kept or options.captions == "all":
        return kept, refused
    # Whoever asks for one caption loses nothing with the others, usable or not.
    return [kept[0] if options.captions == "first" else kept[_drawn(kept)]], []


def record_conversation(record: Record, options: BuildOptions) -> Conversation | None:
    """The conversation in the caption column, if that is what it holds.

    Raises:
        Unfit: it is a conversation of a wrong shape.
    """
    for column in caption_columns(record, options):
        value = record.get(column)
        if is_conversation(value):
            return parse_conversation(value)
    return None


def _drawn(captions: list[Caption]) -> int:
    """A number that looks random and is the same in every build: a hash of the captions themselves."""
    return xxhash.xxh3_64_intdigest("\0".join(caption.text for caption in captions).encode()) % len(captions)


def _column(name: str, column: str, record: Record, words: Any, options: BuildOptions) -> Iterator[Caption | Rejected]:
    if column not in record:
        raise Unfit(f"no column '{column}': the record has {', '.join(map(repr, record)) or 'none'}")
    value = record[column]
    if isinstance(value, str):
        yield checked_caption(name, value, words, keep_blanks=options.documents)
    elif is_conversation(value):
        yield _conversation(name, parse_conversation(value), options)
    elif not isinstance(value, list):
        expected = "a string or a list of strings"
        raise Unfit(f"column '{column}' of a wrong type: {json_type(value)}, expected {expected}")
    elif not value:
        raise Unfit(f"column '{column}' is an empty list")
    else:
        for number, text in enumerate(value):
            yield _item(f"{name}#{number}", column, number, text, options)


def _item(name: str, column: str, number: int, text: Any, options: BuildOptions) -> Caption | Rejected:
    try:
        if not isinstance(text, str):
            raise Unfit(f"column '{column}' of a wrong type: item {number} is {json_type(text)}, expected a string")
        return checked_caption(name, text, None, keep_blanks=options.documents)
    except Unfit as unfit:
        return Rejected(key=name, reason=unfit.reason)


def _conversation(name: str, conversation: Conversation, options: BuildOptions) -> Caption:
    answers = conversation.answers
    if options.turns == "all":
        text = "\n".join(turn.text for turn in conversation.turns)
        return Caption(key=name, text=text, turns=conversation.turns)
    if len(answers) > 1:
        raise Unfit(f"several turns: {len(answers)} answers, a caption is one; --turns all builds conversations whole")
    return Caption(key=name, text=answers[0])

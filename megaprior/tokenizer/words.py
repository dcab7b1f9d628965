"""Encoding a text word by word, remembering words: the same ids as the whole text's, several times as fast.

A BPE merge makes a piece of the vocabulary. Where no piece holds a space after its first character, nothing is ever merged
across the beginning of a word, so that the ids of a text are those of its words, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

from megaprior.tokenizer.base import SPACE

_MOST_WORDS = 1 << 17  # some 30 MB; frequent words come early, so that those that find no room are rare ones
_LONGEST_WORD = 64


class WordByWord:
    """`encode(text)` through its words; texts that cannot be cut that way are encoded whole."""

    def __init__(self, encode: Callable[[str], list[int]]) -> None:
        self._encode, self._known = encode, _Known(encode)

    def __call__(self, text: str) -> list[int]:
        """The ids of `text`."""
        words = text.split(" ")
        if "" in words or SPACE in text:  # blanks side by side, which are pieces of their own
            return self._encode(text)
        return list(chain.from_iterable(map(self._known.__getitem__, words)))


class _Known(dict[str, list[int]]):
    def __init__(self, encode: Callable[[str], list[int]]) -> None:
        super().__init__()
        self._encode = encode

    def __missing__(self, word: str) -> list[int]:
        ids = self._encode(word)
        if len(self) < _MOST_WORDS and len(word) <= _LONGEST_WORD:
            self[word] = ids
        return ids


def splits_at_words(model: bytes) -> bool:
    """Whether a serialized SentencePiece model gives a text the ids of its words: BPE that changes no character and puts a
    space before a text, without a piece that holds a space elsewhere than at its beginning (runs of spaces apart)."""
    from sentencepiece import sentencepiece_model_pb2

    format: Any = sentencepiece_model_pb2  # its classes are made when it is imported
    proto = format.ModelProto.FromString(model)
    before, how = proto.normalizer_spec, proto.trainer_spec
    faithful = before.add_dummy_prefix and before.escape_whitespaces and not before.precompiled_charsmap
    return (
        how.model_type == format.TrainerSpec.BPE
        and faithful
        and not before.remove_extra_whitespaces
        and not before.normalization_rule_tsv
        and not how.treat_whitespace_as_suffix
        and all(SPACE not in entry.piece.lstrip(SPACE) for entry in proto.pieces)
    )

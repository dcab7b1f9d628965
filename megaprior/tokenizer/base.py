"""What a tokenizer is, whatever file it came from: ids, the bytes each id adds to a text, and a fingerprint of both."""

from __future__ import annotations

import codecs
import hashlib
import json
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from megaprior.errors import DataError
from megaprior.files import atomic_write, looks_like

VISION_ROLES = {"patch": "<vpatch>", "start": "<vision>", "row": "<vrow_sep>", "end": "</vision>"}
SPACE = "\u2581"  # how SentencePiece writes a space inside a piece

# Cases in which implementations of one tokenizer have been seen to differ. Changing it changes every fingerprint.
_PROBE = (
    "A photo of two red squares, 1,234.50 EUR; it's 'free' (2019-07-04)!\n\n  Two   spaces\tand a tab\r\nÀ la carte, "
    "naïve Straße, Москва 東京 한국어 العربية हिन्दी 👩‍🚀🎉 e\u0301 \u00a0 <s> </s> <unk> <|eot_id|> <|endoftext|> [INST] "
    "<image> 3.14159e-10 don't WE'LL "
)


class Tokenizer(ABC):
    """Maps text to ids and back. Subclasses supply `encode`; the rest follows from the table id -> bytes.

    `vocab_size` counts every id, control tokens included.
    """

    def __init__(
        self,
        files: Mapping[str, Path],
        *,
        vocabulary: Sequence[bytes | None],
        bos_id: int,
        eos_id: int,
        roles: dict[str, int] | None,
        folds_spaces: bool,
    ) -> None:
        """`files`: the name to save each under -> its source. `vocabulary`: what each id adds to a text, None for control
        tokens. `folds_spaces`: U+2581 in a text is encoded as a space, as SentencePiece does."""
        self._files, self._vocabulary, self._roles, self._folds_spaces = dict(files), vocabulary, roles, folds_spaces
        self.bos_id, self.eos_id, self.vocab_size = bos_id, eos_id, len(vocabulary)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files it was loaded from; `save` carries them."""
        return tuple(self._files.values())

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of `text` alone: no BOS, no EOS, control tokens in it taken as text."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; control tokens give nothing, a cut character gives U+FFFD."""
        text = self._spell(ids).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self._dummy_prefix else text

    def token_bytes(self, token_id: int) -> bytes:
        """What one id adds to the text; empty for control tokens."""
        return self._vocabulary[token_id] or b""

    def texts(self, ids: Sequence[int]) -> list[str]:
        """What each id adds to the text, the dummy space before the first left out; ids beyond the vocabulary add nothing.

        A character that is spread over several ids appears with the last of them; one cut at the end becomes U+FFFD.
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        found = [decoder.decode(self.token_bytes(i) if i < self.vocab_size else b"") for i in ids]
        if found:
            found[0] = found[0].removeprefix(" ")
            found[-1] += decoder.decode(b"", final=True)
        return found

    def token_spans(self, text: str, ids: Sequence[int]) -> list[tuple[int, int]]:
        """Bytes [start, end) of `text.encode()` that each id stands for, in order and without gaps.

        `ids` encode `text` or its beginning; control tokens such as a closing EOS are empty spans. A space belongs to the
        token that carries it; the one that SentencePiece puts before a text is left out, so its token may be empty.

        Raises:
            DataError: `ids` do not spell `text`.
        """
        source = (text.replace(SPACE, " ") if self._folds_spaces else text).encode()
        spelled = self._spell(ids)
        prefixes = (b" ", b"") if self._dummy_prefix else (b"",)
        prefix = next((prefix for prefix in prefixes if (prefix + source).startswith(spelled)), None)
        if prefix is None:
            raise DataError(f"{self.files[0]}: the token ids do not spell {text[:40]!r}; another tokenizer made them")
        edges = [max(0, edge - len(prefix)) for edge in accumulate((len(self.token_bytes(i)) for i in ids), initial=0)]
        if self._folds_spaces and SPACE in text:
            places = _unfolded(text)
            edges = [places[edge] for edge in edges]
        return list(pairwise(edges))

    def identity(self) -> dict[str, Any]:
        """What must agree between two tokenizers: {"vocab": SHA-256, "bos": id, "eos": id, "probe": SHA-256}."""
        return dict(self._identity)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of `identity()`. It covers what ids mean and not the file: Llama-3's ranks file and its
        tokenizer.json agree. Control tokens are no part of it: vision roles belong to the model."""
        return hashlib.sha256(json.dumps(self._identity, sort_keys=True).encode()).hexdigest()

    def reserved_roles(self) -> dict[str, int] | None:
        """Ids free to carry the vision roles "patch", "start", "row" and "end"; None when the vocabulary reserves none."""
        return dict(self._roles) if self._roles else None

    def save(self, folder: Path | str) -> None:
        """Copies the files to `folder` (made if missing) under the names that `load_tokenizer(folder)` finds."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, source in self._files.items():
            atomic_write(Path(folder) / name, source.read_bytes())

    @cached_property
    def _identity(self) -> dict[str, Any]:
        vocabulary = hashlib.sha256()
        for token_id, piece in enumerate(self._vocabulary):
            if piece is not None:
                vocabulary.update(struct.pack("<II", token_id, len(piece)) + piece)
        probe = hashlib.sha256(json.dumps(self.encode(_PROBE)).encode())
        return {"vocab": vocabulary.hexdigest(), "bos": self.bos_id, "eos": self.eos_id, "probe": probe.hexdigest()}

    @cached_property
    def _dummy_prefix(self) -> bool:
        return self._spell(self.encode("a")) == b" a"

    def _spell(self, ids: Iterable[int]) -> bytes:
        return b"".join(map(self.token_bytes, ids))


def compare_fingerprints(a: Tokenizer | Mapping[str, Any], b: Tokenizer | Mapping[str, Any]) -> str | None:
    """Names the first field in which two tokenizers (or their `identity()`) differ; None when they are the same."""
    one, two = (tokenizer.identity() if isinstance(tokenizer, Tokenizer) else tokenizer for tokenizer in (a, b))
    names = {"vocab": "vocabulary", "bos": "BOS id", "eos": "EOS id", "probe": "ids of the probe text"}
    return next((name for field, name in names.items() if one[field] != two[field]), None)


def named_roles(controls: Mapping[str, int]) -> dict[str, int] | None:
    """The vision roles by the names that `train_sentencepiece` reserves, among control tokens name -> id."""
    if not controls.keys() >= set(VISION_ROLES.values()):
        return None
    return {role: controls[name] for role, name in VISION_ROLES.items()}


def not_a_tokenizer(path: Path) -> DataError:
    """The refusal of a file, saying what it looks like instead."""
    with open(path, "rb") as file:
        head = file.read(64)
    words = looks_like(head) or ("a damaged SentencePiece model" if head.startswith(b"\n") else None)
    guess = f"it looks like {words}" if words else f"it begins with {head[:16]!r}"
    return DataError(f"{path}: not a tokenizer: {guess}; copy or download it again")


def _unfolded(text: str) -> list[int]:
    """For each byte position of the text with U+2581 (3 bytes) folded to a space, the position in the text itself."""
    places = [0]
    for character in text:
        size = len(character.encode())
        places += [places[-1] + size] if character == SPACE else range(places[-1] + 1, places[-1] + 1 + size)
    return places

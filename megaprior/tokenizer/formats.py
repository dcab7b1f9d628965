"""The file formats: SentencePiece models, Llama-3's tiktoken ranks, and what the `tokenizers` library reads."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from megaprior.errors import DataError
from megaprior.tokenizer.base import SPACE, VISION_ROLES, Tokenizer, named_roles, not_a_tokenizer
from megaprior.tokenizer.words import WordByWord, splits_at_words

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


class SentencePiece(Tokenizer):
    """A SentencePiece model with BOS and EOS: Llama 1 and 2, Mistral, or one of our own."""

    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        data = path.read_bytes()
        try:
            model = SentencePieceProcessor(model_proto=data)
        except RuntimeError as error:
            raise not_a_tokenizer(path) from error
        self._encode = WordByWord(model.encode) if splits_at_words(data) else model.encode
        if model.bos_id() < 0 or model.eos_id() < 0:
            raise DataError(f"{path}: this SentencePiece model defines no BOS or no EOS; use one that has both")
        ids = range(model.vocab_size())
        super().__init__(
            {"tokenizer.model": path},
            vocabulary=[
                None
                if model.is_control(i) or model.is_unknown(i) or model.is_unused(i)
                else _piece_bytes(model.id_to_piece(i), is_byte=model.is_byte(i))
                for i in ids
            ],
            bos_id=model.bos_id(),
            eos_id=model.eos_id(),
            roles=named_roles({model.id_to_piece(i): i for i in ids if model.is_control(i)}),
            folds_spaces=True,
        )

    def encode(self, text: str) -> list[int]:
        return self._encode(text)


class Llama3(Tokenizer):
    """Llama-3's tiktoken file: 128,000 ranks, then 256 control tokens that the file does not list.

    BOS <|begin_of_text|> is 128000 and EOS <|end_of_text|> 128001. The vision roles take the last four ids, which are
    reserved special tokens in every release; the earlier ones were given other meanings between 3.0 and 3.2.
    """

    RANKS, CONTROLS = 128_000, 256
    PATTERN = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    _LONG_BLANK = re.compile(r"\s{16384}")  # the pattern overflows tiktoken's stack on a million blanks in a row

    def __init__(self, path: Path) -> None:
        from tiktoken import Encoding

        ranks = self._read(path)
        size = self.RANKS + self.CONTROLS
        self._encoding = Encoding("llama3", pat_str=self.PATTERN, mergeable_ranks=ranks, special_tokens={})
        super().__init__(
            {"tokenizer.model": path},
            vocabulary=sorted(ranks, key=ranks.__getitem__) + [None] * self.CONTROLS,
            bos_id=self.RANKS,
            eos_id=self.RANKS + 1,
            roles=dict(zip(VISION_ROLES, range(size - 4, size), strict=True)),
            folds_spaces=False,
        )

    def encode(self, text: str) -> list[int]:
        cuts = [0, *(blank.end() for blank in self._LONG_BLANK.finditer(text)), len(text)]
        return [i for start, end in pairwise(cuts) for i in self._encoding.encode_ordinary(text[start:end])]

    @classmethod
    def _read(cls, path: Path) -> dict[bytes, int]:
        ranks = {}
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            try:
                piece, rank = line.split()
                ranks[base64.b64decode(piece, validate=True)] = int(rank)
            except (ValueError, binascii.Error) as error:
                raise DataError(f"{path}: line {number} is not 'base64 rank' ({line[:40]!r}); copy it again") from error
        if sorted(ranks.values()) != list(range(cls.RANKS)):
            raise DataError(
                f"{path}: {len(ranks):,} tiktoken ranks, but only Llama-3's {cls.RANKS:,} are known, because such a file "
                "does not say how text is split; give the model's tokenizer.json"
            )
        return ranks


class HuggingFace(Tokenizer):
    """A model of the `tokenizers` library: a tokenizer.json, or GPT-2's vocabulary and merges."""

    BOS_NAMES = ("<|begin_of_text|>", "<s>", "<|endoftext|>")
    EOS_NAMES = ("<|end_of_text|>", "</s>", "<|endoftext|>")

    def __init__(
        self, model: Any, files: Mapping[str, Path], *, bos: str | None = None, eos: str | None = None
    ) -> None:
        """`bos` and `eos` name those tokens; None takes the first known name that the vocabulary has."""
        path = next(iter(files.values()))
        model.no_truncation()
        model.no_padding()
        model.encode_special_tokens = True  # sic: encode them as the text that they are, never parse them
        self._model = model
        ids, added = model.get_vocab(with_added_tokens=True), model.get_added_tokens_decoder()
        bos_id = _control_id(path, ids, "bos", [bos] if bos else self.BOS_NAMES)
        eos_id = _control_id(path, ids, "eos", [eos] if eos else self.EOS_NAMES)

        kinds = _component_types(model)
        byte_level = "ByteLevel" in kinds
        if not byte_level and not kinds & {"ByteFallback", "Metaspace"}:
            raise DataError(f"{path}: neither byte-level BPE nor SentencePiece: its tokens do not spell the text back")
        vocabulary: list[bytes | None] = [None] * (max(ids.values()) + 1)
        to_bytes = (
            _byte_level_bytes() if byte_level else lambda piece: _piece_bytes(piece, is_byte="ByteFallback" in kinds)
        )
        controls = {bos_id, eos_id, ids.get(getattr(model.model, "unk_token", None))}
        for piece, token_id in ids.items():
            if token_id not in controls and token_id not in added:
                try:
                    vocabulary[token_id] = to_bytes(piece)
                except KeyError:
                    raise DataError(f"{path}: token {piece!r} is not spelled as byte-level BPE spells bytes") from None
        for token_id, token in added.items():
            vocabulary[token_id] = None if token.special else token.content.encode()

        special = {token.content: token_id for token_id, token in added.items() if token.special}
        reserved = sorted(token_id for name, token_id in special.items() if "reserved_special_token" in name)[-4:]
        roles = dict(zip(VISION_ROLES, reserved, strict=True)) if len(reserved) == 4 else named_roles(special)
        super().__init__(
            files, vocabulary=vocabulary, bos_id=bos_id, eos_id=eos_id, roles=roles, folds_spaces=not byte_level
        )

    @property
    def model(self) -> Any:
        """The `tokenizers.Tokenizer` behind it; not to be changed."""
        return self._model

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._model.encode_batch_fast(list(texts), add_special_tokens=False)]

    @classmethod
    def from_json(cls, path: Path) -> HuggingFace:
        """A tokenizer.json; the tokenizer_config.json beside it, if any, names BOS and EOS."""
        import tokenizers

        try:
            model = tokenizers.Tokenizer.from_buffer(path.read_bytes())
        except Exception as error:  # the library raises bare Exception
            raise not_a_tokenizer(path) from error
        config = path.with_name("tokenizer_config.json")
        if not config.exists():
            return cls(model, {"tokenizer.json": path})
        try:
            fields = json.loads(config.read_bytes())
            tokens = [fields.get("bos_token"), fields.get("eos_token")]
            bos, eos = (token["content"] if isinstance(token, dict) else token for token in tokens)
        except (ValueError, AttributeError, KeyError) as error:
            raise DataError(f"{config}: not a tokenizer configuration ({error}); remove it or copy it again") from error
        return cls(model, {"tokenizer.json": path, "tokenizer_config.json": config}, bos=bos, eos=eos)

    @classmethod
    def from_gpt2(cls, vocabulary: Path, merges: Path) -> HuggingFace:
        """GPT-2's pair of files; <|endoftext|> is both BOS and EOS."""
        import tokenizers

        for file in (vocabulary, merges):
            if not file.exists():
                raise DataError(f"{file}: missing; a GPT-2 tokenizer is {vocabulary.name} together with {merges.name}")
        try:
            model = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(str(vocabulary), str(merges)))
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{vocabulary}, {merges}: not a GPT-2 tokenizer ({error}); copy both again") from error
        model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        return cls(model, {"vocab.json": vocabulary, "merges.txt": merges})


def _control_id(path: Path, ids: Mapping[str, int], role: str, names: Sequence[str]) -> int:
    found = next((ids[name] for name in names if name in ids), None)
    if found is None:
        raise DataError(
            f"{path}: none of {', '.join(names)} is in the vocabulary; give the name as {role}_token in a "
            "tokenizer_config.json beside it"
        )
    return found


def _component_types(model: Any) -> set[str]:
    """The types of the parts of a `tokenizers` model that turn pieces into text, nested ones included."""
    states = [part.__getstate__() for part in (model.pre_tokenizer, model.decoder) if part is not None]
    return {kind for state in states for kind in re.findall(r'"type": ?"(\w+)"', state.decode())}


def _piece_bytes(piece: str, *, is_byte: bool) -> bytes:
    match = _BYTE_PIECE.fullmatch(piece) if is_byte else None
    return bytes([int(match[1], 16)]) if match else piece.replace(SPACE, " ").encode()


def byte_alphabet() -> dict[int, str]:
    """Byte-level BPE's spelling of each byte: printable Latin-1 bytes as themselves, the others from U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + place) for place, byte in enumerate(hidden)}


def _byte_level_bytes() -> Any:
    """The inverse of byte-level BPE's spelling."""
    alphabet = {character: byte for byte, character in byte_alphabet().items()}
    return lambda piece: bytes(alphabet[character] for character in piece)

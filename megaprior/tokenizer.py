"""Tokenizers as the four published file formats hold them, behind one small interface with one fingerprint.

Text only: `encode` adds no BOS or EOS and never parses control tokens, so a caption that spells `<|eot_id|>` stays text.
Two formats of one tokenizer (say Llama-3's ranks file and its tokenizer.json) have one fingerprint, because it covers what
ids mean, the text vocabulary id -> bytes, BOS, EOS and the ids of a probe text, and not the file. Vision roles belong to the model
and stay outside it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import json
import re
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from megaprior.errors import DataError, UsageError
from megaprior.files import atomic_write

VISION_ROLES = {"patch": "<vpatch>", "start": "<vision>", "row": "<vrow_sep>", "end": "</vision>"}
_SPACE = "\u2581"  # how SentencePiece writes a space inside a piece
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_PROBE = (
    "A photo of two red squares, 1,234.50 EUR; it's 'free' (2019-07-04)!\n\n  Two   spaces\tand a tab\r\nÀ la carte, naïve Straße, "
    "Москва 東京 한국어 العربية हिन्दी 👩‍🚀🎉 e\u0301 \u00a0 <s> </s> <unk> <|eot_id|> <|endoftext|> [INST] <image> 3.14159e-10 don't WE'LL "
)


class Tokenizer(ABC):
    """Maps text to ids and back; subclasses supply the encoding, this class what follows from id -> bytes.

    `files` are the sources and `save` carries them; `vocab_size` counts every id, control tokens included.
    """

    def __init__(
        self,
        files: Mapping[str, Path],
        *,
        vocabulary: Sequence[bytes | None],
        bos_id: int,
        eos_id: int,
        roles: dict[str, int] | None = None,
    ) -> None:
        """`files` maps the name under which a file is saved to its source; `vocabulary` is None at control tokens."""
        self.bos_id, self.eos_id, self.vocab_size = bos_id, eos_id, len(vocabulary)
        self._files, self._vocabulary, self._roles = dict(files), vocabulary, roles

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(self._files.values())

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of `text` alone."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; control tokens give nothing, cut UTF-8 gives U+FFFD."""
        text = self._join(ids).decode("utf-8", errors="replace")
        return text[1:] if self._dummy_prefix and text.startswith(" ") else text

    def token_bytes(self, id: int) -> bytes:
        """What one id adds to the text; empty for control tokens."""
        return self._vocabulary[id] or b""

    def token_spans(self, text: str, ids: Sequence[int]) -> list[tuple[int, int]]:
        """Byte range [start, end) of each id in `text.encode()`, in order and without gaps.

        `ids` encode `text` or its beginning; control tokens (a closing EOS) are empty spans. A space belongs to the token
        that carries it, and the space that SentencePiece puts before a text belongs to no one. DataError when `ids` do not spell `text`.
        """
        joined, source = self._join(ids), text.replace(_SPACE, " ").encode() if self._folds else text.encode()
        prefixes = (b" ", b"") if self._dummy_prefix else (b"",)
        prefix = next((p for p in prefixes if (p + source).startswith(joined)), None)
        if prefix is None:
            raise DataError(
                f"{self.files[0]}: token ids do not spell the text {text[:40]!r}: it was encoded by another tokenizer"
            )
        widths = (len(self.token_bytes(id)) for id in ids)
        edges = [0]
        for width in widths:
            edges.append(edges[-1] + width)
        edges = [max(0, edge - len(prefix)) for edge in edges]
        if (
            self._folds and _SPACE in text
        ):  # that character is three bytes in the text and one, a space, in the vocabulary
            place = [0]
            for character in text:
                size = len(character.encode())
                place += [place[-1] + size] if character == _SPACE else [place[-1] + 1 + i for i in range(size)]
            edges = [place[edge] for edge in edges]
        return list(zip(edges, edges[1:], strict=False))

    def identity(self) -> dict[str, Any]:
        """What must agree for two tokenizers to be the same: {"vocab": sha256, "bos": id, "eos": id, "probe": sha256}."""
        return dict(self._identity)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over `identity()`."""
        return hashlib.sha256(json.dumps(self._identity, sort_keys=True).encode()).hexdigest()

    def reserved_roles(self) -> dict[str, int] | None:
        """Ids free to carry the vision roles "patch", "start", "row", "end"; None when the vocabulary reserves none."""
        return dict(self._roles) if self._roles else None

    def save(self, folder: Path | str) -> None:
        """Copies the files to `folder` (made if missing), under names that `load_tokenizer(folder)` finds."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, source in self._files.items():
            atomic_write(Path(folder) / name, source.read_bytes())

    @cached_property
    def _identity(self) -> dict[str, Any]:
        vocabulary = hashlib.sha256()
        for id, piece in enumerate(self._vocabulary):
            if piece is not None:
                vocabulary.update(struct.pack("<II", id, len(piece)) + piece)
        probe = hashlib.sha256(json.dumps(self.encode(_PROBE)).encode())
        return {"vocab": vocabulary.hexdigest(), "bos": self.bos_id, "eos": self.eos_id, "probe": probe.hexdigest()}

    @cached_property
    def _dummy_prefix(self) -> bool:
        return self._join(self.encode("a")) == b" a"

    _folds = True  # whether U+2581 in a text is encoded as a space

    def _join(self, ids: Iterable[int]) -> bytes:
        return b"".join(map(self.token_bytes, ids))


def compare_fingerprints(a: Tokenizer | Mapping[str, Any], b: Tokenizer | Mapping[str, Any]) -> str | None:
    """Names the first field in which two tokenizers (or their `identity()`) differ; None when they are the same."""
    one, two = (t.identity() if isinstance(t, Tokenizer) else t for t in (a, b))
    names = {"vocab": "vocabulary", "bos": "BOS id", "eos": "EOS id", "probe": "probe ids"}
    return next((name for field, name in names.items() if one[field] != two[field]), None)


class _SentencePiece(Tokenizer):
    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            self._model = model = SentencePieceProcessor(model_proto=path.read_bytes())
        except RuntimeError as error:
            raise DataError(f"{path}: not a tokenizer: {looks_like(path)}") from error
        if model.bos_id() < 0 or model.eos_id() < 0:
            raise DataError(f"{path}: this SentencePiece model defines no BOS or no EOS; train one with both")

        def piece_bytes(id: int) -> bytes | None:
            if model.is_control(id) or model.is_unknown(id) or model.is_unused(id):
                return None
            return _piece_bytes(model.id_to_piece(id), byte_fallback=model.is_byte(id))

        controls = {model.id_to_piece(id): id for id in range(model.vocab_size()) if model.is_control(id)}
        super().__init__(
            {"tokenizer.model": path},
            vocabulary=[piece_bytes(id) for id in range(model.vocab_size())],
            bos_id=model.bos_id(),
            eos_id=model.eos_id(),
            roles=_named_roles(controls),
        )

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)


class _Llama3(Tokenizer):
    """Llama-3's tiktoken file: 128,000 ranks, then 256 control tokens that the file does not list."""

    _folds = False
    RANKS, CONTROLS = 128_000, 256
    PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    _LONG_BLANK = re.compile(r"\s{16384}")  # tiktoken's pattern overflows its stack on a run of about a million

    def __init__(self, path: Path) -> None:
        from tiktoken import Encoding

        ranks = {}
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            try:
                piece, rank = line.split()
                ranks[base64.b64decode(piece, validate=True)] = int(rank)
            except (ValueError, binascii.Error) as error:
                raise DataError(f"{path}: line {number} is not 'base64 rank': {looks_like(path)}") from error
        if sorted(ranks.values()) != list(range(self.RANKS)):
            raise DataError(
                f"{path}: a tiktoken file with {len(ranks):,} ranks; only Llama-3's, with ranks 0 to {self.RANKS - 1:,}, is known, "
                "since such files omit how text is split: give a tokenizer.json instead"
            )
        self._encoding = Encoding("llama3", pat_str=self.PATTERN, mergeable_ranks=ranks, special_tokens={})
        size = self.RANKS + self.CONTROLS
        super().__init__(
            {"tokenizer.model": path},
            vocabulary=sorted(ranks, key=ranks.__getitem__) + [None] * self.CONTROLS,
            bos_id=self.RANKS,
            eos_id=self.RANKS + 1,
            roles=dict(zip(VISION_ROLES, range(size - 4, size), strict=True)),
        )

    def encode(self, text: str) -> list[int]:
        cuts = [0, *(match.end() for match in self._LONG_BLANK.finditer(text)), len(text)]
        parts = (text[start:end] for start, end in zip(cuts, cuts[1:], strict=False))
        return [id for part in parts for id in self._encoding.encode_ordinary(part)]


class _HuggingFace(Tokenizer):
    """A `tokenizers` model: tokenizer.json, or GPT-2's vocabulary and merges."""

    BOS_NAMES = ("<|begin_of_text|>", "<s>", "<|endoftext|>")
    EOS_NAMES = ("<|end_of_text|>", "</s>", "<|endoftext|>")

    def __init__(
        self, model: Any, files: Mapping[str, Path], *, bos: str | None = None, eos: str | None = None
    ) -> None:
        path = next(iter(files.values()))
        model.no_truncation()
        model.no_padding()
        model.encode_special_tokens = True  # sic: control tokens in a text are encoded as text
        self._model, ids = model, model.get_vocab(with_added_tokens=True)
        bos_id, eos_id = (
            self._control(path, ids, "BOS", bos, self.BOS_NAMES),
            self._control(path, ids, "EOS", eos, self.EOS_NAMES),
        )

        states = [json.loads(part.__getstate__()) for part in (model.pre_tokenizer, model.decoder) if part is not None]
        kinds = set(re.findall(r'"type": "(\w+)"', json.dumps(states)))
        self._folds = "ByteLevel" not in kinds
        if not kinds & {"ByteLevel", "ByteFallback", "Metaspace"}:
            raise DataError(
                f"{path}: neither byte-level BPE nor SentencePiece: its tokens do not spell the text, so captions cannot be scored"
            )
        added = {id: token for id, token in model.get_added_tokens_decoder().items()}
        alphabet = _byte_alphabet()
        vocabulary: list[bytes | None] = [None] * (max(ids.values()) + 1)
        for piece, id in ids.items():
            if id in added:
                vocabulary[id] = None if added[id].special else added[id].content.encode()
            elif self._folds:
                vocabulary[id] = _piece_bytes(piece, byte_fallback="ByteFallback" in kinds)
            else:
                vocabulary[id] = (
                    bytes(alphabet[character] for character in piece)
                    if set(piece) <= alphabet.keys()
                    else piece.encode()
                )
        vocabulary[bos_id] = vocabulary[eos_id] = None
        controls = {token.content: id for id, token in added.items() if token.special}
        reserved = sorted(id for name, id in controls.items() if "reserved_special_token" in name)[-4:]
        roles = dict(zip(VISION_ROLES, reserved, strict=True)) if len(reserved) == 4 else _named_roles(controls)
        super().__init__(files, vocabulary=vocabulary, bos_id=bos_id, eos_id=eos_id, roles=roles)

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._model.encode_batch_fast(list(texts), add_special_tokens=False)]

    @staticmethod
    def _control(path: Path, ids: Mapping[str, int], role: str, name: str | None, known: Sequence[str]) -> int:
        names = (name,) if name else known
        found = next((ids[n] for n in names if n in ids), None)
        if found is None:
            raise DataError(
                f"{path}: no {role} token ({' or '.join(names)}); name it in a tokenizer_config.json beside the file"
            )
        return found

    @classmethod
    def from_json(cls, path: Path) -> _HuggingFace:
        import tokenizers

        try:
            model = tokenizers.Tokenizer.from_buffer(path.read_bytes())
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{path}: not a tokenizer: {looks_like(path)}") from error
        files, names = {"tokenizer.json": path}, {}
        if (config := path.with_name("tokenizer_config.json")).exists():
            files["tokenizer_config.json"] = config
            try:
                fields = json.loads(config.read_bytes())
                tokens = {role: fields.get(f"{role}_token") for role in ("bos", "eos")}
                names = {role: token["content"] if isinstance(token, dict) else token for role, token in tokens.items()}
            except (ValueError, AttributeError, KeyError) as error:
                raise DataError(f"{config}: not a tokenizer_config.json: {looks_like(config)}") from error
        return cls(model, files, bos=names.get("bos"), eos=names.get("eos"))

    @classmethod
    def from_gpt2(cls, path: Path) -> _HuggingFace:
        import tokenizers

        pairs = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))
        vocabulary, merges = next([path.with_name(name) for name in pair] for pair in pairs if path.name in pair)
        for file in (vocabulary, merges):
            if not file.exists():
                raise DataError(f"{file}: missing; a GPT-2 tokenizer is the pair {vocabulary.name} and {merges.name}")
        try:
            model = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(str(vocabulary), str(merges)))
        except Exception as error:  # the library raises bare Exception
            raise DataError(
                f"{path}: not a GPT-2 tokenizer: {vocabulary.name} is {looks_like(vocabulary)}, {merges.name} is {looks_like(merges)}"
            ) from error
        model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        return cls(model, {"vocab.json": vocabulary, "merges.txt": merges})


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Loads a tokenizer from a file, or from a folder that holds one; the format is told by the content.

    Known: SentencePiece models, Llama-3's tiktoken ranks, tokenizer.json (BOS and EOS from the tokenizer_config.json beside it),
    and GPT-2's encoder.json + vocab.bpe or vocab.json + merges.txt. DataError when it is none of these, saying what it looks like.
    """
    path = _file_in(Path(path))
    if path.name in ("encoder.json", "vocab.json", "vocab.bpe", "merges.txt"):
        return _HuggingFace.from_gpt2(path)
    try:
        with open(path, "rb") as file:
            head = file.read(256)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give a tokenizer's file or its folder") from error
    if head[:1] == b"\n":  # protobuf's mark of field 1, a SentencePiece model's first piece
        return _SentencePiece(path)
    if head.lstrip()[:1] == b"{":
        return _HuggingFace.from_json(path)
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", head):
        return _Llama3(path)
    raise DataError(f"{path}: not a tokenizer: {looks_like(path)}")


def _file_in(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in ("tokenizer.json", "tokenizer.model", "encoder.json", "vocab.json"):
        if (path / name).exists():
            return path / name
    models = sorted(file for file in path.iterdir() if ".model" in file.name)
    if len(models) == 1:
        return models[0]
    found = f"{len(models)} models ({', '.join(m.name for m in models)}): name one" if models else "no tokenizer"
    raise DataError(
        f"{path}: this folder holds {found}; expected tokenizer.json, a *.model, or encoder.json with vocab.bpe"
    )


def looks_like(path: Path) -> str:
    """What a file that was refused seems to be, for the message."""
    head = path.read_bytes()[:512] if path.exists() else b""
    known = [
        (b"\x1f\x8b", "a gzip file (unpack it first)"),
        (b"PK\x03\x04", "a zip archive or PyTorch checkpoint"),
        (b"\x80", "a pickle, which is never loaded"),
        (b"version https://git-lfs", "a Git LFS pointer (run `git lfs pull`)"),
        (b"<", "an HTML or XML page (the download failed)"),
        (b"{", "JSON, but not of a tokenizer"),
        (b"\n", "a damaged or cut SentencePiece model"),
    ]
    guess = next((what for magic, what in known if head.removeprefix(b"\xef\xbb\xbf").startswith(magic)), None)
    return "it is empty" if not head else f"it looks like {guess}" if guess else f"it begins with {head[:16]!r}"


def train_sentencepiece(
    texts: Iterable[str], output: Path | str, *, vocab_size: int, character_coverage: float = 0.9995
) -> Tokenizer:
    """Trains a BPE tokenizer on `texts` and writes `output`/tokenizer.model; the same texts give the same bytes.

    Bytes stand in for unknown characters, digits are single, spaces are kept as they are, and the four vision roles are control
    tokens, which no caption can spell. DataError when there is no text, UsageError when it cannot fill `vocab_size`.
    """
    from sentencepiece import SentencePieceTrainer

    lines = _lines(texts)
    first = next(lines, None)
    if first is None:
        raise DataError(f"{output}: no text to train a tokenizer on")
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=_chain(first, lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            control_symbols=list(VISION_ROLES.values()),
            max_sentence_length=1 << 16,  # bytes; longer lines would be skipped
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rsplit("] ", 1)[-1].strip() or str(error)
        raise UsageError(
            f"{output}: SentencePiece cannot make vocab_size={vocab_size} of this text: {reason}"
        ) from error
    Path(output).mkdir(parents=True, exist_ok=True)
    atomic_write(Path(output) / "tokenizer.model", model.getvalue())
    return load_tokenizer(output)


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _lines(texts: Iterable[str]) -> Iterator[str]:
    return (line for text in texts for line in text.splitlines() if line.strip())


def _named_roles(controls: Mapping[str, int]) -> dict[str, int] | None:
    if not all(name in controls for name in VISION_ROLES.values()):
        return None
    return {role: controls[name] for role, name in VISION_ROLES.items()}


def _piece_bytes(piece: str, *, byte_fallback: bool) -> bytes:
    match = _BYTE_PIECE.fullmatch(piece) if byte_fallback else None
    return bytes([int(match[1], 16)]) if match else piece.replace(_SPACE, " ").encode()


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE writes each byte as a visible character: printable Latin-1 as itself, the rest from U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(hidden)}

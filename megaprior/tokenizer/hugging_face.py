"""Any tokenizer as a model of the `tokenizers` library, for what Hugging Face's programs load.

A merge ranks by what its product is worth: a piece's score (SentencePiece) or rank (tiktoken). Converters that take the order
of the vocabulary instead tokenize some captions differently, and nobody notices; here the fingerprint is compared.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from megaprior.errors import DataError
from megaprior.tokenizer.base import SPACE, Tokenizer, compare_fingerprints
from megaprior.tokenizer.formats import HuggingFace, Llama3, SentencePiece, byte_alphabet
from megaprior.tokenizer.loading import load_tokenizer

Piece = TypeVar("Piece", str, bytes)

# SentencePiece's own numbers.
_BPE = 2
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6

# Llama 3.1's names of the control tokens 128000 + i; the others are reserved.
_LLAMA3_NAMES = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}


def to_hugging_face(tokenizer: Tokenizer) -> Any:
    """A `tokenizers.Tokenizer` of the same ids that adds BOS; control tokens are special, so texts can call them by name.

    Raises:
        DataError: a kind of SentencePiece model that this library cannot follow.
    """
    from tokenizers import processors

    if isinstance(tokenizer, SentencePiece):
        model = _from_sentencepiece(tokenizer)
    elif isinstance(tokenizer, Llama3):
        model = _from_tiktoken(tokenizer)
    else:
        assert isinstance(tokenizer, HuggingFace)
        model = _from_tokenizers(tokenizer)
    bos = model.id_to_token(tokenizer.bos_id)
    model.post_processor = processors.TemplateProcessing(
        single=[bos, "$A"], pair=[bos, "$A", bos, "$B:1"], special_tokens=[(bos, tokenizer.bos_id)]
    )
    return model


def name_control(model: Any, token_id: int, name: str) -> Any:
    """The same model with the control token `token_id` called `name`; an id just beyond the vocabulary is appended.

    Raises:
        DataError: the vocabulary has the name already, under another id.
    """
    from tokenizers import Tokenizer as Model

    taken = model.token_to_id(name)
    if taken is not None and taken != token_id:
        raise DataError(f"{name} is id {taken} of this tokenizer, {token_id} was to be called so: rename the other one")
    state = json.loads(model.to_str())
    old = model.id_to_token(token_id)
    vocabulary = state["model"]["vocab"]
    if old in vocabulary:
        vocabulary[name] = vocabulary.pop(old)
    added = [entry for entry in state["added_tokens"] if entry["id"] != token_id]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    state["added_tokens"] = sorted([*added, {"id": token_id, "content": name, **flags}], key=lambda entry: entry["id"])
    renamed = Model.from_str(json.dumps(state, ensure_ascii=False))
    assert renamed.token_to_id(name) == token_id, (name, token_id, renamed.get_vocab_size())
    return renamed


def check_same(file: Path, original: Tokenizer) -> None:
    """Refuse a tokenizer.json (with its tokenizer_config.json) that is not `original` in other clothes.

    Raises:
        DataError: names the field that differs.
    """
    field = compare_fingerprints(load_tokenizer(file), original)
    if field is not None:
        raise DataError(
            f"{original.files[0]}: as {file.name} it would have another {field}; export it with the model's own tokenizer.json"
        )


# ---------------------------------------------------------------- the three kinds


def _from_sentencepiece(tokenizer: SentencePiece) -> Any:
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]
    from tokenizers import AddedToken, decoders, models
    from tokenizers import Tokenizer as Model

    path = tokenizer.files[0]
    proto = ModelProto.FromString(path.read_bytes())
    if proto.trainer_spec.treat_whitespace_as_suffix or not proto.normalizer_spec.escape_whitespaces:
        raise DataError(f"{path}: it writes spaces behind words, or not at all; no tokenizer.json can follow that")
    pieces = proto.pieces
    unknown = next((i for i, piece in enumerate(pieces) if piece.type == _UNKNOWN), None)
    if proto.trainer_spec.model_type != _BPE:
        # The library's unigram model finds control pieces in a text, and breaks ties in runs of one character otherwise.
        raise DataError(
            f"{path}: not BPE; as tokenizer.json it would tokenize some captions differently, so it stays here"
        )
    scores = {piece.piece: piece.score for piece in pieces if piece.type == _NORMAL}
    model = models.BPE(
        {piece.piece: i for i, piece in enumerate(pieces)},
        merges_of(scores, lambda piece: -scores[piece]),
        unk_token=None if unknown is None else pieces[unknown].piece,
        fuse_unk=True,
        byte_fallback=any(piece.type == _BYTE for piece in pieces),
    )
    converted = Model(model)
    converted.normalizer = _normalizer(proto.normalizer_spec)
    prefix = proto.normalizer_spec.add_dummy_prefix
    bare = decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()
    converted.decoder = decoders.Sequence([*bare, decoders.Strip(" ", 1, 0)] if prefix else [*bare])
    controls = [piece.piece for piece in pieces if piece.type in (_UNKNOWN, _CONTROL, _UNUSED)]
    converted.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in controls])
    # Pieces that are found before all others. What follows one in a text gets a space that SentencePiece does not write.
    spoken = [piece.piece for piece in pieces if piece.type == _USER_DEFINED]
    converted.add_tokens([AddedToken(name, special=False, normalized=False) for name in spoken])
    return converted


def _normalizer(spec: Any) -> Any:
    """What SentencePiece does to a text before it looks for pieces."""
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


def _from_tiktoken(tokenizer: Llama3) -> Any:
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Model

    spelled = byte_alphabet()
    ranks = {tokenizer.token_bytes(rank): rank for rank in range(tokenizer.RANKS)}
    words = {piece: "".join(spelled[byte] for byte in piece) for piece in ranks}
    merges = [(words[a], words[b]) for a, b in merges_of(ranks, ranks.__getitem__)]
    # tiktoken takes a word that is a token as it is, whether or not merges lead there.
    converted = Model(models.BPE({words[piece]: rank for piece, rank in ranks.items()}, merges, ignore_merges=True))
    converted.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(tokenizer.PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    converted.decoder = decoders.ByteLevel()
    names, reserved = [], iter(range(tokenizer.CONTROLS))
    for i in range(tokenizer.CONTROLS):
        names.append(_LLAMA3_NAMES.get(i) or f"<|reserved_special_token_{next(reserved)}|>")
    converted.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return converted


def _from_tokenizers(tokenizer: HuggingFace) -> Any:
    """As it is; only BOS and EOS become special where they were ordinary entries (GPT-2's pair of files)."""
    from tokenizers import AddedToken, decoders
    from tokenizers import Tokenizer as Model

    model = Model.from_str(tokenizer.model.to_str())
    added = model.get_added_tokens_decoder()
    plain = {tokenizer.bos_id, tokenizer.eos_id} - {i for i, token in added.items() if token.special}
    model.add_special_tokens([AddedToken(model.id_to_token(i), special=True, normalized=False) for i in sorted(plain)])
    if model.decoder is None:
        model.decoder = decoders.ByteLevel()  # the adapter takes no other kind without a decoder
    return model


def merges_of(pieces: Mapping[Piece, float], rank: Callable[[Piece], float]) -> list[tuple[Piece, Piece]]:
    """Every way to make a piece of two others, cheapest product first; equal products with the longer left part first.

    SentencePiece and tiktoken merge any neighbours whose product is a piece, so all ways count, not only the one that
    training took. Among equal ones they go from left to right, where the longer part has grown already.
    """
    found: list[tuple[float, int, Piece, Piece]] = []
    for piece in pieces:
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in pieces and right in pieces:
                found.append((rank(piece), -cut, left, right))
    found.sort(key=lambda merge: merge[:2])  # stable: pieces of equal rank keep their order
    return [(left, right) for _, _, left, right in found]

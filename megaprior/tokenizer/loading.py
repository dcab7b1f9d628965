"""Which format a file or folder holds, told by its content: a `tokenizer.model` may be SentencePiece or tiktoken."""

from __future__ import annotations

import re
from pathlib import Path

from megaprior.errors import DataError
from megaprior.tokenizer.base import Tokenizer, not_a_tokenizer
from megaprior.tokenizer.formats import HuggingFace, Llama3, SentencePiece

_GPT2_PAIRS = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Loads a tokenizer from a file, or from a folder that holds one.

    Known: SentencePiece models, Llama-3's tiktoken ranks, tokenizer.json (BOS and EOS from the tokenizer_config.json
    beside it, else by known names), and GPT-2's encoder.json + vocab.bpe or vocab.json + merges.txt.

    Raises:
        DataError: it is none of these; the message says what it looks like.
    """
    path = Path(path)
    if path.is_dir():
        path = _file_in(path)
    for pair in _GPT2_PAIRS:
        if path.name in pair:
            return HuggingFace.from_gpt2(*(path.with_name(name) for name in pair))
    try:
        with open(path, "rb") as file:
            head = file.read(256)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; give a tokenizer's file or the folder that holds it") from error
    if head.startswith(b"\n"):  # protobuf's mark of field 1: the first piece of a SentencePiece model
        return SentencePiece(path)
    if head.lstrip().startswith(b"{"):
        return HuggingFace.from_json(path)
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", head):
        return Llama3(path)
    raise not_a_tokenizer(path)


def load_model_tokenizer(folder: Path | str) -> Tokenizer:
    """The tokenizer that a model's folder carries: in `tokenizer/`, as we save it, or beside the weights.

    Raises:
        DataError: as `load_tokenizer`.
    """
    own = Path(folder) / "tokenizer"
    return load_tokenizer(own if own.is_dir() else folder)


def _file_in(folder: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer.model", "encoder.json", "vocab.json"):
        if (folder / name).exists():
            return folder / name
    models = sorted(file for file in folder.iterdir() if ".model" in file.name)
    if len(models) == 1:
        return models[0]
    if models:
        raise DataError(f"{folder}: holds {len(models)} tokenizers ({', '.join(m.name for m in models)}); name one")
    raise DataError(f"{folder}: no tokenizer here: no tokenizer.json, no *.model, no encoder.json with vocab.bpe")

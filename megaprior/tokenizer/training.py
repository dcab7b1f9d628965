"""Training a tokenizer of one's own, with ids reserved for the vision roles."""

from __future__ import annotations

import io
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

from megaprior.errors import DataError, UsageError
from megaprior.files import atomic_write
from megaprior.tokenizer.base import VISION_ROLES, Tokenizer
from megaprior.tokenizer.loading import load_tokenizer


def train_sentencepiece(
    texts: Iterable[str], output: Path | str, *, vocab_size: int, character_coverage: float = 0.9995
) -> Tokenizer:
    """Trains a BPE tokenizer and writes `output`/tokenizer.model; the same texts in the same order give the same bytes.

    Characters outside the `character_coverage` share are spelled in bytes, digits are single tokens, text is kept as it
    is (no normalization), and the vision roles are control tokens, which no caption can spell.

    Raises:
        DataError: there is no text.
        UsageError: the text cannot fill `vocab_size`, or `vocab_size` cannot hold its characters.
    """
    from sentencepiece import SentencePieceTrainer

    lines = (line for text in texts for line in text.splitlines() if line.strip())
    first = next(lines, None)
    if first is None:
        raise DataError(f"{output}: no text to train a tokenizer on")
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=chain([first], lines),
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
            max_sentence_length=1 << 16,  # bytes; longer lines are skipped
            num_threads=1,  # more would make merges of equal count depend on timing
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rsplit("] ", 1)[-1].strip() or str(error)
        raise UsageError(f"{output}: no tokenizer of {vocab_size} tokens from this text: {reason}") from error
    Path(output).mkdir(parents=True, exist_ok=True)
    atomic_write(Path(output) / "tokenizer.model", model.getvalue())
    return load_tokenizer(output)

"""The manifests of a shard folder: their formats, their names, and the digests that tie one to another.

DIR/build.json            megaprior.build    written last of all: no build.json, no complete build
DIR/tokenizer/            the tokenizer's own files
DIR/00000.json            megaprior.shard    written last of its shard: no manifest, no shard
DIR/00000.<name>.json     megaprior.scores   one per score stream
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megaprior.errors import DataError
from megaprior.files import appearance, digest_bytes, digest_json, read_manifest
from megaprior.tokenizer import Tokenizer, compare_fingerprints

BUILD, SHARD, SCORES = "megaprior.build", "megaprior.shard", "megaprior.scores"
BUILD_NAME = "build.json"
KINDS = ("pairs", "text")
SCORE_KINDS = ("logprob", "importance")
COUNTS = ("samples", "documents", "tokens", "loss_tokens", "images", "truncated")
REQUIRED_STREAMS = {"pairs": ("tokens", "keys", "images", "image_sizes"), "text": ("tokens", "keys")}
# dtype of each stream but `tokens`, which depends on the vocabulary, and scores, which are float32.
STREAM_DTYPES = {"keys": "u1", "images": "u1", "image_sizes": "i4", "loss_spans": "i4", "word_class": "u1"}


def read(path: Path, *, format: str) -> dict[str, Any]:
    """Read one manifest; a foreign file is refused with what it looks like.

    Raises:
        DataError: missing, foreign, changed, or of another format or version.
    """
    try:
        return read_manifest(path, format=format)
    except (ValueError, RecursionError) as error:  # beside DataError, what changed bytes can do to JSON
        words = appearance(path) if path.is_file() else ""
        if isinstance(error, DataError) and (not words or "JSON" in words):
            raise
        raise DataError(f"{path}: not a manifest{words}; copy it again or rebuild the shards") from error


def read_build(folder: Path | str) -> dict[str, Any]:
    """Read `folder/build.json`.

    Raises:
        DataError: the folder has none, so its build is not complete; or the file is not what was written.
    """
    path = Path(folder) / BUILD_NAME
    if not path.is_file():
        raise DataError(
            f"{folder}: no {BUILD_NAME}, so the build is not complete; repeat the `megaprior-data build` command"
        )
    return read(path, format=BUILD)


def tokenizer_entry(tokenizer: Tokenizer) -> dict[str, Any]:
    """What a manifest says of a tokenizer."""
    return {
        "fingerprint": tokenizer.fingerprint,
        "identity": tokenizer.identity(),
        "vocab_size": tokenizer.vocab_size,
    }


def refuse_other_tokenizer(where: str, found: dict[str, Any], expected: dict[str, Any], whose: str) -> None:
    """Compare two tokenizer entries of manifests.

    Raises:
        DataError: they differ; the message names the field that does.
    """
    if found["fingerprint"] != expected["fingerprint"]:
        field = compare_fingerprints(found["identity"], expected["identity"]) or "fingerprint"
        raise DataError(
            f"{where}: another tokenizer than that of {whose}: the {field} differs; use one tokenizer for all"
        )


def refuse_stranger(where: str, manifest: dict[str, Any], build: dict[str, Any]) -> None:
    """Check that a shard belongs to a build.

    Raises:
        DataError: the shard is of another build, kind or tokenizer.
    """
    for field in ("build_id", "kind"):
        if manifest[field] != build[field]:
            raise DataError(
                f"{where}: {field} is {manifest[field]}, the folder's is {build[field]}; "
                "files of different builds were mixed, build again into an empty folder"
            )
    refuse_other_tokenizer(where, manifest["tokenizer"], build["tokenizer"], "the other shards")


def stream_digest(entry: dict[str, Any]) -> str:
    """One digest for a stream: of its manifest entry, which holds the digests of all its blocks."""
    return digest_json(entry)


def lengths_digest(lengths: np.ndarray) -> str:
    """Digest of the lengths of a stream's sequences, as int32 little-endian."""
    return digest_bytes(np.ascontiguousarray(lengths, "<i4").tobytes())

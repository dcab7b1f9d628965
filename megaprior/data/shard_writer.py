"""Write shards: samples in, aligned streams and manifests out.

A shard's manifest is written after its streams and build.json after every shard, so that nothing half-written is ever read.
Letters: k tokens of a caption.
"""

from __future__ import annotations

import sys
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from megaprior.data import manifest as mf
from megaprior.data.alignment import span_problem
from megaprior.data.indexed import token_dtype
from megaprior.data.indexed_writer import IndexedWriter
from megaprior.errors import DataError
from megaprior.files import atomic_folder, block_digests, write_manifest
from megaprior.tokenizer import Tokenizer, load_tokenizer

MAX_SIDE = 2**31 - 1


class ShardWriter:
    """Write one shard; used as a context manager it leaves nothing behind unless `finish` was called.

    Args:
        kind: "pairs" (every sample has an image) or "text" (none has).
        source, options: what the samples came from and how they were made, for the manifest: relative names, no times.

    Raises:
        DataError: the shard exists already.
    """

    def __init__(
        self,
        folder: Path | str,
        prefix: str,
        *,
        tokenizer: Tokenizer,
        build_id: str,
        kind: str,
        source: dict[str, Any],
        options: dict[str, Any],
    ) -> None:
        assert kind in mf.KINDS, kind
        self.folder, self.prefix, self.kind = Path(folder), prefix, kind
        self.path = self.folder / f"{prefix}.json"
        if self.path.exists():
            raise DataError(f"{self.path}: this shard is complete already; build into an empty folder")
        self._head = {"build_id": build_id, "source": source, "options": options}
        self._tokenizer = mf.tokenizer_entry(tokenizer)
        self._dtype, self._vocabulary = token_dtype(tokenizer.vocab_size), tokenizer.vocab_size
        self._counts: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self._images: dict[str, int] = {}
        self._stack = ExitStack()
        self._streams: dict[str, IndexedWriter] = {}

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __len__(self) -> int:
        return self._counts["samples"]

    def add(
        self,
        key: str,
        tokens: Any,
        *,
        image: bytes | None = None,
        image_size: tuple[int, int] | None = None,
        image_key: str | None = None,
        loss_spans: Any = None,
        word_class: Any = None,
        truncated: bool = False,
        end_document: bool = True,
    ) -> int:
        """Append a sample and return its index in the shard.

        Args:
            key: the sample's name in its source, for messages.
            tokens: [k] ids, closing EOS included, no BOS.
            image, image_size: the encoded file as it came; (width, height) after EXIF rotation.
            image_key: samples that give the same key share one stored image (the bytes of the first).
            loss_spans: [[start, end), ...] of tokens in the loss; given for all samples or for none.
            word_class: [k] of 0 boilerplate, 1 image-related, 2 noise; given for all samples or for none.
            truncated: the caption was cut (counted).

        Raises:
            DataError: no token, an id outside the vocabulary, a class or span that does not fit, a missing image.
        """
        tokens = self._packed(key, tokens)
        k, alias = len(tokens), None if image_key is None else self._images.get(image_key)
        self._check_truths(key, k, loss_spans, word_class)
        size = self._checked_size(key, image, image_size, alias)
        spans = None if loss_spans is None else np.asarray(loss_spans, np.int64).reshape(-1)
        name = key.encode("utf-8", "backslashreplace")
        # From here on nothing can be refused: a sample is in every stream or in none.
        self._stream("tokens").append(tokens, k)
        self._stream("keys").append(name, len(name))
        if size is not None:
            self._stream("image_sizes").add(size)
        if spans is not None:
            self._stream("loss_spans").add(spans)
        if word_class is not None:
            self._stream("word_class").add(word_class)
        counts = self._counts
        if self.kind == "pairs":
            index = self._stream("images").add(image or b"", alias=alias)
            counts["images"] += alias is None
            if image_key is not None:
                self._images.setdefault(image_key, index)
        counts["samples"] += 1
        counts["tokens"] += k
        counts["loss_tokens"] += k if spans is None else int((spans[1::2] - spans[::2]).sum())
        counts["truncated"] += truncated
        if end_document:
            for stream in self._streams.values():
                stream.end_document()
        return counts["samples"] - 1

    def add_texts(self, keys: Sequence[str], tokens: Sequence[list[int]], *, truncated: int = 0) -> None:
        """`add` of many captions without images, each a document of its own; several times as fast.

        Raises:
            DataError: as `add`.
        """
        assert self.kind == "text", self.kind
        lengths = [len(ids) for ids in tokens]
        flat = self._array(chain.from_iterable(tokens))
        if flat is None or not all(lengths) or self._streams.keys() - {"tokens", "keys"}:
            for key, ids in zip(keys, tokens, strict=True):  # tells which one does not fit, and why
                self.add(key, ids)
            self._counts["truncated"] += truncated
            return
        names = [key.encode("utf-8", "backslashreplace") for key in keys]
        self._stream("tokens").append_documents(flat, lengths)
        self._stream("keys").append_documents(b"".join(names), [len(name) for name in names])
        self._counts["samples"] += len(keys)
        self._counts["tokens"] += len(flat)
        self._counts["loss_tokens"] += len(flat)
        self._counts["truncated"] += truncated

    def _where(self, key: str) -> str:
        return f"{self.folder.name}/{self.prefix} sample {len(self)} (key {key})"

    def _packed(self, key: str, tokens: Any) -> array[int] | np.ndarray:
        """[k] ids as they go to disk, checked."""
        if type(tokens) is list and tokens and type(tokens[0]) is int:
            packed = self._array(tokens)  # for a caption's few ids numpy takes 5 times as long
            if packed is not None:
                return packed
        tokens = np.asarray(tokens)
        if tokens.size == 0 or tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise DataError(
                f"{self._where(key)}: {tokens.size} tokens of {tokens.dtype}; a caption is a list of ids, at least its EOS"
            )
        low, high = tokens.min(), tokens.max()
        if low < 0 or high >= self._vocabulary:
            raise DataError(f"{self._where(key)}: token ids {low} to {high} in a vocabulary of {self._vocabulary:,}")
        return np.ascontiguousarray(tokens, self._dtype.newbyteorder("<"))

    def _array(self, ids: Iterable[int]) -> array[int] | None:
        """`ids` as they go to disk; None where there are none, or one does not fit."""
        with suppress(TypeError, OverflowError):
            packed = array(self._dtype.char, ids)
            if sys.byteorder == "little" and packed and min(packed) >= 0 and max(packed) < self._vocabulary:
                return packed
        return None

    def _check_truths(self, key: str, k: int, loss_spans: Any, word_class: Any) -> None:
        if word_class is not None and (np.shape(word_class) != (k,) or not np.isin(word_class, (0, 1, 2)).all()):
            raise DataError(
                f"{self._where(key)}: {np.size(word_class)} word classes for {k} tokens, each must be 0, 1 or 2"
            )
        if loss_spans is not None and (problem := span_problem(np.asarray(loss_spans, np.int64).reshape(-1), k)):
            raise DataError(f"{self._where(key)}: {problem}")
        spans_fit = (loss_spans is not None) == ("loss_spans" in self._streams)
        if len(self) and not (spans_fit and (word_class is not None) == ("word_class" in self._streams)):
            name = "word_class" if spans_fit else "loss_spans"
            raise DataError(f"{self._where(key)}: {name} must be given for every sample of a shard or for none")

    def _checked_size(
        self, key: str, image: bytes | None, size: tuple[int, int] | None, alias: int | None
    ) -> np.ndarray | None:
        if self.kind == "text":
            if image is not None or size is not None:
                raise DataError(f"{self._where(key)}: an image in a shard of kind 'text'; build it as 'pairs'")
            return None
        whole = size is not None and all(isinstance(side, int | np.integer) for side in size)
        if size is None or not whole or len(size) != 2 or min(size) < 1 or max(size) > MAX_SIDE:
            raise DataError(f"{self._where(key)}: image size {size}, expected (width, height), each 1 to {MAX_SIDE:,}")
        if not image and alias is None:
            raise DataError(f"{self._where(key)}: no image; quarantine the sample or give its bytes")
        return np.array(size, np.int32)

    def _stream(self, name: str) -> IndexedWriter:
        writer = self._streams.get(name)
        if writer is None:
            dtype = self._dtype if name == "tokens" else mf.STREAM_DTYPES[name]
            self.folder.mkdir(parents=True, exist_ok=True)
            writer = IndexedWriter(self.folder / f"{self.prefix}.{name}", dtype)
            self._streams[name] = self._stack.enter_context(writer)
        return writer

    def quarantined(self, count: int = 1, *, reason: str = "unspecified") -> None:
        """Count samples of the source that were left out, by reason."""
        self._reasons[reason] += count

    def finish(self) -> dict[str, Any]:
        """Commit the streams, then the manifest; returns the manifest."""
        names = mf.REQUIRED_STREAMS[self.kind]
        for name in names:  # a shard whose source gave no usable sample has its streams, with no sequence
            self._stream(name)
        lengths = self._streams["tokens"].lengths
        assert all(len(writer) == len(lengths) for writer in self._streams.values()), "a failed add was ignored"
        streams = {name: writer.finish() for name, writer in self._streams.items()}
        if "images" in streams:
            streams["images"]["aliased"] = True
        self._counts["documents"] = self._streams["tokens"].document_count
        counts = {name: self._counts[name] for name in mf.COUNTS} | {"quarantined": sum(self._reasons.values())}
        body = {
            "format": mf.SHARD,
            "version": 1,
            "prefix": self.prefix,
            "kind": self.kind,
            "tokenizer": self._tokenizer,
            "counts": counts,
            "quarantine": dict(self._reasons),
            "streams": streams,
            "lengths_digest": mf.lengths_digest(lengths),
            **self._head,
        }
        return write_manifest(self.path, body)


def write_build(
    folder: Path | str,
    *,
    build_id: str,
    shard_manifests: Sequence[dict[str, Any]],
    tokenizer: Tokenizer,
    options: dict[str, Any],
    counts: dict[str, Any],
    files: Sequence[str] = (),
) -> dict[str, Any]:
    """Copy the tokenizer into `folder/tokenizer` and write build.json, which makes the folder readable.

    Args:
        files: further files of the folder that belong to the build, relative to it; `verify` then checks their digests.

    Raises:
        DataError: no shard, or shards of different kinds, builds or tokenizers.
    """
    folder = Path(folder)
    if not shard_manifests:
        raise DataError(f"{folder}: a build needs at least one shard; the input held no sample")
    head = {"build_id": build_id, "kind": shard_manifests[0]["kind"], "tokenizer": mf.tokenizer_entry(tokenizer)}
    for manifest in shard_manifests:
        mf.refuse_stranger(f"{folder.name}/{manifest['prefix']}", manifest, head)
    if not (folder / "tokenizer").exists():
        with atomic_folder(folder / "tokenizer") as temporary:
            tokenizer.save(temporary)
    mine, carried = mf.tokenizer_entry(tokenizer), mf.tokenizer_entry(load_tokenizer(folder / "tokenizer"))
    mf.refuse_other_tokenizer(f"{folder}/tokenizer", carried, mine, "the build")
    paths = [path for path in (folder / "tokenizer").rglob("*") if path.is_file()] + [folder / name for name in files]
    recorded = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "blocks": block_digests(path)}
        for path in paths
    }
    shards = [
        {"prefix": m["prefix"], "digest": m["digest"], "samples": m["counts"]["samples"]} for m in shard_manifests
    ]
    body = {
        "format": mf.BUILD,
        "version": 1,
        **head,
        "files": recorded,
        "shards": shards,
        "options": options,
        "counts": counts,
    }
    return write_manifest(folder / mf.BUILD_NAME, body)

"""Write shards: samples in, aligned streams and manifests out.

A shard's manifest is written after its streams and build.json after every shard, so that nothing half-written is ever read.
Letters: k tokens of a caption.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from megaprior.data import manifest as mf
from megaprior.data.alignment import span_problem
from megaprior.data.indexed import IndexedWriter, token_dtype
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
        self._dtype = token_dtype(tokenizer.vocab_size)
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
        where = f"{self.folder.name}/{self.prefix} sample {len(self)} (key {key})"
        tokens, alias = np.asarray(tokens), None if image_key is None else self._images.get(image_key)
        self._check_tokens(where, tokens, loss_spans, word_class)
        self._check_image(where, image, image_size, alias)
        spans = None if loss_spans is None else np.asarray(loss_spans, np.int64).reshape(-1)
        # From here on nothing can be refused: a sample is in every stream or in none.
        row = {
            "tokens": tokens,
            "keys": key.encode("utf-8", "backslashreplace"),
            "image_sizes": image_size,
            "loss_spans": spans,
            "word_class": word_class,
        }
        for name, sequence in row.items():
            if sequence is not None:
                self._stream(name).add(sequence)
        if self.kind == "pairs":
            index = self._stream("images").add(image or b"", alias=alias)
            self._counts["images"] += alias is None
            if image_key is not None:
                self._images.setdefault(image_key, index)
        self._counts["samples"] += 1
        self._counts["tokens"] += len(tokens)
        self._counts["loss_tokens"] += len(tokens) if spans is None else int((spans[1::2] - spans[::2]).sum())
        self._counts["truncated"] += truncated
        if end_document:
            for stream in self._streams.values():
                stream.end_document()
        return len(self) - 1

    def _check_tokens(self, where: str, tokens: np.ndarray, loss_spans: Any, word_class: Any) -> None:
        k, vocabulary = tokens.size, self._tokenizer["vocab_size"]
        if k == 0 or tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise DataError(f"{where}: {k} tokens of {tokens.dtype}; a caption is a list of ids, at least its EOS")
        if tokens.min() < 0 or tokens.max() >= vocabulary:
            raise DataError(f"{where}: token ids {tokens.min()} to {tokens.max()} in a vocabulary of {vocabulary:,}")
        if word_class is not None and (np.shape(word_class) != (k,) or not np.isin(word_class, (0, 1, 2)).all()):
            raise DataError(f"{where}: {np.size(word_class)} word classes for {k} tokens, each must be 0, 1 or 2")
        if loss_spans is not None and (problem := span_problem(np.asarray(loss_spans, np.int64).reshape(-1), k)):
            raise DataError(f"{where}: {problem}")
        for name, value in (("loss_spans", loss_spans), ("word_class", word_class)):
            if len(self) and (value is not None) != (name in self._streams):
                raise DataError(f"{where}: {name} must be given for every sample of a shard or for none")

    def _check_image(self, where: str, image: bytes | None, size: tuple[int, int] | None, alias: int | None) -> None:
        if self.kind == "text":
            if image is not None or size is not None:
                raise DataError(f"{where}: an image in a shard of kind 'text'; build it as 'pairs'")
        elif size is None or len(size) != 2 or min(size) < 1 or max(size) > MAX_SIDE:
            raise DataError(f"{where}: image size {size}, expected (width, height), each 1 to {MAX_SIDE:,}")
        elif not image and alias is None:
            raise DataError(f"{where}: no image; quarantine the sample or give its bytes")

    def _stream(self, name: str) -> IndexedWriter:
        if name not in self._streams:
            dtype = self._dtype if name == "tokens" else mf.STREAM_DTYPES[name]
            self.folder.mkdir(parents=True, exist_ok=True)
            writer = IndexedWriter(self.folder / f"{self.prefix}.{name}", dtype)
            self._streams[name] = self._stack.enter_context(writer)
        return self._streams[name]

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

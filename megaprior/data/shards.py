"""Shards: aligned streams under one manifest, written once, read by index.

    1. ShardWriter   samples -> DIR/00000.<stream>.bin/.idx, then DIR/00000.json         (shard_writer.py)
    2. write_build   DIR/tokenizer/, then DIR/build.json: only now may anybody read      (shard_writer.py)
    3. ScoreWriter   one float per token -> DIR/00000.<name>.bin/.idx, then .json        (scores.py)
    4. ShardSet      the folder as one indexed set of samples, refused as a whole if anything does not belong together
    5. verify        every byte against its digest, every count against the others       (verify.py)

Letters: N samples, k tokens of a caption.
"""

from __future__ import annotations

import resource
import threading
from bisect import bisect_right
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from megaprior.data import manifest as mf
from megaprior.data.indexed import IndexedStream
from megaprior.data.scores import ScoreWriter, check_first_tokens, open_scores, refuse_changed_scores
from megaprior.data.shard_writer import ShardWriter, write_build
from megaprior.data.verify import verify
from megaprior.errors import DataError
from megaprior.tokenizer import Tokenizer, load_tokenizer

__all__ = ["ScoreWriter", "Shard", "ShardSet", "ShardWriter", "verify", "write_build"]

# A mapped file holds a descriptor and a mapping (Linux: 65,530 a process); a shard in use maps up to eight files.
_MAPPED_SHARDS = 4096
_DESCRIPTORS_PER_SHARD = 16


@dataclass(frozen=True, kw_only=True, eq=False)
class Shard:
    """One shard, open: its manifest and its streams by name."""

    folder: Path
    prefix: str
    manifest: dict[str, Any]
    streams: dict[str, IndexedStream]

    @classmethod
    def open(cls, folder: Path | str, prefix: str) -> Shard:
        """Read the manifest and check the sizes of every stream.

        Raises:
            DataError: a manifest or a stream is not what was written.
        """
        folder = Path(folder)
        manifest = mf.read(folder / f"{prefix}.json", format=mf.SHARD)
        streams = {
            name: IndexedStream(folder / f"{prefix}.{name}", expect=entry)
            for name, entry in manifest["streams"].items()
        }
        return cls(folder=folder, prefix=prefix, manifest=manifest, streams=streams)

    def __len__(self) -> int:
        return self.manifest["counts"]["samples"]

    @property
    def name(self) -> str:
        """For messages: pairs/00000."""
        return f"{self.folder.name}/{self.prefix}"

    @cached_property
    def tokens_digest(self) -> str:
        """What a score stream names to say which tokens it belongs to."""
        return mf.stream_digest(self.manifest["streams"]["tokens"])

    def key(self, index: int) -> str:
        """The sample's key in its source."""
        return self.streams["keys"][index].tobytes().decode("utf-8", "replace")

    def describe(self, index: int) -> str:
        """For messages: pairs/00000 sample 17 (key 000000017)."""
        return f"{self.name} sample {index} (key {self.key(index)})"

    def close(self) -> None:
        """Drop the mappings of every stream."""
        for stream in self.streams.values():
            stream.close()


class ShardSet:
    """The samples of a shard folder, indexed 0 .. N-1 in the order of build.json.

    Opening reads the manifests, the lengths and, where they are asked for, the scores; other sequences are mapped on demand.

    Attributes:
        folder, build (build.json), kind ("pairs" or "text"), build_id, fingerprint (of the tokenizer), shards.
        score_kind: "logprob", "importance", or None when opened without scores; scorer: its record, or None.
        token_counts: int32 [N], the length of each sample in `tokens`.
    """

    def __init__(self, folder: Path, build: dict[str, Any], shards: list[Shard], score_name: str | None) -> None:
        self.folder, self.build, self.shards = folder, build, shards
        self.kind: str = build["kind"]
        self.build_id: str = build["build_id"]
        self.fingerprint: str = build["tokenizer"]["fingerprint"]
        self.token_counts = np.concatenate([_token_counts(shard) for shard in shards])
        self.score_kind: str | None = None
        self.scorer: dict[str, Any] | None = None
        self._starts = [0, *accumulate(len(shard) for shard in shards)]  # bisect is quicker on ints than numpy
        self._score_name = score_name
        self._lock = threading.Lock()
        self._recent: OrderedDict[int, None] = OrderedDict()
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._mapped_shards = max(1, min(_MAPPED_SHARDS, descriptors // _DESCRIPTORS_PER_SHARD))

    @classmethod
    def open(cls, folder: Path | str, *, scores: str | None = None, tokenizer: Tokenizer | None = None) -> ShardSet:
        """Open a complete build, with its score stream `scores` where given, for use with `tokenizer` where given.

        Raises:
            DataError: the build is not complete; a file is missing, foreign, or of another size than its manifest says;
                shards or scores of another build or tokenizer; scores that do not fit the tokens, by shard and sample.
        """
        folder = Path(folder)
        build = mf.read_build(folder)
        if tokenizer is not None:
            mf.refuse_other_tokenizer(
                str(folder), build["tokenizer"], mf.tokenizer_entry(tokenizer), "the model in use"
            )
        shards = []
        for entry in build["shards"]:
            shard = Shard.open(folder, entry["prefix"])
            mf.refuse_stranger(shard.name, shard.manifest, build)
            if shard.manifest["digest"] != entry["digest"]:
                raise DataError(
                    f"{folder / shard.prefix}.json: not the manifest that {mf.BUILD_NAME} names; rebuild the shards"
                )
            shards.append(shard)
        opened = cls(folder, build, shards, scores)
        if scores is not None:
            opened._open_scores(scores)
        return opened

    def _open_scores(self, name: str) -> None:
        first: dict[str, Any] | None = None
        for shard in self.shards:
            stream, record = open_scores(shard, name)
            first = first or record
            for what, now, then in (
                ("kind", record["kind"], first["kind"]),
                ("scorer", record["scorer"]["fingerprint"], first["scorer"]["fingerprint"]),
            ):
                if now != then:
                    raise DataError(
                        f"{shard.name}: the {what} of {name!r} is {now}, that of {self.shards[0].name} is {then}; "
                        "score the whole folder with one scorer"
                    )
            shard.streams[name] = stream
            shard.close()
        assert first is not None  # a build has at least one shard
        self.score_kind, self.scorer = first["kind"], first["scorer"]
        if first["kind"] == "logprob" and first["first_token"] == "bos":
            check_first_tokens(self, name)
        for shard in self.shards:
            refuse_changed_scores(shard, name)
            shard.close()

    def __len__(self) -> int:
        return self._starts[-1]

    @cached_property
    def image_sizes(self) -> np.ndarray | None:
        """int32 [N, 2], width and height after EXIF rotation; None for text."""
        if self.kind == "text":
            return None
        return np.concatenate([_image_sizes(shard) for shard in self.shards])

    @property
    def has_word_class(self) -> bool:
        """Whether every shard records the class of each token (generated scenes do)."""
        return all("word_class" in shard.streams for shard in self.shards)

    def locate(self, index: int) -> tuple[Shard, int]:
        """The shard that holds sample `index`, and its place there.

        Raises:
            IndexError: index is outside [0, N).
        """
        if not 0 <= index < self._starts[-1]:
            raise IndexError(f"{self.folder}: sample {index} of {len(self)}")
        at = bisect_right(self._starts, index) - 1
        if len(self.shards) > self._mapped_shards:
            self._touch(at)
        return self.shards[at], index - self._starts[at]

    def _touch(self, at: int) -> None:
        """Unmap the shards that were not asked for lately; loaders call this from several threads."""
        with self._lock:
            self._recent[at] = None
            self._recent.move_to_end(at)
            if len(self._recent) > self._mapped_shards:
                self.shards[self._recent.popitem(last=False)[0]].close()

    def _sequence(self, name: str, index: int) -> np.ndarray:
        shard, local = self.locate(index)
        return shard.streams[name][local]

    def tokens(self, index: int) -> np.ndarray:
        """uint16 or int32 [k], a read-only view: ids of the caption, closing EOS included, no BOS."""
        return self._sequence("tokens", index)

    def image(self, index: int) -> bytes:
        """The encoded image file as it came."""
        return self._sequence("images", index).tobytes()

    def scores(self, index: int) -> np.ndarray:
        """float32 [k], a read-only view: one score per token, of `score_kind`."""
        assert self._score_name is not None, "opened without scores"
        return self._sequence(self._score_name, index)

    def word_class(self, index: int) -> np.ndarray:
        """uint8 [k]: 0 boilerplate, 1 image-related, 2 noise."""
        return self._sequence("word_class", index)

    def loss_spans(self, index: int) -> np.ndarray | None:
        """int32 [s, 2] of [start, end) tokens in the loss; None means all of them."""
        shard, local = self.locate(index)
        return shard.streams["loss_spans"][local].reshape(-1, 2) if "loss_spans" in shard.streams else None

    def key(self, index: int) -> str:
        """The sample's key in its source."""
        shard, local = self.locate(index)
        return shard.key(local)

    def describe(self, index: int) -> str:
        """For messages: pairs/00000 sample 17 (key 000000017)."""
        shard, local = self.locate(index)
        return shard.describe(local)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the shards carry."""
        return load_tokenizer(self.folder / "tokenizer")


def _token_counts(shard: Shard) -> np.ndarray:
    """int32 [samples of the shard], copied.

    Raises:
        DataError: a stream of the same size but with other lengths stands in for the shard's own.
    """
    lengths = shard.streams["tokens"].lengths.astype(np.int32)
    if shard.manifest["lengths_digest"] != mf.lengths_digest(lengths):
        raise DataError(
            f"{shard.streams['tokens'].idx}: lengths are not those of the manifest; it is of another build or was changed, "
            "copy it again or rebuild the shard"
        )
    shard.close()
    return lengths


def _image_sizes(shard: Shard) -> np.ndarray:
    """int32 [samples of the shard, 2], copied."""
    sizes = shard.streams["image_sizes"].flat().reshape(-1, 2).astype(np.int32)
    shard.close()
    return sizes

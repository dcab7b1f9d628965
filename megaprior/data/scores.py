"""Score streams: one float32 per token of `tokens`, bound to those very tokens by digest.

For a reference LM the score is r = log p_r(t_i | BOS, t_1..t_{i-1}), kind "logprob" (r <= 0, -inf allowed); other scorers write
kind "importance" (w >= 0 and finite, used as it is). Letters: k tokens of a caption.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megaprior.data import manifest as mf
from megaprior.data.alignment import score_problems
from megaprior.data.indexed import IndexedStream
from megaprior.data.indexed_writer import IndexedWriter
from megaprior.errors import DataError
from megaprior.files import BLOCK_BYTES, block_digests, fsync_folder, write_manifest

if TYPE_CHECKING:
    from megaprior.data.shards import Shard, ShardSet

_ROUNDING = 1e-6  # a log-probability may exceed 0 by this much, and is then written as 0
_FIRST_TOKEN_SLACK = 0.25  # nats: equal contexts score equally but for the rounding of bf16 kernels
_FIRST_TOKEN_SLACK_FP32 = 0.01  # of a scorer that computed in float32 (TF32 on some devices)
_FIRST_TOKENS_CHECKED = 4096
_NAME = re.compile(r"[a-z][a-z0-9_]*")


class ScoreWriter:
    """Write one shard's score stream, caption by caption in order; nothing appears before `finish`.

    Args:
        name: of the stream, such as "ref_logprob".
        kind: "logprob" or "importance".
        scorer: who scored: at least {"fingerprint": ...}; goes into the manifest as it is.
        first_token: what the first token of a caption is conditioned on; "bos" lets readers detect shifted streams.
        replace: give up a complete stream of that name, at the moment that the new one is whole.

    Raises:
        DataError: the stream exists already and `replace` is false.
    """

    def __init__(
        self,
        shard: Shard,
        name: str,
        *,
        kind: str,
        scorer: dict[str, Any],
        first_token: str | None = "bos",
        replace: bool = False,
    ) -> None:
        assert kind in mf.SCORE_KINDS, kind
        assert _NAME.fullmatch(name), name
        if name in shard.manifest["streams"]:
            raise DataError(
                f"{shard.name}: {name!r} is a stream of the shard itself; choose another name for the scores"
            )
        self.shard, self.name, self.kind = shard, name, kind
        self.path = shard.folder / f"{shard.prefix}.{name}.json"
        if self.path.exists() and not replace:
            raise DataError(
                f"{self.path}: these scores are complete already; choose another name or ask to replace them"
            )
        self._scorer, self._first_token = scorer, first_token
        self._low, self._high, self._infinite, self._count = np.inf, -np.inf, 0, 0
        self._lengths = shard.streams["tokens"].lengths
        self._stream = IndexedWriter(shard.folder / f"{shard.prefix}.{name}", np.float32)

    def __enter__(self) -> ScoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.abort()

    def add(self, scores: Any) -> None:
        """Scores of the next caption, float [k]; log-probabilities in (0, 1e-6] are written as 0.

        Raises:
            DataError: wrong length, NaN, positive (or, as importance, negative or infinite), naming the sample.
        """
        scores = np.asarray(scores, np.float32)
        at = len(self._stream)
        if at >= len(self._lengths):
            raise DataError(
                f"{self.shard.name}: scores for sample {at}, but it has {len(self._lengths)} samples; score again"
            )
        if scores.shape != (self._lengths[at],):
            raise DataError(
                f"{self.shard.describe(at)}: {scores.size} scores for {self._lengths[at]} tokens; score this shard again"
            )
        refuse_bad_scores(self.shard.describe(at), scores, self.kind)
        if self.kind == "logprob":
            scores = np.where(scores > 0, np.float32(0), scores)  # np.minimum leaves the sign of zero to the machine
        finite = scores[np.isfinite(scores)]
        self._low = min(self._low, float(finite.min(initial=np.inf)))
        self._high = max(self._high, float(finite.max(initial=-np.inf)))
        self._infinite += scores.size - finite.size
        self._count += scores.size
        self._stream.add(scores)
        self._stream.end_document()

    def finish(self) -> dict[str, Any]:
        """Commit the stream, then its manifest; returns the manifest.

        Raises:
            DataError: fewer captions than samples.
        """
        if len(self._stream) != len(self._lengths):
            raise DataError(
                f"{self.shard.name}: scores for {len(self._stream)} of {len(self._lengths)} samples; score the rest first"
            )
        if self.path.exists():  # a replaced stream must never be read under the old manifest
            self.path.unlink()
            fsync_folder(self.path.parent)
        finite = self._low <= self._high
        body = {
            "format": mf.SCORES,
            "version": 1,
            "prefix": self.shard.prefix,
            "name": self.name,
            "kind": self.kind,
            "first_token": self._first_token,
            "tokens_digest": self.shard.tokens_digest,
            "lengths_digest": mf.lengths_digest(self._lengths),
            "tokenizer": self.shard.manifest["tokenizer"],
            "scorer": self._scorer,
            "count": self._count,
            "nan_count": 0,
            "infinite_count": self._infinite,
            "min": self._low if finite else None,
            "max": self._high if finite else None,
            "stream": self._stream.finish(),
        }
        return write_manifest(self.path, body)


def refuse_bad_scores(where: str, scores: np.ndarray, kind: str) -> None:
    """Check values, float32 [k]; `where` names their sample in messages.

    Raises:
        DataError: NaN; a log-probability above 1e-6; an importance below 0 or infinite.
    """
    allowed = scores <= _ROUNDING if kind == "logprob" else (scores >= 0) & np.isfinite(scores)
    if not allowed.all():  # NaN compares false
        at = int(np.argmin(allowed))
        law = "log-probabilities are at most 0" if kind == "logprob" else "importances are finite and at least 0"
        raise DataError(f"{where}: score {scores[at]:.6g} at token {at}, but {law}; score again")


def open_scores(shard: Shard, name: str) -> tuple[IndexedStream, dict[str, Any]]:
    """Open a shard's score stream; returns it with its manifest.

    Raises:
        DataError: missing, of other tokens, of another tokenizer, of other lengths (naming the first sample that differs),
            or with a minimum, maximum or NaN count that its kind does not allow.
    """
    path = shard.folder / f"{shard.prefix}.{name}.json"
    if not path.exists():
        raise DataError(
            f"{shard.name}: no scores {name!r}; run `megaprior score --shards {shard.folder} --name {name}`"
        )
    record = mf.read(path, format=mf.SCORES)
    mf.refuse_other_tokenizer(f"{shard.name} {name!r}", record["tokenizer"], shard.manifest["tokenizer"], "the shards")
    if record["tokens_digest"] != shard.tokens_digest:
        raise DataError(
            f"{path}: scores of tokens {record['tokens_digest'][:12]}, the shard's tokens are {shard.tokens_digest[:12]}: "
            "they belong to another or an earlier shard set; score these shards"
        )
    stream = IndexedStream(shard.folder / f"{shard.prefix}.{name}", expect=record["stream"])
    refuse_misaligned(shard, stream, name)
    if record["lengths_digest"] != mf.lengths_digest(stream.lengths):
        raise DataError(
            f"{path}: lengths digest {record['lengths_digest'][:12]} is not that of the stream; score again"
        )
    refuse_bad_summary(path, record)
    return stream, record


def refuse_misaligned(shard: Shard, stream: IndexedStream, name: str) -> None:
    """Compare the lengths of a score stream with those of the tokens.

    Raises:
        DataError: they differ, naming the first sample where they do.
    """
    tokens, scores = shard.streams["tokens"].lengths, stream.lengths
    if stream.dtype != np.float32:
        raise DataError(f"{stream.idx}: {stream.dtype} scores, expected float32; score again")
    if len(scores) != len(tokens):
        raise DataError(
            f"{shard.name}: {name!r} has {len(scores):,} samples, the shard has {len(tokens):,}; score again"
        )
    differs = tokens != scores
    if differs.any():
        at = int(np.argmax(differs))
        raise DataError(
            f"{shard.describe(at)}: {scores[at]} scores {name!r} for {tokens[at]} tokens; score this shard again"
        )


def refuse_bad_summary(path: Path, record: dict[str, Any]) -> None:
    """Hold the manifest's own minimum, maximum and NaN count against the law of its kind.

    Raises:
        DataError: the scores cannot be of that kind.
    """
    kind, low, high = record["kind"], record["min"], record["max"]
    if kind not in mf.SCORE_KINDS:
        raise DataError(f"{path}: kind {kind!r}, expected one of {', '.join(mf.SCORE_KINDS)}; upgrade megaprior")
    infinite = record["infinite_count"] if kind == "importance" else 0
    if record["nan_count"] or infinite:
        raise DataError(f"{path}: {record['nan_count']} NaN and {infinite} infinite scores of kind {kind}; score again")
    extremes = [value for value in (low, high) if value is not None]
    refuse_bad_scores(f"{path} (minimum, maximum)", np.array(extremes, np.float32), kind)


def refuse_changed_scores(shard: Shard, name: str) -> None:
    """Read an open score stream once: its bytes against the digests of its manifest, its values against the summary there.

    A stream that was shifted or edited in place has the right size and lengths, so nothing but its content can tell.

    Raises:
        DataError: names the file, the block and the samples in it; or the number of the summary that differs.
    """
    record, stream = mf.read(shard.folder / f"{shard.prefix}.{name}.json", format=mf.SCORES), shard.streams[name]
    digests = zip(block_digests(stream.bin), record["stream"]["bin"]["blocks"], strict=True)
    for block, (now, then) in enumerate(digests):
        if now != then:
            edges = np.array([block * BLOCK_BYTES, min((block + 1) * BLOCK_BYTES, stream.flat().nbytes) - 1])
            first, last = (np.searchsorted(stream.pointers, edges, side="right") - 1).tolist()
            raise DataError(
                f"{stream.bin}: block {block}, with the scores of samples {first:,} (key {shard.key(first)}) to {last:,}, is "
                f"not what was written: digest {now[:12]}, its manifest says {then[:12]}; score these shards again"
            )
    if block_digests(stream.idx) != record["stream"]["idx"]["blocks"]:
        raise DataError(f"{stream.idx}: is not what was written, though of the same size; score these shards again")
    for problem in score_problems(record, shard.manifest, stream, shard.streams["tokens"]):
        raise DataError(f"{shard.name} {name!r}: {problem}; score these shards again")


def check_first_tokens(shards: ShardSet, name: str) -> None:
    """First tokens share one context, BOS, so equal ids must have equal scores: streams shifted by one token do not.

    Looks at up to 4,096 evenly spaced captions.

    Raises:
        DataError: two equal first tokens differ by more than 0.25 nat (0.01 of a float32 scorer), or a score is none, naming
            shard and sample.
    """
    exact = shards.scorer is not None and shards.scorer.get("dtype") == "float32"
    slack = _FIRST_TOKEN_SLACK_FP32 if exact else _FIRST_TOKEN_SLACK
    seen: dict[int, tuple[float, float, int]] = {}
    for index in np.unique(np.linspace(0, len(shards) - 1, min(len(shards), _FIRST_TOKENS_CHECKED)).astype(np.int64)):
        scores, token = shards.scores(int(index)), int(shards.tokens(int(index))[0])
        refuse_bad_scores(shards.describe(int(index)), scores, "logprob")
        score = float(scores[0])
        low, high, where = seen.get(token, (score, score, int(index)))
        low, high = min(low, score), max(high, score)
        if low != high and not high - low <= slack:
            raise DataError(
                f"{shards.describe(int(index))}: first token {token} scores {score:.4f} in {name!r}, but others of that id "
                f"score from {low:.4f} to {high:.4f}, as in {shards.describe(where)}; after BOS they must agree: "
                "the stream is shifted, score again"
            )
        seen[token] = (low, high, where)

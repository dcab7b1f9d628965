"""What one process of a transfer does with a shard: find each caption in the source, carry its scores over, write the stream.

Letters: k tokens of a caption.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash

from megaprior.data import manifest as mf
from megaprior.data.scores import ScoreWriter, open_scores
from megaprior.data.shards import Shard, ShardSet
from megaprior.data_tools.transfer.byte_scores import Spelled, Spelling, in_common, refusal, transferred
from megaprior.errors import DataError, UsageError
from megaprior.files import digest_json
from megaprior.tokenizer import load_tokenizer

METHOD = "even over bytes, 1"  # the number rises when the same inputs would give other scores
REASONS = ("missing", "different", "truncated", "unspelled")
_AHEAD = 64  # captions looked at in order before the index of all keys is asked


@dataclass(frozen=True)
class Request:
    """What is to be transferred; plain values, so that a worker can be told."""

    source: str
    target: str
    scores: str = "ref_logprob"
    name: str = "ref_logprob"
    unscored: Literal["refuse", "ntp"] = "refuse"


class Transfer:
    """Both folders, open, and what one process does with a shard."""

    def __init__(self, request: Request) -> None:
        """Raises: UsageError and DataError, as `transfer_scores`."""
        self.request = request
        self.source, self._from = _open(request.source, scores=request.scores)
        self.target, self._to = _open(request.target)
        if self.source.score_kind != "logprob":
            raise UsageError(
                f"{request.source}: {request.scores!r} is of kind {self.source.score_kind}; only log-probabilities add up "
                "over the bytes of a token, so run that scorer on the target shards themselves"
            )
        self._folds = (self._from.folds_spaces, self._to.folds_spaces)
        self.source_keys = SourceKeys(self.source)
        self.scorer = self._scorer()

    def _scorer(self) -> dict[str, Any]:
        scorer, name = self.source.scorer or {}, self.request.scores
        manifests = [mf.read(s.folder / f"{s.prefix}.{name}.json", format=mf.SCORES) for s in self.source.shards]
        source = {
            "build_id": self.source.build_id,
            "tokenizer": self.source.fingerprint,
            "name": name,
            "scorer": {key: scorer[key] for key in ("kind", "fingerprint") if key in scorer},
            "scores_digest": digest_json([manifest["digest"] for manifest in manifests]),
        }
        what = {"kind": "transfer", "method": METHOD, "source": source}
        return {**what, "fingerprint": digest_json(what)}

    def is_complete(self, shard: Shard) -> bool:
        """Whether a target shard has these very scores already.

        Raises:
            DataError: it has others of that name, or some that were let pass and now are not.
        """
        name = self.request.name
        if name in shard.manifest["streams"]:
            raise UsageError(f"--name {name}: is a stream of {shard.name} itself; choose another name for the scores")
        if not (shard.folder / f"{shard.prefix}.{name}.json").exists():
            return False
        _, record = open_scores(shard, name)
        found = record["scorer"]
        if found.get("fingerprint") != self.scorer["fingerprint"]:
            raise DataError(
                f"{shard.name}: has scores {name!r} by {found.get('kind')} {found.get('fingerprint')}, this transfer is "
                f"{self.scorer['fingerprint']}; choose another --name, or delete {shard.folder}/*.{name}.* to replace them"
            )
        if self.request.unscored == "refuse" and (count := sum(found["unscored"].values())):
            raise DataError(
                f"{shard.name}: {count:,} of its {len(shard):,} captions were left unscored by --unscored ntp; ask for that "
                f"again, or delete {shard.folder}/*.{name}.* and transfer anew"
            )
        return True

    def shard(self, at: int) -> None:
        """Write the stream of one target shard.

        Raises:
            DataError: a caption has no scores in the source, and those are to be refused; the disk is full.
        """
        shard = self.target.shards[at]
        lost: Counter[str] = Counter(dict.fromkeys(REASONS, 0))
        first = ""
        record: dict[str, Any] = {**self.scorer, "unscored": lost}
        with ScoreWriter(shard, self.request.name, kind="logprob", scorer=record, first_token=None) as writer:
            for local, found in enumerate(self._scores(shard)):
                if isinstance(found, np.ndarray):
                    writer.add(found)
                    continue
                reason, detail = found
                lost[reason] += 1
                first = first or f"{shard.describe(local)}: {detail}"
                # w = 1 - exp(-inf) = 1 for each token: the caption is trained on as without a prior
                writer.add(np.full(shard.streams["tokens"].lengths[local], -np.inf, np.float32))
            if first and self.request.unscored == "refuse":
                counts = ", ".join(f"{count:,} {reason}" for reason, count in lost.items() if count)
                raise DataError(
                    f"{first}; of the shard's {len(shard):,} captions {sum(lost.values()):,} have no scores ({counts}): build "
                    "both folders from the same inputs, or add --unscored ntp to weight such captions evenly"
                )
            record["unscored"] = dict(lost)  # the writer holds this very record
            writer.finish()
        shard.close()

    def _scores(self, shard: Shard) -> Iterator[np.ndarray | tuple[str, str]]:
        """For each caption of a target shard its scores, or why it has none: the reason and what to tell."""
        near = self.source_keys.first_of(shard.prefix)
        for local in range(len(shard)):
            ids = shard.streams["tokens"][local]
            wanted = self._to.spell(ids)
            if isinstance(wanted, int):
                yield "unspelled", _unspelled("the target", wanted, ids)
                continue
            problem = "missing", "the source has no caption of this key"
            for index in self.source_keys.of_key(shard.streams["keys"][local].tobytes(), near):
                found = self._one(index, wanted)
                if isinstance(found, np.ndarray):
                    near = index + 1
                    yield found
                    break
                problem = found if problem[0] == "missing" else problem
            else:
                yield problem

    def _one(self, index: int, wanted: Spelled) -> np.ndarray | tuple[str, str]:
        ids = self.source.tokens(index)
        given = self._from.spell(ids)
        if isinstance(given, int):
            return "unspelled", _unspelled(self.source.describe(index), given, ids)
        given, wanted = in_common(given, wanted, folds=self._folds)
        problem = refusal(given, wanted)
        if problem == "truncated":
            return problem, (
                f"{self.source.describe(index)} was cut after {len(given.data):,} bytes, the target goes on to "
                f"{len(wanted.data):,}; build and score the source with a larger --max-sequence"
            )
        if problem is not None:
            return problem, _difference(self.source.describe(index), given.data, wanted.data)
        return transferred(self.source.scores(index), given, wanted)


class SourceKeys:
    """The source's captions by key: first in order, where both folders come from the same inputs, else by an index of all keys.

    The index takes 16 bytes a caption, and is made when the order fails for the first time. Keys may repeat (line numbers of
    several files do); the caption's bytes then decide.
    """

    def __init__(self, shards: ShardSet) -> None:
        self._shards = shards
        starts = np.cumsum([0, *(len(shard) for shard in shards.shards)])
        self._first = {shard.prefix: int(start) for shard, start in zip(shards.shards, starts, strict=False)}
        self._hashes: np.ndarray | None = None
        self._order = np.empty(0, np.int64)

    @property
    def indexed(self) -> bool:
        """Whether the order failed and the index was made."""
        return self._hashes is not None

    def first_of(self, prefix: str) -> int:
        """Where to begin for a target shard: with the source's shard of the same name, if there is one."""
        return self._first.get(prefix, 0)

    def of_key(self, key: bytes, near: int) -> Iterator[int]:
        """Indices of captions with this key, those that follow `near` closely first."""
        ahead = range(near, min(near + _AHEAD, len(self._shards)))
        for index in ahead:
            if self._key(index) == key:
                yield index
        hashes, wanted = self._index(), np.uint64(xxhash.xxh3_64_intdigest(key))
        low, high = (int(np.searchsorted(hashes, wanted, side=side)) for side in ("left", "right"))
        for index in self._order[low:high].tolist():
            if index not in ahead and self._key(index) == key:
                yield index

    def _key(self, index: int) -> bytes:
        shard, local = self._shards.locate(index)
        return shard.streams["keys"][local].tobytes()

    def _index(self) -> np.ndarray:
        if self._hashes is None:
            hashes = np.fromiter(map(xxhash.xxh3_64_intdigest, map(self._key, range(len(self._shards)))), np.uint64)
            self._order = np.argsort(hashes, kind="stable")
            self._hashes = hashes[self._order]
        return self._hashes


# ---------------------------------------------------------------- checks and messages


def _open(folder: str, *, scores: str | None = None) -> tuple[ShardSet, Spelling]:
    mf.read_build(folder)  # an unfinished build is told as such, before its tokenizer is missed
    tokenizer = load_tokenizer(Path(folder) / "tokenizer")
    shards = ShardSet.open(folder, scores=scores, tokenizer=tokenizer)
    counts = shards.build["counts"]
    if counts["documents"] != counts["samples"]:
        raise UsageError(
            f"{folder}: {counts['documents']:,} documents in {counts['samples']:,} windows; windows of two tokenizers do not "
            "begin at the same bytes, so only captions can be transferred"
        )
    return shards, Spelling(tokenizer)


def _unspelled(where: str, position: int, ids: np.ndarray) -> str:
    return (
        f"token {position} of {len(ids)} in {where}, id {int(ids[position])}, stands for no bytes: its tokenizer cannot spell "
        "this caption"
    )


def _difference(where: str, source: bytes, target: bytes) -> str:
    pairs = enumerate(zip(source, target, strict=False))
    shared = next((at for at, (one, two) in pairs if one != two), min(len(source), len(target)))
    begin = max(0, shared - 12)
    one, two = (data[begin : shared + 12].decode("utf-8", "replace") for data in (source, target))
    return (
        f"the caption of this key in {where} is another from byte {shared:,} on ({one!r}, here {two!r}): other text, or a "
        "tokenizer that normalises text"
    )

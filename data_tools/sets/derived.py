"""Builds made of other builds: their plan, their shards, and the scores that go along.

The sources of such a build are shards instead of raw files; everything else is a build like any other: a build id, a working
folder, resuming by repetition, build.json last. Nothing is taken over unread: a source's bytes are held against their
digests first, else the new digests would bless what was damaged.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from megaprior.data import manifest as mf
from megaprior.data.scores import ScoreWriter, open_scores
from megaprior.data.shards import Shard, ShardSet, ShardWriter
from megaprior.data_tools.building import folder
from megaprior.data_tools.building.join import commit
from megaprior.data_tools.building.plan import RECIPE, Plan
from megaprior.data_tools.building.sharding import ledger_path
from megaprior.data_tools.options import BuildOptions
from megaprior.data_tools.pool import each
from megaprior.errors import DataError
from megaprior.files import BLOCK_BYTES, atomic_write, block_digests, digest_json
from megaprior.telemetry import progress, say
from megaprior.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One shard to write: its name, the shard that it is made of, and the score streams that go along."""

    output: Path
    prefix: str
    build_id: str
    folder: Path
    source: str
    scores: tuple[str, ...]

    @property
    def done(self) -> bool:
        """Whether the shard and its scores are there."""
        names = [f"{self.prefix}.json", *(f"{self.prefix}.{name}.json" for name in self.scores)]
        return all((self.output / name).exists() for name in names)

    def open(self) -> tuple[Shard, Tokenizer]:
        """The shard that it is made of, and its tokenizer."""
        return Shard.open(self.folder, self.source), load_tokenizer(self.folder / "tokenizer")


def score_names(shards: ShardSet) -> tuple[str, ...]:
    """The score streams that every shard has; others are named to the user as left behind."""
    found = [
        {path.name[len(shard.prefix) + 1 : -len(".json")] for path in shards.folder.glob(f"{shard.prefix}.*.json")}
        for shard in shards.shards
    ]
    complete = set.intersection(*found)
    for name in sorted(set.union(*found) - complete):
        have = sum(name in names for names in found)
        say(f"{shards.folder}: {name!r} is left behind: {have:,} of {len(found):,} shards have these scores")
    return tuple(sorted(complete))


def recorded_source(shard: Shard, scores: Iterable[str]) -> dict[str, Any]:
    """What the build id says of a shard that something is made of."""
    digests = {
        name: mf.read(shard.folder / f"{shard.prefix}.{name}.json", format=mf.SCORES)["digest"] for name in scores
    }
    body: dict[str, Any] = {"name": shard.name, "digest": shard.manifest["digest"]}
    return body | ({"scores": digests} if digests else {})


def derived_plan(
    build: dict[str, Any], sources: Sequence[dict[str, Any]], *, options: dict[str, Any], derived: dict[str, Any]
) -> Plan:
    """The plan of a build whose i-th shard is made of `sources[i]`; `derived` says by which verb and how."""
    recorded = {
        "recipe": RECIPE,
        "kind": build["kind"],
        "tokenizer": build["tokenizer"]["fingerprint"],
        "options": {**options, "derived": derived},
        "sources": list(sources),
    }
    return Plan(
        kind=build["kind"],
        jobs=(),
        options=BuildOptions(),
        left_out=(),
        build_id=digest_json(recorded),
        recorded=recorded,
    )


def write_derived(
    output: Path,
    plan: Plan,
    pieces: Sequence[Piece],
    work: Callable[[Any], int],
    *,
    workers: int,
    tasks: Sequence[Any] | None = None,
) -> dict[str, Any]:
    """Write the shards that are missing, each by `work(task)` (its piece, unless `tasks` say more), then build.json.

    Args:
        work: writes one shard and its scores and returns the number of samples; called in other processes too.

    Raises:
        DataError: the folder holds something else, a source was changed, or the disk is full; what is finished is kept.
    """
    if folder.state(output, plan) == "complete":
        say(f"{output}: complete already (build {plan.build_id}); nothing to do")
    with folder.whole(output):
        if folder.state(output, plan) == "complete":
            folder.finish(output)
            return mf.read_build(output)
        words = load_tokenizer(pieces[0].folder / "tokenizer")
        folder.sweep(output)
        folder.begin(output, plan, words)
        todo = [task for piece, task in zip(pieces, tasks or pieces, strict=True) if not piece.done]
        with progress(len(pieces), f"write {output.name}", "shards") as shown:
            shown.advance(len(pieces) - len(todo))
            for _ in each(work, todo, workers=workers):
                shown.advance()
        return commit(output, folder.read_begun(output), words)


# ---------------------------------------------------------------- one shard


def refuse_changed(shard: Shard, scores: Iterable[str] = ()) -> None:
    """Read every byte of a shard, and of its scores, against the digests.

    Raises:
        DataError: names the file and the block that is not what was written.
    """
    entries = dict(shard.manifest["streams"])
    for name in scores:
        entries[name] = open_scores(shard, name)[1]["stream"]
    for name, entry in entries.items():
        for kind in ("bin", "idx"):
            refuse_changed_file(shard.folder / f"{shard.prefix}.{name}.{kind}", entry[kind])


def refuse_changed_file(path: Path, entry: dict[str, Any]) -> None:
    """Hold one file against its entry in a manifest.

    Raises:
        DataError: names the block that is not what was written.
    """
    now = block_digests(path)
    if now != entry["blocks"]:
        at = next((i for i, (a, b) in enumerate(zip(now, entry["blocks"], strict=False)) if a != b), len(now))
        raise DataError(
            f"{path}: block {at} (from byte {at * BLOCK_BYTES:,}) is not what was written; run `megaprior-data verify` and "
            "rebuild the shard first"
        )


def copy_samples(
    piece: Piece,
    chosen: np.ndarray | None = None,
    *,
    rename: Callable[[str], str] | None = None,
    quarantine: Sequence[dict[str, Any]] = (),
    check: bool = False,
) -> int:
    """Write the samples at `chosen` (int64, ascending; all by default) and their scores; returns how many.

    The manifest is a function of the samples: `truncated` counts the documents that do not end in EOS. `quarantine` goes along;
    `check` holds the source's bytes against their digests first.
    """
    shard, tokenizer = piece.open()
    if check:
        refuse_changed(shard, piece.scores)
    at = np.arange(len(shard)) if chosen is None else chosen
    streams, eos = shard.streams, tokenizer.eos_id
    ends = np.zeros(len(shard) + 1, np.bool_)
    ends[streams["tokens"].documents - 1] = True  # the last sample of each document
    head = {"source": taken_from(shard), "options": shard.manifest["options"]}
    if not (piece.output / f"{piece.prefix}.json").exists():
        with ShardWriter(
            piece.output,
            piece.prefix,
            tokenizer=tokenizer,
            build_id=piece.build_id,
            kind=shard.manifest["kind"],
            **head,
        ) as writer:
            for i in at.tolist():
                tokens = streams["tokens"][i]
                key = shard.key(i)
                writer.add(
                    key if rename is None else rename(key),
                    tokens,
                    loss_spans=streams["loss_spans"][i] if "loss_spans" in streams else None,
                    word_class=streams["word_class"][i] if "word_class" in streams else None,
                    truncated=bool(ends[i]) and int(tokens[-1]) != eos,
                    end_document=bool(ends[i]),
                    **_image(shard, i),
                )
            for entry in quarantine:
                writer.quarantined(reason=entry["reason"].partition(":")[0])
            write_ledger(piece, quarantine)
            writer.finish()
    carry_scores(piece, shard, at)
    shard.close()
    return len(at)


def taken_from(shard: Shard) -> dict[str, Any]:
    """What a shard's manifest says of its source when it is made of another shard: the first source, and that shard."""
    return {**shard.manifest["source"], "taken_from": {"name": shard.name, "digest": shard.manifest["digest"]}}


def _image(shard: Shard, index: int) -> dict[str, Any]:
    if "images" not in shard.streams:
        return {}
    images = shard.streams["images"]
    width, height = shard.streams["image_sizes"][index].tolist()
    return {
        "image": images[index].data,
        "image_size": (width, height),
        "image_key": str(int(images.pointers[index])),
    }


def carry_scores(piece: Piece, source: Shard, chosen: np.ndarray) -> None:
    """Write the score streams of a shard that was just written, bound to its tokens.

    A score belongs to a token of its caption, by one scorer; none depends on which other captions stand in the folder now.
    """
    written = Shard.open(piece.output, piece.prefix) if piece.scores else source
    for name in piece.scores:
        stream, record = open_scores(source, name)
        with ExitStack() as stack:
            stack.callback(stream.close)
            writer = stack.enter_context(
                ScoreWriter(
                    written,
                    name,
                    kind=record["kind"],
                    scorer=record["scorer"],
                    first_token=record["first_token"],
                    replace=True,
                )
            )
            for i in chosen.tolist():
                writer.add(stream[i])
            writer.finish()


def write_ledger(piece: Piece, quarantine: Sequence[dict[str, Any]]) -> None:
    """What `join` reads beside the shard's manifest; written before it."""
    atomic_write(
        ledger_path(piece.output, piece.prefix), json.dumps({"quarantine": list(quarantine), "outside_subset": 0})
    )


def units_of(shard: Shard) -> np.ndarray:
    """int64 [samples]: which stored image, or which document of text, each sample belongs to; numbered in order."""
    if "images" in shard.streams:
        return np.unique(shard.streams["images"].pointers, return_inverse=True)[1].astype(np.int64)
    edges = shard.streams["tokens"].documents
    return np.repeat(np.arange(len(edges) - 1), np.diff(edges))


def document_bytes(shard: Shard) -> Iterator[memoryview]:
    """The tokens of each document."""
    tokens = shard.streams["tokens"]
    data, size = tokens.flat().data.cast("B"), tokens.dtype.itemsize
    ends = np.concatenate([[0], np.cumsum(tokens.lengths, dtype=np.int64) * size])[tokens.documents].tolist()
    for start, end in pairwise(ends):
        yield data[start:end]

"""What tests of whole folders ask: which samples they hold, and whether scores still belong to their tokens."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np

from megaprior.data.shards import ScoreWriter, Shard, ShardSet, verify
from megaprior.tokenizer import load_tokenizer


def samples_of(*folders: Path) -> Counter[tuple[bytes, str]]:
    """The multiset of (caption bytes, image digest) of the folders; each must verify."""
    found: Counter[tuple[bytes, str]] = Counter()
    for folder in folders:
        assert verify(folder) == []
        shards, tokenizer = ShardSet.open(folder), load_tokenizer(folder / "tokenizer")
        for i in range(len(shards)):
            caption = tokenizer.decode(shards.tokens(i).tolist()).encode()
            image = hashlib.sha256(shards.image(i)).hexdigest() if shards.kind == "pairs" else ""
            found[caption, image] += 1
    return found


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below the folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def score_of(tokens: np.ndarray) -> np.ndarray:
    """A log-probability that only its own token explains, so that a score on another token shows."""
    return -(tokens % 97 + np.arange(len(tokens)) % 3).astype(np.float32) / np.float32(7)


def add_scores(folder: Path, name: str = "ref_logprob", *, scorer: str = "a" * 32, shards: int | None = None) -> None:
    """Score all shards of a folder, or the first few."""
    for entry in ShardSet.open(folder).build["shards"][:shards]:
        shard = Shard.open(folder, entry["prefix"])
        with ScoreWriter(shard, name, kind="logprob", scorer={"kind": "reference", "fingerprint": scorer}) as writer:
            for i in range(len(shard)):
                writer.add(score_of(shard.streams["tokens"][i]))
            writer.finish()


def check_scores(folder: Path, name: str = "ref_logprob") -> None:
    """Trainers accept the scores, and each is its own token's."""
    shards = ShardSet.open(folder, scores=name)
    for i in range(len(shards)):
        np.testing.assert_array_equal(shards.scores(i), score_of(shards.tokens(i)))

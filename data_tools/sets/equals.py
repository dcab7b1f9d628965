"""Samples that come again, image and caption alike, found by 128 bits of each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xxhash

from megaprior.data.shards import Shard
from megaprior.data_tools.pool import each
from megaprior.data_tools.sets.derived import document_bytes, units_of
from megaprior.telemetry import progress, say

_DIGEST = np.dtype([("high", "<u8"), ("low", "<u8")])


def first_ones(shards: Sequence[Shard], *, workers: int) -> list[np.ndarray]:
    """For each shard the samples whose image and caption did not come before. Memory: 32 bytes a sample."""
    parts = []
    with progress(len(shards), "compare", "shards") as shown:
        places = [(shard.folder, shard.prefix) for shard in shards]
        for part in each(sample_digests, places, workers=workers):
            parts.append(part)
            shown.advance()
    everything = np.concatenate(parts)
    _, first = np.unique(everything, return_index=True)
    kept = np.zeros(len(everything), np.bool_)
    kept[first] = True
    say(
        f"{len(everything) - len(first):,} of {len(everything):,} documents or pairs are dropped as equal to an earlier one"
    )
    chosen, start = [], 0
    for shard, part in zip(shards, parts, strict=True):
        mine = kept[start : start + len(part)]
        start += len(part)
        chosen.append(np.flatnonzero(mine if shard.manifest["kind"] == "pairs" else mine[units_of(shard)]))
    return chosen


def sample_digests(place: tuple[Path, str]) -> np.ndarray:
    """128 bits for each sample of a shard (for each document of text): its image's bytes and its tokens."""
    shard = Shard.open(*place)
    images, known = shard.streams.get("images"), {}
    found = np.zeros(shard.manifest["counts"]["documents"], _DIGEST)
    for at, tokens in enumerate(document_bytes(shard)):
        digest = xxhash.xxh3_128(tokens)
        if images is not None:
            pointer = int(images.pointers[at])
            if pointer not in known:
                known[pointer] = xxhash.xxh3_128_digest(images[at].data)
            digest.update(known[pointer])
        found[at] = np.frombuffer(digest.digest(), _DIGEST)[0]
    shard.close()
    return found

"""What must hold inside one shard beyond its digests: counts, alignment of the streams, and values in range.

Each check yields one line per problem. Letters: N samples, D document boundaries.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from megaprior.data import manifest as mf
from megaprior.data.indexed import IndexedStream

_CHUNK = 1 << 24  # elements looked at together


def shard_problems(manifest: dict[str, Any], streams: dict[str, IndexedStream]) -> Iterator[str]:
    """Problems of a shard's own streams."""
    counts, tokens = manifest["counts"], streams["tokens"]
    vocabulary = manifest["tokenizer"]["vocab_size"]
    for name in mf.REQUIRED_STREAMS[manifest["kind"]]:
        if name not in streams:
            yield f"no stream {name!r} in a shard of kind {manifest['kind']!r}"
    for name, stream in streams.items():
        if len(stream) != counts["samples"]:
            yield f"{name} has {len(stream):,} sequences, the manifest counts {counts['samples']:,} samples"
        yield from _index_problems(name, stream, counts)
    total = int(tokens.lengths.sum(dtype=np.int64))
    if total != counts["tokens"]:
        yield f"{total:,} tokens, the manifest counts {counts['tokens']:,}"
    low, high, _, _ = _extremes(tokens)
    if total and not 0 <= low <= high < vocabulary:
        yield f"token ids from {low} to {high} in a vocabulary of {vocabulary:,}"
    if manifest["lengths_digest"] != mf.lengths_digest(tokens.lengths):
        yield "the digest of lengths is not that of tokens"
    if "image_sizes" in streams:
        sizes = streams["image_sizes"]
        if (sizes.lengths != 2).any() or (len(sizes) and _extremes(sizes)[0] < 1):
            yield "image_sizes is not one width and height, at least 1, for each sample"
    if "word_class" in streams:
        yield from length_problems("word_class", streams["word_class"], tokens)
        if (_extremes(streams["word_class"])[1] or 0) > 2:
            yield "word_class holds classes above 2"
    yield from _span_problems(streams.get("loss_spans"), tokens, counts)


def score_problems(
    record: dict[str, Any], manifest: dict[str, Any], stream: IndexedStream, tokens: IndexedStream
) -> Iterator[str]:
    """Problems of a score stream against its own manifest and the tokens it belongs to."""
    if record["tokens_digest"] != mf.stream_digest(manifest["streams"]["tokens"]):
        yield "made for other tokens than this shard's; score again"
    if record["tokenizer"]["fingerprint"] != manifest["tokenizer"]["fingerprint"]:
        yield "made with another tokenizer than the shard; score again"
    yield from length_problems("the score stream", stream, tokens)
    if record["lengths_digest"] != mf.lengths_digest(stream.lengths):
        yield "the digest of lengths is not that of the stream"
    low, high, nan, infinite = _extremes(stream)
    count = int(stream.lengths.sum(dtype=np.int64))
    found = {"min": low, "max": high, "nan_count": nan, "infinite_count": infinite, "count": count}
    for field, value in found.items():
        if record[field] != value:
            yield f"{field} is {value}, the manifest says {record[field]}"


def length_problems(name: str, stream: IndexedStream, tokens: IndexedStream) -> Iterator[str]:
    """The first sample whose sequence is not as long as its tokens."""
    if len(stream) != len(tokens):
        yield f"{name} has {len(stream):,} sequences, tokens has {len(tokens):,}"
    elif (differs := stream.lengths != tokens.lengths).any():
        at = int(np.argmax(differs))
        yield f"{name} has {stream.lengths[at]} entries at sample {at}, which has {tokens.lengths[at]} tokens"


def span_problem(edges: np.ndarray, tokens: int) -> str | None:
    """What is wrong with one sample's loss spans, int64 [2 * spans], given its number of tokens."""
    if len(edges) % 2 or (np.diff(edges) < 0).any() or (len(edges) and (edges[0] < 0 or edges[-1] > tokens)):
        return f"loss spans {edges.tolist()} are not ascending [start, end) pairs within {tokens} tokens"
    return None


def _index_problems(name: str, stream: IndexedStream, counts: dict[str, Any]) -> Iterator[str]:
    """Sequences must touch and fill the .bin; only images may share bytes."""
    lengths, pointers, documents = stream.lengths.astype(np.int64), stream.pointers, stream.documents
    if (lengths < 0).any():
        yield f"{name} has negative lengths"
    if name == "images":
        pointers, first, inverse = np.unique(pointers, return_index=True, return_inverse=True)
        if (lengths[first][inverse] != lengths).any():
            yield "images that share a pointer differ in length"
        lengths = lengths[first]
        if len(pointers) != counts["images"]:
            yield f"{len(pointers):,} stored images, the manifest counts {counts['images']:,}"
    ends = np.cumsum(lengths) * stream.dtype.itemsize
    starts = np.concatenate([[0], ends])[: len(pointers)]
    if (pointers != starts).any() or (len(ends) and ends[-1] != stream.flat().nbytes):
        yield f"{name}: sequences overlap or leave gaps in the .bin"
    if documents[:1].tolist() != [0] or documents[-1] != len(stream) or (np.diff(documents) <= 0).any():
        yield f"{name}: document indices do not rise from 0 to {len(stream):,}"
    if len(documents) - 1 != counts["documents"]:
        yield f"{name} has {len(documents) - 1:,} documents, the manifest counts {counts['documents']:,}"


def _span_problems(spans: IndexedStream | None, tokens: IndexedStream, counts: dict[str, Any]) -> Iterator[str]:
    if spans is None:
        loss_tokens = int(tokens.lengths.sum(dtype=np.int64))
    else:
        loss_tokens = 0
        for sample in range(len(spans)):
            edges = spans[sample].astype(np.int64)
            if problem := span_problem(edges, int(tokens.lengths[sample])):
                yield f"sample {sample}: {problem}"
                return
            loss_tokens += int((edges[1::2] - edges[::2]).sum())
    if loss_tokens != counts["loss_tokens"]:
        yield f"{loss_tokens:,} loss tokens, the manifest counts {counts['loss_tokens']:,}"


def _extremes(stream: IndexedStream) -> tuple[Any, Any, int, int]:
    """(finite minimum, finite maximum, NaN count, infinite count) of all elements; (None, None) without a finite one."""
    low = high = None
    nan = infinite = 0
    flat = stream.flat()
    for start in range(0, len(flat), _CHUNK):
        part = flat[start : start + _CHUNK]
        nan += int(np.isnan(part).sum())
        infinite += int(np.isinf(part).sum())
        part = part[np.isfinite(part)]
        if part.size:
            low = part.min().item() if low is None else min(low, part.min().item())
            high = part.max().item() if high is None else max(high, part.max().item())
    return low, high, nan, infinite

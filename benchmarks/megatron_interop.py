"""Megatron-core's own IndexedDataset on our streams, and our reader on what its builder writes.

    pip download --no-deps --dest wheels megatron-core && pip install --no-deps --target site wheels/*.whl
    PYTHONPATH=site python -m benchmarks.megatron_interop shards/pairs shards/text

Needs Megatron-core and torch, and no GPU. Of every stream of the folders, scores included, every sequence is read by both and
compared; then Megatron's builder writes the same sequences, and its two files are compared with ours byte for byte (a stream
whose images are shared is written out in full there, so of that one the sequences are compared instead); last, it writes
each dtype of the format for our reader. The first difference ends the run.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from megaprior.data import manifest as mf
from megaprior.data.indexed import DTYPES, IndexedStream


def main() -> int:
    """Compare, and print a line for each stream."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="shard folders")
    options = parser.parse_args()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it would use on a GPU
        from megatron.core import __version__  # pyright: ignore[reportMissingImports]
        from megatron.core.datasets import indexed_dataset  # pyright: ignore[reportMissingImports]
    print(f"Megatron-core {__version__}")
    for folder in options.folders:
        totals: dict[str, int] = {}
        empty = 0
        for shard in mf.read_build(folder)["shards"]:
            for index in sorted(folder.glob(f"{shard['prefix']}.*.idx")):
                name = index.name.split(".")[1]
                if not index.with_suffix(".bin").stat().st_size:
                    empty += 1
                    continue
                totals[name] = totals.get(name, 0) + compare(indexed_dataset, index.with_suffix(""))
        print(f"{folder}: " + ", ".join(f"{name} {count:,}" for name, count in totals.items()) + " sequences equal")
        if empty:
            print(f"{folder}: {empty} streams hold nothing: Megatron maps the .bin, and an empty file cannot be mapped")
    with tempfile.TemporaryDirectory() as place:
        for dtype in DTYPES.values():
            _their_dtype(indexed_dataset, Path(place) / dtype[1:], np.dtype(dtype))
    print(f"written by Megatron's builder, read by ours: {', '.join(np.dtype(d).name for d in DTYPES.values())}")
    return 0


def compare(theirs: Any, prefix: Path) -> int:
    """Read a stream by both, have theirs write it again; returns the number of sequences."""
    ours, stock = IndexedStream(prefix), theirs.IndexedDataset(str(prefix))
    assert len(ours) == len(stock), (prefix, len(ours), len(stock))
    assert (stock.document_indices == ours.documents).all(), prefix
    for i in range(len(ours)):
        found = stock[i]
        assert found.dtype == ours.dtype, (prefix, i, found.dtype)
        assert found.tobytes() == ours[i].tobytes(), (prefix, i)
    shared = len(np.unique(ours.pointers[ours.lengths > 0])) < int((ours.lengths > 0).sum())
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / "copy"
        _write(theirs, copy, ours)
        if shared:
            again = IndexedStream(copy)
            assert all(again[i].tobytes() == ours[i].tobytes() for i in range(len(ours))), prefix
        else:
            for kind in (".bin", ".idx"):
                assert Path(f"{copy}{kind}").read_bytes() == Path(f"{prefix}{kind}").read_bytes(), f"{prefix}{kind}"
    return len(ours)


def _write(theirs: Any, prefix: Path, stream: IndexedStream) -> None:
    import torch

    builder = theirs.IndexedDatasetBuilder(f"{prefix}.bin", dtype=stream.dtype.type)
    ends = set(stream.documents[1:].tolist())
    for i in range(len(stream)):
        values = stream[i]
        wide = values.astype(np.int64) if values.dtype.kind in "iu" else values.copy()  # torch has no uint16 of its own
        builder.add_item(torch.from_numpy(wide))
        if i + 1 in ends:
            builder.end_document()
    builder.finalize(f"{prefix}.idx")


def _their_dtype(theirs: Any, prefix: Path, dtype: np.dtype) -> None:
    import torch

    draw = np.random.default_rng(0)
    sequences = [draw.integers(0, 100, size).astype(dtype) for size in (5, 1, 300, 7)]
    builder = theirs.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype.type)
    for sequence in sequences:
        builder.add_item(torch.from_numpy(sequence.astype(np.float64)))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    stream = IndexedStream(prefix)
    assert stream.dtype == dtype, (stream.dtype, dtype)
    for found, sequence in zip((stream[i] for i in range(len(stream))), sequences, strict=True):
        assert (found == sequence).all(), dtype


if __name__ == "__main__":
    raise SystemExit(main())

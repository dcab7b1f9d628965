"""Streams against Megatron's IndexedDataset, version 1, by its byte layout alone: no line of our reader or writer helps here.

`python -m benchmarks.megatron_interop` does the same with Megatron-core's own code, where that is installed.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaprior.data.indexed import IndexedStream
from megaprior.data.indexed_writer import IndexedWriter
from megaprior.data.shards import ShardSet
from megaprior.data_tools.building.build import build
from megaprior.data_tools.options import BuildOptions
from megaprior.data_tools.sets.merging import Request, merge
from megaprior.errors import DataError
from tests.data_tools.sets import add_scores

DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}


def read(prefix: Path) -> tuple[str, list[np.ndarray], list[int]]:
    """(dtype, sequences, document indices) of prefix.bin and prefix.idx."""
    index, data = Path(f"{prefix}.idx").read_bytes(), Path(f"{prefix}.bin").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00"
    assert struct.unpack_from("<Q", index, 9) == (1,)
    dtype = DTYPES[index[17]]
    (n,), (d,) = struct.unpack_from("<Q", index, 18), struct.unpack_from("<Q", index, 26)
    lengths = struct.unpack_from(f"<{n}i", index, 34)
    pointers = struct.unpack_from(f"<{n}q", index, 34 + 4 * n)
    documents = struct.unpack_from(f"<{d}q", index, 34 + 12 * n)
    assert len(index) == 34 + 12 * n + 8 * d
    size = np.dtype(dtype).itemsize
    found = [np.frombuffer(data[p : p + k * size], dtype) for k, p in zip(lengths, pointers, strict=True)]
    return dtype, found, list(documents)


def write(prefix: Path, code: int, documents: Sequence[Sequence[np.ndarray]]) -> None:
    """Write documents of sequences."""
    sequences = [np.asarray(s, DTYPES[code]) for document in documents for s in document]
    size = np.dtype(DTYPES[code]).itemsize
    pointers = np.cumsum([0, *(len(s) * size for s in sequences)])[:-1] if sequences else []
    edges = np.cumsum([0, *map(len, documents)])
    Path(f"{prefix}.bin").write_bytes(b"".join(s.tobytes() for s in sequences))
    Path(f"{prefix}.idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, code, len(sequences), len(edges))
        + struct.pack(f"<{len(sequences)}i", *map(len, sequences))
        + struct.pack(f"<{len(sequences)}q", *pointers)
        + struct.pack(f"<{len(edges)}q", *edges)
    )


@pytest.fixture
def builds(
    make_tar: Callable[..., Path], picture: Callable[..., bytes], tmp_path: Path, tokenizer_folder: Path
) -> Path:
    """Pairs with shared images, scored and merged, and a text of windows, below one folder."""
    for number in range(2):
        members = []
        for seed in range(4):
            texts = json.dumps({"captions": [f"{seed} dogs", "one red star", "a cat"][: seed % 3 + 1]}).encode()
            members += [(f"{seed}.jpg", picture(seed + 4 * number)), (f"{seed}.json", texts)]
        make_tar(f"{number}.tar", members)
        build([tmp_path / f"{number}.tar"], tmp_path / f"b{number}", tokenizer=tokenizer_folder, options=BuildOptions())
        add_scores(tmp_path / f"b{number}")
    merge(Request(folders=(tmp_path / "b0", tmp_path / "b1"), output=tmp_path / "builds" / "pairs"))
    (tmp_path / "long.txt").write_text("one dog beside a star\n" * 40)
    options = BuildOptions(text=True, documents=True, max_sequence=32)
    build([tmp_path / "long.txt"], tmp_path / "builds" / "text", tokenizer=tokenizer_folder, options=options)
    return tmp_path / "builds"


def test_every_stream_of_a_build_is_of_that_layout(builds: Path) -> None:
    seen = set()
    for folder in builds.iterdir():
        shards = ShardSet.open(folder)
        for shard in shards.shards:
            for path in folder.glob(f"{shard.prefix}.*.idx"):
                dtype, sequences, documents = read(path.with_suffix(""))
                name = path.name.split(".")[1]
                seen.add(name)
                assert dtype == {"tokens": "<u2", "image_sizes": "<i4", "ref_logprob": "<f4"}.get(name, "<u1")
                assert len(sequences) == len(shard)
                assert documents[0] == 0
                assert documents[-1] == len(shard)
                assert len(documents) == shard.manifest["counts"]["documents"] + 1
        start = 0
        for shard in shards.shards:
            streams = {name: read(folder / f"{shard.prefix}.{name}")[1] for name in shard.streams}
            for i in range(len(shard)):
                assert streams["tokens"][i].tolist() == shards.tokens(start + i).tolist()
                assert streams["keys"][i].tobytes().decode() == shards.key(start + i)
                if "images" in streams:
                    assert streams["images"][i].tobytes() == shards.image(start + i)
            start += len(shard)
    assert seen == {"tokens", "keys", "images", "image_sizes", "ref_logprob"}


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_what_another_writer_wrote_is_read(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    code = data.draw(st.sampled_from(sorted(DTYPES)))
    value = st.floats(width=32, allow_nan=False) if code in (6, 7) else st.integers(0, 127)
    documents = data.draw(st.lists(st.lists(st.lists(value, max_size=5), min_size=1, max_size=3), max_size=6))
    folder = tmp_path_factory.mktemp("written")
    write(folder / "theirs", code, [[np.array(s) for s in document] for document in documents])
    stream = IndexedStream(folder / "theirs")
    flat = [sequence for document in documents for sequence in document]
    assert [stream[i].tolist() for i in range(len(stream))] == [np.array(s, DTYPES[code]).tolist() for s in flat]
    assert stream.dtype == np.dtype(DTYPES[code])
    assert stream.documents.tolist() == np.cumsum([0, *map(len, documents)]).tolist()
    with IndexedWriter(folder / "ours", DTYPES[code]) as writer:
        for document in documents:
            for sequence in document:
                writer.add(np.array(sequence, DTYPES[code]))
            writer.end_document()
        writer.finish()
    for kind in ("bin", "idx"):  # the same bytes, whoever writes them
        assert (folder / f"ours.{kind}").read_bytes() == (folder / f"theirs.{kind}").read_bytes()


def test_bytes_beyond_the_last_sequence_and_missing_ones_are_refused(tmp_path: Path) -> None:
    for change in (b"\0", b""):
        write(tmp_path / "x", 4, [[np.arange(5)]])
        path = tmp_path / "x.bin"
        path.write_bytes(path.read_bytes() + change if change else path.read_bytes()[:-1])
        with pytest.raises(DataError, match=r"x\.bin: (21|19) bytes, its index says 20"):
            IndexedStream(tmp_path / "x")

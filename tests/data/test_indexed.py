"""The format is checked against its table, byte by byte, with a reader written from the table alone."""

from __future__ import annotations

import gzip
import json
import os
import re
import struct
from pathlib import Path

import numpy as np
import pytest

from megaprior.data.indexed import IndexedStream, token_dtype
from megaprior.data.indexed_writer import IndexedWriter
from megaprior.errors import DataError
from megaprior.files import BLOCK_BYTES, block_digests

SEQUENCES = ([5, 9, 2], [7, 2], [11, 12, 13, 2])
CODES = {1: "u1", 2: "i1", 3: "i2", 4: "i4", 5: "i8", 6: "f8", 7: "f4", 8: "u2"}


def write(prefix: Path, sequences=SEQUENCES, dtype: str = "u2") -> dict:
    with IndexedWriter(prefix, dtype) as writer:
        for sequence in sequences:
            writer.add(sequence)
            writer.end_document()
        return writer.finish()


def read_by_the_table(prefix: Path) -> tuple[list[np.ndarray], list[int]]:
    """Sequences and document indices, taking nothing from the package."""
    index, data = Path(f"{prefix}.idx").read_bytes(), Path(f"{prefix}.bin").read_bytes()
    assert index[:9] == b"MMIDIDX\0\0"
    version, code, n, d = struct.unpack_from("<QBQQ", index, 9)
    assert version == 1
    assert len(index) == 34 + 12 * n + 8 * d
    lengths = struct.unpack_from(f"<{n}i", index, 34)
    pointers = struct.unpack_from(f"<{n}q", index, 34 + 4 * n)
    dtype = np.dtype("<" + CODES[code])
    sequences = [np.frombuffer(data[p : p + k * dtype.itemsize], dtype) for k, p in zip(lengths, pointers, strict=True)]
    return sequences, list(struct.unpack_from(f"<{d}q", index, 34 + 12 * n))


def test_bytes_are_those_of_the_table(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "a.tokens", np.uint16) as writer:
        assert [writer.add([258, 2]), writer.add([3])] == [0, 1]
        writer.end_document()
        assert writer.add([4, 2]) == 2
        writer.end_document()
        entry = writer.finish()
    header = b"MMIDIDX\0\0" + bytes([1, 0, 0, 0, 0, 0, 0, 0, 8, 3, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0])
    index = header + struct.pack("<3i3q3q", 2, 1, 2, 0, 4, 6, 0, 2, 3)
    assert (tmp_path / "a.tokens.bin").read_bytes() == bytes([2, 1, 2, 0, 3, 0, 4, 0, 2, 0])
    assert (tmp_path / "a.tokens.idx").read_bytes() == index
    assert (entry["dtype"], entry["sequences"], entry["bin"]["bytes"], entry["idx"]["bytes"]) == ("uint16", 3, 10, 94)
    assert sorted(os.listdir(tmp_path)) == ["a.tokens.bin", "a.tokens.idx"]


def test_the_worked_example_of_the_documentation(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "formats.md").read_text()
    dumps = dict(re.findall(r"`(00000\.tokens\.(?:bin|idx))`[^\n]*\n\n((?:    .*\n)+)", text))
    with IndexedWriter(tmp_path / "00000.tokens", np.uint16) as writer:
        for sequence in ([1037, 2422, 2], [300, 2]):
            writer.add(sequence)
            writer.end_document()
        entry = writer.finish()
    shown = re.search(r'"tokens": (\{.*?\}\})', text, re.DOTALL)
    assert shown is not None
    assert json.loads(shown[1]) == entry
    assert sorted(dumps) == ["00000.tokens.bin", "00000.tokens.idx"]
    for name, dump in dumps.items():
        lines = [re.fullmatch(r" {4}(\d+) +((?:[0-9a-f]{2} )+) *\S.*", line) for line in dump.splitlines()]
        data = b""
        for line in lines:
            assert line is not None
            assert int(line[1]) == len(data)
            data += bytes.fromhex(line[2])
        assert data == (tmp_path / name).read_bytes()


@pytest.mark.parametrize("dtype", CODES.values())
def test_every_dtype_comes_back(tmp_path: Path, dtype: str) -> None:
    kind = np.dtype(dtype)
    limits = np.finfo(kind) if kind.kind == "f" else np.iinfo(kind)
    sequences = [np.array([limits.min, 0, limits.max], kind), np.array([], kind), np.array([1], kind)]
    write(tmp_path / "s", sequences, dtype)
    stream = IndexedStream(tmp_path / "s")
    assert stream.dtype == kind
    assert len(stream) == 3
    assert stream.documents.tolist() == [0, 1, 2, 3]
    by_table, documents = read_by_the_table(tmp_path / "s")
    assert documents == [0, 1, 2, 3]
    for i, expected in enumerate(sequences):
        assert stream[i].dtype == kind
        assert stream[i].tolist() == expected.tolist() == by_table[i].tolist()
    assert not stream[0].flags.writeable


def test_views_have_the_documented_types(tmp_path: Path) -> None:
    write(tmp_path / "s")
    stream = IndexedStream(tmp_path / "s")
    assert (stream.lengths.dtype, stream.lengths.tolist()) == (np.int32, [3, 2, 4])
    assert (stream.pointers.dtype, stream.pointers.tolist()) == (np.int64, [0, 6, 10])
    assert (stream.documents.dtype, stream.documents.tolist()) == (np.int64, [0, 1, 2, 3])
    assert stream.flat().tolist() == [5, 9, 2, 7, 2, 11, 12, 13, 2]
    kept = stream[2]
    stream.close()
    assert kept.tolist() == [11, 12, 13, 2]  # a view outlives the stream's mapping
    assert stream[1].tolist() == [7, 2]  # and the stream maps again
    for index in (-1, 3):
        with pytest.raises(IndexError, match="of 3"):
            stream[index]


def test_a_shared_sequence_is_stored_once(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "s", np.uint8) as writer:
        first = writer.add(b"photo")
        writer.add(b"other")
        assert writer.add(b"", alias=first) == 2
        entry = writer.finish()
    stream = IndexedStream(tmp_path / "s", expect=entry)
    assert (tmp_path / "s.bin").read_bytes() == b"photoother"
    assert stream.pointers.tolist() == [0, 5, 0]
    assert [stream[i].tobytes() for i in range(3)] == [b"photo", b"other", b"photo"]


def test_a_stream_without_sequences(tmp_path: Path) -> None:
    entry = write(tmp_path / "s", ())
    assert entry["bin"] == {"bytes": 0, "blocks": []}
    stream = IndexedStream(tmp_path / "s", expect=entry)
    assert (len(stream), stream.lengths.size, stream.flat().size, stream.documents.tolist()) == (0, 0, 0, [0])


@pytest.mark.parametrize("bad", [[70_000], [-1], [0.5], [[1, 2]], ["a"]])
def test_what_does_not_fit_is_refused_and_leaves_the_stream_whole(tmp_path: Path, bad: list) -> None:
    with IndexedWriter(tmp_path / "s", np.uint16) as writer:
        writer.add([1])
        with pytest.raises(DataError, match="s sequence 1"):
            writer.add(bad)
        writer.add([65_535])
        writer.finish()
    assert [s.tolist() for s in read_by_the_table(tmp_path / "s")[0]] == [[1], [65_535]]


def test_half_precision_has_no_code(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="float16 has no code"):
        IndexedWriter(tmp_path / "s", np.float16)


def test_nothing_appears_before_finish_or_after_an_exception(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), IndexedWriter(tmp_path / "s", np.uint16) as writer:
        writer.add([1, 2])
        assert not list(tmp_path.glob("s.*"))
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_digests_are_those_of_the_files_over_a_block_boundary(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, 3 << 20, dtype=np.uint8).tobytes()
    entry = write(tmp_path / "s", [image] * 22, "u1")
    assert entry["bin"]["bytes"] == 66 << 20
    assert entry["bin"]["blocks"] == block_digests(tmp_path / "s.bin")
    assert len(entry["bin"]["blocks"]) == 2
    assert entry["idx"]["blocks"] == block_digests(tmp_path / "s.idx")
    assert BLOCK_BYTES == 64 << 20


@pytest.mark.parametrize("cut", ["empty", "in the header", "in the middle", "one byte short", "one byte long"])
@pytest.mark.parametrize("part", ["bin", "idx"])
@pytest.mark.parametrize("with_manifest", [True, False])
def test_a_file_of_another_length_is_refused(tmp_path: Path, part: str, cut: str, with_manifest: bool) -> None:
    entry = write(tmp_path / "s")
    path = tmp_path / f"s.{part}"
    size = path.stat().st_size
    short = {"empty": 0, "in the header": 9, "in the middle": size // 2, "one byte short": size - 1}.get(cut, size + 1)
    os.truncate(path, short)
    with pytest.raises(DataError) as refused:
        IndexedStream(tmp_path / "s", expect=entry if with_manifest else None)
    message = str(refused.value)
    assert str(path) in message
    assert "copy it again or rebuild" in message
    if with_manifest:
        assert f"{short} bytes, the manifest says {size}" in message


@pytest.mark.parametrize("part", ["bin", "idx"])
def test_a_file_cut_after_opening_is_refused_before_it_is_mapped(tmp_path: Path, part: str) -> None:
    stream = IndexedStream(tmp_path / "s", expect=write(tmp_path / "s"))
    os.truncate(tmp_path / f"s.{part}", 3)
    with pytest.raises(DataError, match=r"3 bytes, .* when it was opened"):
        stream[0]


@pytest.mark.parametrize("part", ["bin", "idx"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (gzip.compress(b"tokens"), "gzip data"),
        (b"<!DOCTYPE html><html><head><title>404 Not Found</title>", "an HTML page"),
        (b"\n  <html><body>Sign in</body>", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n", "a Git-LFS pointer"),
        (b"", "an empty file"),
        (bytes(512), "zeros"),
        (b"TNTIDX\0\0" + bytes(40), "Megatron's old index format"),
    ],
)
def test_a_foreign_file_is_named_for_what_it_looks_like(tmp_path: Path, part: str, content: bytes, words: str) -> None:
    entry = write(tmp_path / "s")
    (tmp_path / f"s.{part}").write_bytes(content)
    with pytest.raises(DataError, match=f"s.{part}: .*it looks like {words}"):
        IndexedStream(tmp_path / "s", expect=entry)
    if part == "idx":
        with pytest.raises(DataError, match=f"not a Megatron index, it looks like {words}"):
            IndexedStream(tmp_path / "s")


@pytest.mark.parametrize(("offset", "value", "words"), [(9, 2, "version 2, dtype code 8"), (17, 9, "dtype code 9")])
def test_another_version_or_dtype_is_refused(tmp_path: Path, offset: int, value: int, words: str) -> None:
    write(tmp_path / "s")
    index = bytearray((tmp_path / "s.idx").read_bytes())
    index[offset] = value
    (tmp_path / "s.idx").write_bytes(index)
    with pytest.raises(DataError, match=words):
        IndexedStream(tmp_path / "s")


def test_a_missing_file_and_another_stream_are_refused(tmp_path: Path) -> None:
    entry = write(tmp_path / "s")
    write(tmp_path / "t", ([1, 2], [3, 4], [5, 6, 7, 8, 9]))  # as many sequences and bytes
    write(tmp_path / "u", ([5, 9, 2], [7, 2], [11, 12, 13, 2]), "i2")
    assert len(IndexedStream(tmp_path / "t", expect=entry)) == 3
    with pytest.raises(DataError, match="3 sequences of int16, the manifest says 3 of uint16"):
        IndexedStream(tmp_path / "u", expect=entry)
    os.unlink(tmp_path / "s.bin")
    with pytest.raises(DataError, match=r"s\.bin: missing"):
        IndexedStream(tmp_path / "s", expect=entry)


@pytest.mark.parametrize(("at", "value"), [(34 + 12, 1 << 40), (34 + 12, -4), (34 + 12, 10)])
def test_a_pointer_outside_the_data_is_refused_when_it_is_followed(tmp_path: Path, at: int, value: int) -> None:
    entry = write(tmp_path / "s", ([5, 9, 2], [7, 2], [11]))
    index = bytearray((tmp_path / "s.idx").read_bytes())
    struct.pack_into("<q", index, at, value)
    (tmp_path / "s.idx").write_bytes(index)
    stream = IndexedStream(tmp_path / "s", expect=entry)
    assert stream[1].tolist() == [7, 2]
    with pytest.raises(DataError, match=r"s\.idx: sequence 0 claims 3 elements at byte .* of 12"):
        stream[0]


def test_offsets_beyond_two_and_four_gib(tmp_path: Path) -> None:
    """A sparse file of 5 GiB: three sequences, one beyond 2^31 and one beyond 2^32."""
    places = [0, 2**31 + 6, 2**32 + 10]
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 3, 2)
    index += struct.pack("<3i", 2, 2, 2) + struct.pack("<3q", *places) + struct.pack("<2q", 0, 3)
    (tmp_path / "s.idx").write_bytes(index)
    with open(tmp_path / "s.bin", "wb") as file:
        for i, place in enumerate(places):
            file.seek(place)
            file.write(struct.pack("<2H", 1000 + i, 2))
    stream = IndexedStream(tmp_path / "s")
    assert [stream[i].tolist() for i in range(3)] == [[1000, 2], [1001, 2], [1002, 2]]
    assert stream.pointers.tolist() == places
    assert (tmp_path / "s.bin").stat().st_size == 2**32 + 14
    os.truncate(tmp_path / "s.bin", 2**32 + 13)
    with pytest.raises(DataError, match="4,294,967,309 bytes, its index says 4,294,967,310"):
        IndexedStream(tmp_path / "s")


@pytest.mark.parametrize(
    ("vocabulary", "dtype"),
    [(300, "uint16"), (65_499, "uint16"), (65_500, "int32"), (65_536, "int32"), (128_256, "int32")],
)
def test_token_dtype_at_the_boundary(vocabulary: int, dtype: str) -> None:
    assert token_dtype(vocabulary).name == dtype

"""JSON arrays, csv and packed files as they are in the wild; a fault keeps to its record wherever that can be told."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaprior.data_tools.options import BuildOptions
from megaprior.data_tools.readers import tables
from megaprior.data_tools.readers.samples import Rejected
from megaprior.data_tools.readers.streams import open_input, packing
from megaprior.data_tools.readers.tables import read_records


def read(data: bytes, format: str, **options: Any) -> list[tuple[str, Any]]:
    found = read_records(io.BytesIO(data), format, BuildOptions(**options))
    return [(key, record.reason if isinstance(record, Rejected) else record) for key, record in found]


# ---------------------------------------------------------------- JSON arrays

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
RECORDS = st.lists(st.dictionaries(st.sampled_from(["image", "caption", "c\u00e9\u4e2d\U0001f600"]), JSON), max_size=8)


@settings(deadline=None)
@given(records=RECORDS, chunk=st.integers(1, 40), indent=st.sampled_from([None, 1]), ascii=st.booleans())
def test_an_array_is_read_whatever_the_window(records: list, chunk: int, indent: int | None, ascii: bool) -> None:
    data = json.dumps(records, indent=indent, ensure_ascii=ascii).encode("utf-8", "surrogatepass")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "_CHUNK", chunk)
        assert read(data, "json") == [(f"item {number}", record) for number, record in enumerate(records)]


@pytest.mark.parametrize("chunk", [1, 2, 7, 1 << 20])
@pytest.mark.parametrize(
    ("data", "reasons"),
    [
        (b'[{"a": 1}, {"a": 2}', [None, None, "it ends without ']', so it is cut short here"]),
        (b'[{"a": 1}, {"a": ', [None, "damaged file: the rest is lost (not JSON: "]),
        (b'[{"a": 1}, {"a": "x', [None, "not JSON: Unterminated string"]),
        (b'[{"a": 1} {"a": 2}]', [None, "not JSON: '{' after item 0, expected ','"]),
        (b'[{"a": 1}, x]', [None, "not JSON: Expecting value"]),
        (b'[{"a": 1}]]', [None, "not JSON: ']' after the end of the array"]),
        (b'[{"a": 1}, 12, "x", null, {"a": 2}]', [None, "a number", "a string", "null", None]),
        (b'\xef\xbb\xbf\r\n [\r\n{"a": 1}\r\n]\r\n', [None]),
        (b'{"a": 1}\n{"a": 2}\n', [None, None]),
        (b"[]", []),
        (b"dog", ["not JSON: it begins with 'd', expected an array of records"]),
        (b"", ["expected an array of records"]),
        (b"[" * 100_000, ["not JSON: "]),
    ],
)
def test_what_an_array_can_suffer(
    data: bytes, reasons: list[str | None], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if len(data) > 1000 and chunk < 100:
        chunk = 1000
    monkeypatch.setattr(tables, "_CHUNK", chunk)
    found = read(data, "json")
    assert len(found) == len(reasons)
    for (key, record), reason, number in zip(found, reasons, range(9), strict=False):
        assert key == f"item {number}"
        assert isinstance(record, dict) if reason is None else reason in record


def test_bad_characters_of_an_array_stay_in_their_record() -> None:
    data = b'[{"a": "\xff"}, {"a": "\\ud800"}, {"a": "\x00"}, {"a": "\xe4\xb8\xad"}]'
    assert [record["a"] for _, record in read(data, "json")] == ["\udcff", "\ud800", "\0", "中"]


def test_an_endless_item_is_given_up_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_RECORD_BYTES", 1 << 20)
    monkeypatch.setattr(tables, "_CHUNK", 1 << 10)

    class Endless(io.BytesIO):
        given = 0

        def read(self, size: int | None = -1) -> bytes:
            assert size is not None
            self.given += size
            return b'[{"a": "' if self.given == size else b"x" * size

    stream = Endless()
    ((key, rejected),) = read_records(stream, "json", BuildOptions())
    assert key == "item 0"
    assert isinstance(rejected, Rejected)
    assert "an item over 1 MiB" in rejected.reason
    assert stream.given < 4 << 20


# ---------------------------------------------------------------- csv

CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), max_size=20)


@settings(deadline=None)
@given(rows=st.lists(st.tuples(CELLS, CELLS), max_size=8), end=st.sampled_from(["\n", "\r\n"]), bom=st.booleans())
def test_csv_is_read_as_it_is_written(rows: list[tuple[str, str]], end: str, bom: bool) -> None:
    file = io.StringIO(newline="")
    writer = csv.writer(file, lineterminator=end)
    writer.writerows([("image", "caption"), *rows])
    data = (b"\xef\xbb\xbf" if bom else b"") + file.getvalue().encode()
    assert [record for _, record in read(data, "csv")] == [{"image": a, "caption": b} for a, b in rows]


def test_csv_faults_name_their_lines() -> None:
    data = (
        b"image,caption\n"
        b'a.jpg,"two\nlines"\n'
        b"b.jpg\n"
        b"c.jpg,caf\xe9\n"
        b"\n"
        b'd.jpg,"never closed\n'
        b"e.jpg,swallowed\n"
        b'f.jpg,"fine"\n'
        b"g.jpg,dog\n"
    )
    assert read(data, "csv") == [
        ("lines 2 to 3", {"image": "a.jpg", "caption": "two\nlines"}),
        ("line 4", "wrong number of columns: 1, the first line has 2"),
        ("line 5", "invalid UTF-8: byte 0xe9 at position 3"),
        ("line 6", "wrong number of columns: the line is empty"),
        ("lines 7 to 9", "not csv: ',' expected after '\"'"),
        ("line 10", {"image": "g.jpg", "caption": "dog"}),
    ]
    assert read(b'caption\n"never closed\ndog\n', "csv") == [("lines 2 to 3", "not csv: unexpected end of data")]


def test_csv_without_a_known_header_has_numbered_columns() -> None:
    assert read(b"u,dog\nv,cat\n", "csv", caption_column="1") == [
        ("line 1", {"0": "u", "1": "dog"}),
        ("line 2", {"0": "v", "1": "cat"}),
    ]


@pytest.mark.parametrize("delimiter", ["\t", ";"])
def test_quoted_tables_with_another_delimiter(delimiter: str) -> None:
    """What pandas writes with sep="\\t", and spreadsheets where the comma is the decimal point."""
    data = f'image{delimiter}caption\na.jpg{delimiter}"one, {delimiter}\ntwo"\nb.jpg{delimiter}three, four\n'.encode()
    assert [record for _, record in read(data, "csv")] == [
        {"image": "a.jpg", "caption": f"one, {delimiter}\ntwo"},
        {"image": "b.jpg", "caption": "three, four"},
    ]


def test_a_tsv_that_is_quoted_is_told_the_remedy() -> None:
    found = read(b'image\tcaption\na.jpg\t"one\ntwo"\nb.jpg\t"fine" dog\nc.jpg\n', "tsv")
    remedy = " (cells in quotes may hold tabs and line ends: --format csv)"
    assert [record for _, record in found] == [
        {"image": "a.jpg", "caption": '"one'},
        "wrong number of columns: 1, the first line has 2" + remedy,
        {"image": "b.jpg", "caption": '"fine" dog'},
        "wrong number of columns: 1, the first line has 2",
    ]


# ---------------------------------------------------------------- packed files


def packed(data: bytes, codec: str, path: Path) -> Path:
    if codec == "gzip":
        path.write_bytes(gzip.compress(data))
    else:
        with pa.CompressedOutputStream(str(path), codec) as file:
            file.write(data)
    return path


LINES = b"".join(json.dumps({"caption": f"dog {number}", "n": number**5}).encode() + b"\n" for number in range(20_000))


@pytest.mark.parametrize("codec", ["gzip", "zstd", "lz4"])
def test_packed_files_are_told_by_content_and_read_through_joints(tmp_path: Path, codec: str) -> None:
    path = packed(LINES, codec, tmp_path / "a.jsonl")
    assert packing(path) == codec
    path.write_bytes(path.read_bytes() * 2)  # frames one after another, as parallel packers write
    with open_input(path) as opened:
        found = list(read_records(opened.stream, "jsonl", BuildOptions()))
        assert opened.consumed() == path.stat().st_size
    assert len(found) == 40_000
    assert [record for _, record in found[20_000:]] == [record for _, record in found[:20_000]]


@pytest.mark.parametrize("format", ["jsonl", "csv", "json", "tsv"])
@pytest.mark.parametrize("codec", ["gzip", "zstd", "lz4"])
@pytest.mark.parametrize("lost", [1, 5000])
def test_a_packed_file_cut_short_says_so(tmp_path: Path, format: str, codec: str, lost: int) -> None:
    bodies = {
        "jsonl": LINES,
        "json": b"[" + LINES.replace(b"}\n", b"},\n")[:-2] + b"]",
        "csv": b"caption,n\n" + b"".join(b'"dog, %d",%d\n' % (n, n**5) for n in range(20_000)),
        "tsv": b"caption\tn\n" + b"".join(b"dog %d\t%d\n" % (n, n**5) for n in range(20_000)),
    }
    path = packed(bodies[format], codec, tmp_path / "a")
    path.write_bytes(path.read_bytes()[:-lost])
    with open_input(path) as opened:
        found = list(read_records(opened.stream, format, BuildOptions()))
    *whole, (key, last) = found
    assert isinstance(last, Rejected)
    assert last.reason.startswith("damaged file: the rest is lost (")
    assert key == last.key
    assert all(isinstance(record, dict) for _, record in whole)
    assert len(whole) <= 20_000


def test_a_broken_disk_is_no_damaged_file(tmp_path: Path) -> None:
    path = packed(LINES, "zstd", tmp_path / "a.jsonl.zst")

    class Broken(io.FileIO):
        def read(self, size: int | None = -1) -> bytes:
            raise OSError(5, "Input/output error")

    from megaprior.data_tools.readers.streams import _Unpacked

    with pytest.raises(OSError, match="Input/output error"):
        _Unpacked(Broken(str(path)), "zstd").readinto(bytearray(10))

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from megaprior.data_tools.readers.inputs import find_sources, sampled_digest
from megaprior.data_tools.readers.streams import open_input
from megaprior.errors import DataError, UsageError

MakeTar = Callable[..., Path]


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def test_formats_by_suffix_and_names_without_their_place(tmp_path: Path, make_tar: MakeTar) -> None:
    paths = [
        make_tar("b.tgz", [("0.txt", b"dog")]),
        write(tmp_path / "x" / "c.jsonl.gz", gzip.compress(b"{}\n")),
        write(tmp_path / "x" / "d.TSV", b"a\tb\n"),
        write(tmp_path / "e.txt", b"dog\n"),
    ]
    sources, left_out = find_sources(paths)
    assert [(s.name, s.format, s.size) for s in sources] == [
        ("b.tgz", "webdataset", paths[0].stat().st_size),
        ("c.jsonl.gz", "jsonl", paths[1].stat().st_size),
        ("d.TSV", "tsv", 4),
        ("e.txt", "text", 4),
    ]
    assert left_out == []


def test_names_are_the_same_wherever_the_folders_lie(tmp_path: Path) -> None:
    names = []
    for place in ("here", "there/deeper"):
        for name in ("one/a.txt", "two/a.txt", "two/b.txt"):
            write(tmp_path / place / name, name.encode())
        sources, _ = find_sources([tmp_path / place / "one" / "a.txt", tmp_path / place / "two"])
        names.append([(source.name, source.digest) for source in sources])
    assert names[0] == names[1]
    assert [name for name, _ in names[0]] == ["one/a.txt", "two/a.txt", "two/b.txt"]


def test_a_folder_stands_for_its_first_format_and_the_rest_is_told(tmp_path: Path, make_tar: MakeTar) -> None:
    tars = [make_tar(name, [("0.txt", b"dog")]) for name in ("1.tar", "0.tar")]
    note = write(tmp_path / "SOURCE.txt", b"where this comes from\n")
    write(tmp_path / ".hidden.tar", b"")
    sources, left_out = find_sources([tmp_path])
    assert [source.path for source in sources] == tars[::-1]
    assert left_out == [note]
    assert [source.path for source in find_sources([tmp_path], format="text")[0]] == [note]


def test_a_linked_file_keeps_the_name_of_its_link(tmp_path: Path) -> None:
    write(tmp_path / "store" / "3f9a", b"dog\n")
    (tmp_path / "captions.txt").symlink_to(tmp_path / "store" / "3f9a")
    assert [source.name for source in find_sources([tmp_path / "captions.txt"])[0]] == ["captions.txt"]


def test_gzip_is_told_by_content(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", gzip.compress(b"dog\n"))
    with open_input(path) as opened:
        assert opened.stream.read() == b"dog\n"
        assert opened.consumed() == path.stat().st_size


def test_the_sampled_digest_notices_size_and_ends(tmp_path: Path) -> None:
    data = bytearray(300_000)
    path = write(tmp_path / "a", bytes(data))
    digests = {sampled_digest(path)}
    for position in (0, 150_000, 299_999):
        data[position] ^= 1
        digests.add(sampled_digest(write(path, bytes(data))))
    digests.add(sampled_digest(write(path, bytes(data[:-1]))))
    assert len(digests) == 5


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.tar", b"", "empty"),
        ("a.tar", b"x" * 2000, "not a tar archive"),
        ("a.tar", b"<!DOCTYPE html><html>404</html>", "looks like an HTML page"),
        ("a.jsonl", b"<html><body>Sign in</body>", "looks like an HTML page"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git-LFS pointer"),
        ("a.txt", b"PK\x03\x04rest", "zip archive"),
        ("a.txt", "dog\n".encode("utf-16"), "UTF-16 text"),
        ("a.txt.gz", gzip.compress(b""), "empty"),
        ("a.txt.gz", gzip.compress(b"dog" * 1000)[:8], "cannot be read"),
        ("a.parquet", b"<html><body>Sign in</body>", "not a parquet file, it looks like an HTML page"),
        ("a.jsonl", b"PAR1 and more", "a parquet file, not jsonl; add --format parquet"),
        ("a.arrow", b"PAR1 and more", "a parquet file, not arrow; add --format parquet"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd rubbish", "cannot be read"),
    ],
)
def test_foreign_files_are_refused_saying_what_they_are(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    path = write(tmp_path / name, data)
    with pytest.raises(DataError, match=message) as caught:
        find_sources([path])
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tar_under_another_name_is_told(tmp_path: Path, make_tar: MakeTar) -> None:
    path = make_tar("a.tar", [("0.txt", b"dog")]).rename(tmp_path / "a.txt")
    with pytest.raises(DataError, match="a tar archive, not text; add --format webdataset"):
        find_sources([path])
    assert find_sources([path], format="webdataset")[0][0].format == "webdataset"


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(DataError, match="not a regular file"):
        find_sources([tmp_path / "a.txt"])


def test_paths_that_cannot_be_meant(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"dog\n")
    with pytest.raises(UsageError, match="no such file"):
        find_sources([tmp_path / "b.txt"])
    with pytest.raises(UsageError, match="given twice"):
        find_sources([path, tmp_path / "." / "a.txt"])
    with pytest.raises(UsageError, match="add --format"):
        find_sources([write(tmp_path / "a.data", b"dog\n")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no file to read"):
        find_sources([tmp_path / "empty"])
    with pytest.raises(UsageError, match="--split train: no input is a folder of splits"):
        find_sources([path], split="train")


@pytest.mark.parametrize(
    ("data", "format"),
    [(b"PAR1", "parquet"), (b"ARROW1\0\0", "arrow"), (b'\n [{"a": 1}]', "json"), (b'\xef\xbb\xbf{"a": 1}\n', "jsonl")],
)
def test_a_file_without_a_telling_suffix_is_known_by_its_first_bytes(tmp_path: Path, data: bytes, format: str) -> None:
    assert find_sources([write(tmp_path / "part-0", data)])[0][0].format == format

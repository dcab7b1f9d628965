from __future__ import annotations

import gzip
import io

import pytest

from megaprior.data_tools.readers import lines
from megaprior.data_tools.readers.lines import decode, read_lines
from megaprior.data_tools.readers.samples import Unfit


def texts(data: bytes, start: int = 0, end: int | None = None) -> list[str | None]:
    return [line.problem or line.text for line in read_lines(io.BytesIO(data), start=start, end=end)]


def test_line_ends_and_byte_order_mark_are_no_text() -> None:
    assert texts(b"\xef\xbb\xbfone\r\ntwo\n\nthree") == ["one", "two", "", "three"]


def test_line_separators_of_unicode_do_not_end_a_line() -> None:
    assert texts("a\u2028b\x85c\x0cd\n".encode()) == ["a\u2028b\x85c\x0cd"]


def test_numbers_and_offsets() -> None:
    found = [(line.number, line.offset) for line in read_lines(io.BytesIO(b"ab\n\ncde\n"))]
    assert found == [(1, 0), (2, 3), (3, 4)]


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b"caf\xe9 noir", "invalid UTF-8: byte 0xe9 at position 3"),
        (b"ab\xed\xa0\x80", "invalid UTF-8: byte 0xed at position 2"),  # a surrogate, which UTF-8 has not
        (b"a\0b", "NUL character: at position 1"),
    ],
)
def test_a_broken_line_is_named_and_its_neighbours_survive(raw: bytes, problem: str) -> None:
    assert texts(b"before\n" + raw + b"\nafter\n") == ["before", problem, "after"]
    with pytest.raises(Unfit, match=problem):
        decode(raw)


def test_an_endless_line_is_skipped_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 10)
    found = list(read_lines(io.BytesIO(b"0123456789\n" + b"x" * 35 + b"\nafter\n")))
    assert [line.problem is None for line in found] == [True, False, True]
    assert (found[2].text, found[2].offset) == ("after", 11 + 36)


def test_every_cut_of_a_file_gives_every_line_once() -> None:
    data = b"one\ntwo\r\n\nfour\n\nsix without an end"
    whole = [(line.offset, line.text) for line in read_lines(io.BytesIO(data))]
    for size in range(1, len(data) + 2):
        cuts = range(0, len(data), size)
        parts = [read_lines(io.BytesIO(data), start=start, end=start + size) for start in cuts]
        assert [(line.offset, line.text) for part in parts for line in part] == whole, size


@pytest.mark.parametrize("keep", [-1, -9, 40])
def test_a_gzip_cut_short_gives_its_lines_then_the_damage(keep: int) -> None:
    # Random-looking lines, so that the packed stream cannot hold them all in its first bytes.
    data = b"".join(b"%d %x\n" % (i, i * i * 7919 % 65537) for i in range(200))
    packed = gzip.compress(data, mtime=0)[:keep]
    found = list(read_lines(gzip.GzipFile(fileobj=io.BytesIO(packed))))
    assert found[-1].problem is not None
    assert found[-1].problem.startswith("damaged file: the rest is lost")
    expected = data.decode().splitlines()
    assert [line.text for line in found[:-1]] == expected[: len(found) - 1]
    assert keep != -1 or len(found) == 201  # only the closing checksum is missing, no line is


def test_a_gzip_with_a_flipped_bit_is_damage() -> None:
    packed = bytearray(gzip.compress(b"a line\n" * 50, mtime=0))
    packed[-5] ^= 1  # in the checksum
    assert list(read_lines(gzip.GzipFile(fileobj=io.BytesIO(bytes(packed)))))[-1].problem is not None

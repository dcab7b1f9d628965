from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megaprior.data_tools.options import BuildOptions
from megaprior.data_tools.readers import pictures, records
from megaprior.data_tools.readers.inputs import find_sources
from megaprior.data_tools.readers.records import check_columns, find_images, read_table, read_text
from megaprior.data_tools.readers.samples import Caption, Rejected, Sample, Unfit


def jsonl(*rows: Any) -> bytes:
    return b"".join((json.dumps(row) if not isinstance(row, str) else row).encode() + b"\n" for row in rows)


def read(data: bytes, format: str = "jsonl", **options: Any) -> list[Sample | Rejected]:
    return list(read_table(io.BytesIO(data), format, BuildOptions(**options)))


def text(data: bytes, *, start: int = 0, end: int | None = None, **options: Any) -> list[Sample | Rejected]:
    return list(read_text(io.BytesIO(data), BuildOptions(**options), start=start, end=end))


def sample(key: str, caption: str, image: bytes | None = None) -> Sample:
    return Sample(key=key, captions=(Caption(key=key, text=caption),), image=image)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (tmp_path / "images" / "deep").mkdir(parents=True)
    (tmp_path / "images" / "a.jpg").write_bytes(b"A")
    (tmp_path / "images" / "deep" / "b.jpg").write_bytes(b"B")
    (tmp_path / "secret.jpg").write_bytes(b"S")
    return tmp_path / "images"


def test_records_with_an_image_folder(images: Path) -> None:
    data = jsonl({"image": "a.jpg", "caption": "dog"}, {"image": "deep/b.jpg", "captions": ["one", "two"]})
    assert read(data, images=images) == [
        sample("line 1", "dog", b"A"),
        Sample(
            key="line 2",
            captions=(Caption(key="line 2#0", text="one"), Caption(key="line 2#1", text="two")),
            image=b"B",
        ),
    ]


def test_columns_of_other_names(images: Path) -> None:
    data = jsonl({"file": "a.jpg", "alt": "dog"})
    assert read(data, images=images, image_column="file", caption_column="alt") == [sample("line 1", "dog", b"A")]


def test_captions_alone_touch_no_image() -> None:
    assert read(jsonl({"image": "gone.jpg", "caption": "dog"}), text=True) == [sample("line 1", "dog")]


def test_a_subset_of_captions_alone_uses_the_images_at_hand(images: Path) -> None:
    data = jsonl({"image": "a.jpg", "caption": "dog"}, {"image": "gone.jpg", "caption": "cat"})
    found = read(data, text=True, subset=(0.0, 0.5), images=images)
    assert found == [sample("line 1", "dog", b"A"), sample("line 2", "cat")]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("", "not JSON"),
        ("{'image': 1}", "not JSON"),
        ("[]", "not a JSON object: a list"),
        ({"image": "a.jpg"}, "no column 'caption': the record has 'image'"),
        ({"image": "a.jpg", "caption": None}, "column 'caption' of a wrong type: null"),
        ({"image": "a.jpg", "caption": "x\ud800"}, "lone surrogate: U+D800 at position 1"),
        ({"caption": "dog"}, "no image name: null"),
        ({"image": ["a.jpg", "deep/b.jpg"], "caption": "dog"}, "more than one image: a list of 2"),
        ({"image": [], "caption": "dog"}, "no image: a list of 0"),
        ({"image": 7, "caption": "dog"}, "no image name: a number"),
        ({"image": "x" * 5000, "caption": "dog"}, "no image: 'xxx"),
        ({"image": "", "caption": "dog"}, "no image name: an empty string"),
        ({"image": "gone.jpg", "caption": "dog"}, "no image: 'gone.jpg' is not in the image folder"),
        ({"image": "a.jpg/x.jpg", "caption": "dog"}, "no image: 'a.jpg/x.jpg' is not in the image folder"),
        ({"image": "deep", "caption": "dog"}, "no image: deep is not a file"),
        ({"image": "../secret.jpg", "caption": "dog"}, "unsafe image name: '../secret.jpg' leads out of"),
        ({"image": "deep/../../secret.jpg", "caption": "dog"}, "unsafe image name"),
        ({"image": "/etc/passwd", "caption": "dog"}, "unsafe image name: '/etc/passwd' leads out of"),
        ({"image": "a.jpg\0", "caption": "dog"}, "unsafe image name"),
        ({"image": "a\ud800.jpg", "caption": "dog"}, "no image: 'a\\ud800.jpg'"),
    ],
)
def test_a_broken_record_is_named_and_its_neighbours_survive(images: Path, row: Any, reason: str) -> None:
    good = {"image": "a.jpg", "caption": "dog"}
    first, rejected, last = read(jsonl(good, row, good), images=images)
    assert (first, last) == (sample("line 1", "dog", b"A"), sample("line 3", "dog", b"A"))
    assert isinstance(rejected, Rejected)
    assert (rejected.key, rejected.reason[: len(reason)]) == ("line 2", reason)


def test_pipes_and_huge_files_are_not_read(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(images / "pipe.jpg")
    monkeypatch.setattr(pictures, "MAX_IMAGE_BYTES", 0)
    found = read(jsonl({"image": "pipe.jpg", "caption": "d"}, {"image": "a.jpg", "caption": "d"}), images=images)
    assert [item.reason for item in found if isinstance(item, Rejected)] == [
        "no image: pipe.jpg is not a file",
        "image too large: 1 bytes, at most 0",
    ]


def test_tables_with_and_without_a_header() -> None:
    assert read(b"caption\turl\ndog\tu\ncat\n", "tsv", text=True) == [
        sample("line 2", "dog"),
        Rejected(key="line 3", reason="wrong number of columns: 1, the first line has 2"),
    ]
    assert read(b"u\tdog\nu\tcat\n", "tsv", text=True, caption_column="1") == [
        sample("line 1", "dog"),
        sample("line 2", "cat"),
    ]


def test_plain_text_is_one_caption_a_line() -> None:
    assert text(b"\xef\xbb\xbf dog \r\n\n<image> </s>\nc\xff\n") == [
        sample("line 1", "dog"),
        Rejected(key="line 2", reason="caption is empty"),
        sample("line 3", "<image> </s>"),
        Rejected(key="line 4", reason="invalid UTF-8: byte 0xff at position 1"),
    ]


def test_a_later_cut_is_keyed_by_byte() -> None:
    data = b"one\ntwo\nthree\n"
    assert text(data, start=0, end=5) == [sample("line 1", "one"), sample("line 2", "two")]
    assert text(data, start=5, end=14) == [sample("byte 8", "three")]


def test_documents_are_cut_at_line_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    assert text(b"one\n\n two\nx\xff\nend", documents=True) == [
        Rejected(key="line 4", reason="invalid UTF-8: byte 0xff at position 1"),
        sample("line 1", "one\n\n two\nend"),
    ]
    monkeypatch.setattr(records, "DOCUMENT_BYTES", 8)
    assert text(b"one\ntwo\nthree\n", documents=True) == [sample("line 1", "one\ntwo"), sample("line 3", "three")]
    assert text(b"\n \n", documents=True) == [Rejected(key="line 1", reason="document is blank")]


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        (
            {"image_url": "https://x/1.jpg", "capsfusion": "dog"},
            {"caption_column": "capsfusion"},
            "--url_col image_url --caption_col capsfusion",
        ),
        ({"link": "http://x/1.jpg", "caption": "dog"}, {}, "--input_format jsonl --url_col link --caption_col caption"),
        (
            {"photo": "a.jpg", "caption": "dog"},
            {},
            r"no column 'image' \(columns: 'photo', 'caption'\); name it with --image-column",
        ),
        ({"image": "gone.jpg", "caption": "dog"}, {}, "'gone.jpg' is neither beside it nor in images/"),
    ],
)
def test_why_a_file_has_no_images(tmp_path: Path, row: dict, options: dict, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl("broken first line", row))
    (source,), _ = find_sources([tmp_path / "a.jsonl"])
    with pytest.raises(Unfit, match=message):
        find_images(source, BuildOptions(**options))


def test_where_images_are_looked_for(images: Path) -> None:
    for place, name, expected in (
        (images.parent, "a.jpg", images),
        (images, "a.jpg", images),
        (images.parent, "images/a.jpg", images.parent),
    ):
        (place / "a.jsonl").write_bytes(jsonl({"image": name, "caption": "dog"}))
        (source,), _ = find_sources([place / "a.jsonl"])
        assert find_images(source, BuildOptions()) == expected
        assert find_images(source, BuildOptions(images=Path("elsewhere"))) == Path("elsewhere")


def test_a_wrong_caption_column_is_refused_before_any_work(shared: Callable[[str], Path]) -> None:
    (source,), _ = find_sources([shared("capsfusion_10k") / "capsfusion_example.jsonl.gz"])
    with pytest.raises(Unfit, match=r"no column 'caption' \(columns: 'laion_2b', 'laion_coco', 'capsfusion'\)"):
        check_columns(source, BuildOptions(text=True))
    (source,), _ = find_sources([shared("cc3m_val") / "Validation_GCC-1.1.0-Validation.tsv.gz"])
    with pytest.raises(Unfit, match="for example --caption-column 0"):
        check_columns(source, BuildOptions(text=True))
    with pytest.raises(Unfit, match="put a header line, 'caption' and 'url', on top"):
        find_images(source, BuildOptions())
    check_columns(source, BuildOptions(text=True, caption_column="0"))

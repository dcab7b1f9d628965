"""Several captions of one image: from lists, from columns, all of them or one; and lists of URLs, which are explained."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from megaprior.data_tools.building.plan import make_plan
from megaprior.data_tools.building.sharding import read_job
from megaprior.data_tools.options import BuildOptions
from megaprior.data_tools.readers.captions import record_captions
from megaprior.data_tools.readers.inputs import find_sources
from megaprior.data_tools.readers.samples import Caption, Unfit
from megaprior.errors import DataError

NAMES = ("capsfusion", "laion_2b", "laion_coco")


def captions(record: dict, **options: Any) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    kept, refused = record_captions("k", record, BuildOptions(**options))
    return [(caption.key, caption.text) for caption in kept], [(item.key, item.reason) for item in refused]


def test_several_columns_are_several_captions() -> None:
    record = {"laion_2b": "raw", "laion_coco": None, "capsfusion": "fused", "lists": ["a", " ", "b"]}
    assert captions(record, caption_column=("capsfusion", "laion_2b")) == (
        [("k#capsfusion", "fused"), ("k#laion_2b", "raw")],
        [],
    )
    kept, refused = captions(record, caption_column=("laion_coco", "laion_2b", "gone", "lists"))
    assert kept == [("k#laion_2b", "raw"), ("k#lists#0", "a"), ("k#lists#2", "b")]
    assert [(key, reason.split(":")[0]) for key, reason in refused] == [
        ("k#laion_coco", "column 'laion_coco' of a wrong type"),
        ("k#gone", "no column 'gone'"),
        ("k#lists#1", "caption is blank"),
    ]


def test_the_first_usable_caption_in_the_order_asked_for() -> None:
    record = {"laion_2b": "raw", "laion_coco": None, "capsfusion": " "}
    assert captions(record, caption_column=("capsfusion", "laion_coco", "laion_2b"), captions="first") == (
        [("k#laion_2b", "raw")],
        [],
    )
    assert captions({"captions": ["", None, "c", "d"]}, captions="first") == ([("k#2", "c")], [])
    kept, refused = captions({"a": None, "b": ""}, caption_column=("a", "b"), captions="first")
    assert (kept, len(refused)) == ([], 2)


def test_a_random_caption_is_the_same_every_time_and_fair() -> None:
    drawn: Counter[str] = Counter()
    for number in range(900):
        record = {"captions": [f"{letter}{number}" for letter in "abc"]}
        (first,), _ = captions(record, captions="random")
        assert captions(record, captions="random")[0] == [first]
        drawn[first[1][0]] += 1
    assert set(drawn) == {"a", "b", "c"}
    assert min(drawn.values()) > 240  # 300 expected, standard deviation 14


def test_an_annotation_belongs_to_a_single_caption() -> None:
    record = {"a": " dog", "b": "cat", "words": [[1, 4, 1]]}
    assert record_captions("k", record, BuildOptions(caption_column="a"))[0] == [
        Caption(key="k", text="dog", words=((0, 3, 1),))
    ]
    kept, _ = record_captions("k", record, BuildOptions(caption_column=("a", "b")))
    assert [caption.words for caption in kept] == [None, None]


def test_one_column_that_is_missing_refuses_the_record() -> None:
    with pytest.raises(Unfit, match="no column 'alt': the record has 'caption'"):
        captions({"caption": "x"}, caption_column="alt")


# ---------------------------------------------------------------- lists of URLs (FAULTS 41)

RECORD = {"image_url": "https://x/1.jpg", "laion_2b": "raw", "laion_coco": "c", "capsfusion": "fused", "width": 3}


def advice(path: Path, **options: Any) -> list[str]:
    with pytest.raises(DataError, match="of image URLs, not of images") as caught:
        make_plan([path], BuildOptions(**options), fingerprint="t")
    assert "\n" not in str(caught.value)
    command = str(caught.value).split("&& ", 1)[1].split(" (or take", 1)[0]
    return shlex.split(command)


def test_a_parquet_of_urls_gets_its_own_command(tmp_path: Path) -> None:
    """CapsFusion as it is published."""
    path = tmp_path / "my data" / "capsfusion_0.parquet"
    path.parent.mkdir()
    parquet.write_table(pa.Table.from_pylist([RECORD]), path)
    command = advice(path, caption_column=NAMES)
    given = dict(zip(command[1::2], command[2::2], strict=True))
    assert command[0] == "img2dataset"
    assert {name: given[name] for name in ("--url_list", "--input_format", "--url_col", "--caption_col")} == {
        "--url_list": str(path),
        "--input_format": "parquet",
        "--url_col": "image_url",
        "--caption_col": "capsfusion",
    }
    assert json.loads(given["--save_additional_columns"]) == ["laion_2b", "laion_coco"]
    assert advice(path.parent)[2] == str(path.parent)  # a folder of many, as it was named
    found = list(read_job(make_plan([path], BuildOptions(text=True, caption_column=NAMES), fingerprint="").jobs[0],
                          BuildOptions(text=True, caption_column=NAMES), lambda _: None))  # fmt: skip
    assert len(found) == 1


@pytest.mark.parametrize(
    ("name", "text", "format", "url"),
    [
        ("a.jsonl", '{"url": "http://x/1.jpg", "caption": "dog"}\n', "jsonl", "url"),
        ("a.json", '[{"link": "http://x/1.jpg", "caption": "dog"}]', "json", "link"),
        ("a.csv", "caption,URL\ndog,http://x/1.jpg\n", "csv", "URL"),
        ("a.tsv", "caption\timage\ndog\thttps://x/1.jpg\n", "tsv", "image"),
        ("a.jsonl", '{"images": ["http://x/1.jpg"], "caption": "dog"}\n', "jsonl", "images"),
    ],
)
def test_other_lists_of_urls(tmp_path: Path, name: str, text: str, format: str, url: str) -> None:
    (tmp_path / name).write_text(text)
    command = advice(tmp_path / name)
    assert command[command.index("--input_format") + 1] == format
    assert command[command.index("--url_col") + 1] == url
    assert command[command.index("--caption_col") + 1] == "caption"
    assert find_sources([tmp_path / name])[0][0].format == format

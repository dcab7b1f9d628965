"""Every format against the same promises: what was written is read, and one bad record costs itself alone."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from format_writers import WRITERS, Row, key
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from megaprior.data.shards import ShardSet, verify
from megaprior.data_tools.building.build import build
from megaprior.data_tools.building.plan import make_plan
from megaprior.data_tools.building.sharding import read_job
from megaprior.data_tools.options import BuildOptions
from megaprior.data_tools.readers.samples import Caption, Rejected, Sample
from megaprior.errors import DataError

FORMATS = list(WRITERS)


def read(path: Path, **options: Any) -> list[Sample | Rejected]:
    """Every sample and refusal of an input, through the plan, as a build reads them."""
    plan = make_plan([path], BuildOptions(**options), fingerprint="t")
    return [item for job in plan.jobs for item in read_job(job, plan.options, lambda _: None)]


def sample(name: str, caption: str, image: bytes | None = b"J") -> Sample:
    return Sample(key=name, captions=(Caption(key=name, text=caption),), image=image)


# Letters of every length in UTF-8, what parsers treat as their own, and what tokenizers might.
LETTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\0\r")
TEXT = st.one_of(
    st.text(LETTERS, min_size=1, max_size=60), st.sampled_from(['"', 'a "b", c', "<image>", "<|eot_id|>", "a\nb"])
)
ROWS = st.lists(
    st.builds(Row, caption=TEXT.filter(lambda text: text.strip()), image=st.binary(min_size=1, max_size=50)),
    min_size=1,
    max_size=12,
)


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=25, deadline=None)
@given(rows=ROWS)
def test_what_is_written_is_read(format: str, rows: list[Row]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = read(WRITERS[format](Path(folder), rows))
        names = [key(format, number, rows) for number in range(len(rows))]
        assert found == [sample(name, row.caption.strip(), row.image) for name, row in zip(names, rows, strict=True)]
        texts = read(WRITERS[format](Path(folder), rows), text=True)
        assert texts == [sample(name, row.caption.strip(), None) for name, row in zip(names, rows, strict=True)]


# FAULTS 38 and 39, in every format that can hold the fault. Tables have one type for a column, so no number among captions.
WRONG = {
    "empty": ("", "caption is empty"),
    "blank": (" \t\u00a0", "caption is blank"),
    "nul": ("a\0b", "NUL character: at position 1"),
    "null": (None, "null"),
    "surrogate": ("ab\ud800", "lone surrogate: U+D800 at position 2"),
    "number": (7, "a number"),
    "object": ({"en": "dog"}, "an object"),
    "list of a number": ([7], "a number"),
}
TYPED = {"csv", "parquet", "parquet struct", "arrow"}
CONVERSATIONS = {"llava", "messages"}


def holds(format: str, wrong: str) -> bool:
    """Whether a file of the format can hold the fault: a typed column of strings cannot hold a number or a surrogate."""
    if format in TYPED and wrong in ("number", "object", "list of a number"):
        return False
    return not (format in TYPED - {"csv"} and wrong == "surrogate")


def expected(format: str, wrong: str) -> str:
    """The reason of the refusal, where the format has a say in it."""
    if format == "csv":  # which knows no null, and whose surrogates are bytes that are no UTF-8
        special = {"null": "caption is empty", "surrogate": "invalid UTF-8: byte 0xed at position 2"}
    elif format in CONVERSATIONS:  # whose turns are stripped before they are looked at
        shape = "conversation of a wrong shape"
        special = {"blank": "caption is empty"} | dict.fromkeys(("null", "number", "object", "list of a number"), shape)
    else:
        special = {}
    return special.get(wrong, WRONG[wrong][1])


@pytest.mark.parametrize(
    ("format", "wrong"), [(format, wrong) for format in FORMATS for wrong in WRONG if holds(format, wrong)]
)
def test_a_wrong_caption_costs_its_record_alone(tmp_path: Path, format: str, wrong: str) -> None:
    rows = [Row("dog"), Row(WRONG[wrong][0]), Row("cat")]
    first, second, third = read(WRITERS[format](tmp_path, rows))
    assert (first, third) == (sample(key(format, 0, rows), "dog"), sample(key(format, 2, rows), "cat"))
    assert isinstance(second, Rejected)
    assert second.key.startswith(key(format, 1, rows))
    assert expected(format, wrong) in second.reason


@pytest.mark.parametrize("format", FORMATS)
def test_a_missing_image_costs_its_record_alone(tmp_path: Path, format: str) -> None:
    rows = [Row("dog"), Row("cow", None), Row("cat")]
    first, second, third = read(WRITERS[format](tmp_path, rows))
    assert (first, third) == (sample(key(format, 0, rows), "dog"), sample(key(format, 2, rows), "cat"))
    assert isinstance(second, Rejected)
    assert second.key == key(format, 1, rows)
    assert second.reason.startswith("no image")
    assert len(read(WRITERS[format](tmp_path, rows), text=True)) == 3


@pytest.mark.parametrize("format", FORMATS)
def test_control_tokens_and_long_captions_are_text(tmp_path: Path, format: str) -> None:
    rows = [Row("<image>"), Row("<|eot_id|> </s> <image>\nx"), Row("dog " * 100_000)]
    found = read(WRITERS[format](tmp_path, rows))
    assert [item.captions[0].text for item in found if isinstance(item, Sample)] == [
        row.caption.strip() for row in rows
    ]


@pytest.mark.parametrize("format", [name for name in FORMATS if name not in ("webdataset", "messages")])
def test_the_caption_column_must_be_there(tmp_path: Path, format: str) -> None:
    path = WRITERS[format](tmp_path, [Row("dog")])
    with pytest.raises(DataError, match=r"no column 'alt' \(columns: .*'image'.*\); name it with --caption-column"):
        read(path, caption_column="alt")
    with pytest.raises(DataError, match=r"no column 'photo' \(columns: .*'image'.*\); name it with --image-column"):
        read(path, image_column="photo")


def pictures() -> dict[str, bytes]:
    """What calls itself a JPEG in web data."""

    def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
        file = io.BytesIO()
        image.save(file, format, **options)
        return file.getvalue()

    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8))
    whole = encoded(noise, "JPEG")
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "whole": whole,
        "truncated": whole[: len(whole) // 2],
        "zeros": bytes(100),
        "html": b"<!DOCTYPE html><html>404</html>",
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n",
        "tiff": encoded(noise, "TIFF"),
        "gif": encoded(noise, "GIF", save_all=True, append_images=[noise.rotate(90)]),
        "cmyk": encoded(noise.convert("CMYK"), "JPEG"),
        "16 bits": encoded(Image.fromarray(np.zeros((4, 5), np.uint16)), "PNG"),
        "palette": encoded(noise.convert("P"), "PNG", transparency=0),
        "rotated": encoded(noise, "JPEG", exif=exif),
        "line": encoded(noise.resize((1, 300)), "PNG"),
    }


@pytest.mark.parametrize("format", FORMATS)
def test_every_kind_of_picture_is_stored_or_refused(tmp_path: Path, format: str, tokenizer_folder: Path) -> None:
    """FAULTS 35: through a whole build, whatever the container."""
    kinds = pictures()
    rows = [Row("a grey star", data) for data in kinds.values()]
    path = WRITERS[format](tmp_path, rows)
    body = build([path], tmp_path / "out", tokenizer=tokenizer_folder, options=BuildOptions())
    shards = ShardSet.open(tmp_path / "out")
    kept = [name for name in kinds if name not in ("truncated", "zeros", "html", "svg", "eps", "tiff")]
    assert [shards.image(index) for index in range(len(shards))] == [kinds[name] for name in kept]
    sizes = shards.image_sizes
    assert sizes is not None
    turned = {"rotated": (24, 32), "16 bits": (5, 4), "line": (1, 300)}
    assert [tuple(size) for size in sizes.tolist()] == [turned.get(name, (32, 24)) for name in kept]
    refused = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert [entry["reason"].split(":")[0] for entry in refused] == [
        "image truncated",
        "image unknown",
        "image html",
        "image svg",
        "image eps",
        "image tiff",
    ]
    numbers = [list(kinds).index(name) for name in ("truncated", "zeros", "html", "svg", "eps", "tiff")]
    assert [entry["sample"] for entry in refused] == [key(format, number, rows) for number in numbers]
    assert body["counts"]["samples"] + body["counts"]["quarantined"] == len(rows)
    assert verify(tmp_path / "out") == []


@pytest.mark.parametrize("format", [name for name in FORMATS if name not in ("webdataset",)])
def test_several_captions_share_one_stored_image(
    tmp_path: Path, format: str, tokenizer_folder: Path, picture: Callable[..., bytes]
) -> None:
    if format in CONVERSATIONS or format == "csv":
        rows = [Row("red square", picture(1)), Row("blue star", picture(1))]
    else:
        rows = [Row(["red square", "blue star"], picture(1))]
    path = WRITERS[format](tmp_path, rows)
    body = build([path], tmp_path / "out", tokenizer=tokenizer_folder, options=BuildOptions())
    assert (body["counts"]["samples"], body["counts"]["images"]) == (2, 1)

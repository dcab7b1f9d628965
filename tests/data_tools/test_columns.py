"""Parquet and arrow: only needed columns, a few rows at a time, and what is lost of a damaged file is told."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from format_writers import Row, table, write_arrow, write_parquet
from pyarrow import parquet

from megaprior.data.shards import ShardSet, verify
from megaprior.data_tools.building.build import build
from megaprior.data_tools.building.plan import make_plan
from megaprior.data_tools.building.sharding import read_job
from megaprior.data_tools.options import BuildOptions
from megaprior.data_tools.readers.columns import open_rows, row_group_ranges
from megaprior.data_tools.readers.inputs import find_sources
from megaprior.data_tools.readers.samples import Rejected, Sample
from megaprior.errors import DataError, UsageError

ROWS = [Row(f"dog {number}", b"J%d" % number) for number in range(10)]


def read(path: Path, ticks: list[int] | None = None, **options: Any) -> list[Sample | Rejected]:
    plan = make_plan([path], BuildOptions(**options), fingerprint="t")
    tick = (lambda _: None) if ticks is None else ticks.append
    return [item for job in plan.jobs for item in read_job(job, plan.options, tick)]


def texts(found: list[Sample | Rejected]) -> list[str]:
    return [item.captions[0].text for item in found if isinstance(item, Sample)]


# ---------------------------------------------------------------- parquet


def test_a_large_parquet_is_cut_between_row_groups(tmp_path: Path) -> None:
    path = write_parquet(tmp_path, ROWS)  # row groups of 3, 3, 3, 1
    sizes = [size for _, _, size in row_group_ranges(path, limit=1)]
    assert [(start, end) for start, end, _ in row_group_ranges(path, limit=1)] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert row_group_ranges(path, limit=sizes[0] + sizes[1]) == [
        (0, 2, sizes[0] + sizes[1]),
        (2, 4, sizes[2] + sizes[3]),
    ]
    assert row_group_ranges(path, limit=1 << 30) == [(0, 4, sum(sizes))]
    plan = make_plan([path], BuildOptions(parquet_shard_bytes=sizes[0] + sizes[1]), fingerprint="t")
    assert [(job.start, job.end, job.bytes) for job in plan.jobs] == [
        (0, 2, sizes[0] + sizes[1]),
        (2, 4, sizes[2] + sizes[3]),
    ]
    assert plan.jobs[1].recorded()["start"] == 2
    ticks: list[int] = []
    found = read(path, ticks, parquet_shard_bytes=sizes[0] + sizes[1])
    assert [(item.key, texts([item])) for item in found] == [(f"row {n}", [f"dog {n}"]) for n in range(10)]
    assert sum(ticks) == sum(sizes)


def test_the_cut_changes_shards_and_not_samples(tmp_path: Path, tokenizer_folder: Path, picture: Callable) -> None:
    path = write_parquet(tmp_path, [Row(f"red star {n}", picture(n % 3)) for n in range(8)])
    found = []
    for limit in (1, 1 << 30):
        output = tmp_path / f"out-{limit}"
        build([path], output, tokenizer=tokenizer_folder, options=BuildOptions(parquet_shard_bytes=limit))
        shards = ShardSet.open(output)
        found.append([(shards.key(n), shards.tokens(n).tolist(), shards.image(n)) for n in range(len(shards))])
        assert verify(output) == []
    assert found[0] == found[1]
    assert len(list((tmp_path / "out-1").glob("0*.json"))) == 3


def test_only_what_samples_need_is_read(tmp_path: Path) -> None:
    wide = table(ROWS).append_column("embedding", pa.array([[1.0] * 8] * 10))
    parquet.write_table(wide, tmp_path / "a.parquet")
    asked: list[list[str]] = []

    def wanted(names: Any) -> list[str]:
        asked.append(list(names))
        return ["caption"]

    with open_rows(tmp_path / "a.parquet", "parquet", wanted=wanted) as rows:
        assert next(rows.records) == ("row 0", {"caption": "dog 0"})
    assert asked == [["caption", "image", "embedding"]]
    # Pages of the image column are spoilt: captions alone do not notice.
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    metadata = parquet.ParquetFile(tmp_path / "a.parquet").metadata.row_group(0)
    place = next(metadata.column(n) for n in range(5) if metadata.column(n).path_in_schema == "image.bytes")
    start = place.dictionary_page_offset or place.data_page_offset
    data[start : start + place.total_compressed_size] = bytes(place.total_compressed_size)
    (tmp_path / "b.parquet").write_bytes(data)
    assert texts(read(tmp_path / "b.parquet", text=True)) == [row.caption for row in ROWS]


def test_a_damaged_row_group_costs_itself_alone(tmp_path: Path) -> None:
    path = write_parquet(tmp_path, ROWS)
    column = parquet.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(data)
    found = read(path)
    assert texts(found) == [f"dog {n}" for n in (0, 1, 2, 6, 7, 8, 9)]
    (lost,) = [item for item in found if isinstance(item, Rejected)]
    assert lost.key == "rows 3 to 5"
    assert lost.reason.startswith("damaged file: rows 3 to 5 of row group 1 are lost (")
    assert "\n" not in lost.reason


def test_a_flipped_bit_is_noticed_where_the_writer_left_checksums(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(table(ROWS, image="bytes"), path, write_page_checksum=True, compression="none")
    data = bytearray(path.read_bytes())
    data[data.index(b"dog 4")] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        DataError, match=r"a.parquet: none of its first records can be read \(rows 0 to 9: damaged file: rows 0 to"
    ):
        read(path)
    parquet.write_table(
        table(ROWS, image="bytes"), path, write_page_checksum=True, compression="none", row_group_size=5
    )
    data = bytearray(path.read_bytes())
    data[data.index(b"dog 7")] ^= 1
    path.write_bytes(data)
    assert [item.key for item in read(path) if isinstance(item, Rejected)] == ["rows 5 to 9"]


@pytest.mark.parametrize("kept", [0.5, 0.99])
def test_a_parquet_cut_short_has_no_footer_and_is_refused(tmp_path: Path, kept: float) -> None:
    path = write_parquet(tmp_path, ROWS)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(DataError, match=r"pairs.parquet: not a whole parquet file, fetch it again \(") as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_text_that_is_no_utf_8_costs_its_row(tmp_path: Path) -> None:
    raw = pa.array([b"dog", b"ab\xff", b"cat"], pa.binary())
    captions = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    parquet.write_table(pa.table({"caption": captions, "image": pa.array([b"J"] * 3)}), tmp_path / "a.parquet")
    found = read(tmp_path / "a.parquet")
    assert texts(found) == ["dog", "cat"]
    assert found[1] == Rejected(key="row 1", reason="invalid UTF-8: byte 0xff at position 2")


def test_images_by_name_lie_in_the_image_folder(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"A")
    (tmp_path / "b.jpg").write_bytes(b"B")
    values = [
        {"bytes": None, "path": "a.jpg"},
        {"bytes": b"X", "path": "gone.jpg"},
        {"bytes": None, "path": "../b.jpg"},
    ]
    data = pa.table({"caption": ["dog", "cat", "cow"], "image": pa.array(values)})
    parquet.write_table(data, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"its first image 'a.jpg' is neither beside it nor in images/"):
        read(tmp_path / "a.parquet")
    first, second, third = read(tmp_path / "a.parquet", images=tmp_path / "photos")
    assert [item.image for item in (first, second) if isinstance(item, Sample)] == [b"A", b"X"]
    assert isinstance(third, Rejected)
    assert third.reason.startswith("unsafe image name: '../b.jpg'")


def test_columns_as_img2dataset_names_them(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"jpg": pa.array([b"J"]), "caption": ["dog"]}), tmp_path / "a.parquet")
    (found,) = read(tmp_path / "a.parquet")
    assert isinstance(found, Sample)
    assert found.image == b"J"


_PEAK = """
import sys
from pathlib import Path
from pyarrow import ipc, parquet
from megaprior.data_tools.readers.columns import open_rows
# Not ru_maxrss, which begins with what the parent process held.
peak = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) // 1024
path, format = Path(sys.argv[1]), sys.argv[2]
before = peak()
with open_rows(path, format, wanted=lambda names: names) as rows:
    total = sum(len(record["image"]) for _, record in rows.records)
print(peak() - before, total >> 20)
"""


@pytest.mark.parametrize("format", ["parquet", "arrow"])
def test_memory_is_bounded_by_rows_and_not_by_the_file(tmp_path: Path, format: str) -> None:
    """One row group of 320 MB of photographs (incompressible); an arrow file of as many in batches of 40."""
    path = tmp_path / f"a.{format}"
    image = bytes(range(256)) * 800
    schema = pa.schema([("caption", pa.string()), ("image", pa.binary())])
    batch = pa.record_batch([["dog"] * 40, [image] * 40], schema=schema)
    if format == "parquet":
        whole = pa.Table.from_batches([batch] * 40)
        parquet.write_table(whole, path, compression="none", use_dictionary=False, row_group_size=1600)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as out:
            for _ in range(40):
                out.write_batch(batch)
    done = subprocess.run([sys.executable, "-c", _PEAK, path, format], capture_output=True, text=True, check=True)
    grown, total = map(int, done.stdout.split())
    assert total == 312
    assert grown < 120


# ---------------------------------------------------------------- arrow, as `datasets` saves it


def test_an_arrow_file_cut_short_gives_what_is_whole(tmp_path: Path) -> None:
    file = write_arrow(tmp_path, ROWS) / "data-00000-of-00001.arrow"  # batches of 4, 4, 2
    data = file.read_bytes()
    file.write_bytes(data[:-300])
    found = read(tmp_path / "saved")
    assert texts(found) == [f"dog {n}" for n in range(8)]
    assert isinstance(found[-1], Rejected)
    assert found[-1].reason.startswith("damaged file: rows from 8 are lost (")
    file.write_bytes(data[:-8])  # exactly between the last batch and the end mark
    found = read(tmp_path / "saved")
    assert len(texts(found)) == 10
    assert found[-1] == Rejected(key="rows from 10", reason="damaged file: no end mark, so it is cut short here")


def test_a_feather_file_is_read_too(tmp_path: Path) -> None:
    whole = table(ROWS)
    with pa.OSFile(str(tmp_path / "a.feather"), "wb") as file, pa.ipc.new_file(file, whole.schema) as out:
        out.write_table(whole, max_chunksize=4)
    ticks: list[int] = []
    assert texts(read(tmp_path / "a.feather", ticks)) == [row.caption for row in ROWS]


def test_splits_of_a_saved_dictionary_are_chosen_by_name(tmp_path: Path) -> None:
    for split, rows in (("train", ROWS[:6]), ("test", ROWS[6:])):
        (tmp_path / "set" / split).mkdir(parents=True)
        write_arrow(tmp_path, rows).rename(tmp_path / "set" / split / "saved")
        for path in (tmp_path / "set" / split / "saved").iterdir():
            path.rename(tmp_path / "set" / split / path.name)
    (tmp_path / "set" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    with pytest.raises(UsageError, match="holds the splits train, test; choose one with --split train"):
        read(tmp_path / "set")
    with pytest.raises(UsageError, match=r"--split dev: .*set holds train, test"):
        read(tmp_path / "set", split="dev")
    assert texts(read(tmp_path / "set", split="test")) == ["dog 6", "dog 7", "dog 8", "dog 9"]
    sources, left_out = find_sources([tmp_path / "set"], split="train")
    assert [(source.name, source.format, left_out) for source in sources] == [
        ("data-00000-of-00001.arrow", "arrow", [])
    ]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            {"_data_files": [{"filename": "gone.arrow"}]},
            "1 of 1 files are missing, the first gone.arrow; copy it again",
        ),
        ({"_data_files": []}, "names no data files"),
        ({"_data_files": [{"filename": "../x.arrow"}]}, "names no data files"),
        ({"_data_files": [{"filename": "a"}], "_indices_files": [{"filename": "i"}]}, "flatten_indices"),
        (None, "cannot be read"),
    ],
)
def test_a_saved_folder_that_is_not_whole_is_refused(tmp_path: Path, state: Any, message: str) -> None:
    write_arrow(tmp_path, ROWS)
    (tmp_path / "saved" / "state.json").write_text("{" if state is None else json.dumps(state))
    with pytest.raises(DataError, match=message):
        read(tmp_path / "saved")


def test_files_of_several_splits_in_one_folder_are_not_mixed(tmp_path: Path) -> None:
    for split, rows in (("train", ROWS[:6]), ("test", ROWS[6:])):
        write_parquet(tmp_path, rows).rename(tmp_path / f"{split}-00000-of-00001.parquet")
    with pytest.raises(UsageError, match="holds the splits test, train; choose one"):
        read(tmp_path)
    assert texts(read(tmp_path, split="test")) == ["dog 6", "dog 7", "dog 8", "dog 9"]
    (tmp_path / "test-00000-of-00001.parquet").unlink()
    assert len(texts(read(tmp_path))) == 6

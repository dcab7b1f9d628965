"""Writers of every input format, as other programs write them, for tests that hold all readers to the same."""

from __future__ import annotations

import base64
import csv
import gzip
import io
import json
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet


@dataclass(frozen=True)
class Row:
    """One record to write: a caption (any value, to be wrong on purpose) and an image (None: no image)."""

    caption: Any
    image: bytes | None = b"J"


def _data_url(image: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(image).decode()


def write_tar(folder: Path, rows: Sequence[Row]) -> Path:
    path = folder / "pairs.tar"
    with tarfile.open(path, "w") as tar:
        for number, row in enumerate(rows):
            for suffix, data in (("jpg", row.image), ("json", json.dumps({"caption": row.caption}).encode())):
                if data is not None:
                    info = tarfile.TarInfo(f"{number:06d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return path


def _images(folder: Path, rows: Sequence[Row]) -> list[str | None]:
    (folder / "images").mkdir(exist_ok=True)
    names: list[str | None] = []
    for number, row in enumerate(rows):
        names.append(None if row.image is None else f"{number:06d}.jpg")
        if row.image is not None:
            (folder / "images" / f"{number:06d}.jpg").write_bytes(row.image)
    return names


def write_jsonl(folder: Path, rows: Sequence[Row]) -> Path:
    path = folder / "pairs.jsonl"
    records = zip(_images(folder, rows), rows, strict=True)
    path.write_text("".join(json.dumps({"image": name, "caption": row.caption}) + "\n" for name, row in records))
    return path


def write_jsonl_gz(folder: Path, rows: Sequence[Row]) -> Path:
    path = write_jsonl(folder, rows)
    packed = path.with_name("pairs.jsonl.gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    return packed


def write_jsonl_zst(folder: Path, rows: Sequence[Row]) -> Path:
    path = write_jsonl(folder, rows)
    packed = path.with_name("pairs.jsonl.zst")
    with pa.CompressedOutputStream(str(packed), "zstd") as file:
        file.write(path.read_bytes())
    return packed


def write_llava(folder: Path, rows: Sequence[Row]) -> Path:
    path = folder / "llava.json"
    records = [
        {
            "id": f"{number:09d}",
            "image": name,
            "conversations": [
                {"from": "human", "value": "<image>\nRender a clear and concise summary of the photo."},
                {"from": "gpt", "value": row.caption},
            ],
        }
        for number, (name, row) in enumerate(zip(_images(folder, rows), rows, strict=True))
    ]
    path.write_text(json.dumps(records, indent=1))
    return path


def write_messages(folder: Path, rows: Sequence[Row]) -> Path:
    path = folder / "messages.jsonl"
    with open(path, "w") as file:
        for row in rows:
            image = [] if row.image is None else [{"type": "image_url", "image_url": {"url": _data_url(row.image)}}]
            content = [*image, {"type": "text", "text": row.caption}]
            file.write(json.dumps({"messages": [{"role": "assistant", "content": content}]}) + "\n")
    return path


def write_csv(folder: Path, rows: Sequence[Row]) -> Path:
    path = folder / "pairs.csv"
    with open(path, "w", newline="", encoding="utf-8", errors="surrogatepass") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        for name, row in zip(_images(folder, rows), rows, strict=True):
            writer.writerow([name, row.caption])
    return path


def _struct(row: Row) -> dict[str, Any] | None:
    return None if row.image is None else {"bytes": row.image, "path": None}


def table(rows: Sequence[Row], *, image: str = "struct") -> pa.Table:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())]) if image == "struct" else pa.binary()
    values = [_struct(row) if image == "struct" else row.image for row in rows]
    return pa.table({"caption": pa.array([row.caption for row in rows]), "image": pa.array(values, kind)})


def write_parquet(folder: Path, rows: Sequence[Row]) -> Path:
    parquet.write_table(table(rows, image="bytes"), folder / "pairs.parquet", row_group_size=3)
    return folder / "pairs.parquet"


def write_parquet_struct(folder: Path, rows: Sequence[Row]) -> Path:
    parquet.write_table(table(rows), folder / "train-00000-of-00001.parquet", row_group_size=2)
    return folder / "train-00000-of-00001.parquet"


def write_arrow(folder: Path, rows: Sequence[Row]) -> Path:
    """What `datasets` writes with save_to_disk: an IPC stream of record batches, and state.json beside it."""
    saved = folder / "saved"
    saved.mkdir(exist_ok=True)
    whole = table(rows)
    with (
        pa.OSFile(str(saved / "data-00000-of-00001.arrow"), "wb") as file,
        pa.ipc.new_stream(file, whole.schema) as out,
    ):
        out.write_table(whole, max_chunksize=4)
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": "train", "_format_type": None}
    (saved / "state.json").write_text(json.dumps(state))
    (saved / "dataset_info.json").write_text(json.dumps({"features": {}, "splits": {}}))
    return saved


WRITERS: dict[str, Callable[[Path, Sequence[Row]], Path]] = {
    "webdataset": write_tar,
    "jsonl": write_jsonl,
    "jsonl.gz": write_jsonl_gz,
    "jsonl.zst": write_jsonl_zst,
    "llava": write_llava,
    "messages": write_messages,
    "csv": write_csv,
    "parquet": write_parquet,
    "parquet struct": write_parquet_struct,
    "arrow": write_arrow,
}


def key(format: str, number: int, rows: Sequence[Row]) -> str:
    """What a reader calls the record at `number`."""
    if format == "webdataset":
        return f"{number:06d}"
    if format == "llava":
        return f"item {number}"
    if format in ("parquet", "parquet struct", "arrow"):
        return f"row {number}"
    if format != "csv":
        return f"line {number + 1}"
    lines = [1 + str(row.caption).count("\n") for row in rows]
    first = 2 + sum(lines[:number])
    return f"line {first}" if lines[number] == 1 else f"lines {first} to {first + lines[number] - 1}"

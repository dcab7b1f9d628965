"""What to tell users who bring a list of image addresses: nothing is downloaded here, img2dataset is made for it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megaprior.data_tools.readers.pictures import is_link
from megaprior.data_tools.readers.samples import Record

if TYPE_CHECKING:
    from megaprior.data_tools.readers.inputs import Source

_URL_COLUMNS = ("url", "image_url", "URL")
_CAPTION_COLUMNS = ("capsfusion", "caption", "captions", "TEXT", "text", "alt_text")


def list_of_urls(source: Source, record: Record, captions: Sequence[str]) -> str:
    """Why this source cannot be built, and the command that fetches its images, with its own columns filled in."""
    links = [name for name, value in record.items() if is_link(value)]
    url = next((name for name in _URL_COLUMNS if name in links), links[0])
    header = ""
    if url.isdigit():  # img2dataset wants names
        url, header = "url", "put a header line, 'caption' and 'url', on top; "
        captions = ["caption"]
    there = [name for name in captions if name in record] or [name for name in _CAPTION_COLUMNS if name in record]
    there = there or list(captions)
    kind = f"a {source.format}" if source.format == "parquet" else "a list"
    others = [name for name, value in record.items() if isinstance(value, str) and name not in (url, there[0])]
    advice = _command(source, url, there[0], [] if header else others)
    return f"{kind} of image URLs, not of images; {header}{advice} (or take captions alone with --text)"


def _command(source: Source, url: str, caption: str, others: Sequence[str]) -> str:
    path, name, before = source.given or source.path, source.path.name.lower(), ""
    format = source.format + (".gz" if name.endswith(".gz") and source.format != "parquet" else "")
    if name.endswith((".zst", ".lz4")):
        before = f"unpack {source.path.name}, which img2dataset cannot; "
        path = path if path.is_dir() else path.with_suffix("")
    if source.format == "arrow":
        folder = source.path.parent
        before = "write it as parquet first, with `datasets`: load_from_disk(...).to_parquet(...); "
        path, format = folder.with_suffix(".parquet"), "parquet"
    keep = f" --save_additional_columns {shlex.quote(json.dumps(list(others)))}" if others else ""
    return (
        f"{before}fetch the images with img2dataset, then build from the tars it writes: "
        f"pip install img2dataset && img2dataset --url_list {shlex.quote(str(path))} --input_format {format} "
        f"--url_col {shlex.quote(url)} --caption_col {shlex.quote(caption)} --output_format webdataset "
        f"--output_folder PAIRS --image_size 1024 --resize_mode keep_ratio_largest --resize_only_if_bigger True{keep}"
    )

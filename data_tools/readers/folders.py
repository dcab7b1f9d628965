"""Which files a folder stands for: those of one format directly inside it, or a Hugging Face dataset's own list."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megaprior.errors import DataError, UsageError

# In this order: img2dataset puts a parquet of what it fetched beside every tar.
SUFFIXES = {
    "webdataset": (".tar", ".tar.gz", ".tgz", ".tar.zst"),
    "parquet": (".parquet",),
    "arrow": (".arrow", ".feather"),
    "jsonl": tuple(name + pack for name in (".jsonl", ".ndjson") for pack in ("", ".gz", ".zst", ".lz4")),
    "csv": (".csv", ".csv.gz", ".csv.zst"),
    "tsv": (".tsv", ".tsv.gz", ".tsv.zst"),
    "json": (".json", ".json.gz", ".json.zst"),
    "text": (".txt", ".txt.gz", ".txt.zst"),
}
_SAVED = "state.json"
_DICT = "dataset_dict.json"
# How Hugging Face names the files of a split: train-00000-of-00008.parquet.
_OF_SPLIT = re.compile(r"(?P<split>\w+(?:\.\w+)*)-\d{5}-of-\d{5}")


def folder_files(folder: Path, *, format: str, split: str | None) -> tuple[list[tuple[Path, str]], list[Path]]:
    """The files to read of an input folder, each with its format, and those that are left out.

    Raises:
        UsageError: no file to read, or several splits and none chosen.
        DataError: a Hugging Face folder that is not whole.
    """
    if format in ("auto", "arrow") and ((folder / _DICT).is_file() or (folder / _SAVED).is_file()):
        return [(path, "arrow") for path in _saved_files(folder, split)], []
    inside = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    for kind in SUFFIXES if format == "auto" else (format,):
        found = [path for path in inside if path.name.lower().endswith(SUFFIXES[kind])]
        if found:
            chosen = _of_split(folder, found, split) if kind in ("parquet", "arrow") else found
            read = set(chosen)
            return [(path, kind) for path in chosen], [path for path in inside if path not in read]
    known = ", ".join(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)
    raise UsageError(f"--input {folder}: no file to read directly inside it ({known})")


def _saved_files(folder: Path, split: str | None) -> list[Path]:
    """The files of what `save_to_disk` wrote, in the data set's order: a folder of splits, or of one of them."""
    if (folder / _DICT).is_file():
        splits = _content(folder / _DICT).get("splits")
        if not isinstance(splits, list) or not splits:
            raise DataError(f"{folder / _DICT}: names no split; save the data set again")
        chosen = _chosen(folder, [str(name) for name in splits], split)
        return _saved_files(folder / chosen, None)
    state = _content(folder / _SAVED)
    names = [entry.get("filename") for entry in state.get("_data_files") or [] if isinstance(entry, dict)]
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise DataError(f"{folder}: a selection of rows that was not written out; flatten_indices() and save it again")
    files = [folder / name for name in names if isinstance(name, str) and "/" not in name]
    if not files or len(files) < len(names):
        raise DataError(f"{folder / _SAVED}: names no data files; save the data set again")
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise DataError(
            f"{folder}: {len(missing)} of {len(files)} files are missing, the first {missing[0]}; copy it again"
        )
    return files


def _content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); save the data set again") from None
    return content if isinstance(content, dict) else {}


def _of_split(folder: Path, files: Sequence[Path], split: str | None) -> list[Path]:
    """Those of one split, where the names tell splits apart: nobody means to train on the test split."""
    matched = {path: match["split"] for path in files if (match := _OF_SPLIT.match(path.name))}
    splits = sorted(set(matched.values()))
    if not splits or (len(splits) == 1 and split is None):
        if split is not None:
            raise UsageError(f"--split {split}: the files of {folder} are not named by split; name the files instead")
        return list(files)
    chosen = _chosen(folder, splits, split)
    return [path for path in files if matched.get(path) == chosen]


def _chosen(folder: Path, splits: list[str], split: str | None) -> str:
    if split is None and len(splits) > 1:
        raise UsageError(f"--input {folder}: holds the splits {', '.join(splits)}; choose one with --split {splits[0]}")
    if split is not None and split not in splits:
        raise UsageError(f"--split {split}: {folder} holds {', '.join(splits)}")
    return split or splits[0]

"""The inputs of benchmarks.data: captions, tars as img2dataset writes them, a tokenizer; made once, in the work folder."""

from __future__ import annotations

import gzip
import io
import json
import random
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.data_case import say
from benchmarks.data_child import run
from megaprior.files import atomic_folder, atomic_write

COLUMNS = ("captions", "caption", "text", "capsfusion", "laion_2b", "laion_coco")
_SCENES = ("--heldout", "--reference", "--text", "--probe", "--tower")


def generated_tars(work: Path, *, pairs: int, source: Path | None) -> list[Path]:
    """`pairs` generated pairs in tars of 2,000, with an image, a caption and the fields that img2dataset writes.

    The scenes' annotation of every word is left out: no bare loop would carry it.

    Args:
        source: tars that `make-scenes` wrote earlier; made anew where it is None.
    """
    folder = work / f"generated_{pairs}"
    if not folder.exists():
        if source is None:
            source = work / f"scenes_{pairs}"
            if not source.exists():
                say(f"rendering {pairs:,} scenes")
                command: list[Any] = [
                    sys.executable,
                    "-m",
                    "megaprior.data_tools.cli",
                    "make-scenes",
                    "--output",
                    source,
                ]
                run([*command, "--pairs", str(pairs), *(word for name in _SCENES for word in (name, "0"))])
            source = source / "pairs"
        with atomic_folder(folder) as fresh:
            for path in sorted(source.glob("*.tar")):
                _plain_tar(path, fresh / path.name)
    return sorted(folder.glob("*.tar"))


def _plain_tar(source: Path, target: Path) -> None:
    with tarfile.open(source) as old, tarfile.open(target, "w", format=tarfile.USTAR_FORMAT) as new:
        for member in old:
            file = old.extractfile(member)
            assert file is not None
            data = file.read()
            if member.name.endswith(".json"):
                fields = {k: v for k, v in json.loads(data).items() if k not in ("words", "scene")}
                data = json.dumps({"url": None, **fields, "sha256": None}).encode()
            member.size = len(data)
            new.addfile(member, io.BytesIO(data))


def first_records(source: Path, target: Path, count: int) -> Path:
    """A tar of the first `count` samples of another."""
    with tarfile.open(source) as old, tarfile.open(target, "w", format=tarfile.USTAR_FORMAT) as new:
        keys: dict[str, None] = {}
        for member in old:
            keys.setdefault(member.name.partition(".")[0])
            if len(keys) > count:
                break
            new.addfile(member, old.extractfile(member))
    return target


def captions_file(work: Path, *, count: int, sources: list[Path], tars: list[Path], seed: int) -> tuple[Path, int]:
    """(a jsonl of `count` records {"text": caption}, how many different captions it draws on).

    Each pass over `sources` (the captions of `tars` where there are none) comes in another order, until `count` is reached.
    """
    path = work / f"captions_{count}_{len(sources)}_{seed}.jsonl"
    texts = [text for source in sources for text in _captions_of(source)] or [
        t for tar in tars for t in _tar_texts(tar)
    ]
    texts = [text for text in map(str.strip, texts) if text and "\0" not in text]
    if not path.exists():
        shuffle = random.Random(seed).shuffle
        lines: list[str] = []
        while len(lines) < count:
            shuffle(texts)
            lines += [json.dumps({"text": text}, ensure_ascii=False) for text in texts[: count - len(lines)]]
        atomic_write(path, "\n".join(lines) + "\n")
    return path, min(count, len(set(texts)))


def first_lines(path: Path, count: int) -> Path:
    """A file beside `path` with its first `count` lines."""
    short = path.with_name(f"{path.stem}_first_{count}.jsonl")
    with open(path, encoding="utf-8") as file:
        atomic_write(short, "".join(next(file) for _ in range(count)))
    return short


def tokenizer_file(work: Path, *, given: Path | None, tars: list[Path]) -> Path:
    """The tokenizer of all arms: `given`, else a SentencePiece model trained on the captions of the first tar."""
    if given is not None:
        return given
    folder = work / "tokenizer"
    if not folder.exists():
        command: list[Any] = [sys.executable, "-m", "megaprior.data_tools.cli", "train-tokenizer", "--input", tars[0]]
        run([*command, "--output", folder, "--vocab-size", "1000"])
    return folder / "tokenizer.model"


def _captions_of(path: Path) -> Iterator[str]:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        for line in file:
            if ".tsv" in path.suffixes:
                yield line.partition("\t")[0]
                continue
            record = json.loads(line)
            for column in COLUMNS:
                value = record.get(column)
                yield from [value] if isinstance(value, str) else value or []


def _tar_texts(path: Path) -> Iterator[str]:
    with tarfile.open(path) as tar:
        for member in tar:
            if member.name.endswith(".txt"):
                file = tar.extractfile(member)
                assert file is not None
                yield file.read().decode()

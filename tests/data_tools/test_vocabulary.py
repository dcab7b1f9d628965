from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import pytest

from megaprior.data_tools.options import BuildOptions
from megaprior.data_tools.vocabulary import train_tokenizer
from megaprior.errors import DataError

TEXT = "".join(f"{n} {c} {s} on a table\n" for n in range(30) for c in ("red", "grey") for s in ("star", "square"))


def train(paths: list[Path], output: Path) -> bytes:
    tokenizer = train_tokenizer(paths, output, vocab_size=320, options=BuildOptions(text=True))
    assert tokenizer.vocab_size == 320
    assert tokenizer.reserved_roles() is not None
    return (output / "tokenizer.model").read_bytes()


def test_the_same_captions_give_the_same_bytes_from_any_format(tmp_path: Path, make_tar: Callable[..., Path]) -> None:
    (tmp_path / "a.txt").write_text(TEXT + "\n \n")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(TEXT.encode()))
    tar = make_tar("c.tar", [(f"{i}.txt", line.encode()) for i, line in enumerate(TEXT.splitlines())])
    models = [
        train([path], tmp_path / f"out{i}") for i, path in enumerate((tmp_path / "a.txt", tmp_path / "b.txt.gz", tar))
    ]
    assert models[0] == models[1] == models[2]


def test_a_tokenizer_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    model = train([tmp_path / "a.txt"], tmp_path / "out")
    with pytest.raises(DataError, match="never overwritten"):
        train([tmp_path / "a.txt"], tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == model


def test_no_text_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n")
    with pytest.raises(DataError, match="no text to train"):
        train([tmp_path / "a.txt"], tmp_path / "out")

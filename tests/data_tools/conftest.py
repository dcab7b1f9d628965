"""Small real inputs: tars, pictures, a tokenizer trained in place; and the command line called as a user calls it."""

from __future__ import annotations

import io
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megaprior.data_tools import cli
from megaprior.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece

Members = list[tuple[str, bytes]]

HERE = str(Path(__file__).resolve().parent)
if HERE not in sys.path:
    sys.path.insert(0, HERE)  # so that tests find format_writers by name


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds a SentencePiece tokenizer of 380 ids."""
    folder = tmp_path_factory.mktemp("tokenizer")
    colours, shapes = ("red", "green", "blue", "grey"), ("square", "circle", "star", "cross")
    texts = [f"A photo of one {c} {s} beside {n} dogs." for c in colours for s in shapes for n in range(9)]
    train_sentencepiece(texts, folder, vocab_size=380)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_folder)


@pytest.fixture(scope="session")
def picture() -> Callable[..., bytes]:
    """`picture(7, width=20, height=10)`: a JPEG that differs by its first argument."""

    def make(seed: int, *, width: int = 20, height: int = 10) -> bytes:
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG")
        return file.getvalue()

    return make


@pytest.fixture
def make_tar(tmp_path: Path) -> Callable[..., Path]:
    """`make_tar("a.tar", [(name, bytes), ...])` writes an archive below tmp_path, gzipped by its suffix."""

    def make(name: str, members: Members) -> Path:
        path = tmp_path / name
        with tarfile.open(path, "w:gz" if name.endswith("gz") else "w") as tar:
            for member, data in members:
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return path

    return make


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`command("build", "--input", path, ...)` -> (exit code, standard output, standard error)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as exit:
            code = int(exit.code or 0)
        return code, *capsys.readouterr()

    return run

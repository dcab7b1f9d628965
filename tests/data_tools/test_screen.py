from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megaprior.data.shards import ScoreWriter, Shard
from megaprior.data_tools.building.build import build
from megaprior.data_tools.commands.screen import caption_text, importance, token_text
from megaprior.data_tools.options import BuildOptions
from megaprior.tokenizer import Tokenizer

Command = Callable[..., tuple[int, str, str]]
TEXTS = ["one red square", "two \x1b[31mdogs", "grey star"]


@pytest.fixture
def shards(
    tmp_path: Path, make_tar: Callable[..., Path], picture: Callable[..., bytes], tokenizer_folder: Path
) -> Path:
    words = [[[4, 7, 1], [8, 14, 1]], [[4, 5, 2]], [[0, 4, 1]]]
    members = []
    for i, text in enumerate(TEXTS):
        members += [(f"{i}.jpg", picture(i)), (f"{i}.json", json.dumps({"caption": text, "words": words[i]}).encode())]
    build([make_tar("a.tar", members)], tmp_path / "out", tokenizer=tokenizer_folder, options=BuildOptions())
    return tmp_path / "out"


def write_scores(folder: Path, *, name: str = "ref_logprob", kind: str = "logprob", value: float = -0.1) -> None:
    shard = Shard.open(folder, "00000")
    with ScoreWriter(shard, name, kind=kind, scorer={"fingerprint": "f"}) as writer:
        for length in shard.streams["tokens"].lengths:
            writer.add(np.full(length, value, np.float32))
        writer.finish()


def test_importance_of_both_kinds() -> None:
    r = np.array([0.0, -1e-7, np.log(0.5), -np.inf], np.float32)
    np.testing.assert_allclose(importance(r, kind="logprob"), [0, 1e-7, 0.5, 1], rtol=1e-6)
    np.testing.assert_array_equal(
        importance(np.array([1, 4, 0], np.float32), kind="importance"), np.array([0.25, 1, 0], np.float32)
    )
    np.testing.assert_array_equal(
        importance(np.array([0, 0], np.float32), kind="importance"), np.array([1, 1], np.float32)
    )


def test_without_colour_a_digit_says_how_important_a_token_is(tokenizer: Tokenizer) -> None:
    ids = np.array([*tokenizer.encode("red red"), tokenizer.eos_id])
    weights = np.linspace(0, 1, len(ids))
    digits = "".join(c for c in caption_text(ids, tokenizer, weights, colour=False).plain if c in "⁰¹²³⁴⁵⁶⁷⁸⁹")
    assert (len(digits), digits[0], digits[-1]) == (len(ids), "⁰", "⁹")


def test_with_colour_the_text_is_the_caption_and_red_grows(tokenizer: Tokenizer) -> None:
    ids = np.array(tokenizer.encode("grey star"))
    text = caption_text(ids, tokenizer, np.array([0.0] * (len(ids) - 1) + [1.0]), colour=True)
    assert text.plain == " grey star"
    assert [str(span.style) for span in (text.spans[0], text.spans[-1])] == [
        "black on rgb(255,255,255)",
        "black on rgb(255,65,65)",
    ]


def test_a_caption_cannot_command_the_terminal(command: Command, shards: Path, tokenizer: Tokenizer) -> None:
    code, said, _ = command("show", shards, "--sample", 1)
    assert code == 0
    assert "\x1b" not in said
    assert "<1b>" in said or "\\x1b" in said
    assert token_text(tokenizer.eos_id, tokenizer) == "<eos>"
    assert [token_text(token, tokenizer) for token in tokenizer.encode("é")[-2:]] == ["<c3>", "<a9>"]


def test_samples_are_evenly_spaced_and_named(command: Command, shards: Path) -> None:
    _, said, _ = command("show", shards, "-n", 2)
    assert "0: out/00000 sample 0 (key 0)" in said
    assert "2: out/00000 sample 2 (key 2)" in said
    assert "sample 1 " not in said
    assert "image 20 x 10" in said
    assert "image-related: ... red square" in said.replace("|", "")


def test_scores_are_shown_once_they_exist(command: Command, shards: Path) -> None:
    assert "importance" not in command("show", shards)[1]
    write_scores(shards)
    _, said, _ = command("show", shards, "--sample", 0)
    assert "importance w by ref_logprob" in said
    assert "<eos>⁰" in said  # 1 - exp(-0.1) = 0.095
    write_scores(shards, name="rarity", kind="importance", value=3.0)
    assert "<eos>⁹" in command("show", shards, "--scores", "rarity", "--sample", 0)[1]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--sample", "3"], 2, "has samples 0 to 2"),
        (["--sample", "-1"], 2, "has samples 0 to 2"),
        (["-n", "0"], 2, "at least 1"),
        (["--scores", "clip"], 65, "no scores 'clip'"),
    ],
)
def test_what_cannot_be_shown(command: Command, shards: Path, arguments: list[str], code: int, message: str) -> None:
    found, _, said = command("show", shards, *arguments)
    assert (found, message in said) == (code, True), said


def test_a_dry_run_shows_shards_and_samples(command: Command, shards: Path, tokenizer_folder: Path) -> None:
    tar = shards.parent / "a.tar"
    code, said, _ = command(
        "build", "--input", tar, "--output", shards.parent / "new", "--tokenizer", tokenizer_folder, "--dry-run"
    )
    assert code == 0
    assert "a.tar" in said
    assert "0: 1 caption, image 20x10\n    one red square\n" in said
    assert not (shards.parent / "new").exists()

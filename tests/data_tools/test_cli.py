"""The command as it is typed: help, exit codes, one line for each error."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megaprior.data_tools import cli

Command = Callable[..., tuple[int, str, str]]
COMMANDS = ("build", "join", "verify", "show", "train-tokenizer", "make-scenes")


@pytest.fixture
def shards(command: Command, tmp_path: Path, tokenizer_folder: Path) -> Path:
    (tmp_path / "a.txt").write_text("one red square\n\ntwo dogs\n" + "grey star " * 50 + "\n")
    code, said, _ = command(
        "build",
        "--input",
        tmp_path / "a.txt",
        "--output",
        tmp_path / "out",
        "--tokenizer",
        tokenizer_folder,
        "--max-sequence",
        32,
    )
    assert code == 0
    assert said.splitlines()[1:] == [
        "1 caption cut at 32 tokens, without a closing EOS",
        f"1 quarantined, see {tmp_path}/out/quarantine.jsonl: 1 caption is empty",
        f"next: megaprior-data verify {tmp_path}/out",
    ]
    return tmp_path / "out"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_teaches_by_example(command: Command, name: str) -> None:
    code, said, _ = command(name, "--help")
    assert code == 0
    assert f"  megaprior-data {name} " in said


def test_help_answers_in_under_a_second() -> None:
    fastest = 9.0
    for _ in range(3):  # the machine may be busy
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "megaprior.data_tools.cli", "build", "--help"], check=True, stdout=subprocess.PIPE
        )
        fastest = min(fastest, time.perf_counter() - start)
    assert fastest < 1


def test_what_the_examples_use_exists(command: Command) -> None:
    for name in COMMANDS:
        _, said, _ = command(name, "--help")
        usage, examples = said.split("example", 1)[0], said.split("example", 1)[1]
        for flag in {word for word in examples.split() if word.startswith("-")}:
            assert flag in usage, (name, flag)


def test_verify_prints_a_table_and_fails_on_a_flipped_bit(command: Command, shards: Path) -> None:
    code, said, _ = command("verify", shards)
    assert code == 0
    assert "ok" in said
    for name in ("00000.tokens.bin", "quarantine.jsonl"):
        data = bytearray((shards / name).read_bytes())
        data[5] ^= 1
        (shards / name).write_bytes(data)
        code, said, _ = command("verify", shards)
        assert code == 65
        assert f"{shards / name}: block 0" in said
        data[5] ^= 1
        (shards / name).write_bytes(data)
    assert command("verify", shards)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["verify", "gone"], 2, "gone: no such folder"),
        (["show", "gone"], 65, "no build.json"),
        (["build", "--input", "gone.txt", "--output", "out", "--tokenizer", "gone"], None, "gone"),
        (
            ["build", "--input", "a.txt", "--output", "out", "--tokenizer", "t", "--subset", "1"],
            2,
            "--subset 1: expected A:B",
        ),
        (["make-scenes", "--output", "out", "--pairs", "-1"], 2, "pairs=-1"),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(
    command: Command, arguments: list[str], code: int | None, message: str
) -> None:
    found, _, said = command(*arguments)
    assert found == code or (code is None and found in (2, 65))
    assert len(said.splitlines()) == 1
    assert said.startswith("megaprior-data: error: ")
    assert message in said


def test_a_missing_argument_is_usage(command: Command) -> None:
    assert command("build", "--input", "a.txt")[0] == 2
    assert command()[0] == 2


def test_an_output_that_cannot_be_written(command: Command, tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "a.txt").write_text("one red square\n")
    (tmp_path / "file").write_text("")
    code, _, said = command(
        "build", "--input", tmp_path / "a.txt", "--output", tmp_path / "file" / "out", "--tokenizer", tokenizer_folder
    )
    assert code == 65
    assert len(said.splitlines()) == 1


def test_a_closed_pipe_is_no_error(shards: Path) -> None:
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{sys.executable} -m megaprior.data_tools.cli show {shards} | head -c 1"],
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_make_scenes_hands_its_counts_on(command: Command, tmp_path: Path) -> None:
    sizes = ["--pairs", 3, "--heldout", 2, "--reference", 4, "--text", 5, "--probe", 4, "--tower", 6, "--seed", 7]
    code, said, _ = command("make-scenes", "--output", tmp_path / "scenes", *sizes)
    assert (code, said) == (0, f"{tmp_path}/scenes: 3 pairs, 2 heldout, 4 reference, 5 text, 4 probe, 6 tower\n")
    assert (tmp_path / "scenes" / "reference.txt.gz").exists()


def test_main_is_what_the_console_script_calls() -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(["--version"])
    assert exit.value.code == 0

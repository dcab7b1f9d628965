"""The output folder: complete or not readable, resumed after SIGKILL, never anybody else's."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megaprior.data.shards import ShardSet, verify
from megaprior.data_tools.building.build import build, preview
from megaprior.data_tools.options import BuildOptions
from megaprior.errors import DataError

MISTRAL = "mistral/tokenizer.model.v1"


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "captions.txt"
    path.write_text("".join(f"{i} dogs\n" for i in range(50)) + "\n")
    return path


@pytest.fixture
def run(text: Path, tmp_path: Path, tokenizer_folder: Path) -> Callable[..., dict[str, Any]]:
    def run(output: Path, **options: Any) -> dict[str, Any]:
        return build(
            [text], output, tokenizer=tokenizer_folder, options=BuildOptions(**{"text_shard_bytes": 100} | options)
        )

    return run


def test_a_build_is_the_same_bytes_wherever_it_is_made(run: Callable[..., dict], tmp_path: Path) -> None:
    run(tmp_path / "one")
    run(tmp_path / "deeper" / "two")
    files = tree(tmp_path / "one")
    assert files == tree(tmp_path / "deeper" / "two")
    assert {"build.json", "00000.json", "00003.tokens.bin", "quarantine.jsonl", "tokenizer/tokenizer.model"} < set(
        files
    )
    assert not [name for name in files if name.startswith(".")]
    for name, data in files.items():
        for word in (str(tmp_path), socket.gethostname(), str(os.getpid())):
            assert name.endswith((".bin", ".idx", ".model")) or word.encode() not in data, (name, word)


def test_repeating_a_complete_build_changes_nothing(run: Callable[..., dict], tmp_path: Path) -> None:
    first = run(tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert run(tmp_path / "out") == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_another_build_is_not_mixed_in(run: Callable[..., dict], tmp_path: Path) -> None:
    run(tmp_path / "out")
    before = tree(tmp_path / "out")
    with pytest.raises(DataError, match=r"holds another build .* choose another --output"):
        run(tmp_path / "out", max_sequence=5)
    assert tree(tmp_path / "out") == before


def test_an_option_that_is_recorded_only_when_asked_for_is_told_apart(
    run: Callable[..., dict], text: Path, tmp_path: Path
) -> None:
    text.write_text(" \n" * 5)
    assert "check" not in BuildOptions().recorded()
    for check, told in (("header", "no sample is left"), ("whole", r"\(check 'header' there, 'whole' now\)")):
        with pytest.raises(DataError, match=told):
            run(tmp_path / "out", check=check)


def test_foreign_folders_are_left_alone(run: Callable[..., dict], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(DataError, match=r"out: not empty \(thesis.tex"):
        run(tmp_path / "out")
    assert tree(tmp_path / "out") == {"thesis.tex": b"x"}
    with pytest.raises(DataError, match="exists and is not a folder"):
        run(tmp_path / "out" / "thesis.tex")


def test_an_unfinished_build_of_other_options_is_refused(run: Callable[..., dict], text: Path, tmp_path: Path) -> None:
    text.write_text(" \n" * 5)
    for _ in range(2):  # no sample is left, so that build.json is never written
        with pytest.raises(DataError, match="no sample is left; 5 quarantined"):
            run(tmp_path / "out")
    with pytest.raises(
        DataError, match=r"unfinished build of other inputs or options \(max_sequence 2048 there, 5 now\)"
    ):
        run(tmp_path / "out", max_sequence=5)


def test_a_dry_run_writes_nothing(text: Path, tmp_path: Path, tokenizer_folder: Path) -> None:
    found = preview([text], tmp_path / "out", tokenizer=tokenizer_folder, options=BuildOptions())
    assert found.state == "new"
    assert [item.key for item in found.first] == ["line 1", "line 2", "line 3"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["captions.txt"]


# ---------------------------------------------------------------- killed


def start(inputs: list[Path], output: Path, tokenizer: Path, *more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "megaprior.data_tools.cli", "build", "--input", *inputs]
    return subprocess.Popen([*command, "--output", output, "--tokenizer", tokenizer, *more], stderr=subprocess.PIPE)


def signal_when(process: subprocess.Popen[bytes], reached: Callable[[], bool], number: signal.Signals) -> None:
    """Send a signal as soon as the builder got that far."""
    assert signalled(process, reached, number), process.communicate()


def signalled(process: subprocess.Popen[bytes], reached: Callable[[], bool], number: signal.Signals) -> bool:
    """As `signal_when`; False where the builder ended between two looks, unseen at that point."""
    deadline = time.monotonic() + 60
    while not reached():
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(number)
    return True


def kill_at(moment: Callable[[], bool], begin: Callable[[], subprocess.Popen[bytes]], output: Path) -> None:
    """Kill a builder at that moment; one that is through before anybody looked has to do it all again."""
    for _ in range(5):
        process = begin()
        signalled(process, moment, signal.SIGKILL)
        said = process.communicate()
        if process.returncode == -signal.SIGKILL and not (output / "build.json").exists():
            return
        assert process.returncode in (0, -signal.SIGKILL), said
        shutil.rmtree(output)
    raise AssertionError("five builders were through before they could be killed")


def test_killed_anywhere_then_repeated_gives_the_same_bytes(shared: Callable[[str], Path], tmp_path: Path) -> None:
    inputs = sorted(shared("flickr8k_tars").glob("*.tar"))[:2]
    tokenizer = shared("tokenizers") / MISTRAL
    output = tmp_path / "killed"
    moments: list[Callable[[], bool]] = [
        (output / ".lock").exists,
        (output / ".building" / "plan.json").exists,
        lambda: any(output.glob(".00000.images.bin.tmp-*")),
        (output / "00000.json").exists,
        lambda: any(output.glob(".00001.images.bin.tmp-*")),
    ]
    for moment in moments:
        # One worker: the shards come in turn, so that a builder that begins anew has the first before the second.
        kill_at(moment, lambda: start(inputs, output, tokenizer, "--workers", "1"), output)
        with pytest.raises(DataError, match="the build is not complete; repeat"):
            ShardSet.open(output)
        assert "build is not complete" in verify(output)[0]
    first_shard = (output / "00000.json").stat()
    process = start(inputs, output, tokenizer, "--resume")
    assert b"resuming build" in process.communicate()[1]
    assert process.returncode == 0
    # a finished shard is kept, not written again
    assert (output / "00000.json").stat().st_mtime_ns == first_shard.st_mtime_ns
    assert (output / "00000.json").stat().st_ino == first_shard.st_ino

    build(inputs, tmp_path / "straight", tokenizer=tokenizer, options=BuildOptions())
    assert tree(output) == tree(tmp_path / "straight")
    assert verify(output) == []
    shards = ShardSet.open(output)
    assert len(shards) == 6000
    assert shards.build["counts"]["images"] == 1200


def test_a_second_builder_is_refused_and_told_who_has_it(shared: Callable[[str], Path], tmp_path: Path) -> None:
    inputs = [shared("flickr8k_tars") / "00000.tar"]
    tokenizer = shared("tokenizers") / MISTRAL
    first = start(inputs, tmp_path / "out", tokenizer)
    signal_when(first, (tmp_path / "out" / ".building" / "plan.json").exists, signal.SIGSTOP)
    with pytest.raises(DataError, match=rf"in use by {socket.gethostname()} pid {first.pid}"):
        build(inputs, tmp_path / "out", tokenizer=tokenizer, options=BuildOptions())
    first.send_signal(signal.SIGCONT)
    first.communicate()
    assert first.returncode == 0
    assert verify(tmp_path / "out") == []

"""Several worker processes: the same bytes, one clear line for whatever goes wrong, nobody left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from benchmarks.build_crashes import contents, session
from megaprior.data.shards import verify
from megaprior.data_tools.building.build import build
from megaprior.data_tools.building.workers import usable_cores
from megaprior.data_tools.options import BuildOptions
from megaprior.errors import DataError

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def pairs(make_tar: Callable[..., Path], picture: Callable[..., bytes], tmp_path: Path) -> Path:
    """A folder of five tars, each of 60 pairs of which two are broken."""
    (tmp_path / "pairs").mkdir()
    for tar in range(5):
        members = []
        for number in range(60):
            image = picture(tar * 60 + number, width=200, height=150) if number % 40 else b"no image"
            members += [(f"{number:05d}.jpg", image), (f"{number:05d}.txt", b"two dogs beside one red square")]
        make_tar(f"pairs/{tar}.tar", members)
    return tmp_path / "pairs"


@pytest.fixture
def start(pairs: Path, tokenizer_folder: Path) -> Start:
    """`start(output, "--workers", "2")`: the command, in a session of its own."""

    def start(output: Path, *more: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "megaprior.data_tools.cli", "build", "--input", str(pairs)]
        command += ["--output", str(output), "--tokenizer", str(tokenizer_folder), *more]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    return start


@pytest.fixture
def straight(pairs: Path, tmp_path: Path, tokenizer_folder: Path) -> dict[str, str]:
    build([pairs], tmp_path / "straight", tokenizer=tokenizer_folder, options=BuildOptions())
    return contents(tmp_path / "straight")


def wait_for(reached: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not reached():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def finish(process: subprocess.Popen[str]) -> None:
    said = process.communicate()[1]
    assert process.returncode == 0, said


def wait_until_gone(process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 10
    while left := session(process.pid):
        assert time.monotonic() < deadline, left
        time.sleep(0.01)


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    return [pid for pid, (_, line) in session(process.pid).items() if "spawn_main" in line]


def writing(output: Path) -> Callable[[], bool]:
    return lambda: any(output.glob(".0*.images.bin.tmp-*"))


@pytest.mark.parametrize("workers", [2, 3, 16])
def test_any_number_of_workers_writes_the_same_bytes(
    workers: int, pairs: Path, tmp_path: Path, tokenizer_folder: Path, straight: dict[str, str]
) -> None:
    build([pairs], tmp_path / "out", tokenizer=tokenizer_folder, options=BuildOptions(), workers=workers)
    assert contents(tmp_path / "out") == straight
    assert "quarantine.jsonl" in straight


def test_a_killed_worker_ends_the_build_naming_its_shard(
    start: Start, tmp_path: Path, straight: dict[str, str]
) -> None:
    output = tmp_path / "out"
    process = start(output, "--workers", "2")
    wait_for(writing(output), process)
    shard = next(output.glob(".0*.images.bin.tmp-*")).name[1:6]
    victim = int(next(output.glob(f".{shard}.images.bin.tmp-*")).name.rpartition("-")[2])
    os.kill(victim, signal.SIGKILL)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 1
    assert f"of 2 was killed by SIGKILL while it wrote shard {shard} of {int(shard)}.tar (out of memory?" in said
    assert "shards were finished and are kept: repeat the command to go on" in said
    assert "Traceback" not in said
    wait_until_gone(process)
    assert not list(output.glob(".0*.tmp-*"))  # swept by the builder, which knows that they are gone
    process = start(output, "--workers", "2")
    assert process.communicate()[1].count("resuming build") == 1
    assert contents(output) == straight


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_signal_ends_it_soon_and_the_same_command_goes_on(
    workers: str, number: signal.Signals, code: int, start: Start, tmp_path: Path, straight: dict[str, str]
) -> None:
    output = tmp_path / "out"
    process = start(output, "--workers", workers)
    wait_for(writing(output), process)
    began = time.monotonic()
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    said = process.communicate(timeout=30)[1]
    assert time.monotonic() - began < 5
    assert process.returncode == code, said
    assert "repeat the command to go on" in said
    assert number == signal.SIGINT or f"stopped by {number.name} after" in said
    assert "Traceback" not in said
    wait_until_gone(process)
    assert not list(output.glob(".*.tmp-*"))
    assert "the build is not complete" in verify(output)[0]
    finish(start(output, "--workers", workers))
    assert contents(output) == straight


def test_workers_do_not_outlive_a_killed_builder(start: Start, tmp_path: Path, straight: dict[str, str]) -> None:
    output = tmp_path / "out"
    process = start(output, "--workers", "3")
    wait_for(writing(output), process)
    assert len(workers_of(process)) == 3
    process.kill()
    process.communicate()
    wait_until_gone(process)
    finish(start(output, "--workers", "3"))
    assert contents(output) == straight


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_said_in_one_line_and_leaves_what_was_complete(
    workers: int,
    pairs: Path,
    tmp_path: Path,
    tokenizer_folder: Path,
    straight: dict[str, str],
    small_disk: Callable[[Path, str], AbstractContextManager[None]],
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    size = sum(path.stat().st_size for path in pairs.iterdir())
    with small_disk(disk, f"{int(size * 0.7) // 1024}k"):
        with pytest.raises(DataError, match=r"disk full \([\d,]+ bytes needed, [\d,]+ bytes free\); free some space"):
            build([pairs], disk / "out", tokenizer=tokenizer_folder, options=BuildOptions(), workers=workers)
        kept = {path.name for path in (disk / "out").glob("0*.json")}
        assert kept
        for prefix in (name.partition(".")[0] for name in kept):
            for path in (disk / "out").glob(f"{prefix}.*"):
                assert contents(disk / "out")[path.name] == straight[path.name]
        assert not list((disk / "out").glob(".0*.tmp-*"))
        assert "the build is not complete" in verify(disk / "out")[0]
        subprocess.run(["mount", "-o", f"remount,size={4 * size}", str(disk)], check=True)
        build([pairs], disk / "out", tokenizer=tokenizer_folder, options=BuildOptions(), workers=workers)
        assert contents(disk / "out") == straight


def test_an_input_that_vanishes_is_named(pairs: Path, tmp_path: Path, start: Start) -> None:
    output = tmp_path / "out"
    process = start(output, "--workers", "2")
    wait_for((output / ".building" / "plan.json").exists, process)
    (pairs / "4.tar").unlink()
    said = process.communicate()[1]
    assert process.returncode == 65
    assert f"megaprior-data: error: {pairs}/4.tar: No such file or directory" in said
    assert "Traceback" not in said


def test_two_builders_race_and_one_wins(start: Start, tmp_path: Path, straight: dict[str, str]) -> None:
    output = tmp_path / "out"
    racers = [start(output, "--workers", "2") for _ in range(3)]
    said = [racer.communicate()[1] for racer in racers]
    codes = [racer.returncode for racer in racers]
    assert codes.count(0) >= 1
    for racer, code, words in zip(racers, codes, said, strict=True):
        if code:
            winners = [other.pid for other, won in zip(racers, codes, strict=True) if won == 0]
            assert code == 65
            assert any(f"in use by {os.uname().nodename} pid {pid}" in words for pid in winners), (racer.pid, words)
        elif words:
            assert "complete already" in words or "in use" not in words
    assert contents(output) == straight


def test_the_default_is_what_this_process_may_use() -> None:
    script = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); "
    script += "from megaprior.data_tools.building.workers import usable_cores; print(usable_cores())"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout.strip() == b"1"
    assert usable_cores() == len(os.sched_getaffinity(0))

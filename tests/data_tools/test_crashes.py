"""A builder that is killed at any step of its writing leaves nothing half-written that anybody would read, and goes on."""

from __future__ import annotations

import builtins
import os
import random
import signal
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.build_crashes import run, table
from megaprior.data.shards import ShardSet, verify
from megaprior.data_tools.building.build import build, build_part
from megaprior.data_tools.building.join import join
from megaprior.data_tools.building.parts import Part
from megaprior.data_tools.options import BuildOptions
from megaprior.errors import DataError
from megaprior.tokenizer import load_tokenizer

# Every call that makes, names, removes or settles something on disk; and a file that was opened for writing is empty still.
_STEPS = ("open", "mkdir", "fsync", "replace", "rename", "unlink", "rmdir")
OPTIONS = BuildOptions(text_shard_bytes=60)
Step = Callable[[], Any]


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def in_child(work: Step, *, die_at: int | None = None) -> int | str:
    """Run `work` in a forked process that SIGKILLs itself at its step `die_at`.

    Returns the number of steps it took, "killed", or "refused" when it ended with a DataError.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        taken = 0

        def counted(real: Callable) -> Callable:
            def call(*arguments: Any, **more: Any) -> Any:
                step()
                return real(*arguments, **more)

            return call

        def step() -> None:
            nonlocal taken
            taken += 1
            if taken == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

        def opened(file: Any, mode: str = "r", *arguments: Any, **more: Any) -> Any:
            handle = real_open(file, mode, *arguments, **more)
            if "w" in mode:
                step()
            return handle

        real_open, builtins.open = builtins.open, opened

        for name in _STEPS:
            setattr(os, name, counted(getattr(os, name)))
        said = b"failed"
        try:
            work()
            said = str(taken).encode()
        except DataError:
            said = b"refused"
        finally:
            os.write(writing, said)
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode()
    os.waitpid(pid, 0)
    assert said != "failed"
    return int(said) if said.isdecimal() else said or "killed"


@pytest.fixture(autouse=True)
def no_wait_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process loses nothing that it has written, only a power cut would: fsync counts as a step and costs nothing."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    path = tmp_path / "captions.txt"
    path.write_text("".join(f"{i} dogs\n" + "\n" * (i % 5 == 0) for i in range(24)))
    return path


@pytest.fixture
def straight(captions: Path, tmp_path: Path, tokenizer_folder: Path) -> dict[str, bytes]:
    build([captions], tmp_path / "straight", tokenizer=tokenizer_folder, options=OPTIONS)
    return tree(tmp_path / "straight")


def check_truth(output: Path, straight: dict[str, bytes]) -> None:
    """Whatever a reader accepts is complete and right, and verify says the same."""
    problems = verify(output) if output.exists() else ["the build is not complete"]
    if (output / "build.json").exists():
        assert all(".building" in problem or ".lock" in problem for problem in problems), problems
        ShardSet.open(output)
    else:
        assert "the build is not complete" in problems[0]
        with pytest.raises(DataError):
            ShardSet.open(output)
    for manifest in output.glob("[0-9]*.json"):
        for path in output.glob(f"{manifest.stem}.*"):
            assert path.read_bytes() == straight[path.name]


@pytest.mark.parametrize("way", ["whole", "part", "join"])
def test_killed_at_every_step_then_repeated(
    way: str, captions: Path, tmp_path: Path, tokenizer_folder: Path, straight: dict[str, bytes]
) -> None:
    def work(output: Path) -> Step:
        def part(number: int) -> Any:
            return build_part([captions], output, part=Part(number, 2), tokenizer=tokenizer_folder, options=OPTIONS)

        if way == "whole":
            return lambda: build([captions], output, tokenizer=tokenizer_folder, options=OPTIONS)
        if way == "part":
            return lambda: part(1)
        for number in range(2):
            if not (output / "build.json").exists():
                part(number)
        return lambda: join(output)

    steps = in_child(work(tmp_path / "counted"))
    assert isinstance(steps, int)
    assert steps > {"whole": 120, "part": 70, "join": 15}[way]
    for step in range(1, steps + 1):
        output = tmp_path / f"killed{step}"
        assert in_child(work(output), die_at=step) == "killed"
        check_truth(output, straight)
        work(output)()
        if way == "part":
            with pytest.raises(DataError, match="1 of 2 parts are not finished: 0/2"):
                join(output)
            build([captions], output, tokenizer=tokenizer_folder, options=OPTIONS)
        assert tree(output) == straight, step


def captions_of(folder: Path) -> Counter[str]:
    """The multiset of captions that a folder holds."""
    shards, tokenizer = ShardSet.open(folder), load_tokenizer(folder / "tokenizer")
    return Counter(tokenizer.decode(shards.tokens(i)[:-1].tolist()) for i in range(len(shards)))


_DEATHS = st.one_of(st.none(), st.integers(1, 160))
_WAYS = st.one_of(
    st.just("whole"),
    st.just("join"),
    st.builds(Part, st.integers(0, 1), st.just(2)),
    st.builds(Part, st.integers(0, 2), st.just(3)),
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(st.text("ab", max_size=12), min_size=1, max_size=20), acts=st.lists(st.tuples(_WAYS, _DEATHS)))
def test_any_sequence_of_builds_kills_and_resumes_keeps_every_sample(
    lines: list[str], acts: list[tuple[Any, int | None]], tmp_path: Path, tokenizer_folder: Path
) -> None:
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    text = folder / "captions.txt"
    text.write_text("".join(f"x {line}\n" for line in lines))
    output = folder / "out"

    def act(way: Any) -> Any:
        if way == "join":
            return join(output)
        if way == "whole":
            return build([text], output, tokenizer=tokenizer_folder, options=OPTIONS)
        return build_part([text], output, part=way, tokenizer=tokenizer_folder, options=OPTIONS)

    for way, step in acts:
        in_child(lambda way=way: act(way), die_at=step)
    act("whole")
    build([text], folder / "straight", tokenizer=tokenizer_folder, options=OPTIONS)
    assert tree(output) == tree(folder / "straight")
    assert captions_of(output) == Counter(f"x {line}".strip() for line in lines)


@pytest.mark.slow
def test_real_processes_killed_at_random_moments(
    make_tar: Callable[..., Path], picture: Callable[..., bytes], tmp_path: Path, tokenizer_folder: Path
) -> None:
    (tmp_path / "pairs").mkdir()
    for tar in range(6):
        members = []
        for number in range(40):
            seed = tar * 40 + number
            image = picture(seed, width=64, height=48) if number % 13 else b"no image"
            members += [(f"{seed:05d}.jpg", image), (f"{seed:05d}.txt", f"{seed} dogs beside one red square".encode())]
        make_tar(f"pairs/{tar}.tar", members)
    told: list[str] = []
    build_line = ["--input", str(tmp_path / "pairs"), "--tokenizer", str(tokenizer_folder)]
    tallies = run(build_line, tmp_path, kills=10, seed=random.getrandbits(32), say=told.append)
    assert sum(tally.kills.total() for tally in tallies.values()) == 10, told
    assert "| one process | " in table(tallies)

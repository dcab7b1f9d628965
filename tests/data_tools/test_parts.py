"""Parts of a job array over one folder, and the join that completes them."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks.build_crashes import contents
from megaprior.data.shards import verify
from megaprior.data_tools.building import folder
from megaprior.data_tools.building.build import build, build_part
from megaprior.data_tools.building.join import join
from megaprior.data_tools.building.parts import Part, parse_part
from megaprior.data_tools.options import BuildOptions
from megaprior.errors import DataError, UsageError

Run = Callable[..., object]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "captions.txt"
    path.write_text("".join(f"{i} dogs\n" for i in range(50)) + "\n")
    return path


@pytest.fixture
def part(text: Path, tmp_path: Path, tokenizer_folder: Path) -> Run:
    """`part("1/3")` builds that part of five shards into tmp_path/out."""

    def run(which: str, **options: object) -> object:
        wanted = BuildOptions(**{"text_shard_bytes": 80} | options)  # type: ignore[arg-type]
        return build_part([text], tmp_path / "out", part=parse_part(which), tokenizer=tokenizer_folder, options=wanted)

    return run


@pytest.fixture
def straight(text: Path, tmp_path: Path, tokenizer_folder: Path) -> dict[str, str]:
    build(
        [text], tmp_path / "straight", tokenizer=tokenizer_folder, options=BuildOptions(text_shard_bytes=80), workers=2
    )
    return contents(tmp_path / "straight")


def test_parts_are_counted_from_0() -> None:
    assert parse_part("3/10") == Part(3, 10)
    assert [list(Part(i, 3).select("abcdefg")) for i in range(3)] == [list("adg"), list("be"), list("cf")]
    with pytest.raises(UsageError, match=r"--part 10/10: 10 parts are counted from 0 to 9; submit with --array=0-9"):
        parse_part("10/10")
    for wrong in ("3", "a/b", "1/0", "-1/3", "1.0/3", "", "/", "1/3/4"):
        with pytest.raises(UsageError, match="expected I/N"):
            parse_part(wrong)


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_parts_in_any_order_then_join_give_the_same_bytes(
    count: int, part: Run, tmp_path: Path, straight: dict[str, str]
) -> None:
    for number in reversed(range(count)):
        part(f"{number}/{count}")
    body = join(tmp_path / "out")
    assert body["counts"]["samples"] == 50
    assert contents(tmp_path / "out") == straight
    assert join(tmp_path / "out") == body
    assert part(f"0/{count}").complete  # type: ignore[attr-defined]
    assert contents(tmp_path / "out") == straight


def test_parts_that_begin_at_once_get_along(
    text: Path, tmp_path: Path, tokenizer_folder: Path, straight: dict[str, str]
) -> None:
    def run(number: int) -> subprocess.CompletedProcess[str]:
        script = (
            "import sys; from pathlib import Path; from megaprior.data_tools.building.build import build_part\n"
            "from megaprior.data_tools.options import BuildOptions; from megaprior.data_tools.building.parts import Part\n"
            "build_part([Path(sys.argv[1])], Path(sys.argv[2]), part=Part(int(sys.argv[4]), 4), tokenizer=Path(sys.argv[3]),"
            " options=BuildOptions(text_shard_bytes=80))"
        )
        command = [sys.executable, "-c", script, text, tmp_path / "out", tokenizer_folder, str(number)]
        return subprocess.run(command, capture_output=True, text=True)

    with ThreadPoolExecutor(4) as pool:
        for done in pool.map(run, range(4)):
            assert done.returncode == 0, done.stderr
    join(tmp_path / "out")
    assert contents(tmp_path / "out") == straight


def test_join_refuses_and_names_what_is_missing(part: Run, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder; build its parts first"):
        join(tmp_path / "out")
    part("0/4")
    part("2/4")
    with pytest.raises(
        DataError,
        match=r"2 of 4 parts are not finished: 1/4, 3/4 \(2 of 5 shards are missing, the first 00001 of captions.txt\)",
    ):
        join(tmp_path / "out")
    assert not (tmp_path / "out" / "build.json").exists()
    assert "the build is not complete" in verify(tmp_path / "out")[0]


def test_join_leaves_a_foreign_folder_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("x")
    with pytest.raises(DataError, match="no manifest, so nothing was completed here"):
        join(tmp_path / "thesis")
    assert [path.name for path in (tmp_path / "thesis").rglob("*")] == ["thesis.tex"]


def test_a_build_of_the_whole_completes_what_parts_began(
    part: Run, text: Path, tmp_path: Path, tokenizer_folder: Path, straight: dict[str, str]
) -> None:
    part("1/2")
    first = (tmp_path / "out" / "00001.json").stat()
    build([text], tmp_path / "out", tokenizer=tokenizer_folder, options=BuildOptions(text_shard_bytes=80))
    assert (tmp_path / "out" / "00001.json").stat().st_ino == first.st_ino
    assert contents(tmp_path / "out") == straight


def test_a_part_of_another_build_is_refused(part: Run) -> None:
    part("0/2")
    with pytest.raises(
        DataError, match=r"unfinished build of other inputs or options \(max_sequence 2048 there, 7 now\)"
    ):
        part("1/2", max_sequence=7)


def hold(output: Path, which: str) -> subprocess.Popen[str]:
    """A process that holds the folder, or a part of it, until its input is closed."""
    script = (
        "import sys; from pathlib import Path; from megaprior.data_tools.building import folder, parts\n"
        "output, which = Path(sys.argv[1]), sys.argv[2]\n"
        "lock = folder.whole(output) if which == 'whole' else folder.held_part(output, parts.parse_part(which))\n"
        "with lock:\n    print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(output), which]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize(
    ("holder", "asked", "said"),
    [
        ("1/3", "1/3", "part 1/3 is being built by {owner}; wait for it"),
        ("1/3", "0/2", "part 1/3 is being built by {owner}; 3 and 2 parts overlap; wait for it"),
        ("whole", "0/2", "in use by {owner}, which builds or joins the whole; wait for it"),
        ("1/3", "join", "part 1/3 is being built by {owner}; wait for it"),
        ("1/3", "whole", "part 1/3 is being built by {owner}; wait for it"),
        ("whole", "join", "in use by {owner}; wait for it"),
        ("1/3", "0/3", None),
    ],
)
def test_who_may_work_beside_whom(
    holder: str, asked: str, said: str | None, part: Run, text: Path, tmp_path: Path, tokenizer_folder: Path
) -> None:
    part("2/3")
    process = hold(tmp_path / "out", holder)
    owner = f"{socket.gethostname()} pid {process.pid}"

    def ask() -> None:
        if asked == "join":
            join(tmp_path / "out")
        elif asked == "whole":
            build([text], tmp_path / "out", tokenizer=tokenizer_folder, options=BuildOptions(text_shard_bytes=80))
        else:
            part(asked)

    if said is None:
        ask()
    else:
        with pytest.raises(DataError, match=said.format(owner=owner)):
            ask()
    process.kill()  # a dead holder's lock is nobody's
    process.communicate()
    part(asked) if "/" in asked else part("0/3")
    assert not folder.leftovers(tmp_path / "out") or not (tmp_path / "out" / "build.json").exists()


def test_a_broken_ledger_says_what_to_delete(part: Run, tmp_path: Path, straight: dict[str, str]) -> None:
    part("0/1")
    (tmp_path / "out" / ".building" / "00002.json").write_text("{")
    with pytest.raises(DataError, match=r"delete 00002.json in .*out, which has it built again"):
        join(tmp_path / "out")
    (tmp_path / "out" / "00002.json").unlink()
    part("0/1")
    join(tmp_path / "out")
    assert contents(tmp_path / "out") == straight


def test_shards_of_two_builds_are_never_joined(part: Run, text: Path, tmp_path: Path, tokenizer_folder: Path) -> None:
    part("0/1")
    other = BuildOptions(text_shard_bytes=80, max_sequence=9)
    build([text], tmp_path / "other", tokenizer=tokenizer_folder, options=other)
    for path in (tmp_path / "other").glob("00002.*"):
        shutil.copy(path, tmp_path / "out")
    with pytest.raises(DataError, match=r"out/00002"):
        join(tmp_path / "out")
    assert not (tmp_path / "out" / "build.json").exists()


def test_the_command(
    command: Callable[..., tuple[int, str, str]], text: Path, tmp_path: Path, tokenizer_folder: Path
) -> None:
    arguments = ("build", "--input", text, "--output", tmp_path / "out", "--tokenizer", tokenizer_folder)
    code, said, _ = command(*arguments, "--part", "0/2")
    assert (code, said.splitlines()) == (
        0,
        [
            f"{tmp_path}/out: part 0/2: 1 shard of 1",
            f"next, when all 2 parts are done: megaprior-data join {tmp_path}/out",
        ],
    )
    assert command(*arguments, "--part", "1/2")[1].startswith(f"{tmp_path}/out: part 1/2: 0 shards of 1\n")
    code, said, _ = command("join", tmp_path / "out")
    assert (code, said.splitlines()[0]) == (0, f"{tmp_path}/out: 50 captions, 240 tokens, 1 shard")
    assert json.loads((tmp_path / "out" / "build.json").read_text())["counts"]["quarantined"] == 1
    assert command(*arguments, "--workers", "0")[0] == 2

"""`mpirun` for real: the same bytes, all ranks end together, a node that sees another folder is told at the start."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.build_crashes import MPIRUN, contents, session
from megaprior.data_tools.building.build import build
from megaprior.data_tools.building.ranks import launched_ranks
from megaprior.data_tools.options import BuildOptions
from megaprior.errors import UsageError

needs_mpirun = pytest.mark.skipif(MPIRUN is None, reason="needs mpirun")
_CLI = [sys.executable, "-m", "megaprior.data_tools.cli"]


@pytest.fixture
def pairs(make_tar: Callable[..., Path], picture: Callable[..., bytes], tmp_path: Path) -> Path:
    """A folder of five tars of 40 pairs, some of them broken."""
    (tmp_path / "pairs").mkdir()
    for tar in range(5):
        members = []
        for number in range(40):
            image = picture(tar * 40 + number, width=120, height=90) if number % 30 else b"no image"
            members += [(f"{number:05d}.jpg", image), (f"{number:05d}.txt", b"two dogs beside one red square")]
        make_tar(f"pairs/{tar}.tar", members)
    return tmp_path / "pairs"


@pytest.fixture
def straight(pairs: Path, tmp_path: Path, tokenizer_folder: Path) -> dict[str, str]:
    build([pairs], tmp_path / "straight", tokenizer=tokenizer_folder, options=BuildOptions())
    return contents(tmp_path / "straight")


def mpirun(*command: object) -> subprocess.Popen[str]:
    line = [MPIRUN, "--allow-run-as-root", "--oversubscribe", *map(str, command)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


def build_line(pairs: Path, output: Path | str, tokenizer: Path) -> list[object]:
    return [*_CLI, "build", "--input", pairs, "--output", output, "--tokenizer", tokenizer]


@needs_mpirun
@pytest.mark.parametrize(("ranks", "more"), [(2, ()), (3, ()), (2, ("--workers", "2"))])
def test_ranks_write_the_same_bytes(
    ranks: int, more: tuple[str, ...], pairs: Path, tmp_path: Path, tokenizer_folder: Path, straight: dict[str, str]
) -> None:
    process = mpirun("-n", ranks, *build_line(pairs, tmp_path / "out", tokenizer_folder), *more)
    said, warned = process.communicate(timeout=120)
    assert process.returncode == 0, warned
    assert said.count(f"{tmp_path}/out: ") == 1  # rank 0 alone speaks
    assert contents(tmp_path / "out") == straight
    again = mpirun("-n", ranks, *build_line(pairs, tmp_path / "out", tokenizer_folder))
    assert "complete already" in again.communicate(timeout=120)[1]
    assert again.returncode == 0


@needs_mpirun
def test_a_killed_rank_ends_all_and_the_same_command_goes_on(
    pairs: Path, tmp_path: Path, tokenizer_folder: Path, straight: dict[str, str]
) -> None:
    output = tmp_path / "out"
    process = mpirun("-n", 2, *build_line(pairs, output, tokenizer_folder))
    while not (writing := list(output.glob(".0*.images.bin.tmp-*"))):
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    os.kill(int(writing[0].name.rpartition("-")[2]), signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0
    deadline = time.monotonic() + 10
    while left := session(process.pid):
        assert time.monotonic() < deadline, left
        time.sleep(0.02)
    process = mpirun("-n", 3, *build_line(pairs, output, tokenizer_folder))
    process.communicate(timeout=120)
    assert process.returncode == 0
    assert contents(output) == straight


@needs_mpirun
def test_a_rank_whose_input_fails_ends_all_and_is_named(pairs: Path, tmp_path: Path, tokenizer_folder: Path) -> None:
    output = tmp_path / "out"
    process = mpirun("-n", 2, *build_line(pairs, output, tokenizer_folder))
    while not list(output.glob(".00001.images.bin.tmp-*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    (pairs / "3.tar").unlink()  # the second one of rank 1
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 65, said
    assert f"megaprior-data: error: rank 1 of 2: {pairs}/3.tar: No such file or directory\n" in said
    assert "Traceback" not in said


@needs_mpirun
def test_a_mistake_is_said_once(pairs: Path, tmp_path: Path, tokenizer_folder: Path) -> None:
    process = mpirun("-n", 3, *build_line(pairs / "gone.tar", tmp_path / "out", tokenizer_folder))
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 2
    assert said.count("no such file or folder") == 1
    assert not (tmp_path / "out").exists()


@needs_mpirun
@pytest.mark.parametrize("what", ["output", "input"])
def test_a_rank_that_sees_another_folder_is_told_at_the_start(
    what: str, pairs: Path, tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    output: Path | str = "out" if what == "output" else tmp_path / "out"
    inputs = pairs
    if what == "input":
        (here / "pairs").symlink_to(pairs)
        inputs = Path("pairs")
    line = build_line(inputs, output, tokenizer_folder)
    process = mpirun("-n", 1, "--wdir", here, *line, ":", "-n", 1, "--wdir", there, *line)
    began = time.monotonic()
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 65, said
    assert f"error: rank 1 on {os.uname().nodename}: {'out' if what == 'output' else 'pairs/1.tar'}: " in said
    assert "a file system that all nodes share" in said.replace("\n", " ")
    assert time.monotonic() - began < 30
    assert not list(tmp_path.glob("*/out/0*"))
    assert not list(there.iterdir())


def test_launchers_are_told_by_their_environment() -> None:
    assert launched_ranks({}) == 1
    assert launched_ranks({"OMPI_COMM_WORLD_SIZE": "4"}) == 4
    assert launched_ranks({"PMI_SIZE": "3"}) == 3
    assert launched_ranks({"PMI_SIZE": "1", "SLURM_STEP_NUM_TASKS": "1"}) == 1
    assert launched_ranks({"SLURM_STEP_NUM_TASKS": "8", "PMIX_RANK": "0"}) == 8
    with pytest.raises(UsageError, match=r"srun started 8 tasks without MPI.*--part \$SLURM_PROCID/8"):
        launched_ranks({"SLURM_STEP_NUM_TASKS": "8"})


def test_ranks_that_do_not_see_each_other_are_refused(pairs: Path, tmp_path: Path, tokenizer_folder: Path) -> None:
    """mpi4py loaded with another MPI than mpirun's: each process would take itself for the only one."""
    pytest.importorskip("mpi4py")
    environment = os.environ | {"OMPI_COMM_WORLD_SIZE": "2"}
    line = list(map(str, build_line(pairs, tmp_path / "out", tokenizer_folder)))
    done = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 2
    assert "started 2 ranks but" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_plain_run_never_touches_mpi(workers: str, pairs: Path, tmp_path: Path, tokenizer_folder: Path) -> None:
    script = (
        "import sys\nfrom megaprior.data_tools.cli import main\n"
        "if __name__ == '__main__':\n    code = main()\n    print('mpi4py' in sys.modules)\n    sys.exit(code)\n"
    )
    (tmp_path / "script.py").write_text(script)
    line = [sys.executable, tmp_path / "script.py", *build_line(pairs, tmp_path / "out", tokenizer_folder)[3:]]
    done = subprocess.run([*line, "--workers", workers], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False"

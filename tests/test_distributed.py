"""The launcher's environment, and two real processes that agree, differ, fail and fall silent."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from megaprior.distributed import Peers, Place, digest, place
from megaprior.errors import MegapriorError, UsageError

RANK1 = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_no_launcher_means_alone() -> None:
    assert place({}) == Place(rank=0, world=1, local_rank=0)


def test_a_launchers_environment_is_read() -> None:
    assert place(RANK1) == Place(rank=1, world=2, local_rank=1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"RANK": None}, "RANK not set while"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK not set while"),
        ({"RANK": "2"}, "RANK=2 is not below WORLD_SIZE=2"),
        ({"RANK": "-1"}, "RANK=-1 is not below"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two'.* must be whole numbers"),
        ({"MASTER_PORT": None}, "WORLD_SIZE=2 but MASTER_PORT not set"),
    ],
)
def test_a_wrong_environment_is_one_line(changes: dict[str, str | None], words: str) -> None:
    env = {name: value for name, value in {**RANK1, **changes}.items() if value is not None}
    with pytest.raises(UsageError, match=words) as error:
        place(env)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "launcher"), [("SLURM_STEP_NUM_TASKS", "srun"), ("OMPI_COMM_WORLD_SIZE", "mpirun")])
def test_several_tasks_without_ranks_would_overwrite_each_other(name: str, launcher: str) -> None:
    with pytest.raises(UsageError, match=f"{launcher} started 4 processes"):
        place({name: "4"})
    assert place({name: "1"}) == Place()


def test_digests_fit_a_float_exactly_and_tell_parts_apart() -> None:
    found = digest("a", b"b", 1.5)
    assert found == int(found) < 2**52
    assert digest("ab") != digest("a", "b")
    assert digest(1.0) != digest(2.0)


def test_alone_everything_agrees() -> None:
    peers = Peers(Place())
    assert peers.gather([1.0, 2.0]) == [[1.0, 2.0]]
    assert peers.share("x") == "x"
    peers.announce({"its data": 1.0}).check(1)
    peers.settle()
    with pytest.raises(OSError, match="mine"):
        peers.settle(OSError("mine"))
    with pytest.raises(KeyError):
        peers.first_does(lambda: {}["absent"])
    peers.close()


SCRIPT = """
import os, sys, time
from megaprior.distributed import Watchdog, connect, place
from megaprior.errors import MegapriorError

here = place()
peers = connect(here, backend="gloo", timeout_s=30)
assert peers.gather([here.rank, 0.5]) == [[0.0, 0.5], [1.0, 0.5]]
assert peers.gather_objects({"rank": here.rank}) == [{"rank": 0}, {"rank": 1}]
assert peers.share(f"from {here.rank}") == "from 0"
assert peers.first_does(lambda: here.rank) == 0

flying = peers.announce({"its sample ids": 7.0, "its rows": 2.0})
assert peers.gather([1.0]) == [[1.0], [1.0]]  # others may travel meanwhile
flying.check(3)
try:
    peers.announce({"its sample ids": 7.0, "its rows": 2.0 + here.rank}).check(4)
except MegapriorError as error:
    assert "step 4: rank 1 differs from rank 0 in its rows" in str(error), error
else:
    raise AssertionError

try:
    peers.settle(ValueError("no space") if here.rank == 1 else None)
except ValueError:
    assert here.rank == 1
except MegapriorError as error:
    assert here.rank == 0
    assert str(error) == "rank 1 failed: ValueError: no space", error
try:
    peers.first_does(lambda: 1 / 0)
except ZeroDivisionError:
    assert here.rank == 0
except MegapriorError as error:
    assert here.rank == 1
    assert "ZeroDivisionError" in str(error)

if here.rank == 1:
    if sys.argv[1] == "dies":
        os._exit(9)
    time.sleep(60)
with Watchdog(peers, timeout_s=2.0) as watchdog:
    watchdog.beat("step 12")
    peers.gather([1.0])
"""


def run_two(tmp_path: Path, how: str) -> list[tuple[int | None, str]]:
    """(exit code, standard error) of two ranks of SCRIPT; one that is still there when the other has ended is killed."""
    script = tmp_path / "ranks.py"
    script.write_text(textwrap.dedent(SCRIPT))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), how],
            env={**shared, "RANK": str(r), "LOCAL_RANK": str(r)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(2)
    ]
    _, first = ranks[0].communicate(timeout=90)
    ranks[1].kill()
    _, second = ranks[1].communicate(timeout=30)
    return [(ranks[0].returncode, first), (ranks[1].returncode, second)]


def test_two_ranks_agree_differ_and_notice_a_death(tmp_path: Path) -> None:
    (code, said), (other, _) = run_two(tmp_path, "dies")
    assert other == 9, said
    assert code == 1, said
    assert MegapriorError.__name__ in said
    assert "rank 0 lost contact with the others during step 12: rank 1 does not answer" in said


def test_a_silent_rank_ends_the_job_within_the_timeout(tmp_path: Path) -> None:
    (code, said), _ = run_two(tmp_path, "sleeps")
    assert code == 1, said
    assert "rank 0 made no progress for 2 s during step 12: rank 1 does not answer" in said

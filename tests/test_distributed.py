"""The launcher's environment, and two real processes that agree, differ, fail and fall silent."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
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
from pathlib import Path
from megaprior.distributed import connect, place
from megaprior.errors import MegapriorError
from megaprior.train.watchdog import Watchdog

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

assert not peers.alarmed()
with Watchdog(peers, timeout_s=3.0) as watchdog:
    watchdog.stacks = Path(sys.argv[0]).parent / "stacks"
    watchdog.beat("step 12")
    if here.rank == int(sys.argv[2]):
        if sys.argv[1] == "dies":
            os._exit(9)
        Path(sys.argv[0]).with_name("here").touch()
        def stuck():
            time.sleep(60)
        stuck()
    peers.gather([1.0])
"""


def run_two(tmp_path: Path, how: str, who: int = 1) -> list[tuple[int | None, str]]:
    """(exit code, standard error) of two ranks of SCRIPT, of which `who` dies, sleeps or is stopped (and killed at the end)."""
    script = tmp_path / "ranks.py"
    script.write_text(textwrap.dedent(SCRIPT))
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), how, str(who)],
            env={**shared, "RANK": str(r), "LOCAL_RANK": str(r), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(2)
    ]
    if how == "stops":
        deadline = time.monotonic() + 60
        while not (tmp_path / "here").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        ranks[who].send_signal(signal.SIGSTOP)
    said = {1 - who: ranks[1 - who].communicate(timeout=90)[1]}
    if how == "stops":
        ranks[who].kill()
    said[who] = ranks[who].communicate(timeout=30)[1]
    return [(ranks[r].returncode, said[r]) for r in range(2)]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_two_ranks_agree_differ_and_notice_a_death(tmp_path: Path) -> None:
    (code, said), (other, _) = run_two(tmp_path, "dies")
    assert other == 9, said
    assert code == 1, said
    assert MegapriorError.__name__ in said
    assert "rank 0 lost contact with the others during step 12: rank 1 does not answer" in said


def test_a_sleeping_rank_is_named_with_the_line_where_it_hangs(tmp_path: Path) -> None:
    ranks = run_two(tmp_path, "sleeps")
    for code, said in ranks:
        assert code == 1, said
        assert "rank 1 hangs in step 12 at ranks.py:" in said
        assert f"stuck, the others wait for it; the job ends, stacks are in {tmp_path}/stacks" in said
    assert any(f"rank {r} made no progress for 3 s during step 12" in ranks[r][1] for r in range(2))
    waiting, hanging = ((tmp_path / "stacks" / f"rank{r}.txt").read_text() for r in range(2))
    assert "in stuck" in hanging
    assert "in stuck" not in waiting
    assert "in gather" in waiting


@pytest.mark.parametrize("who", [0, 1])
def test_a_frozen_rank_ends_the_job_within_the_timeout(tmp_path: Path, who: int) -> None:
    """Rank 0 has the store through which ranks speak in an emergency: frozen, it must not freeze that too."""
    ranks = run_two(tmp_path, "stops", who)
    assert ranks[who][0] == -signal.SIGKILL  # by the test, at last
    code, said = ranks[1 - who]
    assert code == 1, said
    assert f"rank {1 - who} made no progress for 3 s during step 12: rank {who} does not answer" in said


def test_a_port_that_another_job_uses_is_one_line(tmp_path: Path) -> None:
    with socket.socket() as job:
        job.bind(("127.0.0.1", 0))
        job.listen()
        port = str(job.getsockname()[1])
        env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
        script = (
            "import sys\nfrom megaprior.distributed import connect, place\nfrom megaprior.errors import UsageError\n"
            "try:\n    connect(place(), backend='gloo', timeout_s=3)\n"
            "except UsageError as error:\n    sys.exit(str(error))\n"
        )
        for rank in ("0", "1"):
            done = subprocess.run(
                [sys.executable, "-c", script],
                env={**env, "RANK": rank},
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            assert done.returncode == 1, done.stderr
            last = done.stderr.strip().splitlines()[-1]
            assert last.startswith(f"rank {rank} of 2 cannot meet the others at 127.0.0.1:{port} (")
            assert last.endswith("(choose another --master_port), and can every machine reach that address?")

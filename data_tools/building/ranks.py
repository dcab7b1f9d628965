"""A build under `mpirun`, or `srun` with MPI: rank 0 plans and joins, every rank writes its share of the shards.

Only a process that a launcher has started among others imports mpi4py. Waiting ranks sleep; an MPI library left to itself
would keep a core busy.
"""

from __future__ import annotations

import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

from megaprior.data import manifest as mf
from megaprior.data_tools.building import folder
from megaprior.data_tools.building.build import bytes_read, start, tell_left_out
from megaprior.data_tools.building.join import commit
from megaprior.data_tools.building.plan import Plan, make_plan
from megaprior.data_tools.building.workers import Throttled, Work, run_jobs
from megaprior.data_tools.options import BuildOptions
from megaprior.errors import DataError, MegapriorError, UsageError
from megaprior.tokenizer import Tokenizer, load_tokenizer

T = TypeVar("T")

_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")  # Open MPI; MPICH, Intel MPI, srun's pmi2; MVAPICH
_READ, _DONE, _AWAKE = 1, 2, 3  # tags
_POLL_S = 0.02
_SEES_WITHIN_S = 15.0  # a network file system shows a new file after some seconds


def launched_ranks(environment: Mapping[str, str] | None = None) -> int:
    """How many ranks the launcher has started, by its environment alone; 1 without a launcher.

    Raises:
        UsageError: srun started several tasks that cannot speak to each other.
    """
    env = os.environ if environment is None else environment
    size = next((int(env[name]) for name in _SIZES if env.get(name, "").isdecimal()), 1)
    tasks = int(env.get("SLURM_STEP_NUM_TASKS") or 1)
    if size == 1 and tasks > 1:
        if "PMIX_RANK" not in env:
            raise UsageError(
                f"srun started {tasks} tasks without MPI, and each would build the whole; start them with srun --mpi=pmix, "
                f"or give each a part: --part $SLURM_PROCID/{tasks}"
            )
        return tasks
    return size


def build_on_ranks(
    paths: Sequence[Path], output: Path, *, tokenizer: Path, options: BuildOptions, workers: int = 1
) -> dict[str, Any] | None:
    """`build` with the ranks of a launcher, `workers` processes each; returns build.json's content on rank 0, else None.

    Raises:
        MegapriorError: as `build`, on rank 0; the other ranks leave with the same exit code.
    """
    world = World(launched_ranks())
    with ExitStack() as held:
        plan = world.first(lambda: _prepare(held, paths, output, tokenizer, options))
        if plan is None:
            return mf.read_build(output) if world.rank == 0 else None
        world.every(lambda: _refuse_blind(world, output, plan, tokenizer))
        words = load_tokenizer(tokenizer)
        _write_shards(world, Work(output=output, plan=plan, tokenizer=tokenizer), words, workers)
        world.first(lambda: commit(output, folder.read_begun(output), words) and None)
    return mf.read_build(output) if world.rank == 0 else None


def _write_shards(world: World, work: Work, words: Tokenizer, workers: int) -> None:
    plan = work.plan
    shown = bytes_read(work.output, plan.jobs) if world.rank == 0 else nullcontext(([], lambda _: None))
    with world.failing_together(), shown as (todo, tick):
        # What is left is dealt out anew, so that a resumed build is as even as a fresh one.
        numbers = world.first(lambda: [int(job.prefix) for job in todo])
        share = [plan.jobs[number] for number in numbers[world.rank :: world.size]]
        told = Throttled(world.reporting(tick))
        run_jobs(work, share, words, workers=workers, tick=told)
        told.flush()
        world.await_all(tick)


def _prepare(
    held: ExitStack, paths: Sequence[Path], output: Path, tokenizer: Path, options: BuildOptions
) -> Plan | None:
    """On rank 0: plan, hold the folder, begin; None when the build is complete already."""
    words = load_tokenizer(tokenizer)
    plan = make_plan(paths, options, fingerprint=words.fingerprint)
    tell_left_out(plan)
    folder.state(output, plan)
    held.enter_context(folder.whole(output))
    if start(output, plan) == "complete":
        folder.finish(output)
        return None
    folder.sweep(output)
    folder.begin(output, plan, words)
    return plan


def _refuse_blind(world: World, output: Path, plan: Plan, tokenizer: Path) -> None:
    """Refuse, before any work, a node that does not see what rank 0 sees.

    Raises:
        DataError: the output folder, an input or the tokenizer is missing or another here.
    """
    deadline = time.monotonic() + _SEES_WITHIN_S
    while True:
        try:
            found = folder.read_begun(output).build_id
            break
        except (DataError, OSError):
            if time.monotonic() > deadline:
                raise DataError(
                    f"{output}: not the folder that rank 0 has begun to write; put --output on a file system that all "
                    "nodes share, under the same path"
                ) from None
            time.sleep(0.2)
    if found != plan.build_id:
        raise DataError(f"{output}: holds build {found}, rank 0 builds {plan.build_id}; do all nodes see one folder?")
    for job in plan.jobs[world.rank :: world.size]:
        size = job.source.path.stat().st_size if job.source.path.is_file() else None
        if size != job.source.size:
            here = "no such file" if size is None else f"{size:,} bytes"
            raise DataError(
                f"{job.source.path}: {here} here, {job.source.size:,} bytes on rank 0; put --input on a file system that "
                "all nodes share"
            )
    if load_tokenizer(tokenizer).fingerprint != plan.recorded["tokenizer"]:
        raise DataError(f"{tokenizer}: another tokenizer here than on rank 0; put it on a file system that all share")


class World:
    """The ranks of this launch, which fail together."""

    def __init__(self, expected: int) -> None:
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:
            why = str(error).strip().splitlines()[0]
            raise UsageError(
                f"{expected} ranks were started but MPI cannot be used ({why}); install an MPI library for mpi4py, or use "
                "--workers on one machine and --part on several"
            ) from None
        self._mpi, self._comm = MPI, MPI.COMM_WORLD
        self.rank, self.size = self._comm.rank, self._comm.size
        self._sent: list[Any] = []
        if self.size != expected:
            raise UsageError(
                f"the launcher started {expected} ranks but mpi4py's library ({MPI.Get_library_version().split(',')[0]}) "
                f"sees {self.size}; start with the mpirun of that library, or use --part"
            )

    def first(self, work: Callable[[], T]) -> T:
        """What `work` gives on rank 0, on every rank.

        Raises:
            MegapriorError: as `work`, on rank 0; elsewhere SystemExit with the same code.
        """
        outcome: tuple[int, T | None] = (0, None)
        failure: BaseException | None = None
        if self.rank == 0:
            try:
                outcome = (0, work())
            except Exception as error:
                failure, outcome = error, (getattr(error, "exit_code", 1), None)
            for rank in range(1, self.size):
                self._comm.send(None, dest=rank, tag=_AWAKE)
        else:
            self._receive(0, _AWAKE)
        code, value = self._comm.bcast(outcome)
        if failure is not None:
            raise failure
        if code:
            raise SystemExit(code)
        return value

    def every(self, work: Callable[[], None]) -> None:
        """Do `work` on every rank.

        Raises:
            DataError: a rank could not; on rank 0 it names that rank and its machine, elsewhere SystemExit.
        """
        problem = None
        try:
            work()
        except (MegapriorError, OSError) as error:
            problem = f"rank {self.rank} on {socket.gethostname()}: {error}"
        problems = [text for text in self._comm.allgather(problem) if text]
        if problems:
            if self.rank:
                raise SystemExit(DataError.exit_code)
            more = f" ({len(problems)} of {self.size} ranks fail)" if len(problems) > 1 else ""
            raise DataError(f"{problems[0]}{more}")

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """End every rank when this one fails: the others would wait for it for ever."""
        try:
            yield
        except SystemExit:
            raise
        except BaseException as error:
            code, said = getattr(error, "exit_code", 1), str(error)
            if isinstance(error, OSError):
                code, said = DataError.exit_code, f"{error.filename or 'input or output'}: {error.strerror}"
            elif isinstance(error, KeyboardInterrupt):
                code, said = 130, "interrupted; repeat the command to go on"
            elif not isinstance(error, MegapriorError):
                said = traceback.format_exc()
            print(f"megaprior-data: error: rank {self.rank} of {self.size}: {said}", file=sys.stderr, flush=True)
            self._comm.Abort(code)

    def reporting(self, tick: Callable[[int], None]) -> Callable[[int], None]:
        """A `tick` that tells rank 0, which also hears the others as it works."""

        def listening(count: int) -> None:
            tick(count)
            self._hear(tick)

        return listening if self.rank == 0 else self._tell

    def await_all(self, tick: Callable[[int], None]) -> None:
        """On rank 0: hear the others until all have done their share. Elsewhere: say that it is done."""
        if self.rank:
            self._comm.send(None, dest=0, tag=_DONE)
            return
        for rank in range(1, self.size):
            self._receive(rank, _DONE, meanwhile=lambda: self._hear(tick))
        self._hear(tick)

    def _tell(self, count: int) -> None:
        self._sent = [request for request in self._sent if not request.Test()]
        if len(self._sent) < 64:  # else rank 0 is not listening just now: it only shows the sum
            self._sent.append(self._comm.isend(count, dest=0, tag=_READ))

    def _hear(self, tick: Callable[[int], None]) -> None:
        while self._comm.iprobe(tag=_READ):
            tick(self._comm.recv(tag=_READ))

    def _receive(self, rank: int, tag: int, *, meanwhile: Callable[[], None] = lambda: None) -> Any:
        while not self._comm.iprobe(source=rank, tag=tag):
            meanwhile()
            time.sleep(_POLL_S)
        return self._comm.recv(source=rank, tag=tag)

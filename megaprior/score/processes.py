"""Several worker processes of one scoring run on this machine, watched until all units are there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import IO

from megaprior.errors import DataError, MegapriorError
from megaprior.score.ledger import Ledger, Unit
from megaprior.score.worker import Job

_POLL_S = 0.2


@dataclass(frozen=True)
class Worker:
    """A running process and the file that holds what it said."""

    process: subprocess.Popen[bytes]
    said: IO[bytes]

    def last_words(self) -> str:
        """The last line it wrote to standard error."""
        self.said.seek(0)
        lines = self.said.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "without a word"


def run_processes(
    job: Job, ledger: Ledger, missing: list[Unit], *, count: int, on_unit: Callable[[Unit], None]
) -> None:
    """Start `count` workers and call `on_unit` for each of the missing units when it is finished, by whomever.

    Raises:
        MegapriorError: a worker ended before all units were there; the others are stopped, finished units are kept.
    """
    total = len(missing)
    with _workers(job, count) as workers:
        while missing:
            time.sleep(_POLL_S)
            codes = [
                worker.process.poll() for worker in workers
            ]  # before the look at the units, which they write first
            done = ledger.done()
            for unit in missing:
                if unit.file in done:
                    on_unit(unit)
            missing = [unit for unit in missing if unit.file not in done]
            failed = next((rank for rank, code in enumerate(codes) if code), None)
            if missing and failed is not None:
                raise _death(workers, failed, kept=total - len(missing), total=total)
            if missing and None not in codes:
                raise MegapriorError(
                    f"all {count} scorer processes ended, {len(missing)} of {total} units are missing; repeat the command"
                )


@contextmanager
def _workers(job: Job, count: int) -> Iterator[list[Worker]]:
    """`count` workers, gone when the block ends; they end by themselves when this process does, however it does."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(job.threads), "MKL_NUM_THREADS": str(job.threads)}
    workers: list[Worker] = []
    with ExitStack() as stack:
        try:
            for rank in range(count):
                said = stack.enter_context(tempfile.TemporaryFile())
                arguments = [json.dumps(asdict(job)), str(rank), str(count)]
                command = [sys.executable, "-m", "megaprior.score.worker", *arguments]
                process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=said, env=environment)
                workers.append(Worker(process, said))
            yield workers
        finally:
            for worker in workers:
                worker.process.kill()
                worker.process.wait()
                assert worker.process.stdin is not None
                worker.process.stdin.close()


def _death(workers: list[Worker], rank: int, *, kept: int, total: int) -> MegapriorError:
    code, last = workers[rank].process.returncode, workers[rank].last_words()
    if code == DataError.exit_code:
        return DataError(last)
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code} ({last})"
    hint = " (out of memory? then use fewer --processes)" if code == -signal.SIGKILL else ""
    return MegapriorError(
        f"scorer process {rank} of {len(workers)} {how}{hint}; {kept} of {total} units were finished and are kept: "
        "repeat the command to go on"
    )

"""Shards built by several processes of one machine: each takes the next job when it has finished one.

A worker that dies ends the build; so does the build's own end, however it comes, end its workers. What they leave is whole
shards, and half-written files under temporary names which the next start sweeps away.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing import connection, resource_tracker
from pathlib import Path
from typing import Any

from megaprior.data_tools.building.folder import sweep
from megaprior.data_tools.building.plan import Plan, ShardJob
from megaprior.data_tools.building.sharding import build_shard
from megaprior.data_tools.pool import end_with_parent
from megaprior.errors import DataError, MegapriorError, Requeue
from megaprior.tokenizer import Tokenizer, load_tokenizer

_TICK_S = 0.2
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # the processes are the parallelism


def usable_cores() -> int:
    """Cores that this process may run on (a Slurm task sees its own, not the machine's)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, kw_only=True)
class Work:
    """What all jobs of a build share; `tokenizer` is where each process loads it from."""

    output: Path
    plan: Plan
    tokenizer: Path


class Throttled:
    """Passes bytes read on a few times a second, not for every sample."""

    def __init__(self, send: Callable[[int], None]) -> None:
        self._send, self._bytes, self._last = send, 0, time.monotonic()

    def __call__(self, count: int) -> None:
        self._bytes += count
        if time.monotonic() - self._last >= _TICK_S:
            self.flush()

    def flush(self) -> None:
        """Pass on what is left."""
        self._send(self._bytes)
        self._bytes, self._last = 0, time.monotonic()


def run_jobs(
    work: Work, jobs: Sequence[ShardJob], words: Tokenizer, *, workers: int, tick: Callable[[int], None]
) -> None:
    """Write the shards of `jobs`, in this process when one is enough; `tick` is told the bytes read.

    The caller's lock covers the shards of these jobs.

    Raises:
        MegapriorError: a job was refused, or a worker died; finished shards are kept.
        Requeue: SIGTERM or SIGUSR1 asked to stop.
    """
    done = 0
    try:
        with _stop_on_signals():
            if min(workers, len(jobs)) <= 1:
                for job in jobs:
                    build_shard(job, work.plan, words, work.output, tick=tick)
                    done += 1
                return
            try:
                with _pool(work, min(workers, len(jobs))) as pool:
                    for _ in _dispatch(pool, jobs, tick):
                        done += 1
            except BaseException:
                sweep(work.output, [job.prefix for job in jobs])
                raise
    except _Stopped as stopped:
        raise Requeue(
            f"{work.output}: stopped by {stopped} after {done} of {len(jobs)} shards; repeat the command to go on"
        ) from None
    except _Death as death:
        raise MegapriorError(
            f"{work.output}: {death}; {done} of {len(jobs)} shards were finished and are kept: repeat the command to go on"
        ) from None


# ---------------------------------------------------------------- the one who hands out jobs


class _Stopped(KeyboardInterrupt):
    """A signal asked to stop. No Exception: code that puts a broken sample aside must not take it for one."""


class _Death(Exception):
    """A worker ended without a word."""


@dataclass
class _Worker:
    number: int
    process: Any
    pipe: Any
    job: ShardJob | None = None


@contextmanager
def _stop_on_signals() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _: object) -> None:
        raise _Stopped(signal.Signals(number).name)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C waits until the block ends; a process started in it never sees one, not even in the middle of its imports."""
    resource_tracker.ensure_running()  # starting it later would let the signal through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _pool(work: Work, count: int) -> Iterator[list[_Worker]]:
    """`count` workers, gone when the block ends; they end by themselves when this process does, however it does."""
    # Fresh interpreters: a fork would copy the locks of whatever threads the libraries have started here.
    context = multiprocessing.get_context("spawn")
    lean = replace(work, plan=replace(work.plan, jobs=(), left_out=(), recorded={}))
    fingerprint = work.plan.recorded["tokenizer"]
    pool: list[_Worker] = []
    try:
        with _environment(_ONE_THREAD), _interrupts_held():
            for number in range(count):
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(theirs, lean, fingerprint), daemon=True)
                process.start()
                theirs.close()  # so that the worker's death ends the pipe
                pool.append(_Worker(number, process, ours))
        yield pool
    finally:
        for worker in pool:
            worker.process.kill()
        for worker in pool:
            worker.process.join()
            worker.pipe.close()


def _dispatch(pool: list[_Worker], jobs: Sequence[ShardJob], tick: Callable[[int], None]) -> Iterator[ShardJob]:
    """Hand out the jobs and yield each when it is done."""
    waiting, pending = deque(jobs), len(jobs)
    for worker in pool:
        _hand(worker, waiting)
    while pending:
        ready = connection.wait([worker.pipe for worker in pool])
        for worker in pool:
            if worker.pipe not in ready:
                continue
            try:
                kind, value = worker.pipe.recv()
            except (EOFError, ConnectionResetError):
                raise _death(worker, len(pool)) from None
            if kind == "read":
                tick(value)
            elif kind == "refused":
                raise value
            elif kind == "bug":
                sys.stderr.write(value)
                raise RuntimeError(f"worker {worker.number} of {len(pool)} failed; its traceback is above")
            elif kind == "done":
                pending -= 1
                assert worker.job is not None
                yield worker.job
                _hand(worker, waiting)


def _hand(worker: _Worker, waiting: deque[ShardJob]) -> None:
    worker.job = waiting.popleft() if waiting else None
    if worker.job is not None:
        with suppress(BrokenPipeError):  # it is dead, which reading from it will tell
            worker.pipe.send(worker.job)


def _death(worker: _Worker, count: int) -> _Death:
    worker.process.join()
    code = worker.process.exitcode
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    hint = " (out of memory? then use fewer --workers)" if code == -signal.SIGKILL else ""
    what = f" while it wrote shard {worker.job.prefix} of {worker.job.source.name}" if worker.job else ""
    return _Death(f"worker {worker.number} of {count} {how}{what}{hint}")


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set what a child must find when it starts: the libraries read it as they are imported."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


# ---------------------------------------------------------------- a worker


def _work(pipe: Any, work: Work, fingerprint: str) -> None:
    # Ctrl-C reaches the whole group; it is held here since the start, and who handed out the jobs ends us.
    end_with_parent()
    with suppress(EOFError, ConnectionError):  # the one who handed out the jobs is gone
        try:
            _serve(pipe, work, fingerprint)
        except (MegapriorError, OSError) as error:
            pipe.send(("refused", error))
        except Exception:
            pipe.send(("bug", traceback.format_exc()))
        pipe.recv_bytes()  # until this process is ended: a pipe that closes would be taken for a death


def _serve(pipe: Any, work: Work, fingerprint: str) -> None:
    words = load_tokenizer(work.tokenizer)
    if words.fingerprint != fingerprint:
        raise DataError(f"{work.tokenizer}: the tokenizer was changed while the build began; repeat the command")
    tick = Throttled(lambda count: pipe.send(("read", count)))
    while True:
        build_shard(pipe.recv(), work.plan, words, work.output, tick=tick)
        tick.flush()
        pipe.send(("done", None))

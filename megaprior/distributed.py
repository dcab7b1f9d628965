"""Who this process is among its peers, and how the peers make sure that they agree.

The control channel is a gloo group of its own on the CPU: it can neither reorder nor wait for an engine's collectives,
costs no device synchronisation, and with one process it is no group at all.
"""

from __future__ import annotations

import os
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from megaprior.errors import MegapriorError, UsageError
from megaprior.files import digest_bytes

T = TypeVar("T")

_ALARM = "alarm"
_PATIENCE_S = 30.0  # a collective waits so much longer than the watchdog, which knows more to say
_DIGEST_HEX = 13  # 52 bits: an integer of that size is exact in the float64 that travels


@dataclass(frozen=True)
class Place:
    """This process among `world` processes; `local_rank` counts those on the same machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0


def place(environment: Mapping[str, str] | None = None) -> Place:
    """Read RANK, WORLD_SIZE and LOCAL_RANK as the deepspeed and torchrun launchers set them; none of them means alone.

    Raises:
        UsageError: they are incomplete, no numbers or contradict each other.
    """
    env = os.environ if environment is None else environment
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    missing = [name for name in names if not env.get(name)]
    if len(missing) == len(names):
        for launcher, size in (("srun", "SLURM_STEP_NUM_TASKS"), ("mpirun", "OMPI_COMM_WORLD_SIZE")):
            if int(env.get(size) or 1) > 1:
                raise UsageError(
                    f"{launcher} started {env[size]} processes but RANK, WORLD_SIZE and LOCAL_RANK are not set, so each would "
                    "train alone on the same output; export them (`megaprior doctor`, started in the same way, says how), or "
                    "start through `deepspeed` or `torchrun`"
                )
        return Place()
    if missing:
        raise UsageError(
            f"{', '.join(missing)} not set while {' and '.join(n for n in names if n not in missing)} is; set all or none. "
            "`megaprior doctor`, started in the same way, says how"
        )
    try:
        here = Place(*(int(env[name]) for name in names))
    except ValueError:
        shown = ", ".join(f"{name}={env[name]!r}" for name in names)
        raise UsageError(f"{shown}: these must be whole numbers; check the launcher's environment") from None
    if not 0 <= here.rank < here.world or here.local_rank < 0:
        raise UsageError(f"RANK={here.rank} is not below WORLD_SIZE={here.world}; check the launcher's environment")
    absent = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not env.get(name)]
    if here.world > 1 and absent:
        raise UsageError(
            f"WORLD_SIZE={here.world} but {' and '.join(absent)} not set; the ranks cannot find each other"
        )
    return here


def digest(*parts: bytes | str | float) -> float:
    """52 bits of the xxh3-128 of `parts`, as a float64 that holds them exactly."""
    raw = [p if isinstance(p, bytes) else p.encode() if isinstance(p, str) else struct.pack("<d", p) for p in parts]
    return float(int(digest_bytes(b"\0".join(raw))[:_DIGEST_HEX], 16))


class Gathering:
    """Numbers on their way from every rank to every rank."""

    def __init__(self, work: Any, table: list[Any]) -> None:
        self._work, self._table = work, table

    def wait(self) -> list[list[float]]:
        """The numbers by rank."""
        if self._work is not None:
            self._work.wait()
        return [row.tolist() if hasattr(row, "tolist") else row for row in self._table]


@dataclass(frozen=True)
class Announcement:
    """Digests of what this rank is about to do, travelling while it already does it."""

    names: tuple[str, ...]
    gathering: Gathering

    def check(self, step: int) -> None:
        """Compare with the other ranks.

        Raises:
            MegapriorError: a rank differs; every rank raises it, naming that rank and the field.
        """
        table = self.gathering.wait()
        for rank, row in enumerate(table):
            for name, mine, first in zip(self.names, row, table[0], strict=True):
                if mine != first:
                    raise MegapriorError(
                        f"step {step}: rank {rank} differs from rank 0 in {name} (digest {int(mine):013x} against "
                        f"{int(first):013x}); nothing was updated. Do all machines see the same files, versions and options? "
                        "`megaprior doctor`, started in the same way, compares them"
                    )


class Peers:
    """The control channel between `place.world` processes; every method is called by all of them in the same order."""

    def __init__(self, place: Place, *, group: Any = None, store: Any = None) -> None:
        self.place, self.group, self.store = place, group, store

    def start_gather(self, values: Sequence[float]) -> Gathering:
        """Send `values` (the same count on every rank) to all ranks without waiting."""
        if self.place.world == 1:
            return Gathering(None, [list(values)])
        import torch
        import torch.distributed as dist

        mine = torch.tensor(values, dtype=torch.float64)
        table = [torch.empty_like(mine) for _ in range(self.place.world)]
        return Gathering(dist.all_gather(table, mine, group=self.group, async_op=True), table)

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """Every rank's `values`, by rank."""
        return self.start_gather(values).wait()

    def announce(self, fields: Mapping[str, float]) -> Announcement:
        """Send digests of named things that must be equal on all ranks; `check` them later."""
        return Announcement(tuple(fields), self.start_gather(list(fields.values())))

    def share(self, value: Any) -> Any:
        """Rank 0's `value` on every rank (any small picklable object)."""
        return self.gather_objects(value if self.place.rank == 0 else None)[0]

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's `value`, by rank (small picklable objects)."""
        if self.place.world == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.place.world
        dist.all_gather_object(values, value, group=self.group)
        return values

    def settle(self, error: Exception | None = None) -> None:
        """Meet all ranks; when any of them brings an error, all of them raise one.

        Raises:
            Exception: this rank's own `error`, or a MegapriorError that quotes the first rank that has one.
        """
        found = self.gather_objects(f"{type(error).__name__}: {error}" if error is not None else None)
        if error is not None:
            raise error
        for rank, message in enumerate(found):
            if message is not None:
                raise MegapriorError(f"rank {rank} failed: {message}")

    def first_does(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 and give its (small, picklable) result to all ranks.

        Raises:
            Exception: what `work` raised, on rank 0; a MegapriorError that quotes it elsewhere.
        """
        value, error = None, None
        if self.place.rank == 0:
            try:
                value = work()
            except Exception as found:  # the peers are told before it is raised
                error = found
        self.settle(error)
        return self.share(value)

    def alarmed(self) -> bool:
        """Whether a rank has called the roll: something is wrong and the job ends. Waits while rank 0 is frozen."""
        try:
            return self.store.check([_ALARM])
        except Exception:  # rank 0 has gone, in good order or not: what comes of it shows elsewhere
            return False

    def roll_call(self, report: str, *, wait_s: float = 5.0) -> dict[int, str] | None:
        """After contact was lost: what each rank reports that does so within `wait_s`; `alarmed` tells the others to.

        None where the store does not answer, which lives in rank 0's process, or its launcher's.
        """
        found, lost = {self.place.rank: report}, []
        until = time.monotonic() + wait_s

        def ask() -> None:
            try:
                self.store.set(_report_of(self.place.rank), report)
                self.store.set(_ALARM, "1")
                while len(found) < self.place.world and time.monotonic() < until:
                    for rank in range(self.place.world):
                        if rank not in found and self.store.check([_report_of(rank)]):
                            found[rank] = self.store.get(_report_of(rank)).decode()
                    time.sleep(0.1)
            except Exception as error:  # whatever is raised
                lost.append(error)

        asking = threading.Thread(target=ask, name="megaprior-roll-call", daemon=True)  # a frozen store never returns
        asking.start()
        asking.join(wait_s + 1.0)
        return None if lost or asking.is_alive() else dict(found)

    def close(self) -> None:
        """Leave the process groups, so that a later run in this process can form its own."""
        if self.place.world > 1:
            import torch.distributed as dist

            if dist.is_initialized():
                dist.destroy_process_group()


def connect(here: Place, *, backend: str, timeout_s: float) -> Peers:
    """Form the default process group (`backend`: "gloo" or "nccl") and the control channel beside it.

    Raises:
        UsageError: the ranks cannot meet at MASTER_ADDR:MASTER_PORT.
    """
    if here.world == 1:
        return Peers(here)
    import torch.distributed as dist

    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    limit = timedelta(seconds=timeout_s)
    patience = limit + timedelta(seconds=_PATIENCE_S)
    try:
        store = _rendezvous(here, limit)
        dist.init_process_group(backend, store=store, rank=here.rank, world_size=here.world, timeout=patience)
        return Peers(here, group=dist.new_group(backend="gloo", timeout=patience), store=store)
    except (RuntimeError, ValueError) as error:  # DistError derives from RuntimeError
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"rank {here.rank} of {here.world} cannot meet the others at {where} ({reason}); `megaprior doctor`, started in the "
            "same way, looks: is another job still using that port (choose another --master_port), and can every machine reach "
            "that address?"
        ) from error


def _rendezvous(here: Place, limit: timedelta) -> Any:
    """The store through which the ranks meet.

    In a thread: where something else listens on the port, torch waits for its answer for ever, whatever `timeout` says.

    Raises:
        RuntimeError: it was not formed in time, or torch's own reason.
    """
    import torch.distributed as dist

    found: list[Any] = []

    def meet() -> None:
        try:
            found.append(next(dist.rendezvous("env://", here.rank, here.world, timeout=limit))[0])
        except Exception as error:
            found.append(error)

    meeting = threading.Thread(target=meet, name="megaprior-rendezvous", daemon=True)
    meeting.start()
    meeting.join(limit.total_seconds() + 5.0)
    if not found:
        raise RuntimeError(f"what listens there has not answered within {limit.total_seconds():.0f} s")
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def _report_of(rank: int) -> str:
    return f"report/{rank}"

"""Ends a job whose ranks no longer make progress together, and says which rank it is and where it stands.

A frozen peer otherwise stops the whole job without a word. Each rank watches itself from a thread. The first that has made no
progress for too long, or lost contact, raises the alarm; then every rank that still can writes the Python stacks of its
threads to RUN/stacks/rankN.txt, tells the others where its main thread is, and ends.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from megaprior.distributed import Peers
from megaprior.errors import MegapriorError

_GRACE_S = 30.0  # before faulthandler ends a process whose threads cannot run
_LINGER_S = 2.0  # rank 0 holds the store: it stays until the others have read it
_TICK_S = 1.0
# Where a main thread is that waits for other ranks or for the device: the file of one of its innermost frames.
_WAITING_IN = (
    "/torch/distributed/",
    "/torch/autograd/graph.py",  # a GPU's backward: its threads do the work
    "/torch/cuda/",
    "/deepspeed/comm/",
    "/deepspeed/runtime/zero/",
    "/megaprior/distributed.py",
)
_INNERMOST = 4


@dataclass(frozen=True)
class Whereabouts:
    """What a rank tells the others in an alarm."""

    doing: str  # the piece of work that its last beat announced
    beats: int
    at: str  # innermost line of its main thread
    waits: bool  # for other ranks, or for the device


class Watchdog:
    """Context manager around all work of a run that ranks do together; with one process it does nothing.

    Attributes:
        stacks: folder for the stacks, from when on it may be made; standard error before.
    """

    def __init__(self, peers: Peers, *, timeout_s: float) -> None:
        self.stacks: Path | None = None
        self._peers, self._timeout_s = peers, timeout_s
        self._last, self._doing, self._beats = time.monotonic(), "start", 0
        self._closed, self._alarm = threading.Event(), threading.Event()
        # Two threads: asking the store for an alarm never returns while rank 0 is frozen.
        self._threads = [
            threading.Thread(target=work, name="megaprior-watchdog", daemon=True)
            for work in (self._watch, self._listen)
        ]

    def __enter__(self) -> Watchdog:
        if self._peers.place.world > 1:
            self.beat("start")
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._closed.set()
        if self._peers.place.world == 1:
            return
        faulthandler.cancel_dump_traceback_later()
        for (
            thread
        ) in self._threads:  # they must not drop the last reference to a process group while the interpreter ends
            thread.join(_GRACE_S)
        if isinstance(error, RuntimeError) and _is_lost_contact(error):
            blame = self._roll_call(waited_at=_innermost(traceback.extract_tb(error.__traceback__)))
            raise MegapriorError(
                f"rank {self._peers.place.rank} lost contact with the others during {self._doing}: {blame}. Repeat the command "
                "to go on from the newest checkpoint"
            ) from error

    def beat(self, doing: str) -> None:
        """Progress was made; `doing` is what comes next."""
        self._last, self._doing, self._beats = time.monotonic(), doing, self._beats + 1
        if self._peers.place.world > 1:  # a thread cannot run while another holds the interpreter's lock
            faulthandler.dump_traceback_later(self._timeout_s + _GRACE_S, exit=True)

    def _watch(self) -> None:
        while not self._closed.wait(min(_TICK_S, self._timeout_s / 4)):
            if time.monotonic() - self._last > self._timeout_s:
                self._end(f"made no progress for {self._timeout_s:.0f} s during {self._doing}")
            elif self._alarm.is_set():
                self._end(f"ends with the others, during {self._doing}")

    def _listen(self) -> None:
        while not self._closed.wait(_TICK_S) and not self._peers.alarmed():
            pass
        if not self._closed.is_set():
            self._alarm.set()

    def _end(self, why: str) -> None:
        kept = self._dump(why)
        blame = self._roll_call()
        print(
            f"megaprior: error: rank {self._peers.place.rank} {why}: {blame}; the job ends{kept}. Repeat the command to go "
            "on from the newest checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    def _dump(self, why: str) -> str:
        """Write the stacks of all threads; what the message says about it."""
        rank = self._peers.place.rank
        header = f"--- rank {rank}, {time.strftime('%Y-%m-%d %H:%M:%S')}: {why}\n"
        try:
            if self.stacks is not None:
                self.stacks.mkdir(parents=True, exist_ok=True)
                with open(self.stacks / f"rank{rank}.txt", "a", encoding="utf-8") as file:
                    file.write(header)
                    file.flush()
                    faulthandler.dump_traceback(file)
                return f", stacks are in {self.stacks}"
            print(header, file=sys.stderr, end="", flush=True)
            faulthandler.dump_traceback(sys.stderr)
        except (OSError, ValueError, AttributeError):  # a full disk, a standard error that is no file
            pass
        return ""

    def _roll_call(self, *, waited_at: str | None = None) -> str:
        """Who is to blame; `waited_at` is where this rank waited for others until the connection broke."""
        rank = self._peers.place.rank
        mine = whereabouts(self._doing, self._beats)
        if waited_at is not None:
            mine = Whereabouts(self._doing, self._beats, waited_at, waits=True)
        found = self._peers.roll_call(json.dumps(asdict(mine)))
        if found is None:
            return "rank 0 does not answer"
        if rank == 0:
            time.sleep(_LINGER_S)
        there = {r: Whereabouts(**json.loads(text)) for r, text in found.items()}
        return blame(there, world=self._peers.place.world)


def whereabouts(doing: str, beats: int) -> Whereabouts:
    """Of this process, from any of its threads."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    stack = traceback.extract_stack(frame) if frame is not None else []
    inner = [f"/{f.filename.lstrip('/')}" for f in stack[-_INNERMOST:]]
    device = bool(stack) and stack[-1].name == "take"  # the engine's one wait, see `Sums`
    waits = device or any(part in file for file in inner for part in _WAITING_IN)
    return Whereabouts(doing, beats, _innermost(stack), waits)


def _innermost(stack: traceback.StackSummary | list[traceback.FrameSummary]) -> str:
    return f"{Path(stack[-1].filename).name}:{stack[-1].lineno} {stack[-1].name}" if stack else "its end"


def blame(found: Mapping[int, Whereabouts], *, world: int) -> str:
    """Who holds up whom: ranks that do not answer, else those that wait for nobody, else those that are behind."""
    silent = [rank for rank in range(world) if rank not in found]
    if silent:
        return f"rank {', '.join(map(str, silent))} {'does' if len(silent) == 1 else 'do'} not answer"
    busy = [rank for rank, there in found.items() if not there.waits]
    if busy and len(busy) < world:
        return f"{_hangs(busy, found)}, the others wait for {'it' if len(busy) == 1 else 'them'}"
    least, most = (pick(there.beats for there in found.values()) for pick in (min, max))
    if least < most:
        behind = [rank for rank, there in found.items() if there.beats == least]
        return f"{_hangs(behind, found)}, the others are already at {next(t.doing for t in found.values() if t.beats == most)}"
    places = sorted({f"{there.at} (rank {rank})" for rank, there in found.items()})[:4]
    return f"all ranks still answer, at {', '.join(places)}"


def _hangs(ranks: list[int], found: Mapping[int, Whereabouts]) -> str:
    first = found[ranks[0]]
    return f"rank {', '.join(map(str, ranks))} hangs in {first.doing} at {first.at}"


def _is_lost_contact(error: RuntimeError) -> bool:
    """Whether a collective failed because of another process: gloo raises a bare RuntimeError that names itself."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()

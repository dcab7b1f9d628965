"""Saving checkpoints beside the training: a snapshot at the step boundary, the writing in a thread, the commit atomic.

Both halves go into a temporary folder, then digests, manifest, rename. Killed anywhere, the last complete one stands.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import TYPE_CHECKING, Any

from megaprior.distributed import Peers
from megaprior.errors import MegapriorError, Requeue
from megaprior.models.hlvlm import LM_FOLDER
from megaprior.telemetry import say
from megaprior.train.checkpoint import Checkpoint, step_folder
from megaprior.train.engine import frozen_digest
from megaprior.train.host_memory import fits_in_memory
from megaprior.train.retention import prune
from megaprior.train.snapshot import HostBuffers, Write
from megaprior.train.writing import DONE, FAILED, Destination, Writing, begin_folder, explained

if TYPE_CHECKING:
    from megaprior.telemetry import MetricsLog
    from megaprior.tokenizer import Tokenizer
    from megaprior.train.engine import Engine

_STATE_BYTES_PER_PARAMETER = 12  # fp32 weight and AdamW's two moments
_ROOM = 1.05
_GRACE_S = 5.0  # for the other ranks' parts when contact with them was lost
_LOOK_EVERY_S = 0.05


class Saver:
    """Writes a run's checkpoints; its methods are collective: all ranks call them after the same steps.

    As a context manager it ends what is under way: with the run's own end or a requested stop it waits for the commit, after
    another error it commits what the ranks have still written.
    """

    def __init__(
        self,
        run: Path,
        *,
        engine: Engine,
        peers: Peers,
        tokenizer: Tokenizer,
        facts: Callable[[], dict[str, Any]],
        log: MetricsLog | None = None,
        background: bool = True,
        keep_last: int = 0,
        keep_every: int = 0,
        timeout_s: float = 1800.0,
        frozen: str | None = None,
    ) -> None:
        """
        Args:
            facts: plain values for the manifest, for example the run's identity that a resume compares.
            log: gets a line of kind "save" for every checkpoint, on rank 0.
            background: False writes before the training goes on, with no copy of the engine's state.
            keep_last, keep_every: see `retention.superfluous`.
            timeout_s: how long rank 0 waits for the files of another rank.
            frozen: the digest of what is frozen, where it is known.
        """
        self.last: Checkpoint | None = None  # the newest one that this object wrote, on rank 0
        self._run, self._engine, self._peers = run, engine, peers
        self._tokenizer = _files_of(tokenizer) if engine.place.rank == 0 else {}
        self._facts, self._log, self._timeout_s, self._frozen = facts, log, timeout_s, frozen
        self._background, self._keep = background, {"keep_last": keep_last, "keep_every": keep_every}
        self._buffers, self._writing, self._line = HostBuffers(), None, {}

    def save(self, step: int) -> None:
        """Take what the checkpoint after `step` updates will hold, and write it, or begin to.

        Raises:
            CheckpointError: the disk is full (bytes needed and free are named), now or in the save before; earlier checkpoints
                are intact.
        """
        began = time.perf_counter()
        before = self._line.get("step")
        waited = self._drain()
        if waited > 1.0:
            say(f"waited {waited:.1f} s for the checkpoint after step {before} before that after step {step}")
        background = self._background and fits_in_memory(self._memory_needed(), self._peers)
        where = self._begin(step)
        writes: list[Write] = []
        self._guarded(where, lambda: writes.extend(self._snapshot(where.temporary, copy=background)))
        if self._frozen is None:
            self._frozen = self._peers.share(frozen_digest(self._engine))
        place = self._engine.place
        body = {
            **self._facts(),
            "step": step,
            "engine": self._engine.name,
            "world": place.world,
            "frozen": self._frozen,
        }
        self._writing = Writing(
            where,
            writes,
            place=place,
            body=body,
            patience_s=self._timeout_s,
            committed=lambda: prune(self._run, **self._keep),
        )
        self._line = {"step": step, "background": background, "wait_s": waited, "stall_s": time.perf_counter() - began}
        if not background:
            self._drain()
            self._buffers.free()

    def poll(self) -> None:
        """Between steps: see whether a save under way has ended. Costs nothing when there is none.

        Raises:
            CheckpointError: it failed on this rank; earlier checkpoints are intact.
            MegapriorError: it failed on another rank, which is quoted.
        """
        if self._writing is None:
            return
        states = [row[0] for row in self._peers.gather([float(self._writing.state)])]
        if FAILED in states:
            self._fail(self._writing)
        elif all(state == DONE for state in states):
            self._complete(self._writing)

    def finish(self) -> None:
        """Wait for the commit of what is under way, at the run's end or before a stop.

        Raises:
            CheckpointError: as `poll`.
            MegapriorError: what is frozen is no longer what it was at the first save: a fault of the machine or of ours.
        """
        self._drain()
        if self._frozen is not None:
            found = self._peers.share(frozen_digest(self._engine))
            if found != self._frozen:
                raise MegapriorError(
                    f"{self._run}: the frozen weights changed during this run (digest {self._frozen} at its first save, {found} "
                    "now): its checkpoints belong to no base model; check this machine's memory and begin a new run"
                )

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, Requeue):
            self._drain()
        elif self._writing is not None:
            if not isinstance(
                error, MegapriorError
            ):  # ranks that agreed on an error are still there, others may not be
                self._writing.hurry(_GRACE_S)
            self._writing.wait()

    def _drain(self) -> float:
        """Wait for the end of a save under way; the seconds that took."""
        began = time.perf_counter()
        while self._writing is not None:
            self._writing.wait(_LOOK_EVERY_S)
            self.poll()
        return time.perf_counter() - began

    def _begin(self, step: int) -> Destination:
        target = step_folder(self._run, step)
        needed = 0.0
        for p in self._engine.module.parameters():
            if p.requires_grad:  # what is frozen is neither in the model's half nor in the state's
                needed += _ROOM * getattr(p, "ds_numel", p.numel()) * (p.element_size() + _STATE_BYTES_PER_PARAMETER)
        return Destination(self._run, self._peers.first_does(lambda: begin_folder(target, needed=needed)), target)

    def _memory_needed(self) -> float:
        """Bytes of host memory that this rank's copies take beyond what earlier ones left reserved."""
        place, trained = self._engine.place, [p for p in self._engine.module.parameters() if p.requires_grad]
        counts = [getattr(p, "ds_numel", p.numel()) for p in trained]
        whole = sum(n * p.element_size() for n, p in zip(counts, trained, strict=True)) if place.rank == 0 else 0
        return sum(counts) * _STATE_BYTES_PER_PARAMETER / place.world + whole - self._buffers.nbytes

    def _snapshot(self, temporary: Path, *, copy: bool) -> list[Write]:
        """What this rank will write: its part of the engine's state, and rank 0 the model, which all ranks gather."""
        self._buffers.begin()
        writes = self._engine.snapshot_state(temporary / "state", self._buffers if copy else None)
        weights = {}
        for name, tensor in self._engine.weights():
            if self._engine.place.rank == 0:
                weights[name] = self._buffers.copy(tensor)
        if self._engine.place.rank == 0:
            writes.append(Write(temporary / "model", lambda: self._write_model(temporary / "model", weights)))
        return writes

    def _write_model(self, folder: Path, weights: dict[str, Any]) -> None:
        """The Hugging Face half."""
        folder.mkdir()
        model: Any = self._engine.module.model
        model.save_pretrained(folder, state_dict=weights)
        for place in (folder, folder / LM_FOLDER):  # a language model that trained is a text LM of its own
            if place.is_dir():
                (place / "tokenizer").mkdir()
                for name, content in self._tokenizer.items():
                    (place / "tokenizer" / name).write_bytes(content)

    def _guarded(self, where: Destination, work: Callable[[], None]) -> None:
        """Run one rank's part; a failure anywhere is raised on all ranks, and a full disk is explained."""
        error: Exception | None = None
        try:
            work()
        except Exception as found:
            error = explained(found, where.temporary)
        self._settle(where, error)

    def _settle(self, where: Destination, error: Exception | None) -> None:
        """Where any rank has an error: the temporary folder goes once no rank writes there any more, and all ranks raise."""
        failed = any(row[0] for row in self._peers.gather([float(error is not None)]))
        if failed and self._peers.place.rank == 0:
            shutil.rmtree(where.temporary, ignore_errors=True)
        if failed:
            self._peers.settle(error)

    def _fail(self, writing: Writing) -> None:
        self._writing = None
        failed = (
            writing.state == FAILED
        )  # as the other ranks were told; what cancelling makes of a healthy one is no news
        writing.cancel()
        self._settle(writing.where, writing.error if failed else None)

    def _complete(self, writing: Writing) -> None:
        self._writing = None
        writing.wait()
        self.last = writing.checkpoint
        if not self._line["background"]:
            self._line["stall_s"] += writing.seconds
        if self._log is not None and writing.checkpoint is not None:
            size = sum(entry["bytes"] for entry in writing.checkpoint.manifest["files"].values())
            self._log.write({"kind": "save", **self._line, "write_s": writing.seconds, "bytes": size})


def _files_of(tokenizer: Tokenizer) -> dict[str, bytes]:
    """Its files by name, in memory: they may have been read from a checkpoint that does not stay for the whole run."""
    with TemporaryDirectory() as folder:
        tokenizer.save(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}

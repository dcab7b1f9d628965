"""What happens to a training process of the tests, for real.

{"rows": n}  SIGKILL when the n-th row's forward begins; with "poison": the row is NaN; {"heldout_rows": n} in evaluation;
{"files": n, "below": text}  SIGKILL at the n-th opening, renaming or removal of a file whose path holds `text`;
{"signal": name}  that one in place of SIGKILL; {"times": n} so often; {"sleep": s}  so many seconds in place of any;
{"busy": s}  each row takes so many seconds more of the processor;
{"address_space": n}  so many bytes may be mapped beyond those of now: what a full memory looks like to an allocator;
{"largest": n}  no file may grow beyond n bytes: what a full disk looks like to the writer;
{"gradients": path}  rank 0 writes the first step's gradients there.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

from megaprior.objectives.base import Step


def cause(fault: dict[str, Any]) -> None:
    """Arrange what `fault` describes, in this process."""
    what = [getattr(signal, fault.get("signal", "SIGKILL"))] * fault.get("times", 1)
    if "rows" in fault:
        _at_row(fault["rows"], what, poison=fault.get("poison", False), sleep=fault.get("sleep"))
    if "busy" in fault:
        _at_every_row(fault["busy"])
    if "heldout_rows" in fault:
        _at_row(fault["heldout_rows"], what, training=False)
    if "address_space" in fault:
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + fault["address_space"],) * 2)
    if "largest" in fault:
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault["largest"], fault["largest"]))
    if "files" in fault:
        _at_file(fault["files"], fault["below"], what)


def _at_row(
    number: int,
    what: list[signal.Signals],
    *,
    poison: bool = False,
    sleep: float | None = None,
    training: bool = True,
) -> None:
    original, seen = Step.forward, [0]

    def counted(self: Any, batch: Any) -> Any:
        counts = self.training == training and not (batch.sample_ids < 0).any()  # those of the preflight are negative
        seen[0] += counts
        hit = seen[0] == number and counts
        if hit and sleep is not None:
            time.sleep(sleep)
        elif hit and not poison:
            for one in what:
                os.kill(os.getpid(), one)
        loss, nll = original(self, batch)
        return (loss * float("nan"), nll) if hit and poison else (loss, nll)

    Step.forward = counted  # type: ignore[method-assign]


def _at_every_row(seconds: float) -> None:
    original = Step.forward

    def slowed(self: Any, batch: Any) -> Any:
        until = time.thread_time() + seconds
        while time.thread_time() < until:
            pass
        return original(self, batch)

    Step.forward = slowed  # type: ignore[method-assign]


def _at_file(number: int, below: str, what: list[signal.Signals]) -> None:
    seen = [0]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir") and below in str(arguments[0]):
            seen[0] += 1
            if seen[0] == number:
                for one in what:
                    os.kill(os.getpid(), one)

    sys.addaudithook(hook)


def keep_gradients(path: Path, *, first: bool) -> None:
    import torch

    from megaprior.train.engine import LocalEngine
    from megaprior.train.zero3 import Zero3Engine

    for kind in (LocalEngine, Zero3Engine):

        def update(self: Any, *, lr: float, scale: float, original: Any = kind.update) -> None:
            if not path.exists():
                gradients = {name: tensor.clone() for name, tensor in self.gradients()}
                if first:
                    torch.save(gradients, path)
            original(self, lr=lr, scale=scale)

        kind.update = update  # type: ignore[method-assign]

"""Where else a run's metrics can be looked at: TensorBoard by default, Weights & Biases by option.

Neither is needed, neither can stop or slow a run, and nothing leaves the machine unless `wandb_mode: online` asks for it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from megaprior.config import configclass
from megaprior.files import atomic_write
from megaprior.telemetry import Tracker, say

_CLOSE_S = 60.0  # how long the end of a run waits for Weights & Biases


@configclass
class TrackerConfig:
    """Which trackers a run has beside metrics.jsonl, which it always has."""

    tensorboard: bool = True
    wandb: str | None = None  # the project; None: off
    wandb_mode: Literal["offline", "online"] = "offline"  # offline: into the run's folder, for `wandb sync` later


def open_trackers(cfg: TrackerConfig, folder: Path, *, start: int, config: dict[str, Any]) -> list[Tracker]:
    """The trackers of the run in `folder`, which goes on after step `start`; one that cannot start is left out with a line.

    `config` is what a tracker shows as the run's configuration (plain values).
    """
    trackers: list[Tracker] = []
    if cfg.tensorboard:
        try:
            trackers.append(TensorBoard(folder / "tensorboard", start=start))
        except (ImportError, OSError) as error:
            say(f"TensorBoard is off ({error}); metrics.jsonl is complete without it")
    if cfg.wandb is not None:
        try:
            trackers.append(WandB(folder, project=cfg.wandb, mode=cfg.wandb_mode, config=config))
        except (ImportError, OSError) as error:
            say(f"Weights & Biases is off ({error}); metrics.jsonl is complete without it")
    return trackers


class TensorBoard:
    """Every number of every line as the series KIND/NAME; what an earlier process wrote after step `start` is hidden."""

    name = "TensorBoard"

    def __init__(self, folder: Path, *, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=start + 1)

    def write(self, values: dict[str, Any]) -> None:
        """Show one line, if it has a step."""
        if "step" not in values:
            return
        for name, value in values.items():
            if name != "step" and isinstance(value, int | float):
                self._writer.add_scalar(f"{values.get('kind', 'run')}/{name}", value, values["step"])

    def close(self) -> None:
        """Write what is buffered."""
        self._writer.close()


class WandB:
    """Weights & Biases, in a process of its own (wandb_feed.py) that follows metrics.jsonl.

    So neither a network that hangs nor a bug of the library reaches the run. The id in RUN/wandb_id makes every restart
    continue the same W&B run.
    """

    name = "Weights & Biases"

    def __init__(self, folder: Path, *, project: str, mode: str, config: dict[str, Any]) -> None:
        if importlib.util.find_spec("wandb") is None:
            raise ImportError("the package wandb is not installed: pip install wandb")
        log, kept = folder / "metrics.jsonl", folder / "wandb_id"
        log.touch()
        if not kept.exists():
            atomic_write(kept, secrets.token_hex(4) + "\n")
        order = {
            "log": str(log.absolute()),
            "offset": log.stat().st_size,
            "project": project,
            "mode": mode,
            "id": kept.read_text(encoding="utf-8").strip(),
            "name": folder.absolute().name,
            "config": config,
        }
        # A session of its own: Ctrl-C and a scheduler's signal are the run's, which tells this process when it is over.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "megaprior.wandb_feed"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert self._process.stdin is not None
        self._stdin = self._process.stdin
        with suppress(BrokenPipeError):  # `write` finds out how it ended
            self._stdin.write(json.dumps(order, default=str).encode() + b"\n")
            self._stdin.flush()

    def write(self, values: dict[str, Any]) -> None:
        """Nothing to do while the process lives: it reads the line from the log.

        Raises:
            RuntimeError: it was killed or crashed. An error that wandb raised it has told itself, and left with 0.
        """
        if self._process.poll():
            raise RuntimeError(f"its process ended with exit code {self._process.returncode}")

    def close(self) -> None:
        """Let it read to the end and finish; a minute at most.

        Raises:
            RuntimeError: it does not come to an end, or crashed.
        """
        with suppress(OSError):
            self._stdin.close()
        try:
            self._process.wait(_CLOSE_S)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            raise RuntimeError(
                f"it did not finish within {_CLOSE_S:.0f} s; `wandb sync` can send what it has"
            ) from None
        self.write({})

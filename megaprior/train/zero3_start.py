"""Before DeepSpeed is used: its version, the environment it reads, the operator it compiles, its process group."""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megaprior.distributed import Peers
from megaprior.errors import UsageError
from megaprior.telemetry import say

OLDEST = (0, 19, 3)  # earlier ones corrupt frozen parameters under activation checkpointing
_STALE_LOCK_S = 60.0


def check_version() -> None:
    """Refuse a DeepSpeed that is missing or too old, before anything is loaded.

    Raises:
        UsageError: gives both versions and the command.
    """
    remedy = f"pip install 'deepspeed>={'.'.join(map(str, OLDEST))}', or train on one process with engine=local"
    try:
        found = importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        raise UsageError(f"engine=zero3 needs DeepSpeed, which is not installed: {remedy}") from None
    numbers = tuple(int(part) for part in found.split("+")[0].split(".")[:3] if part.isdigit())
    if numbers < OLDEST:
        raise UsageError(
            f"DeepSpeed {found} is older than {'.'.join(map(str, OLDEST))}, the first that trains right: {remedy}"
        )


def prepare_environment() -> None:
    """Settle what DeepSpeed reads from the environment when it is imported."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")
    # Another ninja on PATH (Debian's) would find this environment's build out of date and compile it again, and back.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    if "TORCH_EXTENSIONS_DIR" not in os.environ:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        os.environ["TORCH_EXTENSIONS_DIR"] = str(cache / "megaprior" / "torch_extensions")


def start_deepspeed(peers: Peers) -> Any:
    """Import DeepSpeed on top of the process group that exists already, its compiled operators built by one rank per machine."""
    prepare_environment()
    if not torch.distributed.is_initialized():  # one process: DeepSpeed still wants a group
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    if peers.place.local_rank == 0:
        prebuild()
    peers.settle()
    # DeepSpeed calls collectives under names that torch 2.13 deprecates, once per rank and call site.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed

    deepspeed.init_distributed(verbose=False)
    return deepspeed


def prebuild() -> None:
    """Compile the operator that DeepSpeed loads on CPU before its first collective (about a minute, once per machine)."""
    if not torch.cuda.is_available():
        _build("deepspeed_shm_comm", "communication", lambda: _builder("ShareMemCommBuilder"))


def prebuild_cpu_adam(peers: Peers) -> None:
    """Compile DeepSpeed's AdamW for host memory, by one rank per machine (about a minute, once). Collective."""
    if peers.place.local_rank == 0:
        _build("cpu_adam", "AdamW", lambda: _builder("CPUAdamBuilder"))
    peers.settle()


def _builder(name: str) -> Any:
    if torch.cuda.is_available():
        import deepspeed.ops.op_builder as builders
    else:
        import deepspeed.ops.op_builder.cpu as builders
    return getattr(builders, name)()


def _build(stem: str, what: str, builder: Callable[[], Any]) -> None:
    """Compile one of DeepSpeed's operators unless it is there.

    A build that was killed leaves a lock behind on which every later one waits without a word: while we hold our own lock,
    one older than a minute is such a leftover.
    """
    folder = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".megaprior.lock", "w") as ours:
        fcntl.flock(ours, fcntl.LOCK_EX)
        for lock in (path for path in folder.glob("**/lock") if is_stale(path)):
            say(f"removed the lock of a killed build, {lock}")
            lock.unlink(missing_ok=True)
        if not any(folder.glob(f"**/{stem}*.so")):
            say(f"compiling DeepSpeed's CPU {what} operator (about a minute, once per machine)")
        builder().load(verbose=False)


def is_stale(lock: Path) -> bool:
    """Whether a build lock outlives any build that is still going on without our own lock."""
    while lock.exists():
        age = time.time() - lock.stat().st_mtime
        if age > _STALE_LOCK_S:
            return True
        time.sleep(0.2)
    return False

"""Limits of this machine and of the container or job on it: memory, files, processors, home folder."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from megaprior.doctor.finding import Finding, amount, green, red, yellow

_GIB = 1 << 30
_FILES = 4096  # shards stay mapped, workers have pipes, ranks have sockets
_SHM = 1 * _GIB


def check_shm(folder: Path = Path("/dev/shm")) -> list[Finding]:
    """Shared memory."""
    why = "NCCL and DeepSpeed exchange data between the ranks of a machine through it"
    remedy = "docker run --shm-size=16g (or --ipc=host); Kubernetes: an emptyDir with medium: Memory"
    try:
        usage = shutil.disk_usage(folder)
    except OSError as error:
        return [red("shared memory", f"{folder}: {error.strerror}", why, remedy)]
    found = f"{folder}: {amount(usage.free)} free of {amount(usage.total)}"
    if usage.free < 64 << 20 or usage.total <= 64 << 20:
        return [red("shared memory", found, why, remedy)]
    return [yellow("shared memory", found, why, remedy) if usage.free < _SHM else green("shared memory", found)]


def check_limits() -> list[Finding]:
    """What `ulimit` allows."""
    findings = []
    files, hard = (1 << 20 if n == resource.RLIM_INFINITY else n for n in resource.getrlimit(resource.RLIMIT_NOFILE))
    if files < _FILES:
        why = "every shard, worker and connection takes some; a run over thousands of shards runs out of them"
        remedy = (
            f"ulimit -n {min(hard, 65536)}"
            if hard >= _FILES
            else "raise the hard limit (limits.conf), then ulimit -n 65536"
        )
        findings.append(yellow("open files", f"{files:,} per process (hard limit {_limit(hard)})", why, remedy))
    largest, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if largest != resource.RLIM_INFINITY:
        findings.append(
            red(
                "file size",
                f"no file may grow beyond {amount(largest)}",
                "checkpoints and shards stop there, as on a full disk",
                "ulimit -f unlimited",
            )
        )
    space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if space != resource.RLIM_INFINITY:
        why = "CUDA and mapped shards reserve far more addresses than memory"
        findings.append(yellow("address space", f"limited to {amount(space)}", why, "ulimit -v unlimited"))
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if Path("/sys/class/infiniband").is_dir() and locked != resource.RLIM_INFINITY:
        findings.append(
            red(
                "locked memory",
                f"at most {amount(locked)}, on a machine with InfiniBand",
                "NCCL registers its buffers with the network card and fails in ibv_reg_mr",
                "ulimit -l unlimited (Slurm: PropagateResourceLimitsExcept=MEMLOCK; docker: --ulimit memlock=-1)",
            )
        )
    core, _ = resource.getrlimit(resource.RLIMIT_CORE)
    if not findings:
        findings = [
            green("limits", f"{_limit(files)} open files, locked memory {_limit(locked)}, core files {_limit(core)}")
        ]
    return findings


def check_processors(environment: Mapping[str, str], *, ranks_here: int) -> list[Finding]:
    """Threads against the processors that this process may use."""
    allowed, present = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    quota = _quota()
    usable = min(allowed, int(quota)) if quota and quota >= 1 else allowed
    text = environment.get("OMP_NUM_THREADS", "")
    found = f"{usable} of {present} processors"
    if text and not text.isdigit():
        why, remedy = "OpenMP ignores it and takes all processors", "export OMP_NUM_THREADS=4, a whole number"
        return [yellow("processors", f"OMP_NUM_THREADS={text!r}", why, remedy)]
    if text and int(text) * ranks_here > usable:
        return [
            yellow(
                "processors",
                f"{ranks_here} rank(s) with OMP_NUM_THREADS={text} on {found}",
                "more threads than processors wait for each other; steps take several times as long",
                f"OMP_NUM_THREADS={max(1, usable // ranks_here)}",
            )
        ]
    if usable < ranks_here:
        return [
            yellow(
                "processors",
                f"{ranks_here} ranks on {found}",
                "each rank packs rows and decodes images on processors of its own",
                "ask for more (Slurm: --cpus-per-task; several ranks bound to one core: --cpu-bind=none)",
            )
        ]
    threads = f"OMP_NUM_THREADS={text}" if text else "OMP_NUM_THREADS not set: the ranks share them"
    return [green("processors", f"{found}, {threads}")]


def _quota() -> float | None:
    """Processors that the control group of this process grants; None for no limit."""
    text = _group_file("cpu.max")
    quota, _, period = text.partition(" ")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


def check_memory() -> list[Finding]:
    """The machine's memory, or the smaller part of it that its control group grants."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    total, free = (int(fields[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    limit = _group_file("memory.max")
    found = f"{amount(free)} available of {amount(total)}"
    if limit.isdigit() and int(limit) < total:
        used = _group_file("memory.current")
        free = min(free, int(limit) - int(used or 0))
        found = f"{amount(free)} available of {amount(int(limit))} that this job or container may use"
    if free < 4 * _GIB:
        why = "what is beyond it ends in a SIGKILL without a message"
        return [yellow("memory", found, why, "ask for more (Slurm: --mem=0; docker: --memory), or end what uses it")]
    return [green("memory", found)]


def _group_file(name: str) -> str:
    """A file of this process's control group, version 2, or of the nearest one above that has it; "" where there is none."""
    try:
        line = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return ""
    here = Path("/sys/fs/cgroup") / line[3:].lstrip("/")
    for folder in (here, *here.parents):
        if folder == Path("/sys/fs"):
            break
        try:
            text = (folder / name).read_text().strip()
        except OSError:
            continue
        if not text.startswith("max"):
            return text
    return ""


def check_home(environment: Mapping[str, str]) -> list[Finding]:
    """Whether libraries can keep their caches."""
    home = environment.get("HOME", "")
    try:
        with tempfile.TemporaryFile(dir=home or "/nonexistent"):
            return [green("home", f"{home} can be written to")]
    except OSError as error:
        return [
            yellow(
                "home",
                f"HOME={home or '(not set)'}: {error.strerror}",
                "Triton, DeepSpeed and Hugging Face keep compiled kernels and caches there",
                "export HOME, or XDG_CACHE_HOME, TRITON_CACHE_DIR, TORCH_EXTENSIONS_DIR and HF_HOME, to a local folder",
            )
        ]


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else f"{value:,}"

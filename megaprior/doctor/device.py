"""torch, the accelerators it sees, and the loss kernel it would use. `look` runs in a process of its own."""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
import warnings
from collections.abc import Mapping
from typing import Any

from megaprior.doctor.finding import Finding, amount, green, red, yellow

_SMI = ("index", "name", "memory.total", "memory.used", "driver_version", "ecc.errors.uncorrected.volatile.total")
_BUSY_MIB = 1024  # of a GPU that nobody should be using yet


def look() -> dict[str, Any]:
    """What torch says of this machine, and which loss kernel agrees with the plain form."""
    import torch
    import torch.cuda.nccl

    facts: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda, "devices": [], "blind": []}
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(count):
        free, total = torch.cuda.mem_get_info(index)
        facts["devices"].append({"name": torch.cuda.get_device_name(index), "free": free, "total": total})
    pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
    facts["blind"] = [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)]
    facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version())) if count else None
    facts["gloo"] = torch.distributed.is_available() and torch.distributed.is_gloo_available()
    facts |= _kernels(torch.device("cuda", 0) if count else torch.device("cpu"))
    return facts


def _kernels(device: Any) -> dict[str, Any]:
    import torch

    from megaprior.kernels.choice import chosen

    found: dict[str, str] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            for dtype in (torch.float32, torch.bfloat16):
                found[str(dtype).removeprefix("torch.")] = chosen(device, dtype)
        except (ValueError, RuntimeError) as error:  # MEGAPRIOR_LOSS_IMPL asks for what cannot be
            return {"kernels": {}, "kernel_error": str(error), "set_aside": []}
    aside = [str(one.message) for one in caught if "set aside" in str(one.message)]
    return {"kernels": found, "kernel_error": None, "set_aside": aside}


def smi(timeout_s: float) -> list[dict[str, str]] | str | None:
    """nvidia-smi's line of each GPU; a text that says what went wrong with it; None where it is not installed."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, f"--query-gpu={','.join(_SMI)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return f"nvidia-smi does not answer within {timeout_s:.0f} s"
    except OSError as error:
        return f"{program}: {error.strerror}"
    if done.returncode:
        return (done.stdout + done.stderr).strip().splitlines()[0] if done.stdout + done.stderr else "nvidia-smi failed"
    rows = csv.reader(io.StringIO(done.stdout), skipinitialspace=True)
    return [dict(zip(_SMI, row, strict=True)) for row in rows if len(row) == len(_SMI)]


def check_gpus(facts: Mapping[str, Any], listed: list[dict[str, str]] | str | None, local_rank: int) -> list[Finding]:
    """`facts` of `look`, and what `smi` lists."""
    seen = facts["devices"]
    if isinstance(listed, str):
        return [red("GPUs", listed, "the driver does not answer", "look at dmesg for NVRM and Xid; reboot the machine")]
    if not seen and listed:
        built = f"built for CUDA {facts['cuda']}" if facts["cuda"] else "a build for CPUs"
        return [
            red(
                "GPUs",
                f"nvidia-smi lists {len(listed)} (driver {listed[0]['driver_version']}), torch ({built}) sees none",
                "training would run on the CPUs",
                "install torch's CUDA build, update the driver, or look at CUDA_VISIBLE_DEVICES",
            )
        ]
    if not seen:
        return [green("GPUs", "none: training runs on the CPUs, with gloo")]
    if local_rank >= len(seen):
        return [
            red(
                "GPUs",
                f"LOCAL_RANK={local_rank} but this process sees {len(seen)} GPU(s)",
                "every rank takes the GPU of its local rank",
                "start at most as many ranks as GPUs, and let each see all of the machine's (Slurm: --gpus-per-node, "
                "not --gpus-per-task)",
            )
        ]
    names = sorted({device["name"] for device in seen})
    sizes = ", ".join(sorted({amount(device["total"]) for device in seen}))
    driver = f"driver {listed[0]['driver_version']}, " if listed else ""
    found = f"{len(seen)} x {' and '.join(names)}, {sizes}, {driver}CUDA {facts['cuda']}, NCCL {facts['nccl']}"
    findings = [green("GPUs", found)]
    if len(names) > 1:
        findings = [yellow("GPUs", found, "every step waits for the slowest", "start on machines with one kind of GPU")]
    return [*findings, *_faults(listed or []), *_peers(facts["blind"])]


def _faults(listed: list[dict[str, str]]) -> list[Finding]:
    findings = []
    for gpu in listed:
        errors, used = gpu["ecc.errors.uncorrected.volatile.total"], gpu["memory.used"]
        if errors.isdigit() and int(errors):
            findings.append(
                red(
                    "GPUs",
                    f"GPU {gpu['index']}: {errors} uncorrected memory errors",
                    "its numbers cannot be trusted",
                    "take the machine out of the job and reset the GPU",
                )
            )
        if used.isdigit() and int(used) > _BUSY_MIB:
            findings.append(
                yellow(
                    "GPUs",
                    f"GPU {gpu['index']}: {int(used):,} MiB in use already",
                    "a run has less memory and fewer cycles than it plans with",
                    "nvidia-smi names the process",
                )
            )
    return findings


def _peers(blind: list[tuple[int, int]]) -> list[Finding]:
    if not blind:
        return []
    pairs = ", ".join(f"{a}-{b}" for a, b in blind[:4])
    return [
        yellow(
            "GPUs",
            f"{len(blind)} pairs cannot read each other's memory ({pairs})",
            "NCCL goes through the host between them, several times as slow as NVLink",
            "look at nvidia-smi topo -m; in a virtual machine or container, ask for peer access",
        )
    ]


def check_kernels(facts: Mapping[str, Any]) -> list[Finding]:
    """The loss kernel that "auto" means here."""
    if facts["kernel_error"]:
        return [
            red(
                "loss kernel",
                facts["kernel_error"],
                "training and scoring would stop with this error",
                "unset MEGAPRIOR_LOSS_IMPL, or set it to one that runs here",
            )
        ]
    on = "a GPU" if facts["devices"] else "the CPU"
    names = sorted(set(facts["kernels"].values()))
    chosen = names[0] if len(names) == 1 else ", ".join(f"{dtype}: {name}" for dtype, name in facts["kernels"].items())
    if facts["set_aside"]:
        return [
            yellow(
                "loss kernel",
                f"{chosen} on {on}; {facts['set_aside'][0]}",
                "the next slower one is used in its place",
                "report the message; nothing else has to be done",
            )
        ]
    if facts["devices"] and "torch" in names:
        return [
            yellow(
                "loss kernel",
                f"{chosen} on {on}",
                "the plain form keeps whole logits in memory and is several times as slow",
                "install triton, or build the CUDA kernels (docs/kernels.md)",
            )
        ]
    passed = "its self-check passed" if facts["devices"] else "the plain form, which the others are checked against"
    return [green("loss kernel", f"{chosen} on {on}: {passed}")]

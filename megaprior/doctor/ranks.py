"""What several ranks have to have in common, compared over the real group that their launcher makes possible."""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from megaprior.distributed import Peers, Place
from megaprior.doctor.finding import Finding, amount, green, red, yellow
from megaprior.doctor.meeting import all_reduce, pace
from megaprior.doctor.software import versions
from megaprior.errors import DataError
from megaprior.files import digest_bytes, owner_lock

_LOCK = ".megaprior-doctor.lock"
_SEEN_S = 5.0  # a network file system may show a new file so much later
_SKEW_S = 1.0
# Training refuses to start where these differ; the others are reported.
_MUST = ("megaprior", "its source", "python", "torch", "transformers", "deepspeed", "loss kernel", "configuration")


def facts_of(here: Place, environment: Mapping[str, str], *, config: str | None) -> dict[str, str]:
    """What this rank computes with, in words; "host" says where."""
    import torch

    from megaprior.kernels.choice import chosen

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = torch.device("cuda", here.local_rank) if here.local_rank < count else torch.device("cpu")
    try:
        kernel = chosen(device)
    except (ValueError, RuntimeError) as error:
        kernel = f"none ({error})"
    network = {k: v for k, v in environment.items() if k.startswith(("NCCL_", "GLOO_", "TORCH_NCCL_", "UCX_"))}
    return {
        "host": socket.gethostname(),
        **versions(),
        "its source": _source_digest(),
        "loss kernel": kernel,
        "configuration": digest_bytes(Path(config).read_bytes())[:12] if config and Path(config).is_file() else "none",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "threads": f"{torch.get_num_threads()} (OMP_NUM_THREADS={environment.get('OMP_NUM_THREADS', 'not set')})",
        "processors": str(len(os.sched_getaffinity(0))),
        "network variables": " ".join(f"{k}={v}" for k, v in sorted(network.items())) or "none",
    }


def _source_digest() -> str:
    """Of every Python file of the package: two checkouts may bear the same version."""
    root = Path(__file__).resolve().parents[1]
    files = sorted(root.rglob("*.py"))
    return digest_bytes(b"".join(str(p.relative_to(root)).encode() + p.read_bytes() for p in files))[:12]


def compare(table: Sequence[Mapping[str, str]]) -> list[Finding]:
    """Facts by rank."""
    findings = []
    for name in (field for field in table[0] if field != "host"):
        ranks: dict[str, list[int]] = {}
        for rank, facts in enumerate(table):
            ranks.setdefault(facts[name], []).append(rank)
        if len(ranks) == 1:
            continue
        found = "; ".join(f"{value} on {_named(of, table)}" for value, of in ranks.items())
        if name in _MUST:
            why, remedy = "training stops at its start: the ranks would not compute the same", "make them equal"
            findings.append(
                red(f"ranks: {name}", found, why, f"{remedy} on every machine: one environment on a shared folder")
            )
        else:
            why = "a step takes as long as its slowest rank, and sums may round differently"
            findings.append(yellow(f"ranks: {name}", found, why, "start all ranks alike, on machines of one kind"))
    hosts = list(dict.fromkeys(facts["host"] for facts in table))
    if not findings:
        findings = [green("ranks", f"{len(table)} on {', '.join(hosts)}: same versions, kernels, threads and devices")]
    return findings


def _named(ranks: Sequence[int], table: Sequence[Mapping[str, str]]) -> str:
    hosts = list(dict.fromkeys(table[rank]["host"] for rank in ranks))
    which = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank {which} ({', '.join(hosts[:4])})"


def check_clocks(peers: Peers) -> list[Finding]:
    """The clocks, as far as a collective can tell them apart."""
    rounds = [peers.gather([time.time()]) for _ in range(6)][1:]
    apart = [min(abs(one[rank][0] - one[0][0]) for one in rounds) for rank in range(peers.place.world)]
    far = [rank for rank, seconds in enumerate(apart) if seconds > _SKEW_S]
    if not far:
        return [green("clocks", f"equal to within {max(apart) * 1000:.0f} ms")]
    shown = ", ".join(f"rank {rank} by {apart[rank]:.1f} s" for rank in far[:6])
    return [
        yellow(
            "clocks",
            f"differ from rank 0's: {shown}",
            "locks and checkpoints seem younger or older than they are, and logs cannot be laid side by side",
            "run chrony or ntpd on every machine",
        )
    ]


def check_shared(peers: Peers, folder: Path) -> list[Finding]:
    """Rank 0 writes a token into the folder and locks it: does every rank read it, and respect the lock?"""
    token, check = secrets.token_hex(8), f"shared {folder}"
    name = peers.share(f".megaprior-doctor-{token}")
    with ExitStack() as stack:
        complaint = None
        if peers.place.rank == 0:
            try:
                (folder / name).write_text(name)
                stack.callback((folder / name).unlink, missing_ok=True)
                stack.enter_context(owner_lock(folder, _LOCK))
            except (OSError, DataError) as error:
                complaint = getattr(error, "strerror", None) or str(error)
        complaint = peers.share(complaint)
        if complaint is not None:
            return [
                red(
                    check, f"rank 0 cannot write there: {complaint}", "nothing can be saved", "give this user the right"
                )
            ]
        mine = _seen(folder, name), _respects(folder) if peers.place.rank else None
        table = peers.gather_objects((socket.gethostname(), *mine))
    return _judge(check, table)


def _judge(check: str, table: Sequence[tuple[str, str | None, bool | None]]) -> list[Finding]:
    blind = [(rank, host, why) for rank, (host, why, _) in enumerate(table) if why is not None]
    if blind:
        return [
            red(
                check,
                "; ".join(f"rank {rank} on {host}: {why}" for rank, host, why in blind[:6]),
                "what rank 0 writes there the others do not see: a run would stop at its start",
                "mount the same file system under the same path on every machine, and name it by its absolute path",
            )
        ]
    bold = [f"rank {rank} on {host}" for rank, (host, _, respects) in enumerate(table) if respects is False]
    if bold:
        return [
            yellow(
                check,
                f"rank 0's lock does not hold back {', '.join(bold[:6])}",
                "two jobs on two machines could write the same run",
                "mount it with locks (NFS: without nolock or local_lock; Lustre: -o flock), or never start a run twice",
            )
        ]
    return [green(check, f"all {len(table)} ranks see one file system, and its locks hold everywhere")]


def _seen(folder: Path, name: str) -> str | None:
    """Why this rank does not see the token; None when it does."""
    until = time.monotonic() + _SEEN_S
    while True:
        try:
            return None if (folder / name).read_text() == name else "other content"
        except OSError as error:
            if time.monotonic() > until:
                return f"{folder.absolute()}: rank 0's file is not there" if error.errno == 2 else error.strerror
        time.sleep(0.1)


def _respects(folder: Path) -> bool | None:
    """Whether rank 0's lock keeps this rank out; None where it cannot be tried."""
    try:
        with owner_lock(folder, _LOCK):
            return False
    except DataError:
        return True
    except OSError:
        return None


def check_group(peers: Peers) -> list[Finding]:
    """A real all-reduce over all ranks: gloo on the control group, NCCL where every rank has a GPU of its own."""
    import torch
    import torch.distributed as dist

    here = peers.place
    cpu = torch.device("cpu")
    speed = min(
        row[0] for row in peers.gather([all_reduce(here.rank, here.world, device=cpu, size=8 << 20, group=peers.group)])
    )
    findings = [pace("gloo", f"{here.world} ranks added 8 MiB at {amount(speed)}/s", speed)]
    able = torch.cuda.is_available() and here.local_rank < torch.cuda.device_count()
    if not all(row[0] for row in peers.gather([float(able)])):
        return findings
    device = torch.device("cuda", here.local_rank)
    torch.cuda.set_device(device)
    group = dist.new_group(backend="nccl")
    size = 256 << 20
    speed = min(
        row[0] for row in peers.gather([all_reduce(here.rank, here.world, device=device, size=size, group=group)])
    )
    return [*findings, pace("nccl", f"{here.world} ranks added {amount(size)} at {amount(speed)}/s", speed)]

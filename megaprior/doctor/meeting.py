"""A real all-reduce between processes of this machine: `look` is one of them, in a process of its own."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from megaprior.doctor.finding import Finding, amount, green, red, yellow
from megaprior.doctor.probe import Probe, Silent
from megaprior.errors import MegapriorError

_BYTES = {"gloo": 8 << 20, "nccl": 256 << 20}
_ROUNDS = 5
_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE")
_SLOW = {"gloo": 50e6, "nccl": 5e9}  # bytes/s


def look(backend: str, rank: int, world: int, port: int, timeout_s: float) -> float:
    """Form a group on localhost, reduce, and return the bandwidth in bytes/s."""
    import torch
    import torch.distributed as dist

    if backend == "nccl":
        torch.cuda.set_device(rank)
    limit = timedelta(seconds=timeout_s)
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world, timeout=limit)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    return all_reduce(rank, world, device=device, size=_BYTES[backend])


def all_reduce(rank: int, world: int, *, device: Any, size: int, group: Any = None) -> float:
    """Sum `size` bytes of float32 over the ranks, check the sum, and return bytes/s as nccl-tests count them ("bus").

    Raises:
        MegapriorError: the sum is wrong.
    """
    import torch
    import torch.distributed as dist

    best = 0.0
    for _ in range(_ROUNDS):
        values = torch.full((size // 4,), float(rank + 1), device=device)
        began = time.perf_counter()
        dist.all_reduce(values, group=group)
        low, high = values.min().item(), values.max().item()  # waits for the device
        seconds = time.perf_counter() - began
        if not low == high == world * (world + 1) / 2:
            raise MegapriorError(
                f"an all-reduce of 1..{world} gave {low:g} to {high:g}, not {world * (world + 1) // 2}"
            )
        best = max(best, 2 * (world - 1) / world * size / seconds)
    return best


class Meeting:
    """The processes of one such group, under way."""

    def __init__(self, backend: str, world: int, *, timeout_s: float) -> None:
        self.backend, self.world = backend, world
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        alone: dict[str, str | None] = dict.fromkeys(_LAUNCHERS)
        self._probes = [
            Probe("meet", backend, rank, world, port, timeout_s, timeout_s=timeout_s, environment=alone)
            for rank in range(world)
        ]

    def check(self, environment: Mapping[str, str]) -> list[Finding]:
        """Wait for them."""
        try:
            speed = min([probe.answer() for probe in self._probes])
        except (Silent, MegapriorError) as error:
            for probe in self._probes:
                probe.end()
            variable = f"{self.backend.upper()}_SOCKET_IFNAME"
            told = f"{variable}={environment[variable]}" if environment.get(variable) else f"{variable} is not set"
            return [
                red(
                    self.backend,
                    f"{self.world} processes of this machine cannot add numbers: {' '.join(str(error).split())}; {told}",
                    "every step of a run needs this",
                    f"set {variable} to an interface that exists (lo on one machine), and look at the firewall"
                    + ("; NCCL_DEBUG=INFO says more" if self.backend == "nccl" else ""),
                )
            ]
        found = f"{self.world} processes added {amount(_BYTES[self.backend])} at {amount(speed)}/s"
        return [pace(self.backend, found, speed)]


def pace(backend: str, found: str, speed: float) -> Finding:
    """Green, or yellow where the bandwidth (bytes/s) is far below what the poorest sound machine has."""
    if speed >= _SLOW[backend]:
        return green(backend, found)
    return yellow(
        backend,
        found,
        "gradients and parameters travel at every step",
        "NCCL_DEBUG=INFO shows which network is used; NCCL_SOCKET_IFNAME and NCCL_IB_HCA choose one"
        if backend == "nccl"
        else "GLOO_SOCKET_IFNAME chooses the interface; is the machine busy?",
    )

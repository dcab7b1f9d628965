"""Names, interfaces and ports: what ranks need to find each other. `look` runs in a process of its own."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megaprior.distributed import Place
from megaprior.doctor.finding import Finding, green, red, yellow

DEFAULT_PORT = 29500  # of torchrun and deepspeed


def look(*names: str) -> dict[str, list[str] | str]:
    """The addresses of each name, or why there are none."""
    found: dict[str, list[str] | str] = {}
    for name in names:
        try:
            found[name] = sorted(
                {str(entry[4][0]) for entry in socket.getaddrinfo(name, None, proto=socket.IPPROTO_TCP)}
            )
        except (OSError, UnicodeError) as error:
            found[name] = getattr(error, "strerror", None) or str(error)
    return found


def check_names(facts: Mapping[str, Any], environment: Mapping[str, str], *, several: bool) -> list[Finding]:
    """This machine's own name and MASTER_ADDR; `several` says that the run has more machines than this one."""
    host, master = socket.gethostname(), environment.get("MASTER_ADDR")
    findings, own = [], facts[host]
    chosen = "GLOO_SOCKET_IFNAME" in environment
    if isinstance(own, str) and not chosen:
        level = red if several else yellow
        findings.append(
            level(
                "names",
                f"the machine's own name {host} has no address: {own}",
                "gloo and MPI listen at the address of that name; without one only this machine's ranks find each other",
                f"add a line for {host} to /etc/hosts, or set GLOO_SOCKET_IFNAME (ip -brief addr shows the interfaces)",
            )
        )
    elif (
        several
        and not chosen
        and isinstance(own, list)
        and all(address.startswith("127.") or address == "::1" for address in own)
    ):
        findings.append(
            red(
                "names",
                f"the machine's own name {host} means {', '.join(own)}",
                "gloo would listen there, where no other machine can reach it",
                "set GLOO_SOCKET_IFNAME to the interface that the machines share (ip -brief addr)",
            )
        )
    if master and isinstance(facts[master], str):
        findings.append(
            red(
                "names",
                f"MASTER_ADDR={master} has no address: {facts[master]}",
                "no rank can find rank 0",
                "use an address in the place of the name, or a name that every machine knows",
            )
        )
    if findings:
        return findings
    address = own if isinstance(own, str) else ", ".join(own)
    shown = f"{host}: {address}" + (f"; MASTER_ADDR={master}" if master else "")
    return [green("names", shown)]


def check_interfaces(environment: Mapping[str, str]) -> list[Finding]:
    """That the interfaces which gloo and NCCL were told to use are there."""
    present = [name for _, name in socket.if_nameindex()]
    findings = []
    for variable in ("GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        value = environment.get(variable, "")
        missing = [name for name in value.split(",") if name and not _there(name, present, variable)]
        if missing:
            findings.append(
                red(
                    "interfaces",
                    f"{variable}={value}, but this machine has {', '.join(present)}",
                    "the ranks cannot listen on an interface that is not there",
                    f"set {variable} to one of them that all machines share, or unset it",
                )
            )
    down = [name for name in present if name != "lo" and _state(name) == "down"]
    cards = sorted(path.name for path in Path("/sys/class/infiniband").glob("*"))
    shown = ", ".join(name + (" (down)" if name in down else "") for name in present)
    return findings or [green("interfaces", shown + (f"; InfiniBand {', '.join(cards)}" if cards else ""))]


def _there(name: str, present: Sequence[str], variable: str) -> bool:
    if not variable.startswith("NCCL"):
        return name in present
    if name.startswith("^"):  # all but these
        return True
    return name[1:] in present if name.startswith("=") else any(one.startswith(name) for one in present)


def _state(name: str) -> str:
    try:
        return Path(f"/sys/class/net/{name}/operstate").read_text().strip()
    except OSError:
        return "unknown"


def check_port(environment: Mapping[str, str], here: Place | None) -> list[Finding]:
    """Whether rank 0 can listen on MASTER_PORT, where that is this process's part."""
    text = environment.get("MASTER_PORT", "")
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return [green("port", f"{text}, held by torchrun")]
    if here is not None and here.rank > 0:
        return []
    if text and not (text.isdigit() and 0 < int(text) < 65536):
        return [red("port", f"MASTER_PORT={text!r}", "no such port", "export MASTER_PORT=29500, or another free one")]
    port = int(text or DEFAULT_PORT)
    error = _listen(port)
    if error is None:
        return [green("port", f"{port} is free")]
    name = f"MASTER_PORT={port}" if text else f"{port}, which deepspeed and torchrun take by default,"
    level = red if text else yellow
    return [
        level(
            "port",
            f"{name} cannot be listened on: {error}{_holder(port)}",
            "rank 0 fails with 'address already in use', or joins another job's ranks",
            f"choose another: --master_port {_free_port()}, or end the job that holds it",
        )
    ]


def _listen(port: int) -> str | None:
    """Why nobody can listen on the port on all interfaces; None when one can."""
    for family, address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind((address, port))
        except OSError as error:
            if (
                family == socket.AF_INET or error.errno == 98
            ):  # EADDRINUSE; a machine without IPv6 is none of our business
                return error.strerror
    return None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _holder(port: int) -> str:
    """The process that listens there, in words; "" where it may not be seen."""
    inodes = set()
    for table in ("tcp", "tcp6"):
        try:
            rows = Path(f"/proc/net/{table}").read_text().splitlines()[1:]
        except OSError:
            continue
        for row in rows:
            fields = row.split()
            if fields[3] == "0A" and int(fields[1].rsplit(":", 1)[1], 16) == port:
                inodes.add(f"socket:[{fields[9]}]")
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            held = any(os.readlink(entry) in inodes for entry in (folder / "fd").iterdir())
            if held:
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                return f" (process {folder.name}: {command[:80]})"
        except OSError:
            continue
    return ""

"""The doctor's round: everything is started at once, answers are waited for in turn, rank 0 reports."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megaprior.distributed import Peers, Place, connect
from megaprior.doctor import device, folders, launcher, machine, network, planned, ranks, software
from megaprior.doctor.finding import LEVELS, Finding, red, together, worst
from megaprior.doctor.meeting import Meeting
from megaprior.doctor.probe import Probe, Silent
from megaprior.errors import MegapriorError, UsageError

_COLOURS = {"green": "\033[32m", "yellow": "\033[33m", "red": "\033[31m"}


def doctor(
    *,
    shared: Sequence[Path] = (),
    config: Path | None = None,
    overrides: Sequence[str] = (),
    as_json: bool = False,
    timeout_s: float = 60.0,
) -> int:
    """Look at everything and print it; 1 where something is red, else 0.

    Args:
        shared: folders that all machines must see.
        config, overrides: of a run that is to start here.
        timeout_s: how long anything may take before it counts as hanging.
    """
    here, found = launcher.read(os.environ)
    first = _first_on_machine(os.environ) if here is None else here.local_rank == 0
    world = here.world if here else 1
    if first:
        found += look_at_machine(
            os.environ, here, shared=shared, config=config, overrides=overrides, timeout_s=timeout_s
        )
    if here is None or world == 1:
        if first or worst(found) == "red":
            report(found, as_json=as_json, title=f"{socket.gethostname()}, one process")
        return int(worst(found) == "red")
    return _with_others(here, found, shared=shared, config=config, as_json=as_json, timeout_s=timeout_s)


def look_at_machine(
    environment: Mapping[str, str],
    here: Place | None,
    *,
    shared: Sequence[Path],
    config: Path | None,
    overrides: Sequence[str],
    timeout_s: float,
) -> list[Finding]:
    """All that one process can find out about its machine."""
    world = here.world if here else 1
    names = [socket.gethostname(), *filter(None, [environment.get("MASTER_ADDR")])]
    torch = Probe("torch", timeout_s=timeout_s)
    resolved = Probe("names", *names, timeout_s=timeout_s)
    gloo = Meeting("gloo", 2, timeout_s=timeout_s) if world == 1 else None
    plan = Probe("config", str(config), list(overrides), world, timeout_s=timeout_s) if config else None
    places = {folder: Probe("folder", str(folder), timeout_s=timeout_s) for folder in shared or [Path.cwd()]}

    findings = software.check_versions()
    facts = _ask(
        torch, "torch", "nothing here works without it", "reinstall it: pip install --force-reinstall torch", findings
    )
    if facts is not None:
        local_rank = here.local_rank if here else 0
        findings += device.check_gpus(facts, device.smi(timeout_s), local_rank) + device.check_kernels(facts)
    gpus = len(facts["devices"]) if facts else 0
    findings += software.check_ninjas(environment.get("PATH", os.defpath))
    findings += software.check_extensions(software.extensions_folder(environment), gpu=gpus > 0)
    ranks_here = int(environment.get("LOCAL_WORLD_SIZE") or (world if world > 1 else 1))
    findings += [*machine.check_processors(environment, ranks_here=ranks_here), *machine.check_memory()]
    findings += [*machine.check_shm(), *machine.check_limits(), *machine.check_home(environment)]
    addresses = _ask(resolved, "names", "ranks find each other by name", "look at /etc/resolv.conf", findings)
    if addresses is not None:
        several = world > ranks_here or environment.get("SLURM_JOB_NUM_NODES", "1") not in ("", "1")
        findings += network.check_names(addresses, environment, several=several)
    findings += [*network.check_interfaces(environment), *network.check_port(environment, here)]
    if gloo is not None:
        findings += gloo.check(environment)
    if world == 1 and gpus > 1:
        findings += Meeting("nccl", gpus, timeout_s=timeout_s).check(environment)
    for folder, probe in places.items():
        findings += _folder(folder, probe)
    if plan is not None:
        findings += _plan(plan, timeout_s)
    return findings


def _ask(probe: Probe, check: str, why: str, remedy: str, findings: list[Finding]) -> Any:
    """The probe's answer; where there is none, a finding says so."""
    try:
        return probe.answer()
    except (Silent, MegapriorError) as error:
        findings.append(red(check, " ".join(str(error).split()), why, remedy))
        return None


def _folder(folder: Path, probe: Probe, *, needed: int = 0) -> list[Finding]:
    findings: list[Finding] = []
    why, remedy = "whatever touches it hangs, and cannot be killed", "is its server there? look at dmesg and mount"
    facts = _ask(probe, f"folder {folder}", why, remedy, findings)
    return findings if facts is None else folders.check_folder(facts, needed=needed)


def _plan(probe: Probe, timeout_s: float) -> list[Finding]:
    findings: list[Finding] = []
    facts = _ask(probe, "configuration", "training would stop with this message", "correct it and look again", findings)
    if facts is None:
        return findings
    out = planned.nearest(Path(facts["out"]))
    written = _folder(out, Probe("folder", str(out), timeout_s=timeout_s), needed=planned.needed(facts))
    return planned.check_plan(facts) + written


# ---------------------------------------------------------------- several ranks


def _with_others(
    here: Place, found: list[Finding], *, shared: Sequence[Path], config: Path | None, as_json: bool, timeout_s: float
) -> int:
    """Meet the other ranks, compare, and let rank 0 report for all."""
    doing = ["the ranks' meeting"]

    def give_up() -> None:
        why, remedy = (
            "a rank is not there, hangs, or cannot be reached",
            "repeat it; the ranks that report are those that live",
        )
        text = f"rank {here.rank} got no answer during {doing[0]} within {4 * timeout_s:.0f} s"
        report(
            [*found, red("ranks", text, why, remedy)],
            as_json=as_json,
            title=f"{socket.gethostname()}, rank {here.rank}",
        )
        os._exit(1)

    guard = threading.Timer(4 * timeout_s, give_up)
    guard.daemon = True
    guard.start()
    try:
        peers = connect(here, backend="gloo", timeout_s=2 * timeout_s)
    except UsageError as error:
        why, remedy = "no run can start", "look at MASTER_ADDR, MASTER_PORT and the firewall; is every rank started?"
        found.append(red("ranks", str(error), why, remedy))
        report(found, as_json=as_json, title=f"{socket.gethostname()}, rank {here.rank}")
        return 1
    try:
        every, table = _compare(peers, found, shared=shared, config=config, doing=doing)
    except RuntimeError as error:  # gloo's, when a rank ends while others wait for it
        why, remedy = "a rank ended, or cannot be reached any more", "look for the first rank that said something"
        text = f"rank {here.rank} lost the others during {doing[0]}: {str(error).splitlines()[0]}"
        report(
            [*found, red("ranks", text, why, remedy)],
            as_json=as_json,
            title=f"{socket.gethostname()}, rank {here.rank}",
        )
        return 1
    guard.cancel()
    if here.rank == 0:
        hosts = dict.fromkeys(facts["host"] for facts in table)
        report(every, as_json=as_json, title=f"{here.world} ranks on {len(hosts)} machine(s)")
    verdict = int(peers.share(worst(every) == "red"))
    peers.close()
    return verdict


def _compare(
    peers: Peers, found: list[Finding], *, shared: Sequence[Path], config: Path | None, doing: list[str]
) -> tuple[list[Finding], list[dict[str, str]]]:
    """(everybody's findings and what the comparison gave, facts by rank); the same on every rank."""
    here = peers.place
    doing[0] = "the comparison of versions"
    facts = ranks.facts_of(here, os.environ, config=str(config) if config else None)
    table = peers.gather_objects(facts)
    mine = [finding for finding in found if here.local_rank == 0 or finding.level != "green"]
    gathered = peers.gather_objects((here.local_rank == 0, mine))
    by_machine = [(table[rank]["host"], list(one)) for rank, (first, one) in enumerate(gathered) if first]
    others = [
        (f"rank {rank} on {table[rank]['host']}", list(one))
        for rank, (first, one) in enumerate(gathered)
        if not first and one
    ]
    every = together(by_machine) + [f for place in others for f in together([place, ("", [])])]
    every += ranks.compare(table)
    doing[0] = "the comparison of clocks"
    every += ranks.check_clocks(peers)
    doing[0] = "an all-reduce"
    every += ranks.check_group(peers)
    hanging = {f.check for f in every if f.level == "red" and "no answer within" in f.found}
    for folder in shared:
        if f"folder {folder}" not in hanging:
            doing[0] = f"the test of {folder}"
            every += ranks.check_shared(peers, folder)
    return every, table


def _first_on_machine(environment: Mapping[str, str]) -> bool:
    """Without a place: whether any launcher's own count says that this is a machine's first process."""
    for name in ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID"):
        if environment.get(name):
            return environment[name] == "0"
    return True


# ---------------------------------------------------------------- the report


def report(findings: Sequence[Finding], *, as_json: bool, title: str) -> None:
    """Print everything, the worst last, where it is read first."""
    ordered = sorted(findings, key=lambda finding: LEVELS.index(finding.level))
    verdict = worst(ordered)
    if as_json:
        body = {"format": "megaprior doctor", "version": 1, "of": title, "verdict": verdict}
        print(json.dumps({**body, "findings": [asdict(finding) for finding in ordered]}, indent=1), flush=True)
        return
    width = max((len(finding.check) for finding in ordered), default=0)
    lines = []
    for finding in ordered:
        where = f" [{finding.where}]" if finding.where else ""
        lines.append(f"{_level(finding.level)}  {finding.check:<{min(width, 24)}}  {finding.found}{where}")
        lines += [
            f"        {name}: {text}" for name, text in (("why", finding.why), ("remedy", finding.remedy)) if text
        ]
    counts = ", ".join(f"{sum(f.level == level for f in ordered)} {level}" for level in LEVELS)
    print("\n".join([*lines, f"megaprior doctor: {title}: {verdict} ({counts})"]), flush=True)


def _level(level: str) -> str:
    text = f"{level:<6}"
    return f"{_COLOURS[level]}{text}\033[0m" if sys.stdout.isatty() else text

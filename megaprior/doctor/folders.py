"""File systems: where they lie, what they hold, how fast and how safe they are. `look` runs in a process of its own."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megaprior.doctor.finding import Finding, amount, green, red, yellow
from megaprior.errors import DataError
from megaprior.files import atomic_file, owner_lock

_WRITTEN = 64 << 20  # bytes
_LEAST = 256 << 20  # bytes free: less holds no checkpoint worth the name
_SLOW = 20e6  # bytes/s
_SKEW_S = 2.0
_NETWORK = ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "glusterfs", "wekafs", "panfs", "9p",
            "virtiofs", "smb3", "afs")  # fmt: skip
_LOCAL_LOCKS = ("nolock", "local_lock=all", "local_lock=flock", "localflock")


def look(path: str) -> dict[str, Any]:
    """Facts of the file system of `path`: it is written to, renamed in, locked, and left as it was."""
    folder = Path(path)
    facts: dict[str, Any] = {"path": path, "error": None}
    try:
        facts |= mount_of(folder)
        disk = os.statvfs(folder)
        facts |= {"free": disk.f_bavail * disk.f_frsize, "total": disk.f_blocks * disk.f_frsize}
        facts["inodes"] = disk.f_favail if disk.f_files else None
        scratch = Path(tempfile.mkdtemp(prefix=".megaprior-doctor-", dir=folder))
    except OSError as error:
        return {**facts, "error": error.strerror or str(error)}
    try:
        facts |= _write(scratch, min(_WRITTEN, facts["free"] // 4))
        facts["lock"] = _lock(scratch)
    except (OSError, DataError) as error:
        facts["error"] = getattr(error, "strerror", None) or str(error)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return facts


def mount_of(folder: Path) -> dict[str, Any]:
    """Kind, source and options of the mount that holds the folder."""
    resolved = folder.resolve(strict=True)
    best: dict[str, Any] = {"kind": "unknown", "source": "", "options": "", "mount": ""}
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        before, _, after = line.partition(" - ")
        point = before.split()[4].encode().decode("unicode_escape")
        kind, source, options = after.split(" ", 2)
        inside = resolved == Path(point) or Path(point) in resolved.parents
        if inside and len(point) >= len(best["mount"]):
            best = {"kind": kind, "source": source, "options": f"{before.split()[5]},{options}", "mount": point}
    return best


def _write(scratch: Path, size: int) -> dict[str, Any]:
    block = os.urandom(1 << 20)
    began = time.perf_counter()
    with atomic_file(scratch / "written") as file:
        for left in range(size, 0, -len(block)):
            file.write(block[:left])
    seconds = time.perf_counter() - began
    before, mtime, after = time.time(), _mtime(scratch / "clock"), time.time()
    skew = mtime - min(max(mtime, before), after)  # 0 where the time lies between the two
    found = (scratch / "written").stat().st_size
    if found != size:
        raise OSError(5, f"{size:,} bytes were written, {found:,} arrived")
    return {"written": size, "speed": size / seconds if size else None, "skew": skew}


def _mtime(path: Path) -> float:
    path.write_bytes(b"x")
    return path.stat().st_mtime


def _lock(scratch: Path) -> str | None:
    """What is wrong with locks there; None for nothing."""
    with owner_lock(scratch):
        try:
            with owner_lock(scratch):
                return "two owners held one lock"
        except DataError as error:
            return None if "in use by" in str(error) else str(error)


def check_folder(facts: Mapping[str, Any], *, needed: int = 0, output: bool = True) -> list[Finding]:
    """`facts` of `look`; `needed` bytes are to be written there. `output` false: the folder is only read."""
    check = f"folder {facts['path']}"
    if facts["error"] and ("free" not in facts or output):
        free = f", {amount(facts['free'])} free" if "free" in facts else ""
        return [
            red(
                check,
                f"{facts['error']}{free}",
                "runs, shards and scores are written there by every machine",
                "mount or make it, and give this user the right to write",
            )
        ]
    kind = f"{facts['kind']}, {amount(facts['free'])} free of {amount(facts['total'])}"
    if not output:
        return [green(check, kind)]
    written = f", written at {amount(facts['speed'])}/s" if facts["speed"] else ""
    findings = [*_room(check, kind, facts, needed), *_manners(check, kind, facts)]
    if findings:
        return findings
    return [green(check, f"{kind}{written}; fsync, rename and locks work")]


def _room(check: str, kind: str, facts: Mapping[str, Any], needed: int) -> list[Finding]:
    findings = []
    if facts["free"] < max(needed, _LEAST):
        findings.append(
            red(
                check,
                f"{kind}, needed {amount(max(needed, _LEAST))}",
                "a checkpoint stops halfway, and with it the run",
                "free some space, choose another folder, or keep fewer checkpoints (keep_last, save_every)",
            )
        )
    if facts["inodes"] is not None and facts["inodes"] < 10_000:
        why, remedy = "no file can be made without one", "delete small files, or choose another folder"
        findings.append(yellow(check, f"{kind}, {facts['inodes']:,} inodes left", why, remedy))
    return findings


def _manners(check: str, kind: str, facts: Mapping[str, Any]) -> list[Finding]:
    findings = []
    if facts["lock"]:
        why, remedy = (
            "two jobs could write the same run",
            "mount it with locks (Lustre: -o flock), or choose another folder",
        )
        findings.append(red(check, f"{kind}: {facts['lock']}", why, remedy))
    options = facts["options"].split(",")
    local = [option for option in _LOCAL_LOCKS if option in options]
    if local and facts["kind"] in _NETWORK:
        why, remedy = "two machines could write the same run", "mount it without that option"
        findings.append(yellow(check, f"{kind}: mounted with {local[0]}, so locks end at this machine", why, remedy))
    if facts["kind"] in ("tmpfs", "ramfs", "overlay"):
        lost = "container" if facts["kind"] == "overlay" else "machine"
        why = f"what is written there is lost with the {lost}, and no other machine sees it"
        findings.append(yellow(check, kind, why, "put runs and shards on a file system that stays"))
    if facts["speed"] and facts["speed"] < _SLOW:
        minutes = (100 << 30) / facts["speed"] / 60
        why = f"a checkpoint of 100 GiB takes {minutes:,.0f} minutes"
        findings.append(yellow(check, f"{kind}, written at {amount(facts['speed'])}/s", why, "choose a faster one"))
    if abs(facts["skew"]) > _SKEW_S:
        found = f"its clock differs from this machine's by {facts['skew']:+.1f} s"
        why = "the age of a lock or checkpoint is read from it"
        findings.append(yellow(check, found, why, "run chrony or ntpd on both"))
    return findings

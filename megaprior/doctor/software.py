"""Installed versions against what setup.py asks for, and DeepSpeed's cache of compiled operators."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from megaprior.doctor.finding import Finding, green, red, yellow

TESTED = {"torch": "2.13"}
_NAMED = ("torch", "deepspeed", "transformers", "numpy", "mpi4py", "sentencepiece")  # the others share a line
_OPTIONAL = {
    "triton": "the fused loss kernels need it on a GPU",
    "flash-attn": "torch's own attention is used without it",
    "wandb": "only `tracker.wandb` needs it",
}
_STALE_S = 60.0


# ---------------------------------------------------------------- versions


def installed(name: str) -> str | None:
    """The version of a distribution; None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """What the machines of a run should have in common."""
    found = {"python": platform.python_version()}
    return found | {name: installed(name) or "none" for name in ("megaprior", *_NAMED, *_OPTIONAL)}


def check_versions() -> list[Finding]:
    """Python and every package that setup.py asks for."""
    from packaging.requirements import Requirement

    findings = [green("python", f"{platform.python_version()} ({sys.executable})")]
    wanted = {r.name: r for r in map(Requirement, importlib.metadata.requires("megaprior") or []) if r.marker is None}
    good = []
    for name, requirement in wanted.items():
        version = installed(name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            findings.append(
                red(
                    name,
                    f"{version or 'not installed'}, needed {requirement.specifier}",
                    "older releases lack what is used here, or compute it wrongly",
                    f"pip install '{requirement}'",
                )
            )
        elif name in _NAMED:
            findings.append(_version(name, version, str(requirement.specifier)))
        else:
            good.append(name)
    findings.append(green("packages", f"{len(good)} others as setup.py asks for"))
    return findings + [green(name, installed(name) or f"not installed; {why}") for name, why in _OPTIONAL.items()]


def _version(name: str, version: str, wanted: str) -> Finding:
    tested = TESTED.get(name)
    if tested is not None and not version.startswith(tested):
        return yellow(
            name,
            f"{version}, tested is {tested}",
            "what is promised bit for bit was measured on that one",
            f"pip install '{name}=={tested}.*', or run the tests on this one: bash launch/test.sh",
        )
    return green(name, f"{version} ({wanted})")


# ---------------------------------------------------------------- compiled operators


def check_ninjas(path: str) -> list[Finding]:
    """Whether the ninja that a build finds first is this environment's."""
    found = []
    for folder in path.split(os.pathsep):
        ninja = Path(folder or ".") / "ninja"
        if os.access(ninja, os.X_OK) and ninja.resolve() not in [other.resolve() for other in found]:
            found.append(ninja)
    own = Path(sys.executable).parent / "ninja"
    if not found:
        if own.exists():
            found = [own]
        else:
            why, remedy = "DeepSpeed compiles operators with it", "pip install ninja"
            return [yellow("ninja", "none on PATH", why, remedy)]
    if len(found) > 1 and found[0].parent.resolve() != own.parent.resolve():
        return [
            yellow(
                "ninja",
                f"{len(found)} on PATH, first {found[0]}: {', '.join(map(str, found[1:]))} come after it",
                "each finds the other's build out of date and compiles it again, a minute at every start",
                f"put {own.parent} first on PATH, on every machine",
            )
        ]
    return [green("ninja", str(found[0]))]


def extensions_folder(environment: Mapping[str, str]) -> Path:
    """Where training keeps DeepSpeed's compiled operators."""
    if environment.get("TORCH_EXTENSIONS_DIR"):
        return Path(environment["TORCH_EXTENSIONS_DIR"])
    cache = environment.get("XDG_CACHE_HOME") or str(Path(environment.get("HOME") or "~").expanduser() / ".cache")
    return Path(cache) / "megaprior" / "torch_extensions"


def check_extensions(folder: Path, *, gpu: bool) -> list[Finding]:
    """Locks that nobody holds any more, and what is compiled already."""
    try:
        locks = sorted(folder.glob("**/lock"))
        compiled = sorted(path.stem for path in folder.glob("**/*.so"))
        _writable(folder)
    except OSError as error:
        return [
            red(
                "compiled operators",
                f"{folder}: {error.strerror}",
                "DeepSpeed compiles operators into it, and cannot start without",
                "set TORCH_EXTENSIONS_DIR to a folder that every rank of this machine can write to",
            )
        ]
    findings = list(_locks(folder, locks))
    shown = ", ".join(dict.fromkeys(name.removesuffix("_op") for name in compiled)) or "none yet"
    if not findings and not gpu and not any("shm_comm" in name for name in compiled):
        findings.append(_no_operator(folder))
    elif not findings:
        findings.append(green("compiled operators", f"{folder}: {shown}"))
    return findings


def _locks(folder: Path, locks: list[Path]) -> Iterator[Finding]:
    builds = _working_folders() if locks else set()
    for lock in locks:
        try:
            age = time.time() - lock.stat().st_mtime
        except OSError:
            continue  # its build has just ended
        if lock.parent.resolve() in builds or age < _STALE_S:
            found = f"{lock}: {age:.0f} s old, a build is going on there"
            yield yellow("compiled operators", found, "other processes wait for it", "wait a minute and look again")
        else:
            yield red(
                "compiled operators",
                f"{lock}: {_age(age)} old, and no process builds there",
                "the build was killed; whatever loads that operator waits for the lock for ever, without a word",
                f"rm {lock}",
            )


def _no_operator(folder: Path) -> Finding:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        return red(
            "compiled operators",
            f"{folder}: none, and there is no C++ compiler on PATH",
            "engine=zero3 on CPUs compiles DeepSpeed's communication operator at its first start",
            "apt install g++, or train with engine=local",
        )
    return green(
        "compiled operators", f"{folder}: none yet; the first start with engine=zero3 takes about a minute more"
    )


def _writable(folder: Path) -> None:
    """Raise OSError where no file can be made in `folder`, or in the nearest folder above it that exists."""
    here = folder
    while not here.exists():
        here = here.parent
    if not here.is_dir() or not os.access(here, os.W_OK | os.X_OK):
        raise PermissionError(13, f"{here} cannot be written to")


def _working_folders() -> set[Path]:
    """Where the processes of this machine work that we may look at; compilers work in the folder that they build."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*/cwd"):
        try:
            found.add(entry.resolve(strict=True))
        except OSError:
            continue
    return found


def _age(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"

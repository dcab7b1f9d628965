"""The output folder of a build: whose it is, how far it is, and who works in it now.

While a build is under way `DIR/.building/` holds

    plan.json               the build id and all that it is the hash of
    tokenizer/              the tokenizer, so that `join` needs neither inputs nor options
    00007.json              what a finished shard left out (written before the shard's manifest)
    part-3-of-10.lock       held by the builder of that part; DIR/.lock is held by one who builds or joins the whole

The kernel drops a lock with its process, so that a killed builder never leaves a stale one behind.
"""

from __future__ import annotations

import fcntl
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaprior.data import manifest as mf
from megaprior.data_tools.building.parts import Part
from megaprior.data_tools.building.plan import Plan, difference, shard_prefix
from megaprior.data_tools.building.sharding import WORKING
from megaprior.errors import DataError
from megaprior.files import atomic_folder, fsync_folder, owner_lock, read_manifest, write_manifest
from megaprior.tokenizer import Tokenizer, load_tokenizer

_PLAN, _FORMAT = "plan.json", "megaprior.plan"
_LOCK = ".lock"
_PART_LOCK = re.compile(r"part-(\d+)-of-(\d+)\.lock")


@dataclass(frozen=True, kw_only=True)
class Begun:
    """A build under way, as its working folder tells it; `recorded` is what the build id is the hash of."""

    build_id: str
    recorded: dict[str, Any]

    @property
    def prefixes(self) -> list[str]:
        """Names of all its shards, in order."""
        return [shard_prefix(number) for number in range(len(self.recorded["sources"]))]


def state(output: Path, plan: Plan) -> str:
    """How far the build of `plan` is in `output`: "new", "begun" or "complete".

    Raises:
        DataError: the folder holds something else.
    """
    if not output.exists():
        return "new"
    if not output.is_dir():
        raise DataError(f"{output}: exists and is not a folder; choose another --output")
    if (output / mf.BUILD_NAME).exists():
        found = mf.read_build(output)
        if found["build_id"] != plan.build_id:
            raise DataError(
                f"{output}: holds another build ({found['build_id']}, now {plan.build_id}); choose another --output"
            )
        return "complete"
    if (output / WORKING / _PLAN).exists():
        begun = read_begun(output)
        if begun.build_id != plan.build_id:
            changed = difference(plan.recorded, begun.recorded)
            raise DataError(
                f"{output}: holds an unfinished build of other inputs or options ({changed}); repeat that command, "
                "or choose another --output"
            )
        return "begun"
    # What a build leaves when it is killed before its plan is written: the lock, an empty or half-written .building.
    if strange := sorted(path.name for path in output.iterdir() if path.name not in (_LOCK, WORKING)):
        raise DataError(f"{output}: not empty ({', '.join(strange[:3])}...) and not a build; choose another --output")
    return "new"


def read_begun(output: Path) -> Begun:
    """The build that is under way in `output`.

    Raises:
        DataError: none is, or its plan is not what was written.
    """
    body = read_manifest(output / WORKING / _PLAN, format=_FORMAT)
    return Begun(build_id=body["build_id"], recorded=body["plan"])


def begin(output: Path, plan: Plan, tokenizer: Tokenizer) -> None:
    """Write down what is being built, where that has not been done; several parts may begin at once.

    Raises:
        DataError: somebody else has just begun another build here.
    """
    working = output / WORKING
    working.mkdir(parents=True, exist_ok=True)
    fsync_folder(output.parent)
    fsync_folder(output)
    if not (working / _PLAN).exists():
        write_manifest(
            working / _PLAN, {"format": _FORMAT, "version": 1, "build_id": plan.build_id, "plan": plan.recorded}
        )
    state(output, plan)
    kept = working / "tokenizer"
    if not kept.exists():
        try:
            with atomic_folder(kept) as temporary:
                tokenizer.save(temporary)
        except (DataError, OSError):
            if not kept.exists():  # else another part was faster
                raise


def begun_tokenizer(output: Path) -> Tokenizer:
    """The tokenizer of the build that is under way.

    Raises:
        DataError: it is missing or not what was written.
    """
    return load_tokenizer(output / WORKING / "tokenizer")


def missing(output: Path, prefixes: Iterable[str]) -> list[str]:
    """The shards that are not written yet."""
    return [prefix for prefix in prefixes if not (output / f"{prefix}.json").exists()]


def sweep(output: Path, prefixes: Iterable[str] | None = None) -> None:
    """Remove what killed builders left half-written: everything, or that of some shards alone.

    The caller's lock says that nobody is writing it.
    """
    names = None if prefixes is None else set(prefixes)
    for folder in (output, output / WORKING):
        for path in folder.glob(".*.tmp-*"):
            if names is None or path.name[1:].partition(".")[0] in names:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def leftovers(output: Path) -> bool:
    """Whether a builder was killed after build.json was written, before it had tidied up."""
    return (output / WORKING).exists() or (output / _LOCK).exists()


def finish(output: Path) -> None:
    """Drop the working folder: build.json has been written."""
    shutil.rmtree(output / WORKING, ignore_errors=True)


# ---------------------------------------------------------------- who works here


@contextmanager
def whole(output: Path) -> Iterator[None]:
    """Hold the folder for a build or a join of the whole.

    Raises:
        DataError: another builder, or the builder of a part, holds it; both are named.
    """
    with owner_lock(output, _LOCK):
        refuse_live_parts(output)
        yield


@contextmanager
def held_part(output: Path, part: Part) -> Iterator[None]:
    """Hold one part of the folder, beside the other parts of the same cut.

    First the own lock, then a look at the others': of two that would collide, at least one sees the other.

    Raises:
        DataError: another process builds this part, the whole, or a part of another cut.
    """
    if owner := _holder(output / WORKING / part.lock):
        raise DataError(f"{output}: part {part} is being built by {owner}; wait for it")
    with owner_lock(output, f"{WORKING}/{part.lock}"):
        if owner := _holder(output / _LOCK):
            raise DataError(f"{output}: in use by {owner}, which builds or joins the whole; wait for it")
        refuse_live_parts(output, besides=part.of)
        (output / WORKING / f"cut-{part.of}").touch()
        yield


def refuse_live_parts(output: Path, *, besides: int | None = None) -> None:
    """Refuse to go on beside the builder of a part, unless the folder is cut into `besides` parts by both.

    Raises:
        DataError: such a builder is at work; it is named.
    """
    for path in sorted((output / WORKING).glob("part-*.lock")):
        if match := _PART_LOCK.fullmatch(path.name):
            part = Part(int(match[1]), int(match[2]))
            if part.of != besides and (owner := _holder(path)):
                why = "wait for it" if besides is None else f"{part.of} and {besides} parts overlap; wait for it"
                raise DataError(f"{output}: part {part} is being built by {owner}; {why}")


def last_cut(output: Path) -> int | None:
    """Into how many parts the build was cut last; None when it was never cut."""
    cuts = [(path.stat().st_mtime_ns, int(path.name[4:])) for path in (output / WORKING).glob("cut-*")]
    return max(cuts)[1] if cuts else None


def _holder(path: Path) -> str | None:
    """Who holds a lock file now; None when nobody does."""
    try:
        with open(path, encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read().strip() or "another process"
    except FileNotFoundError:
        pass
    return None

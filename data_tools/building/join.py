"""The last step of a build: all shards are there, so quarantine.jsonl, tokenizer/ and then build.json are written.

It reads the output folder alone, so that parts built on many machines are joined without their inputs.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from megaprior.data import manifest as mf
from megaprior.data.shards import Shard, write_build
from megaprior.data_tools.building import folder
from megaprior.data_tools.building.folder import Begun
from megaprior.data_tools.building.parts import Part
from megaprior.data_tools.building.sharding import ledger_path
from megaprior.errors import DataError
from megaprior.files import atomic_file
from megaprior.telemetry import say
from megaprior.tokenizer import Tokenizer

QUARANTINE = "quarantine.jsonl"


def join(output: Path) -> dict[str, Any]:
    """Complete a build whose parts have all been built; returns the content of its build.json.

    Raises:
        DataError: nothing was begun here, a part is still at work or not finished; each is named.
    """
    if not output.is_dir():
        raise DataError(f"{output}: no such folder; build its parts first, with --part I/N")
    if (output / mf.BUILD_NAME).exists():
        say(f"{output}: complete already; nothing to do")
        if folder.leftovers(output):
            with folder.whole(output):
                folder.finish(output)
        return mf.read_build(output)
    folder.read_begun(output)  # a foreign folder is refused before even a lock is put there
    with folder.whole(output):
        begun = folder.read_begun(output)
        folder.sweep(output)
        return commit(output, begun, folder.begun_tokenizer(output))


def commit(output: Path, begun: Begun, tokenizer: Tokenizer) -> dict[str, Any]:
    """Write build.json and what it names, when every shard is there; the caller holds the folder.

    Raises:
        DataError: a shard is missing or not what was written, or no sample survived.
    """
    _refuse_missing(output, begun)
    manifests = []
    for prefix in begun.prefixes:
        shard = Shard.open(output, prefix)
        shard.close()
        manifests.append(shard.manifest)
    counts = Counter({"shards": len(manifests), "outside_subset": 0})
    for manifest in manifests:
        counts.update(manifest["counts"])
    quarantined = counts["quarantined"] > 0
    counts["outside_subset"] = _collect(output, begun, output / QUARANTINE if quarantined else None)
    if not counts["samples"]:
        first = "none was quarantined"
        if quarantined:
            with open(output / QUARANTINE, encoding="utf-8") as file:
                first = "the first: {source}, {sample}: {reason}".format_map(json.loads(file.readline()))
        raise DataError(
            f"{output}: no sample is left; {counts['quarantined']:,} quarantined, see {QUARANTINE} ({first})"
        )
    body = write_build(
        output,
        build_id=begun.build_id,
        shard_manifests=manifests,
        tokenizer=tokenizer,
        options=begun.recorded["options"],
        counts=dict(counts),
        files=[QUARANTINE] if quarantined else [],
    )
    folder.finish(output)
    return body


def _collect(output: Path, begun: Begun, quarantine: Path | None) -> int:
    """Bring the shards' ledgers together, in order: entries into the file, the sum of records outside the subset."""
    outside = 0
    if quarantine is None:
        return sum(_ledger(output, prefix)["outside_subset"] for prefix in begun.prefixes)
    with atomic_file(quarantine, "w") as file:
        for prefix in begun.prefixes:
            ledger = _ledger(output, prefix)
            outside += ledger["outside_subset"]
            file.writelines(json.dumps(entry) + "\n" for entry in ledger["quarantine"])
    return outside


def _ledger(output: Path, prefix: str) -> dict[str, Any]:
    path = ledger_path(output, prefix)
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: what shard {prefix} left out cannot be read ({error}); delete {prefix}.json in {output}, which has "
            "it built again, and repeat the command"
        ) from None


def _refuse_missing(output: Path, begun: Begun) -> None:
    lacking = folder.missing(output, begun.prefixes)
    if not lacking:
        return
    names = [source["name"] for source in begun.recorded["sources"]]
    number = begun.prefixes.index(lacking[0])
    what = f"{len(lacking)} of {len(names)} shards are missing, the first {lacking[0]} of {names[number]}"
    cut = folder.last_cut(output)
    if cut is None:
        raise DataError(f"{output}: {what}; repeat the build's command to go on")
    absent = set(lacking)
    wanted = [prefix in absent for prefix in begun.prefixes]
    parts = [str(part) for part in (Part(i, cut) for i in range(cut)) if any(part.select(wanted))]
    shown = ", ".join(parts[:10]) + (", ..." if len(parts) > 10 else "")
    raise DataError(
        f"{output}: {len(parts)} of {cut} parts are not finished: {shown} ({what}); build them again with --part, then join"
    )

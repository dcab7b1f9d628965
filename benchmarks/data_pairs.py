"""Tars to shards: our pair build against a bare loop of tarfile, image header, tokenizer and write."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from benchmarks.data_bare import CHECKS
from benchmarks.data_case import Arm, Case, take_turns
from benchmarks.data_child import run_json
from benchmarks.data_inputs import first_records

FEW = 10  # records; what a build of so few takes is called start-up
SLACK = 1.25  # "at most 25% slower": of the time per pair
_ARMS = {
    "ours": "megaprior-data build --workers 1: every image read to its end, keys, digests, manifests, fsync",
    "ours, header": "the same with --check header: of an image, as in the bare loop, the header alone",
    "bare": "tarfile, image header and EXIF, json, tokenizer, write; nothing is checked or synced",
    "bare, decode": "the same, and every image decoded: what it costs to know that images are whole",
}


def pairs_case(options: argparse.Namespace, name: str, tars: list[Path], tokenizer: Path, *, rounds: int) -> Case:
    """Rounds go through the tars, so that together they build all of them: each round all arms on the same ones.

    Where there are fewer tars than rounds, every round takes all of them.
    """
    share = len(tars) // rounds if len(tars) >= 2 * rounds else 0
    parts = [tars[i::rounds] for i in range(rounds)] if share else [tars] * rounds
    how = "each round on other tars, together all of them" if share else "each round on all of them"
    case = Case(
        name=f"pair build, {name}",
        title=f"Pair build: {name}",
        unit="pairs",
        text=f"{len(tars)} tars, {how}. Seconds are those of the call in a fresh process less those of a first build of "
        f"{FEW} records. Each round compares token ids, lengths, image sizes and image bytes.",
        target="at most 25% slower per core than the bare loop",
        least=1 / SLACK,
        arms=[Arm(arm, what, ours=arm in CHECKS, base=arm == "bare") for arm, what in _ARMS.items()],
    )
    folder = options.work / "pairs"
    few = first_records(tars[0], options.work / f"few_{name}.tar", FEW)
    contents: dict[int, dict[str, dict[str, str]]] = {}

    def measure(arm: Arm, number: int) -> dict[str, float]:
        shutil.rmtree(folder, ignore_errors=True)
        request = {"arm": arm.name, "out": str(folder / "out"), "tokenizer": str(tokenizer), "few": [str(few)]}
        found = run_json("benchmarks.data_bare", {**request, "tars": [str(tar) for tar in parts[number]]})
        contents.setdefault(number, {})[arm.name] = found.pop("content")
        return found

    take_turns(case, rounds, measure, seed=options.seed)
    for found in contents.values():
        for arm in case.arms:
            content, expected = found.get(arm.name, {}), found.get("ours", {})
            if differ := [part for part, digest in content.items() if expected.get(part) != digest]:
                arm.refused = f"its {' and '.join(differ)} are not ours"
    shutil.rmtree(folder, ignore_errors=True)
    return case

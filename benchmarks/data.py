"""The data tools beside their peers: builds, random access, opening, order and packing, the loader; checked, then timed.

    python -m benchmarks.data --quick            # everything on tiny inputs: does it work? under half a minute
    python -m benchmarks.data --dry-run          # what would be measured, and which peers are there
    python -m benchmarks.data --work DIR --tars PHOTOS/*.tar --captions CAPTIONS.jsonl.gz --tokenizer MISTRAL.model \\
        --megatron MEGATRON_LM --peer-path SITE_OF_LITDATA --peer-path SITE_OF_WEBDATASET

Sections, each of which --only picks by name:

    text build      captions to token streams, against Megatron-LM's tools/preprocess_data.py
    pair build      tars to shards, against a bare loop of tarfile, image header, tokenizer and write
    random access   token rows and image bytes by index, against Megatron's IndexedDataset, litdata and webdataset
    opening         1,000 shards: seconds and memory of a fresh process
    order           order and packing of up to 100,000,000 samples: microseconds a sample, memory
    loader          training's batches with decoded images, against Pillow on the same images

Arms take turns and ratios are taken round by round, so that a busy machine slows all of them. Rates count processor time:
"per core". An arm whose content is not ours, token by token and byte by byte, is refused and no figure of it is printed; a
peer that is not there is listed as not run, with the reason. The generated inputs are rendered once and kept in --work.

Peers live outside this project. --megatron is a checkout of Megatron-LM that fits this Python (core_v0.16.1: 3.11). The
others can be installed beside it without touching this environment, for example:

    pip install --no-deps --target SITE webdataset braceexpand litdata lightning-utilities tifffile obstore boto3 botocore \\
        jmespath s3transfer urllib3 python-dateutil six regex
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.data_case import say
from benchmarks.data_child import Failed, run
from benchmarks.data_figure import figure
from benchmarks.data_plan import SECTIONS, Inputs, sections
from benchmarks.data_report import markdown

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("numpy", "pillow", "sentencepiece", "torch")
PEERS = {
    "Megatron-LM": ("megatron.core", "megatron.core.package_info"),
    "litdata": ("litdata", "litdata"),
    "webdataset": ("webdataset", "webdataset"),
}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that --only leaves; results are kept after each case."""
    started = time.monotonic()
    result = _header(options)
    inputs = Inputs(options)
    for section, begin in sections(options, inputs):
        if options.only and not any(word in section for word in options.only):
            continue
        say(f"[{time.monotonic() - started:4.0f} s] {section}")
        try:
            begin(result)
        except (Failed, OSError) as error:
            result["dropped"].append({"name": section, "why": str(error)})
            say(f"    failed: {error}")
        result["runs"][0]["seconds"] = round(time.monotonic() - started, 1)
        _write(options, result)
    return result


def _header(options: argparse.Namespace) -> dict[str, Any]:
    versions = {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}}
    return {
        "runs": [
            {
                "command": "python -m benchmarks.data" + "".join(f" {word}" for word in options.shown),
                "date": date.today().isoformat(),
                "load": os.getloadavg()[0],
                "seconds": 0.0,
            }
        ],
        "machine": f"{platform.machine()}, {processor()}, {os.cpu_count()} cores",
        "versions": versions | {name: found for name in PEERS if (found := peer(options, name)[0])},
        "seed": options.seed,
        "quick": options.quick,
        "cases": [],
        "dropped": [],
    }


def peer(options: argparse.Namespace, name: str) -> tuple[str, str]:
    """(version, "") of a peer that can be imported, or ("", why not)."""
    module, told = PEERS[name]
    places = [*options.peer_paths, *([options.megatron] if options.megatron else [])]
    try:
        done = run([sys.executable, "-c", f"import {module}, {told} as told; print(told.__version__)"], paths=places)
    except Failed as error:
        return "", str(error)
    return done.output.strip().splitlines()[-1], ""


def processor() -> str:
    """The CPU's name, as Linux gives it."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def _write(options: argparse.Namespace, result: dict[str, Any]) -> None:
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / ("data_quick.json" if result["quick"] else "data.json")
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    report(path)


def merge(paths: Sequence[Path]) -> None:
    """Put the sections of further kept results into the first; a section that several have is taken from the last."""
    first, *others = (json.loads(path.read_text(encoding="utf-8")) for path in paths)
    for other in others:
        again = {case["name"] for case in other["cases"]}
        first["cases"] = [case for case in first["cases"] if case["name"] not in again] + other["cases"]
        first["dropped"] += other["dropped"]
        first["runs"] += other["runs"]
        first["versions"] |= other["versions"]
        first |= {name: other[name] for name in ("opening", "ordering") if name in other}
    first["cases"].sort(key=lambda case: SECTIONS.index(case["name"].partition(",")[0]))
    paths[0].write_text(json.dumps(first, indent=1) + "\n", encoding="utf-8")


def report(path: Path) -> str:
    """Write the table and the figure beside a kept JSON; returns the table."""
    result = json.loads(path.read_text(encoding="utf-8"))
    drawing = path.with_suffix(".png")
    try:
        figure(result, drawing)
    except ImportError as error:
        say(f"no figure: {error}")
    text = markdown(result, figure=drawing.name if drawing.exists() else "")
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    return text


def dry_run(options: argparse.Namespace) -> None:
    """Print what would be measured, on what, and which peers are there."""
    photos = f"{len(options.tars)} tars of photographs" if options.tars else "no photographs (--tars)"
    print(f"{options.count:,} captions, {options.pairs:,} generated pairs, {photos}, {options.rounds} rounds")
    for section in SECTIONS:
        chosen = not options.only or any(word in section for word in options.only)
        print(f"{'yes' if chosen else 'no '}  {section}")
    for name in PEERS:
        version, why = peer(options, name)
        print(f"{'yes' if version else 'no '}  {name} {version or why}")


def _shown(words: Sequence[str]) -> list[str]:
    """The command without the places of this machine: of a path only its name, and neither work nor output folder."""
    kept, skip = [], False
    for word in words:
        if skip or word in ("--work", "--output"):
            skip = not skip
            continue
        kept.append(Path(word).name if "/" in word else word)
    return [shlex.quote(word) for word in kept]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; --quick fills in small ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--work", type=Path, metavar="DIR", help="folder for inputs and outputs, some 5 GB; inputs are kept there (default: "
        "a temporary one)")  # fmt: skip
    add("--tars", type=Path, nargs="+", default=[], metavar="TAR", help="photographs, as img2dataset writes them")
    add("--captions", type=Path, nargs="+", default=[], metavar="FILE", help="jsonl or tsv, plain or .gz, with captions to "
        "build; repeated in other orders up to --count (default: the generated ones)")  # fmt: skip
    add(
        "--scenes",
        type=Path,
        metavar="DIR",
        help="pairs/ of an earlier `megaprior-data make-scenes`, to save rendering",
    )
    add("--tokenizer", type=Path, metavar="FILE", help="a SentencePiece model (default: trained on generated captions)")
    add("--hf-tokenizer", type=Path, metavar="DIR", help="a folder that transformers' AutoTokenizer reads, such as GPT-2's: "
        "the text build is measured with it too")  # fmt: skip
    add("--megatron", type=Path, metavar="DIR", help="a checkout of Megatron-LM")
    add("--peer-path", dest="peer_paths", type=Path, action="append", default=[], metavar="DIR", help="where a peer, or what "
        "it needs, is installed; repeatable")  # fmt: skip
    add("--only", action="append", default=[], metavar="NAME", help="only sections whose name contains it; repeatable")
    add("--rounds", type=int, help="turns of every arm (default: 5)")
    add("--count", type=int, help="captions of the text build (default: 200,000)")
    add("--pairs", type=int, help="generated pairs (default: 200,000)")
    add("--quick", action="store_true", help="tiny inputs, one round: a trial, not a measurement")
    add("--dry-run", action="store_true", help="print the plan and which peers are there; measure nothing")
    add("--report", type=Path, nargs="+", metavar="JSON", help="only write a kept run's table and figure again, after adding "
        "the sections of further kept runs to it")  # fmt: skip
    add("--seed", type=int, default=0, help="of shuffles and orders (default: %(default)s)")
    add("--output", type=Path, default=RESULTS, help="folder for the results")
    options = parser.parse_args(argv)
    options.shown = _shown(list(sys.argv[1:] if argv is None else argv))
    small = {"rounds": 1, "count": 1000, "pairs": 200, "reads": 400, "batch": 16, "open": (5, 20), "steps": 5}
    full = {
        "rounds": 5,
        "count": 200_000,
        "pairs": 200_000,
        "reads": 20_000,
        "batch": 512,
        "open": (1000, 500),
        "steps": 200,
    }
    for name, value in (small if options.quick else full).items():
        if getattr(options, name, None) is None:
            setattr(options, name, value)
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the report, keep it with the raw samples."""
    options = parse(argv)
    if options.report:
        merge(options.report)
        print(report(options.report[0]))
    elif options.dry_run:
        dry_run(options)
    elif options.work is None:
        with tempfile.TemporaryDirectory(prefix="megaprior-benchmark-") as folder:
            options.work = Path(folder)
            print(markdown(measure(options)))
    else:
        options.work = options.work.resolve()
        options.work.mkdir(parents=True, exist_ok=True)
        print(markdown(measure(options)))


if __name__ == "__main__":
    main()

"""The loss kernels beside their peers: time, share of the machine's ceilings, peak memory; checked before they count.

    python -m benchmarks.loss                    # on a GPU: under 9 minutes; on a CPU: about 5
    python -m benchmarks.loss --dry-run          # which cases, which arms, and what cannot run here and why
    python -m benchmarks.loss --quick            # smallest shapes: does everything work?

Arms are ours (impl="torch", "triton", "cuda"), liger-kernel, cut-cross-entropy, quack-kernels, F.linear_cross_entropy, the
plain form and torch.compile of it; what is not installed, or does not fit, is listed with the reason. They take turns
within a case, each round in another order, on the same random tensors. An arm whose loss or gradients are wrong on those
tensors is refused: no time of it is printed, ours included (loss_check.py has the bounds and why they are what they are).

Cases come in order of importance. When the budget is spent the rest is dropped, and the report says which. Results are
rewritten after every case: results/loss_DEVICE.json with raw samples, .md with tables, .png with the figure.

A run that was cut short leaves what it had; --report draws its figure. On a GPU every kernel that
might fault or hang is first tried in a process of its own (loss_trial.py), and left out if it does.

Needs torch, and matplotlib for the figure; nothing else of what megaprior's training needs.

How the problems look: loss_cases.py. How each arm is called: loss_arms.py. How time is taken: loss_timing.py.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.loss_arms import Arm, arms_of, first_line, probe, unavailable
from benchmarks.loss_cases import TITLES, Case, plan
from benchmarks.loss_figure import figure
from benchmarks.loss_report import markdown
from benchmarks.loss_run import GIB, release, run_case, say
from benchmarks.loss_timing import Clock, ceilings, processor
from benchmarks.loss_trial import GROUPS, trials

RESULTS = Path(__file__).parent / "results"
GRACE_S = 40.0  # after the budget, a case that has begun still tries its arms for so long
PACKAGES = ("triton", "liger-kernel", "cut-cross-entropy", "quack-kernels", "nvidia-cutlass-dsl")


def run(options: argparse.Namespace, arms: Callable[[Case], list[Arm]] = arms_of) -> dict[str, Any]:
    """Measure every case that the budget allows; writes results after each and returns them."""
    started = time.monotonic()
    device = torch.device(options.device)
    result = _header(options, device)
    if device.type == "cuda":
        say(f"{result['machine']}: trying the kernels in processes of their own")
        options.trials = trials(device, [group for group in GROUPS if not any(part in group for part in options.skip)])
    clock = Clock(device)
    say(f"{result['machine']}: measuring the ceilings")
    result["ceilings"].append(ceilings(clock, quick=options.quick))
    cases = [case for case in plan(device, quick=options.quick) if options.case in case.name]
    gc.freeze()  # what is loaded by now stays; collecting between arms then takes no time
    try:
        for number, case in enumerate(cases):
            _attempt(case, arms, clock, options, result, seed=options.seed + number, started=started)
            _write(options, result)
    finally:
        gc.unfreeze()
    if cases:
        try:
            result["ceilings"].append(ceilings(clock, quick=options.quick))
        except RuntimeError as error:
            say(f"the ceilings could not be measured again: {first_line(error)}")
    result["load"][0] = max(result["load"][0], os.getloadavg()[0])
    result["seconds"] = round(time.monotonic() - started, 1)
    _write(options, result, draw=True)
    return result


def _attempt(
    case: Case,
    arms: Callable[[Case], list[Arm]],
    clock: Clock,
    options: argparse.Namespace,
    result: dict[str, Any],
    *,
    seed: int,
    started: float,
) -> None:
    """Measure a case into the result, or write there why not."""
    spent = time.monotonic() - started
    say(f"[{spent:4.0f} s] {case.name}")
    if spent > options.budget_s:
        why = f"dropped: {spent:.0f} s of the budget of {options.budget_s:g} s were spent before it"
    else:
        try:
            last_call = started + options.budget_s + GRACE_S
            result["cases"].append(run_case(case, arms(case), clock, options, seed=seed, last_call=last_call))
            why = ""
        except Exception as error:  # a case that cannot even be set up; the others may still run
            why = f"failed: {first_line(error)}"
    if why:
        result["dropped"].append({"name": case.name, "why": why})
        say(f"    {why}")
    release(clock.device)


def _header(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        versions["cuda"] = str(torch.version.cuda)
        machine = f"{properties.name}, {properties.multi_processor_count} multiprocessors"
        machine += f", {properties.total_memory / GIB:.0f} GiB"
    else:
        machine = f"{platform.machine()}, {processor()}, {torch.get_num_threads()} threads"
    return {
        "command": "python -m benchmarks.loss" + "".join(f" {word}" for word in options.shown),
        "date": date.today().isoformat(),
        "device": device.type,
        "machine": machine,
        "versions": versions,
        "seed": options.seed,
        "budget_s": options.budget_s,
        "quick": options.quick,
        "load": [os.getloadavg()[0], os.cpu_count()],
        "ceilings": [],
        "cases": [],
        "dropped": [],
    }


def _write(options: argparse.Namespace, result: dict[str, Any], *, draw: bool = False) -> None:
    """Keep what there is. The figure is drawn once, at the end."""
    name = processor() if result["device"] == "cpu" else torch.cuda.get_device_name()
    slug = re.sub(r"[^a-z0-9]+", "_", f"{result['device']} {name}".lower()).strip("_")
    slug = slug.removeprefix("cuda_") + ("_quick" if result["quick"] else "")
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"loss_{slug}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    report(path, draw=draw)


def report(path: Path, *, draw: bool = True) -> str:
    """Write the table and the figure beside a kept JSON; returns the table."""
    result = json.loads(path.read_text(encoding="utf-8"))
    drawing = path.with_suffix(".png")
    if draw:
        try:
            figure(result, drawing)
        except ImportError as error:
            say(f"no figure: {first_line(error)}")
    text = markdown(result, figure=drawing.name if draw and drawing.exists() else "")
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    return text


def dry_run(options: argparse.Namespace) -> None:
    """Print the cases in order, and for each arm whether it can run here."""
    device = torch.device(options.device)
    tried: dict[tuple[str, str], str] = {}
    for case in plan(device, quick=options.quick):
        if options.case not in case.name:
            continue
        print(f"{case.name}\n    {TITLES[case.operation]}, {case.loss_rows:,} rows with loss")
        for arm in arms_of(case):
            skipped = any(part in arm.name for part in options.skip)
            why = "left out by --skip" if skipped else unavailable(arm, case, device)
            if not why:
                key = (arm.name, case.operation)
                why = tried[key] = tried[key] if key in tried else probe(arm, case, device)
            print(f"    {'no ' if why else 'yes'}  {arm.name}: {why or arm.computes}")


def _shown(words: list[str]) -> list[str]:
    """Options as they are kept: quoted where a shell needs it, and without the folder of the results."""
    if "--output" in words:
        at = words.index("--output")
        words = words[:at] + words[at + 2 :]
    return [word if re.fullmatch(r"[\w.=-]+", word) else f'"{word}"' for word in words]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if cuda else "cpu", choices=("cuda", "cpu"), help="where to measure")
    parser.add_argument("--budget-s", type=float, default=450.0, help="seconds after which no case is begun")
    parser.add_argument("--case", default="", metavar="TEXT", help='only cases whose name contains it, e.g. "logits"')
    parser.add_argument(
        "--skip", action="append", default=[], metavar="TEXT", help="leave out arms whose name contains it; repeatable"
    )
    parser.add_argument("--quick", action="store_true", help="smallest shapes, 3 rounds: a trial, not a measurement")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and what can run here; measure nothing")
    parser.add_argument("--report", type=Path, metavar="JSON", help="only write a kept run's table and figure again")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch, on a CPU")
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs; case i of the plan takes seed + i")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results")
    options = parser.parse_args(argv)
    options.trials = {}
    options.shown = _shown(list(sys.argv[1:] if argv is None else argv))
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the report, keep it with the raw samples."""
    options = parse(argv)
    torch.set_num_threads(options.threads)
    if options.report:
        print(report(options.report))
        return
    if options.dry_run:
        dry_run(options)
        return
    print(markdown(run(options)))


if __name__ == "__main__":
    main()

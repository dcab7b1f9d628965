"""How long a save holds up the training: written beside it against written before it goes on, under DeepSpeed ZeRO-3 on CPU.

    python -m benchmarks.checkpoint               # about 100M parameters, 1 and 2 ranks; writes results/checkpoint_cpu.{json,md}
    python -m benchmarks.checkpoint --kills 40    # SIGKILL at random moments of saves, see checkpoint_kills.py

stall      seconds from the step boundary until training goes on, as metrics.jsonl has them; the wait for an earlier save included
write      seconds from the snapshot to the commit
step       seconds of a training step: those that began while a save was under way, and the others

The two ways take turns, run by run. Raw samples are kept.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.checkpoint_kills import finish, kill_and_compare, said
from benchmarks.checkpoint_runs import BASE_100M, make_shards, settings, start

RESULTS = Path(__file__).parent / "results"
SAVE_EVERY = 4


def measure(shards: Path, out: Path, *, world: int, background: bool, saves: int) -> dict[str, Any]:
    """One run: its "save" lines, its steps, and what it wrote."""
    values = settings(
        shards,
        out,
        llama=BASE_100M,
        steps=SAVE_EVERY * saves + 1,
        save_every=SAVE_EVERY,
        save_background=background,
        keep_last=1,
        timeout_s=600.0,
    )
    values["data"] |= {"batch_size": 4, "max_tokens": 192}
    load, began = os.getloadavg()[0], time.perf_counter()  # of whatever else runs on this machine
    codes = finish(start(values, world=world), patience_s=1200.0)
    assert codes == [0] * world, said(out)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found = {
        "world": world,
        "background": background,
        "load": load,
        "seconds": time.perf_counter() - began,
        "saves": [line for line in lines if line["kind"] == "save"],
        "steps": [{"step": line["step"], "step_s": line["step_s"]} for line in lines if line["kind"] == "train"],
        "files": sum(1 for path in (out / "checkpoints").rglob("*") if path.is_file()),
    }
    shutil.rmtree(out)
    return found


def beside(run: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Seconds of steps while a save was being written, and of the others; the first step of a run is left out."""
    during, alone = [], []
    for line in run["steps"][1:]:
        if line["step"] % SAVE_EVERY == 1 and run["background"]:
            during.append(line["step_s"])
        elif line["step"] % SAVE_EVERY != 2 or not run["background"]:  # the second one may be either
            alone.append(line["step_s"])
    return during, alone


def report(runs: list[dict[str, Any]], machine: dict[str, Any]) -> str:
    """The result as Markdown."""
    rows = []
    for world in sorted({run["world"] for run in runs}):
        for background in (False, True):
            mine = [run for run in runs if (run["world"], run["background"]) == (world, background)]
            saves = [line for run in mine for line in run["saves"] if line["step"] % SAVE_EVERY == 0]
            during = [seconds for run in mine for seconds in beside(run)[0]]
            alone = [seconds for run in mine for seconds in beside(run)[1]]
            stall, write = ([line[key] for line in saves] for key in ("stall_s", "write_s"))
            cells = [world, "background" if background else "foreground", len(saves)]
            rows.append(f"| {' | '.join(map(str, [*cells, *map(_spread, (stall, write, during, alone))]))} |")
    size = max(line["bytes"] for run in runs for line in run["saves"])
    head = [
        "# A save beside the training and before it, on CPU",
        "",
        f"`python -m benchmarks.checkpoint`, {machine['date']}; {machine['cpu']}, {machine['cores']} cores; python "
        f"{machine['python']}, torch {machine['torch']}, deepspeed {machine['deepspeed']}.",
        "",
        f"A text LM of about 100M parameters in fp32 with AdamW under ZeRO-3: {size / 1e9:.2f} GB a checkpoint. Seconds, median "
        "(smallest to largest); raw samples in checkpoint_cpu.json. Load average of the machine when a run began: "
        f"{_spread([run['load'] for run in runs])}.",
        "",
        "| ranks | save | saves | stall | write | a step while one is written | another step |",
        "|--:|---|--:|--:|--:|--:|--:|",
    ]
    return "\n".join([*head, *rows, "", *_notes(machine)]) + "\n"


def _notes(machine: dict[str, Any]) -> list[str]:
    return [
        "A foreground save's write is part of its stall. Here training, which needs every core, and writing share "
        f"{machine['cores']} cores: what a step beside a save takes longer is the price of that. No GPU was measured.",
    ]


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})" if values else "-"


def machine_facts() -> dict[str, Any]:
    """What the figures depend on."""
    import importlib.metadata

    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": names[0] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "deepspeed")},
    }


def main() -> None:
    """See the module's words."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=0, help="kill so many saves instead of measuring")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--saves", type=int, default=3, help="timed saves of a run")
    parser.add_argument("--runs", type=int, default=2, help="runs of each way and number of ranks")
    parser.add_argument("--folder", type=Path, help="the disk to write on (default: a temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        scratch = Path(name)
        if options.kills:
            tally = kill_and_compare(scratch, kills=options.kills, seed=options.seed)
            print(
                f"{sum(tally.kills.values())} kills, all resumed to the same bits: {dict(tally.kills)}; left: {dict(tally.left)}"
            )
            return
        shards, runs = make_shards(scratch), []
        for world in (1, 2):
            for number in range(options.runs):
                for background in (False, True):
                    out = scratch / f"{world}-{number}-{background}"
                    runs.append(measure(shards, out, world=world, background=background, saves=options.saves))
    machine = machine_facts()
    text = json.dumps({"machine": machine, "save_every": SAVE_EVERY, "runs": runs}, indent=1)
    (RESULTS / "checkpoint_cpu.json").write_text(text + "\n")
    (RESULTS / "checkpoint_cpu.md").write_text(report(runs, machine))
    print(report(runs, machine))


if __name__ == "__main__":
    main()

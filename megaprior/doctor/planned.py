"""Whether a configuration could start here: what `megaprior train --dry-run` reads, and room for its checkpoints.

`look` runs in a process of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megaprior.doctor.finding import Finding, amount, green

_STATE = 12  # bytes of a trained parameter in state/: its fp32 weight and AdamW's two moments
_TRAINED = re.compile(r"model: ([\d,]+) parameters")  # how train's plan begins that line, whatever the stage


def look(config: str, overrides: Sequence[str], world: int) -> dict[str, Any]:
    """The run's plan in lines, the folder it writes to and how much it will write.

    Raises:
        MegapriorError: it could not start; the message says why.
    """
    from megaprior.config import load_config
    from megaprior.train.assembly import resolve_init
    from megaprior.train.plan import describe_plan
    from megaprior.train.settings import RunConfig, check_run

    cfg = load_config(RunConfig, config, list(overrides))
    check_run(cfg, world=world)
    cfg = resolve_init(cfg)
    lines = describe_plan(cfg, world=world).splitlines()
    left = -(-cfg.steps // cfg.save_every)
    kept = left if not cfg.keep_last else cfg.keep_last + (cfg.steps // cfg.keep_every if cfg.keep_every else 0)
    return {
        "lines": lines,
        "out": str(cfg.out),
        "checkpoint": checkpoint_bytes(cfg, lines),
        "checkpoints": min(left, kept + 1),  # a new one is whole before an old one goes
    }


def checkpoint_bytes(cfg: Any, lines: Sequence[str]) -> int:
    """About how large one checkpoint of the run is, in bytes: measured where it has one, else reckoned from its plan."""
    done = sorted((cfg.out / "checkpoints").glob("step_*"))
    if done:
        return sum(path.stat().st_size for path in done[-1].rglob("*") if path.is_file())
    trained = next(int(found[1].replace(",", "")) for line in lines if (found := _TRAINED.match(line)))
    halves = cfg.model.dtype == "bfloat16" or (cfg.engine == "zero3" and cfg.precision == "bf16")
    return trained * (_STATE + (2 if halves else 4))


def nearest(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def check_plan(facts: Mapping[str, Any]) -> list[Finding]:
    """`facts` of `look`."""
    run = next((line for line in facts["lines"] if line.startswith("run: ")), facts["lines"][-1])
    size = f"; {facts['checkpoints']} checkpoints of about {amount(facts['checkpoint'])}" if facts["checkpoint"] else ""
    return [green("configuration", f"{facts['lines'][0]}; {run.removeprefix('run: ')}{size}")]


def needed(facts: Mapping[str, Any]) -> int:
    """Bytes that the run will write in all."""
    return facts["checkpoint"] * facts["checkpoints"]

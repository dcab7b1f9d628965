"""The verbs that operate runs: `doctor` and what else is asked before or beside them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

Verb = Callable[..., argparse.ArgumentParser]

_DOCTOR = """\
look at this machine, its launcher, network and file systems, and say green, yellow or red: what was found, why it matters,
what to do. Started as a training is started (torchrun, srun, deepspeed), it also compares the ranks: versions, clocks, whether
all see the same folders, a real all-reduce. Nothing is changed. Whatever hangs is given up after --timeout.

exit code: 0 green or yellow, 1 red
"""


def add_doctor(verb: Verb) -> None:
    """`megaprior doctor`."""
    parser = verb(
        "doctor",
        _doctor,
        "look for what would stop a run: versions, GPUs, network, folders, limits, the launcher's environment",
        "torchrun --nproc-per-node 2 -m megaprior.cli doctor --shared runs --config launch/configs/ulvlm_tiny.yaml",
    )
    parser.description = _DOCTOR
    parser.add_argument(
        "--shared",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        metavar="DIR",
        help="folders that every machine must see and write",
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="a run that is to start here: could it, and is there room?"
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="key=value",
        help="overrides of --config, as train takes them",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    parser.add_argument(
        "--timeout", type=float, default=60.0, metavar="S", help="seconds anything may take (default: 60)"
    )


def _doctor(options: argparse.Namespace) -> int:
    from megaprior.doctor.visit import doctor

    return doctor(
        shared=options.shared,
        config=options.config,
        overrides=options.set,
        as_json=options.json,
        timeout_s=options.timeout,
    )

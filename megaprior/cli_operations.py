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


_PLAN = """\
what a run will need, before a GPU is asked for: memory part by part, traffic, arithmetic, time, and what limits it, on --gpus
GPUs and on 1 to 1,024. Sizes come from the configuration's folders where they are there (a config.json is enough), else from
the published model that a folder's name says; token counts from the shards, else from assumptions that are printed. No weight
is read. Memory is counted by running the model's own layers on tensors without contents; times are arithmetic and bytes over
the vendor's figures times an assumed share: a forecast, not a measurement. docs/plan.md has the paper's four trainings.
"""


def add_plan(verb: Verb) -> None:
    """`megaprior plan`."""
    from megaprior.planning.hardware import GPUS, Assumptions

    parser = verb(
        "plan",
        _plan,
        "forecast memory, traffic and hours of a run on any number of GPUs, and say what limits it",
        "megaprior plan launch/configs/ulvlm_paper.yaml --gpus 64 --gpu h200",
    )
    parser.description = _PLAN
    add = parser.add_argument
    usual = Assumptions()
    add("config", type=Path, help="YAML file, as train takes it")
    add("overrides", nargs="*", metavar="key=value", help="dotted overrides, as train takes them")
    add("--gpus", type=int, metavar="N", help="GPUs of the run (default: 8, with engine=local 1)")
    add("--gpu", choices=GPUS, default="h200", help="which (default: h200)")
    add("--model-config", metavar="FILE|NAME", help="sizes of the language model, where model.init is not here")
    add("--tower-config", metavar="FILE|NAME", help="sizes of the vision tower, where model.tower.init is not here")
    add("--caption-tokens", type=float, metavar="K", help="mean, where the shards are not here (default: 27)")
    add(
        "--text-tokens",
        type=float,
        metavar="K",
        help="mean of a document, where the shards are not here (default: 1000)",
    )
    add("--image-size", metavar="WxH", help="pixels, where the shards are not here (default: 640x480)")
    add(
        "--efficiency",
        type=float,
        default=usual.efficiency,
        metavar="SHARE",
        help="of the vendor's arithmetic that a full row reaches (default: %(default)s)",
    )
    add(
        "--per-node",
        type=int,
        default=usual.per_node,
        metavar="N",
        help="GPUs of a machine (default: %(default)s)",
    )
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--json", action="store_true", help="print one JSON object: bytes, seconds, shares")
    shown.add_argument("--markdown", action="store_true", help="print tables for a document")


def _plan(options: argparse.Namespace) -> int:
    import json

    from megaprior.config import load_config
    from megaprior.errors import UsageError
    from megaprior.planning.hardware import GPUS, Assumptions
    from megaprior.planning.plan import as_json, make_plan
    from megaprior.planning.show import show
    from megaprior.planning.workload import Guess, parse_size
    from megaprior.train.settings import RunConfig

    cfg = load_config(RunConfig, options.config, options.overrides)
    gpus = options.gpus if options.gpus is not None else 1 if cfg.engine == "local" else 8
    if min(gpus, options.per_node) < 1:
        raise UsageError(f"--gpus {gpus}, --per-node {options.per_node}: at least 1")
    if not 0 < options.efficiency <= 1:
        raise UsageError(f"--efficiency {options.efficiency}: a share above 0 and at most 1")
    size = parse_size(options.image_size) if options.image_size is not None else None
    plan = make_plan(
        cfg,
        gpus=gpus,
        gpu=GPUS[options.gpu],
        assumed=Assumptions(efficiency=options.efficiency, per_node=options.per_node),
        guess=Guess(caption_tokens=options.caption_tokens, text_tokens=options.text_tokens, image_size=size),
        model_config=options.model_config,
        tower_config=options.tower_config,
    )
    if options.json:
        print(json.dumps(as_json(plan), indent=1))
    else:
        show(plan, markdown=options.markdown)
    return 0

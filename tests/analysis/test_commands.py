from __future__ import annotations

from pathlib import Path

from megaprior.analysis.commands import evaluating, reporting, runnable, scoring, training
from megaprior.analysis.runs import Run

TIMES = [
    {"stage": "score", "command": "megaprior score --model runs/reference --shards shards/pairs --processes 1"},
    {"stage": "score", "command": "megaprior score --model runs/reference --shards shards/pairs --processes 2"},
    {"stage": "evaluate", "command": "megaprior evaluate --model runs/a --shards h --probe p.jsonl --output r.jsonl"},
    {"stage": "no command"},
]


def run(name: str, *, measured: bool = False, command: str | None = None) -> Run:
    losses = object() if measured else None
    return Run(Path("runs") / name, {"command": command}, [], [], None, losses, None)  # type: ignore[arg-type]


def test_a_command_under_the_launcher_becomes_one_that_a_user_types() -> None:
    assert runnable({"command": "megaprior train a.yaml seed=1"}) == "megaprior train a.yaml seed=1"
    ranks = {"command": "cli.py --local_rank=0 train 'a b.yaml'", "world": 8}
    assert runnable(ranks) == "deepspeed --num_gpus 8 --module megaprior.cli train 'a b.yaml'"
    assert runnable({"command": "cli.py train a.yaml"}) == "megaprior train a.yaml"
    assert runnable({}) is None
    assert training([run("a", command="megaprior train x"), run("b", command="megaprior train x"), run("c")]) == [
        "megaprior train x"
    ]


def test_a_timed_command_stands_for_itself_and_a_missing_one_is_put_together_or_left_out() -> None:
    runs = [run("a", measured=True), run("b", measured=True), run("c")]
    assert evaluating(runs, TIMES, heldout="my shards") == [
        "megaprior evaluate --model runs/a --shards h --probe p.jsonl --output r.jsonl",
        "megaprior evaluate --model runs/b --shards 'my shards'",
    ]
    assert evaluating(runs, TIMES, heldout=None, flag="--probe") == [TIMES[2]["command"]]  # nobody knows b's probe
    assert scoring("shards/pairs", TIMES, reference=None) == [TIMES[1]["command"]]  # the repetition
    assert scoring("other", TIMES, reference=None) == []
    assert scoring("other", [], reference=Path("ref"), scores="mine") == [
        "megaprior score --model ref --shards other --name mine"
    ]


def test_the_reports_own_command() -> None:
    command = reporting(
        "report.html",
        single={"results": None, "heldout": "h", "title": "My run"},
        shards=["a", "b"],
        runs={"ulvlm": {"ntp": ["n0", "n1"], "prior": ["p"]}},
        stages={"text LM": "t"},
        commands=["bash all.sh"],
    )
    assert command == (
        "megaprior report --output report.html --heldout h --title 'My run' --shards a b --run ulvlm.ntp=n0 "
        "--run ulvlm.ntp=n1 --run ulvlm.prior=p --stage 'text LM=t' --command 'bash all.sh'"
    )

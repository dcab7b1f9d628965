"""The command `megaprior`: one verb per arrow of the story, from shards and configs to a report.

Only the verb that runs is imported, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from megaprior import __version__
from megaprior.errors import MegapriorError

_STORY = """\
the story, one way through:
  megaprior-data build --input PAIRS... --output DIR --tokenizer FILE    pairs -> shards
  megaprior train launch/configs/reference.yaml key=value ...            text shards -> reference LM
  megaprior score --model RUN --shards DIR                               shards + reference -> ref_logprob streams
  megaprior train launch/configs/ulvlm.yaml weighting.kind=prior ...     shards + scores -> vision-language model
  megaprior evaluate --model RUN --probe FILE --output results.jsonl     checkpoint -> results
  megaprior report --output report.html ...                              runs + results -> one HTML file
every verb answers --help; long work resumes by repeating the same command.
exit codes: 0 done, 1 bug or failure, 2 usage, 65 data refused, 75 stopped in good order (repeat the command).
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; a `MegapriorError` is printed as one line and becomes its exit code."""
    options = _parser().parse_args(argv)
    try:
        return options.run(options) or 0
    except MegapriorError as error:
        print(f"megaprior: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("megaprior: interrupted; repeat the command to go on", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="megaprior",
        description="Vision-language pre-training that gives more weight to tokens a text-only model cannot predict.",
        epilog=_STORY,
        formatter_class=raw,
    )
    parser.add_argument("--version", action="version", version=f"megaprior {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(
        name: str, run: Callable[[argparse.Namespace], int | None], help: str, example: str
    ) -> argparse.ArgumentParser:
        added = verbs.add_parser(
            name, help=help, description=help, epilog=f"example:\n  {example}", formatter_class=raw
        )
        added.set_defaults(run=run)
        return added

    _add_train(verb)
    _add_replay(verb)
    _add_score(verb)
    _add_evaluate(verb)
    _add_report(verb)
    return parser


# ---------------------------------------------------------------- train, replay


def _add_train(verb: Callable[..., argparse.ArgumentParser]) -> None:
    parser = verb(
        "train",
        _train,
        "train one stage (text LM, reference LM or LVLM) from a YAML configuration; repeat the command to resume",
        "megaprior train launch/configs/ulvlm_tiny.yaml out=runs/prior weighting.kind=prior optim.lr=2e-3",
    )
    parser.add_argument("config", type=Path, help="YAML file; `extends: other.yaml` inherits")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides, for example steps=500")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved plan and stop")
    # DeepSpeed's launcher and older torchrun pass it; LOCAL_RANK in the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)


def _train(options: argparse.Namespace) -> int:
    from megaprior.config import load_config
    from megaprior.train.run import RunConfig, train

    return train(load_config(RunConfig, options.config, options.overrides), dry_run=options.dry_run)


def _add_replay(verb: Callable[..., argparse.ArgumentParser]) -> None:
    parser = verb(
        "replay",
        _replay,
        "rebuild one step's batch on one process and print its sample ids, D, weights, loss and gradient norm",
        "megaprior replay runs/prior --step 120",
    )
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="the run's folder")
    parser.add_argument("--step", type=int, required=True, help="the step to rebuild, as metrics.jsonl numbers it")


def _replay(options: argparse.Namespace) -> int:
    from megaprior.train.run import replay

    return replay(options.run_folder, options.step)


# ---------------------------------------------------------------- score


def _add_score(verb: Callable[..., argparse.ArgumentParser]) -> None:
    parser = verb(
        "score",
        _score,
        "write ref_logprob streams: the log-probability of every caption token under a text-only reference LM",
        "megaprior score --model runs/reference --shards shards/pairs --processes 2",
    )
    parser.add_argument(
        "--model", type=Path, required=True, help="a run folder, a checkpoint, or a Hugging Face folder"
    )
    parser.add_argument("--shards", type=Path, required=True, nargs="+", help="shard folders to score")
    parser.add_argument("--name", default="ref_logprob", help="name of the score stream (default: ref_logprob)")
    parser.add_argument(
        "--processes", type=int, default=1, help="worker processes; the result is the same (default: 1)"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the model's products")
    parser.add_argument("--row-tokens", type=int, default=8192, help="tokens per packed row (default: 8192)")
    parser.add_argument("--unit-tokens", type=int, default=65536, help="tokens per unit of work (default: 65536)")
    parser.add_argument(
        "--allow-other-hardware",
        action="store_true",
        help="resume on another device, version or thread count; the bytes may then differ from an undisturbed run's",
    )


def _score(options: argparse.Namespace) -> int:
    from megaprior.score.reference import score

    for shards in options.shards:
        score(
            model=options.model,
            shards=shards,
            name=options.name,
            processes=options.processes,
            dtype=options.dtype,
            row_tokens=options.row_tokens,
            unit_tokens=options.unit_tokens,
            allow_other_hardware=options.allow_other_hardware,
        )
    return 0


# ---------------------------------------------------------------- evaluate, report


def _add_evaluate(verb: Callable[..., argparse.ArgumentParser]) -> None:
    parser = verb(
        "evaluate",
        _evaluate,
        "probe a saved checkpoint: true statements against swapped ones, with true and with shuffled images",
        "megaprior evaluate --model runs/prior --probe scenes/probe/probe.jsonl --output runs/results.jsonl",
    )
    parser.add_argument("--model", type=Path, required=True, help="a run folder, a checkpoint, or a Hugging Face folder")
    parser.add_argument("--probe", type=Path, required=True, help="probe items, JSON lines: image, true, false, attribute")
    parser.add_argument("--output", type=Path, required=True, help="results.jsonl; one line per checkpoint and probe")


def _evaluate(options: argparse.Namespace) -> int:
    from megaprior.evaluate import evaluate

    evaluate(model=options.model, probe=options.probe, output=options.output)
    return 0


def _add_report(verb: Callable[..., argparse.ArgumentParser]) -> None:
    parser = verb("report", _report, "write runs and results as one self-contained HTML file", "megaprior report")
    parser.add_argument("--output", type=Path, required=True)


def _report(options: argparse.Namespace) -> int:
    raise UsageError(f"{options.output}: not there yet")


if __name__ == "__main__":
    sys.exit(main())

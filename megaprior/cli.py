"""The command `megaprior`: one verb per arrow of the story, from shards and configs to a report.

Only the verb that runs is imported, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from megaprior import __version__
from megaprior.cli_export import add_caption, add_export, add_import
from megaprior.cli_operations import add_doctor, add_plan
from megaprior.errors import MegapriorError, UsageError

_STORY = """\
the story, one way through:
  megaprior-data build --input PAIRS... --output DIR --tokenizer FILE    pairs -> shards
  megaprior train launch/configs/reference.yaml key=value ...            text shards -> reference LM
  megaprior score --model RUN --shards DIR                               shards + reference -> ref_logprob streams
  megaprior train launch/configs/ulvlm.yaml weighting.kind=prior ...     shards + scores -> vision-language model
  megaprior evaluate --model RUN --probe FILE --output results.jsonl     checkpoint -> results
  megaprior report --output report.html ...                              runs + results -> one HTML file
  megaprior export RUN --output DIR                                      checkpoint -> a folder for transformers
  megaprior caption DIR IMAGE...                                         images -> captions, coloured by probability
  megaprior import FOLDER --output DIR                                   Llama, CLIP, LLaVA -> where training starts
  megaprior doctor --shared DIR                                          what of this machine would stop a run
every verb answers --help; long work resumes by repeating the same command.
exit codes: 0 done, 1 bug or failure, 2 usage, 65 data refused, 75 stopped in good order (repeat the command).
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; a `MegapriorError` is printed as one line and becomes its exit code."""
    options = _parser().parse_args(argv)
    try:
        return options.handler(options) or 0
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
    # DeepSpeed's launcher puts it first; LOCAL_RANK in the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(
        name: str, run: Callable[[argparse.Namespace], int | None], help: str, example: str
    ) -> argparse.ArgumentParser:
        added = verbs.add_parser(
            name, help=help, description=help, epilog=f"example:\n  {example}", formatter_class=raw
        )
        added.set_defaults(handler=run)
        return added

    _add_train(verb)
    _add_replay(verb)
    _add_score(verb)
    _add_evaluate(verb)
    _add_report(verb)
    add_export(verb)
    add_caption(verb)
    add_import(verb)
    add_plan(verb)
    add_doctor(verb)
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
    parser.add_argument(
        "--profile",
        action="append",
        default=[],
        metavar="steps=A:B",
        help="profile the steps A to B into RUN/profile (a trace, tables, on a GPU a memory snapshot); ranks=all: every rank",
    )


def _train(options: argparse.Namespace) -> int:
    from megaprior.train.signals import StopSignals

    with StopSignals() as signals:  # from here on, so that none is lost during the seconds of importing
        from megaprior.config import load_config
        from megaprior.train.profiling import profile_overrides
        from megaprior.train.run import RunConfig, train

        overrides = [*options.overrides, *profile_overrides(options.profile)]
        config = load_config(RunConfig, options.config, overrides)
        return train(config, dry_run=options.dry_run, signals=signals)


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
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each process (default: 1)")
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
            threads=options.threads,
            allow_other_hardware=options.allow_other_hardware,
        )
    return 0


# ---------------------------------------------------------------- evaluate, report


def _add_evaluate(verb: Callable[..., argparse.ArgumentParser]) -> None:
    parser = verb(
        "evaluate",
        _evaluate,
        "probe a saved checkpoint with true and false statements, and measure its held-out loss, or a tower's retrieval",
        "megaprior evaluate --model runs/prior --probe scenes/probe/probe.jsonl --output runs/results.jsonl",
    )
    parser.add_argument(
        "--model", type=Path, required=True, help="a run folder, a checkpoint, or a Hugging Face folder"
    )
    parser.add_argument("--probe", type=Path, help="probe items, JSON lines: image, true, false, attribute")
    parser.add_argument("--output", type=Path, help="results.jsonl for the probe; one line per checkpoint and probe")
    parser.add_argument(
        "--shards",
        type=Path,
        help="held-out shards: the loss with true and with shuffled images; of a tower, retrieval",
    )
    parser.add_argument(
        "--scores", default="ref_logprob", help="score stream that splits the loss (default: ref_logprob)"
    )
    parser.add_argument("--captions", type=int, default=5000, help="held-out captions at most (default: 5000)")


def _evaluate(options: argparse.Namespace) -> int:
    if options.probe is None and options.shards is None:
        raise UsageError("evaluate: give --probe FILE, --shards DIR, or both")
    from megaprior.retrieval import is_clip, retrieval

    if is_clip(options.model):
        if options.shards is None or options.probe is not None:
            raise UsageError(
                f"evaluate: {options.model} compares images with captions and says no words: it takes --shards alone"
            )
        retrieval(options.model, options.shards, captions=options.captions)
        return 0
    if options.probe is not None:
        if options.output is None:
            raise UsageError("evaluate: --probe needs --output FILE for its line of results")
        from megaprior.evaluate import evaluate

        evaluate(model=options.model, probe=options.probe, output=options.output)
    if options.shards is not None:
        from megaprior.analysis.loss_split import heldout_losses

        heldout_losses(options.model, options.shards, scores=options.scores, captions=options.captions)
    return 0


def _add_report(verb: Callable[..., argparse.ArgumentParser]) -> None:
    parser = verb(
        "report",
        _report,
        "write runs and results as one self-contained HTML file, and the same numbers as JSON",
        "megaprior report --output report.html --results results.json --shards shards/pairs --heldout shards/heldout "
        "--run ulvlm.ntp=runs/ntp --run ulvlm.prior=runs/prior",
    )
    parser.add_argument("--output", type=Path, required=True, help="the HTML file")
    parser.add_argument("--results", type=Path, help="JSON file with what the page shows")
    parser.add_argument("--shards", type=Path, nargs="+", default=[], help="scored shard folders (importance, Fig. 8)")
    parser.add_argument(
        "--heldout", type=Path, help="held-out shards that `evaluate --shards` measured (Fig. 9, captions)"
    )
    parser.add_argument("--scores", default="ref_logprob", help="name of the score stream (default: ref_logprob)")
    parser.add_argument(
        "--run",
        action="append",
        default=[],
        metavar="FAMILY.METHOD=RUN",
        help="a run to show, for example ulvlm.prior=runs/prior; any method name; repeat for more seeds, methods, families",
    )
    parser.add_argument(
        "--stage",
        action="append",
        default=[],
        metavar="NAME=RUN",
        help="runs before: time and memory; `reference` and `tower` also show what was measured of them",
    )
    parser.add_argument("--probe", type=Path, help="results.jsonl of `evaluate --probe`")
    parser.add_argument("--times", type=Path, help="JSON lines: stage, wall_s, peak_memory_mib, command")
    parser.add_argument("--command", action="append", default=[], help="what to type to repeat all this")
    parser.add_argument("--title", default="PRIOR, end to end", help="headline of the page")


def _report(options: argparse.Namespace) -> int:
    from megaprior.analysis.report import report

    runs: dict[str, dict[str, list[str]]] = {}
    for name, folder in (_named(text, "--run") for text in options.run):
        family, dot, method = name.partition(".")
        if not dot:
            raise UsageError(f"--run {name}={folder}: expected FAMILY.METHOD=RUN, for example ulvlm.prior={folder}")
        runs.setdefault(family, {}).setdefault(method, []).append(folder)
    report(
        options.output,
        results=options.results,
        shards=options.shards,
        heldout=options.heldout,
        scores=options.scores,
        runs=runs,
        stages=dict(_named(text, "--stage") for text in options.stage),
        probe=options.probe,
        times=options.times,
        commands=options.command,
        title=options.title,
    )
    print(options.output)
    return 0


def _named(text: str, flag: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name or not value:
        raise UsageError(f"{flag} {text}: expected NAME=PATH")
    return name, value


if __name__ == "__main__":
    sys.exit(main())

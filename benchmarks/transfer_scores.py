"""Are transferred scores what a reference of the other tokenizer would have given? Rank correlations of importance.

    python -m benchmarks.transfer_scores --work WORK --output transfer_scores.json \\
        --reference captions_of_other_images.jsonl.gz --captions pairs/*.tar \\
        --tokenizer mistral_v1=mistral/tokenizer.model.v1 --tokenizer gpt2=gpt2/encoder.json

For each of the two tokenizers, two references (seeds 0 and 1) of the tiny preset are trained on --reference and score
--captions. Then, on the captions as the target's tokenizer cuts them, the target's own seed 0 is compared with

    seed        its own seed 1: what a perfect transfer could reach, since two seeds of one recipe differ by as much
    transfer    the other tokenizer's seed 0, by `megaprior-data transfer-scores`
    bytes       the caption's total spread evenly over its bytes: what the lengths of tokens say alone
    shuffled    its own scores, dealt out anew over all captions: chance

Importance is w = 1 - p (alpha = 1). Everything runs on one CPU core by commands that go on when repeated; 600 steps of four
references take about half an hour.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata

from megaprior.data.shards import ShardSet
from megaprior.data_tools.transfer.byte_scores import Spelled, Spelling, in_common

CONFIG = Path(__file__).parents[1] / "launch/configs/textlm_tiny.yaml"
SEEDS = (0, 1)


def run(program: str, *arguments: object) -> None:
    """One of the project's commands, on one core."""
    words = [sys.executable, "-m", program, *map(str, arguments)]
    print("+", " ".join(words[2:]), flush=True)
    subprocess.run(words, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def prepare(work: Path, name: str, tokenizer: Path, options: argparse.Namespace) -> None:
    """Shards, references and their scores of one tokenizer."""
    folder, tool = work / name, "megaprior.data_tools.cli"
    for part in ("reference", "captions"):
        files = getattr(options, part)
        run(tool, "build", "--input", *files, "--text", "--output", folder / part, "--tokenizer", tokenizer)
    for seed in SEEDS:
        out = folder / f"seed{seed}"
        given = (
            f"data.train.0.path={folder / 'reference'}",
            f"steps={options.steps}",
            f"seed={seed}",
            "save_every=200",
        )
        run("megaprior.cli", "train", CONFIG, *given, f"out={out}")
        run("megaprior.cli", "score", "--model", out, "--shards", folder / "captions", "--name", f"ref_seed{seed}")


# ---------------------------------------------------------------- correlations


def compare(work: Path, source: str, target: str) -> dict[str, Any]:
    """Correlations on the target's captions, with each of the four in the place of its own seed 0."""
    folders = {name: work / name / "captions" for name in (source, target)}
    run(
        "megaprior.data_tools.cli", "transfer-scores", "--from", folders[source], "--to", folders[target],
        "--scores", "ref_seed0", "--name", "transferred_seed0",
    )  # fmt: skip
    streams = {"own": "ref_seed0", "seed": "ref_seed1", "transfer": "transferred_seed0"}
    sets = {arm: ShardSet.open(folders[target], scores=name) for arm, name in streams.items()}
    count = len(sets["own"])
    scores = {arm: [each.scores(i).astype(np.float64) for i in range(count)] for arm, each in sets.items()}
    aligned, widths = spans(ShardSet.open(folders[source]), sets["own"])
    scores["bytes"] = [_by_width(r, width) for r, width in zip(scores["transfer"], widths, strict=True)]
    rng = np.random.default_rng(0)
    edges = np.cumsum([len(r) for r in scores["own"]])[:-1]
    scores["shuffled"] = np.split(rng.permutation(np.concatenate(scores["own"])), edges)
    w = {arm: [-np.expm1(r) for r in each] for arm, each in scores.items()}
    same = np.concatenate(aligned)
    return {
        "from": source,
        "to": target,
        "captions": count,
        "tokens": len(same),
        "one_to_one": float(same.mean()),
        "perplexity": {arm: float(np.exp(-np.concatenate(scores[arm]).mean())) for arm in streams},
        "mean_importance": {arm: float(np.concatenate(w[arm]).mean()) for arm in streams},
        "arms": {arm: correlations(w["own"], w[arm], same) for arm in ("seed", "transfer", "bytes", "shuffled")},
    }


def correlations(own: Sequence[np.ndarray], other: Sequence[np.ndarray], same: np.ndarray) -> dict[str, float]:
    """Spearman's rank correlation of w: over tokens (all; those that both tokenizers cut alike; the others), inside captions,
    and over captions by their mean."""
    a, b = np.concatenate(own), np.concatenate(other)
    inside = [spearman(x, y) for x, y in zip(own, other, strict=True) if len(x) > 2]
    return {
        "token": spearman(a, b),
        "token_cut_alike": spearman(a[same], b[same]),
        "token_cut_otherwise": spearman(a[~same], b[~same]),
        "inside_a_caption": float(np.nanmean(inside)),
        "caption": spearman(np.array([x.mean() for x in own]), np.array([x.mean() for x in other])),
    }


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """The correlation of ranks, ties at their mean; NaN where one of them is constant."""
    x, y = (rankdata(values) - (len(values) + 1) / 2 for values in (a, b))
    size = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / size if size else float("nan")


def spans(source: ShardSet, target: ShardSet) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """For each target caption: which tokens the source's tokenizer cuts alike, bool [k], and the bytes of each, int64 [k]."""
    one, two = Spelling(source.tokenizer()), Spelling(target.tokenizer())
    alike, widths = [], []
    for index in range(len(target)):
        given, taken = one.spell(source.tokens(index)), two.spell(target.tokens(index))
        assert isinstance(given, Spelled) and isinstance(taken, Spelled), index  # noqa: PT018
        given, taken = in_common(given, taken, folds=(one.folds_spaces, two.folds_spaces))
        pairs = set(zip(given.edges[:-1].tolist(), given.edges[1:].tolist(), strict=True))
        alike.append(np.array([pair in pairs for pair in zip(*_ends(taken), strict=True)]))
        widths.append(np.diff(taken.edges))
    return alike, widths


def _ends(caption: Spelled) -> tuple[list[int], list[int]]:
    return caption.edges[:-1].tolist(), caption.edges[1:].tolist()


def _by_width(scores: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """The caption's total over its bytes, EOS left as it is."""
    found = scores.copy()
    found[:-1] = scores[:-1].sum() * widths[:-1] / max(1, widths[:-1].sum())
    return found


def table(results: Sequence[dict[str, Any]]) -> str:
    """The correlations as a Markdown table."""
    names = ("token", "token_cut_alike", "token_cut_otherwise", "inside_a_caption", "caption")
    lines = ["| from, to | compared with | " + " | ".join(name.replace("_", " ") for name in names) + " |"]
    lines.append("|---" * (len(names) + 2) + "|")
    for result in results:
        for arm, found in result["arms"].items():
            cells = " | ".join(f"{found[name]:.3f}" for name in names)
            lines.append(f"| {result['from']}, {result['to']} | {arm} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    """Prepare what is missing, compare in both directions, print the table and keep the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--work", type=Path, required=True, help="folder for shards and runs; an interrupted study goes on there")
    add("--reference", type=Path, nargs="+", required=True, help="captions to train the references on")
    add("--captions", type=Path, nargs="+", required=True, help="captions to score")
    add("--tokenizer", action="append", required=True, metavar="NAME=PATH", help="given twice")
    add("--steps", type=int, default=600, help="optimizer steps of each reference (default: %(default)s)")
    add("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    tokenizers = dict(text.split("=", 1) for text in options.tokenizer)
    if len(tokenizers) != 2:
        parser.error("give two tokenizers of different names")
    for name, path in tokenizers.items():
        prepare(options.work, name, Path(path), options)
    one, two = tokenizers
    results = [compare(options.work, one, two), compare(options.work, two, one)]
    print(table(results))
    if options.output:
        text = json.dumps({"steps": options.steps, "results": results}, indent=1)
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

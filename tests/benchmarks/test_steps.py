"""The step benchmarks run as documented, on a few pairs, and refuse arms that do not compute the same."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.side_by_side import Arm, measure_speed

ROOT = Path(__file__).resolve().parents[2]


class Fixed(Arm):
    """An arm that claims a loss."""

    def __init__(self, loss: float, tokens: int = 5) -> None:
        self.loss, self.tokens = loss, tokens

    def step(self, number: int) -> tuple[float, int]:
        return self.loss, self.tokens


def options() -> argparse.Namespace:
    return argparse.Namespace(steps=3, warmup=1)


def test_equal_arms_are_compared() -> None:
    found = measure_speed(options(), {"ours": Fixed(2.0), "plain": Fixed(2.0 + 5e-6)})
    assert len(found["speedup"]) == 3
    assert found["caption_tokens"] == [5, 5, 5]
    assert found["largest_loss_gap"] == pytest.approx(5e-6)


@pytest.mark.parametrize("other", [Fixed(2.001), Fixed(2.0, tokens=6)])
def test_arms_that_compute_something_else_are_refused(other: Arm) -> None:
    with pytest.raises(SystemExit, match="step 0: the arms do not compute the same loss"):
        measure_speed(options(), {"ours": Fixed(2.0), "plain": other})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ulvlm_step", "hlvlm_step"])
def test_a_few_steps_on_real_pairs(name: str, tmp_path: Path, shared) -> None:
    from megaprior.data_tools.cli import main

    tokenizer = str(shared("tokenizers") / "mistral" / "tokenizer.model.v1")
    pairs = str(shared("coco_cc_by") / "items.jsonl")
    build = ["build", "--input", pairs, "--images", str(shared("coco_cc_by") / "images"), "--tokenizer", tokenizer]
    assert main([*build, "--output", str(tmp_path / "shards")]) == 0
    command = [
        sys.executable,
        "-m",
        f"benchmarks.{name}",
        "--shards",
        str(tmp_path / "shards"),
        "--tokenizer",
        tokenizer,
    ]
    sizes = ["--batch", "4", "--steps", "2", "--warmup", "1", "--output", str(tmp_path / "results")]
    subprocess.run([*command, *sizes], cwd=ROOT, check=True, timeout=300, capture_output=True)
    result = json.loads((tmp_path / "results" / f"{name}.json").read_text())
    assert result["speed"]["largest_loss_gap"] < 1e-5
    assert "Ours / plain, step by step" in (tmp_path / "results" / f"{name}.md").read_text()

"""The loss benchmark runs end to end, refuses arms that compute something else, and prints what its samples say."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import loss
from benchmarks.loss_arms import Arm, arms_of
from benchmarks.loss_cases import IGNORED, Case, Problem, make_problem, plan
from benchmarks.loss_check import bounds, errors, reference_of, refusal
from benchmarks.loss_report import markdown, measured
from benchmarks.loss_run import step_of
from benchmarks.loss_trial import trials, verdicts
from megaprior.kernels import linear_weighted_cross_entropy

CASE = Case(operation="fused", rows=64, hidden=32, vocabulary=160, dtype=torch.float32, weights="token")
CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]
Gradients = tuple[torch.Tensor, ...]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    folder = tmp_path_factory.mktemp("loss")
    loss.main(["--device", "cpu", "--quick", "--skip", "compile", "--output", str(folder)])
    (kept,) = folder.glob("loss_cpu_*_quick.json")
    return json.loads(kept.read_text()), kept


def outcome(case: Case, change: Callable[[torch.Tensor, Gradients], tuple[torch.Tensor, Gradients]]) -> str:
    """Why our arm's result, changed, is refused."""
    problem = make_problem(case, CPU, seed=3)
    reference = reference_of(problem)
    (ours,) = [arm for arm in arms_of(case) if arm.name == "ours, torch"]
    result = errors(problem, reference, *change(*step_of(ours, problem)()))
    return refusal(result, bounds(problem, reference, inexact=False))


def test_a_quick_run_leaves_samples_a_table_and_a_figure(quick: tuple[dict, Path]) -> None:
    result, kept = quick
    assert len(result["cases"]) == len(plan(CPU, quick=True))
    assert not result["dropped"]
    assert "Measured on a CPU" in kept.with_suffix(".md").read_text()
    assert kept.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert str(kept.parent) not in kept.read_text()
    for case in result["cases"]:
        assert not [arm["refused"] for arm in case["arms"] if arm["refused"]], case["name"]
        assert {"ours, torch", "plain"} <= {arm["name"] for arm in measured(case)}
        assert all(len(arm["ms"]) == 3 for arm in measured(case))


def test_the_table_follows_from_the_raw_samples(quick: tuple[dict, Path]) -> None:
    result = json.loads(json.dumps(quick[0]))
    case = result["cases"][0]
    arms = {arm["name"]: arm for arm in measured(case)}
    arms["ours, torch"]["ms"], arms["plain"]["ms"] = [200.0, 210.0, 220.0], [400.0, 630.0, 880.0]
    for ceiling in result["ceilings"]:
        ceiling["gemm"].update(operations=4e12, ms=[1000.0])
    text = markdown({**result, "cases": [case]})
    (ours,) = [line for line in text.splitlines() if line.startswith("| **ours, torch**")]
    (plain,) = [line for line in text.splitlines() if line.startswith("| plain |")]
    rate = 6 * 96 * 16 * 96 / 0.210 / 1e12
    assert "| 210 (205-215) |" in ours
    assert f"| {rate:.3g} | {rate / 4:.0%} |" in ours
    assert f"{statistics.median([2.0, 3.0, 4.0]):.2f}x (2.50-3.50)" in plain


def test_targets_are_judged_by_the_samples_of_their_own_shape(quick: tuple[dict, Path]) -> None:
    result = json.loads(json.dumps(quick[0])) | {"device": "cuda", "quick": False}
    result["ceilings"] = [{"copy": {"bytes": 4e9, "ms": [1.0]}, "gemm": {"operations": 8e11, "ms": [1.0], "what": "x"}}]
    case = result["cases"][0]
    case.update(rows=8192, loss_rows=8192, hidden=4096, vocabulary=128_256, gradient_bytes=0)
    case["operations"] = 6 * 8192 * 4096 * 128_256  # 32.3 ms at 800 TFLOP/s
    for arm in case["arms"]:
        arm["ms"] = [35.0 if arm["ours"] else 70.0] * 3 if arm["ms"] else []
        arm["peak_extra_bytes"] = 1 << 30
    text = markdown({**result, "cases": [case]})
    assert "**met**: ours, torch: 92.2%, 1,024 of 3,028 MiB, " in text
    assert text.count("| not measured |") == 4
    for arm in case["arms"]:
        arm["ms"] = [37.0] * len(arm["ms"])
    assert "not met: ours, torch: 87.2%" in markdown({**result, "cases": [case]})
    assert "## Targets" not in markdown(quick[0])


def test_arms_that_cannot_run_are_listed_with_the_reason(quick: tuple[dict, Path]) -> None:
    text = quick[1].with_suffix(".md").read_text()
    (left_out,) = {
        line for line in text.splitlines() if line.startswith("- not run: torch.compile") and "--skip" in line
    }
    assert left_out == "- not run: torch.compile of plain: left out by --skip"
    (case,) = [case for case in quick[0]["cases"] if case["name"] == plan(CPU, quick=True)[0].name]
    reasons = {arm["name"]: arm["not_run"] for arm in case["arms"]}
    for peer in (
        "liger-kernel, fp32 dWeight",
        "cut-cross-entropy, default",
        "quack-kernels",
        "ours, triton",
        "ours, cuda",
    ):
        assert "CUDA only" in reasons[peer]


def test_a_dry_run_names_every_arm_and_measures_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    loss.main(["--device", "cpu", "--dry-run", "--skip", "compile", "--output", str(tmp_path)])
    shown = capsys.readouterr().out
    cases = plan(CPU)
    assert [line for line in shown.splitlines() if line and line[0] != " "] == [case.name for case in cases]
    for arm in arms_of(cases[0]):
        assert f"{arm.name}: " in shown
    assert "no   quack-kernels: runs on CUDA only" in shown
    assert not list(tmp_path.iterdir())


def test_a_spent_budget_drops_cases_and_says_so(tmp_path: Path) -> None:
    loss.main(["--device", "cpu", "--quick", "--budget-s", "0", "--output", str(tmp_path)])
    (page,) = tmp_path.glob("*.md")
    assert page.read_text().count("s of the budget of 0 s were spent before it") == len(plan(CPU, quick=True))


def test_the_right_result_passes() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for operation in ("fused", "logits"):
            assert not outcome(replace(CASE, dtype=dtype, operation=operation), lambda value, grads: (value, grads))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operation", ["fused", "logits"])
def test_a_gradient_one_percent_too_large_is_refused(operation: str, dtype: torch.dtype) -> None:
    case = replace(CASE, dtype=dtype, operation=operation)
    why = outcome(case, lambda value, grads: (value, tuple(1.01 * grad for grad in grads)))
    assert "scale is off by 0.0" in why


def test_a_wrong_loss_a_missing_gradient_and_nan_are_refused() -> None:
    assert "loss is off by 0.001 (bound 1e-05)" in outcome(CASE, lambda value, grads: (1.001 * value, grads))
    assert "gradient of weight is off by nan" in outcome(CASE, lambda value, grads: (value, grads[:1]))
    assert "gradient of hidden is off by nan" in outcome(
        CASE, lambda value, grads: (value, (grads[0] * torch.nan, grads[1]))
    )


def test_a_gradient_of_the_targets_alone_is_refused() -> None:
    case = replace(CASE, vocabulary=4096)  # few rows are targets; the others hold little of the whole norm
    targets = make_problem(case, CPU, seed=3).targets

    def only_targets(value: torch.Tensor, grads: Gradients) -> tuple[torch.Tensor, Gradients]:
        named = torch.zeros(case.vocabulary, 1).index_fill_(0, targets, 1.0)
        return value, (grads[0], grads[1] * named)

    assert "gradient of weight, away from targets is off by 1 (" in outcome(case, only_targets)


def test_ignored_weights_are_refused_in_a_run_and_their_times_are_not_printed(tmp_path: Path) -> None:
    def unweighted(problem: Problem) -> Callable[[], torch.Tensor]:
        hidden, weight = problem.head
        return lambda: linear_weighted_cross_entropy(hidden, weight, problem.targets, impl="torch")[0]

    def broken(problem: Problem) -> Callable[[], torch.Tensor]:
        raise RuntimeError("out of something\nand more")

    def arms(case: Case) -> list[Arm]:
        wrong = Arm(name="careless", make=unweighted, computes="no weights", sums="fp32")
        return [
            *[arm for arm in arms_of(case) if arm.name == "ours, torch"],
            wrong,
            replace(wrong, name="broken", make=broken),
        ]

    options = loss.parse(["--device", "cpu", "--quick", "--case", "token weights", "--output", str(tmp_path)])
    (case,) = loss.run(options, arms)["cases"]
    (page,) = tmp_path.glob("*.md")
    assert [arm["name"] for arm in measured(case)] == ["ours, torch"]
    assert "\n| careless" not in page.read_text()
    assert "refused: careless: " in page.read_text()
    assert "- not run: broken: RuntimeError: out of something\n" in page.read_text()


def test_a_trial_in_another_process_passes_what_works_and_names_what_does_not_come_back() -> None:
    assert trials(CPU, ["F.linear_cross_entropy"]) == {}
    found = trials(CPU, ["plain"], limit_s=0.1)  # its imports are not done by then
    assert found["plain", "fused", "uniform"] == "its trial did not come back within 0.1 s"
    assert {operation for _, operation, _ in found} == {"fused", "forward", "logits", "logprob"}


def test_a_trial_names_the_arm_that_stopped_it() -> None:
    keys = [(name, "fused", "uniform") for name in "abcd"]
    lines = [
        json.dumps({"arm": keys[0], "why": ""}),
        "{noise}",
        json.dumps({"arm": keys[1], "why": "RuntimeError: no"}),
    ]
    found = {key[0]: why for key, why in verdicts(keys, lines, "ended with exit status -11").items()}
    assert found == {
        "b": "in a trial: RuntimeError: no",
        "c": "its trial ended with exit status -11",
        "d": "not tried: before it, the trial of c ended with exit status -11",
    }


def test_it_needs_little_more_than_torch() -> None:
    heavy = {"transformers", "deepspeed", "pydantic", "matplotlib", "megaprior.train"}
    script = f"import sys, benchmarks.loss; print(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_problems_have_the_share_of_loss_rows_that_they_name() -> None:
    case = replace(CASE, rows=1000, share=0.25)
    problem = make_problem(case, CPU, seed=0)
    keep = problem.targets != IGNORED
    assert int(keep.sum()) == case.loss_rows
    assert abs(case.loss_rows / 1000 - 0.25) < 0.03
    assert problem.token_weight is not None
    assert not problem.token_weight[~keep].any()
    assert float(problem.token_weight.sum()) == pytest.approx(case.loss_rows, rel=1e-5)
    assert float(problem.token_weight[keep].std()) > 0.3

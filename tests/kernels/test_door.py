"""What the doors promise whatever stands behind them: impl, arguments, denominators, scores in place of weights."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megaprior import kernels
from megaprior.kernels import (
    choice,
    linear_logprob,
    linear_weighted_cross_entropy,
    token_weights,
    weighted_cross_entropy,
)

ROOT = Path(__file__).resolve().parents[2]
N, V, H = 11, 29, 6


@pytest.fixture
def problem():
    make = torch.Generator().manual_seed(7)
    hidden, weight = torch.randn(N, H, generator=make), torch.randn(V, H, generator=make)
    targets = torch.randint(V, (N,), generator=make)
    targets[[0, 6]] = -100
    return hidden, weight, targets


@pytest.mark.parametrize("name", ["megaprior.kernels", "kernels"])
def test_importing_imports_nothing_heavy(name):
    """`kernels`, too: that is how transformers meets the folder when it looks for a distribution of that name."""
    script = f"import sys, {name} as k; assert k.__all__; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_the_public_names():
    assert set(kernels.__all__) == {
        "token_weights", "weighted_cross_entropy", "linear_weighted_cross_entropy", "linear_logprob"
    }  # fmt: skip
    with pytest.raises(AttributeError, match="no attribute 'softmax'"):
        _ = kernels.softmax


def calls(problem, **options):
    hidden, weight, targets = problem
    return (
        lambda: weighted_cross_entropy(hidden @ weight.T, targets, **options),
        lambda: linear_weighted_cross_entropy(hidden, weight, targets, **options),
        lambda: linear_logprob(hidden, weight, targets, **options),
    )


def test_an_impl_that_cannot_run_says_why(problem):
    for call in calls(tuple(part.double() if part.is_floating_point() else part for part in problem), impl="triton"):
        with pytest.raises(
            RuntimeError, match="impl='triton' cannot run here: it takes float32 and bfloat16, not float64"
        ):
            call()
    for call in calls(problem, impl="cuda"):
        with pytest.raises(RuntimeError, match=r"impl='cuda' cannot run here: .*MEGAPRIOR_BUILD_CUDA=1|CPU"):
            call()


def test_triton_without_its_interpreter_needs_a_gpu():
    script = (
        "import torch; from megaprior.kernels import linear_logprob as door;"
        "x = torch.randn(3, 4); t = torch.zeros(3, dtype=torch.long);"
        "assert door(x, x, t).shape == (3,); door(x, x, t, impl='triton')"
    )
    bare = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=bare, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "tensors are on the CPU, and Triton needs a CUDA device (or TRITON_INTERPRET=1)" in done.stderr


def test_the_environment_stands_in_for_auto(problem, monkeypatch):
    seen = []
    real = choice.unavailable
    monkeypatch.setattr(choice, "unavailable", lambda impl, *rest: seen.append(impl) or real(impl, *rest))
    for value, asked in (("torch", ["torch"]), ("triton", ["triton"])):
        monkeypatch.setenv("MEGAPRIOR_LOSS_IMPL", value)
        seen.clear()
        calls(problem)[2]()
        assert seen == asked
        calls(problem, impl="torch")[2]()
        assert seen[-1] == "torch"  # a call that names one is not overruled
    monkeypatch.setenv("MEGAPRIOR_LOSS_IMPL", "numpy")
    with pytest.raises(ValueError, match="MEGAPRIOR_LOSS_IMPL must be one of"):
        calls(problem)[2]()


def test_auto_on_a_cpu_is_the_plain_form_even_where_triton_could_run():
    assert choice.implementation("auto", torch.device("cpu"), torch.float32) is choice._load("torch")


def test_the_self_check_sees_a_kernel_that_is_wrong(monkeypatch):
    """`auto` believes a kernel only once it has given the plain form's answers on that device."""
    cpu, plain = torch.device("cpu"), choice._load("torch")
    triton = choice._load("triton")
    assert choice.largest_difference(triton, plain, cpu, torch.float32) < 1e-5
    assert choice.largest_difference(triton, plain, cpu, torch.bfloat16) < 2e-2
    real = triton.kernels.cross_entropy_rows

    def off_by_a_percent(logits, targets, factor, nll, *, gradient):
        real(logits, targets, factor * 1.01, nll, gradient=gradient)

    wrong = choice._load("triton").__class__(SimpleNamespace(cross_entropy_rows=off_by_a_percent,
                                                             scale_=triton.kernels.scale_), triton.segment_weights)  # fmt: skip
    assert choice.largest_difference(wrong, plain, cpu, torch.float32) > 5e-3
    for loaded, trusted in ((triton, True), (wrong, False)):
        monkeypatch.setattr(choice, "_load", lambda name, loaded=loaded: plain if name == "torch" else loaded)
        choice._agrees.cache_clear()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            assert choice._agrees("triton", cpu, torch.float32) is trusted
        assert ["set aside" in str(warning.message) for warning in told] == [True] * (not trusted)
    choice._agrees.cache_clear()


def test_auto_runs_and_unknown_impls_are_refused(problem):
    for auto, plain in zip(calls(problem, impl="auto"), calls(problem, impl="torch"), strict=True):
        for got, want in zip(auto(), plain(), strict=True):
            assert torch.equal(got, want)
    for call in calls(problem, impl="numpy"):
        with pytest.raises(ValueError, match="impl must be one of"):
            call()


def test_denominator_forms_agree(problem):
    hidden, weight, targets = problem
    nine = linear_weighted_cross_entropy(hidden, weight, targets)[0]  # 11 targets, two of them ignored
    for denominator in (9, 9.0, torch.tensor(9), torch.tensor(9.0), torch.tensor(9.0, dtype=torch.float64)):
        assert torch.equal(linear_weighted_cross_entropy(hidden, weight, targets, denominator=denominator)[0], nine)
        assert torch.equal(
            weighted_cross_entropy(hidden @ weight.T, targets, denominator=denominator)[0],
            weighted_cross_entropy(hidden @ weight.T, targets)[0],
        )
    assert linear_weighted_cross_entropy(hidden, weight, targets, denominator=18)[0] == nine / 2


@pytest.mark.parametrize("bad", [0, 0.99, -3, math.nan, math.inf, "9", torch.tensor(0.5), torch.tensor([9.0])])
def test_impossible_denominators_are_refused(problem, bad):
    for call in calls(problem, denominator=bad)[:2]:
        with pytest.raises(ValueError, match="denominator must be"):
            call()


def test_scores_stand_in_for_weights(problem):
    hidden, weight, targets = problem
    scores = torch.randn(N).abs().neg()
    scores[3], scores[0] = -math.inf, math.nan  # position 0 is ignored: its score is nobody's business
    edges, compact = torch.tensor([0, 5, 5, 7, N], dtype=torch.int32), torch.tensor([0, 4, 4, 5, 9], dtype=torch.int32)
    keep = targets != -100
    for options in ({}, {"alpha": 0.5}, {"alpha": 2.0, "length_scale": False}):
        by_hand = torch.zeros(N)
        by_hand[keep] = token_weights(scores[keep], compact, **options)  # ignored positions are in no k and no sum
        for got, want in (
            (linear_weighted_cross_entropy(hidden, weight, targets, scores=scores, cu_seqlens=edges, **options),
             linear_weighted_cross_entropy(hidden, weight, targets, by_hand)),
            (weighted_cross_entropy(hidden @ weight.T, targets, scores=scores, cu_seqlens=edges, **options),
             weighted_cross_entropy(hidden @ weight.T, targets, by_hand)),
        ):  # fmt: skip
            assert torch.equal(got[0], want[0])
            assert torch.equal(got[1], want[1])


def test_impossible_scores_are_refused_in_the_losses_too(problem):
    edges = torch.tensor([0, N], dtype=torch.int32)
    for bad in (math.nan, 1e-3):
        for call in calls(problem, scores=torch.full((N,), bad), cu_seqlens=edges)[:2]:
            with pytest.raises(ValueError, match=r"scores\[1\]"):  # position 0 is ignored
                call()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"scores": torch.zeros(N)}, "go together"),
        ({"cu_seqlens": torch.tensor([0, N])}, "go together"),
        ({"scores": torch.zeros(N), "cu_seqlens": torch.tensor([0, N]), "token_weight": torch.ones(N)}, "not both"),
        ({"scores": torch.zeros(N - 1), "cu_seqlens": torch.tensor([0, N - 1])}, "one value per target"),
        ({"token_weight": torch.ones(N + 1)}, "one value per target"),
        ({"token_weight": torch.ones(N, 1)}, "one value per target"),
        ({"chunk_rows": 0}, "chunk_rows"),
    ],
)
def test_arguments_of_the_losses_are_checked(problem, options, match):
    for call in calls(problem, **options)[:2]:
        with pytest.raises(ValueError, match=match):
            call()


def test_shapes_and_dtypes_are_checked(problem):
    hidden, weight, targets = problem
    for wrong in (
        (hidden[None], weight, targets),
        (hidden.half(), weight, targets),
        (hidden, weight[:, 1:], targets),
        (hidden, weight.long(), targets),
        (hidden, weight, targets[1:]),
        (hidden, weight, targets.float()),
        (hidden, weight, targets.index_fill(0, torch.tensor(4), V)),
        (hidden, weight, targets.index_fill(0, torch.tensor(4), -1)),
    ):
        for door in (linear_weighted_cross_entropy, linear_logprob):
            with pytest.raises(ValueError, match="must"):
                door(*wrong)
    with pytest.raises(ValueError, match=r"targets\[4\] is 29"):
        weighted_cross_entropy(hidden @ weight.T, targets.index_fill(0, torch.tensor(4), V))
    with pytest.raises(ValueError, match="logits must be"):
        weighted_cross_entropy((hidden @ weight.T)[0], targets)


def test_ignore_index_and_int32_targets(problem):
    hidden, weight, targets = problem
    want = linear_weighted_cross_entropy(hidden, weight, targets)
    other = targets.where(targets != -100, 7_777).int()
    for got, expected in zip(
        linear_weighted_cross_entropy(hidden, weight, other, ignore_index=7_777), want, strict=True
    ):
        assert torch.equal(got, expected)
    assert (want[1][[0, 6]] == 0).all()


def test_autocast_changes_nothing(problem):
    hidden, weight, targets = problem
    leaves = (hidden.requires_grad_(), weight.requires_grad_())

    def everything():
        loss, nll = linear_weighted_cross_entropy(*leaves, targets)
        return loss, nll, linear_logprob(*leaves, targets), *torch.autograd.grad(loss, leaves)

    want = everything()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = everything()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))

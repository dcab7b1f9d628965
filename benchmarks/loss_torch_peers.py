"""How benchmarks.loss calls what torch itself offers: the plain form, torch.compile of it, F.linear_cross_entropy.

N rows, V vocabulary, H width; g token weights, D the number of targets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.loss_cases import IGNORED, Problem

Call = Callable[[], Tensor]


def plain_loss(problem: Problem) -> Call:
    """The form one writes first: whole logits, float32 softmax."""
    return _plain(problem, _loss)


def plain_logprob(problem: Problem, *, dtype: torch.dtype | None = None) -> Call:
    """The same, negated and per token; products in `dtype`, the inputs' own if None."""
    return _plain(problem, _logprob, dtype)


def compiled(form: Callable[[Problem], Call]) -> Callable[[Problem], Call]:
    """torch.compile of `plain_loss` or `plain_logprob`; a graph break is an error, not a silent slowness."""

    def make(problem: Problem) -> Call:
        function = _logprob if form is plain_logprob else _loss
        return _plain(problem, torch.compile(function, fullgraph=True, dynamic=False))

    return make


def torch_linear(options: Callable[[], Any] | None) -> Callable[[Problem], Call]:
    """F.linear_cross_entropy, which newer torch has; `options()` are its own, None the reference form."""

    def make(problem: Problem) -> Call:
        if not hasattr(F, "linear_cross_entropy"):
            raise RuntimeError(f"torch {torch.__version__} has no F.linear_cross_entropy")
        reduction = "mean" if problem.token_weight is None and problem.case.operation != "logprob" else "none"
        hidden, weight = problem.head
        arguments = {"reduction": reduction, "ignore_index": IGNORED, "options": options() if options else None}
        return per_token(
            problem, lambda: F.linear_cross_entropy(hidden, weight, problem.targets, **arguments), reduction
        )

    return make


def chunked_options(policy: Literal["auto", "accurate"]) -> Callable[[], Any]:
    """Its options for the chunked form; `policy` says in which dtype it sums."""
    return lambda: torch.nn.LinearCrossEntropyOptions(acc_policy=policy)


def per_token(problem: Problem, nll: Call, reduction: str) -> Call:
    """What the case asks for, from a peer's loss: itself, or from per-token losses the weighted sum or the negative."""
    if reduction == "mean":
        return nll
    if problem.case.operation == "logprob":
        return lambda: -nll()
    g, count = problem.token_weight, (problem.targets != IGNORED).sum()
    assert g is not None
    return lambda: (g * nll()).sum() / count


def _plain(problem: Problem, function: Callable[..., Tensor], dtype: torch.dtype | None = None) -> Call:
    count = (problem.targets != IGNORED).sum()
    if problem.case.operation == "logits":
        return lambda: function(problem.given, None, problem.targets, problem.token_weight, count)
    hidden, weight = problem.head
    if dtype is None:
        return lambda: function(hidden, weight, problem.targets, problem.token_weight, count)
    return lambda: function(hidden.to(dtype), weight.to(dtype), problem.targets, problem.token_weight, count)


def _loss(x: Tensor, weight: Tensor | None, targets: Tensor, g: Tensor | None, count: Tensor) -> Tensor:
    """x: (N, H) with a weight (V, H), else the logits (N, V)."""
    logits = (x if weight is None else x @ weight.t()).float()
    if g is None:
        return F.cross_entropy(logits, targets, ignore_index=IGNORED)
    nll = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")
    return (g * nll).sum() / count


def _logprob(x: Tensor, weight: Tensor, targets: Tensor, g: Tensor | None, count: Tensor) -> Tensor:
    """(N,): minus the per-token loss. `g` and `count` are not used: one signature for both."""
    return -F.cross_entropy((x @ weight.t()).float(), targets, ignore_index=IGNORED, reduction="none")

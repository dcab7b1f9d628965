"""What benchmarks.loss compares: our implementations and how each peer is called.

N rows, V vocabulary, H width; g token weights, D the number of targets. A call returns the 0-d loss, or (N,)
log-probabilities; gradients are taken outside, by torch.autograd.grad, so that no arm pays for accumulating into .grad.

Peers take no token weights that are known before the forward pass. With g all 1 each is called as it wants to be, by
reduction="mean". With other g they give the loss per token, which is then weighted: sum(g * nll) / D. Peers that can do
that under grad are tried, and checked, like the rest.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.loss_cases import IGNORED, Case, Problem
from benchmarks.loss_torch_peers import chunked_options, compiled, per_token, plain_logprob, plain_loss, torch_linear
from megaprior.kernels import linear_logprob, linear_weighted_cross_entropy, weighted_cross_entropy

Call = Callable[[], Tensor]
FUSED = ("fused", "forward")
LOSSES = ("fused", "forward", "logits")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to compute an operation.

    name: unique within a case.  computes: what, and how.  sums: where dWeight is summed up.
    inexact: "", or in what the arm is less exact than the plain path by its own choice.
    whole_bytes: peak bytes per element of (N, V), 0 for what works in chunks.
    package: that must be installed, with what it imports.  cuda_only: does not measure anything elsewhere.
    make: problem -> call. Imports happen there.
    """

    name: str
    make: Callable[[Problem], Call]
    computes: str
    sums: str
    inexact: str = ""
    ours: bool = False
    whole_bytes: int = 0
    package: str = ""
    cuda_only: bool = False
    operations: tuple[str, ...] = FUSED
    weights: tuple[str, ...] = ("uniform", "token")

    def takes(self, case: Case) -> bool:
        """Whether the arm offers what the case asks for."""
        return case.operation in self.operations and case.weights in self.weights


def arms_of(case: Case) -> list[Arm]:
    """The arms that offer a case's operation, ours first."""
    return [
        arm for arm in (*_ours(case), *_torch_arms(case), *_liger(case), *_cut(case), *_quack(case)) if arm.takes(case)
    ]


def unavailable(arm: Arm, case: Case, device: torch.device) -> str:
    """Why an arm cannot run here; empty when it can, as far as one can tell without running it."""
    if any(part in arm.name for part in case.leave_out):
        return "left out of this case by the plan, to save time"
    if arm.cuda_only and device.type != "cuda":
        return "runs on CUDA only (Triton's interpreter on a CPU is no measurement)"
    if arm.package and importlib.util.find_spec(arm.package) is None:
        return f"{arm.package} is not installed"
    if arm.ours and "triton" in arm.name and os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1: the interpreter is no measurement"
    return ""


def probe(arm: Arm, case: Case, device: torch.device) -> str:
    """The same after a try on a tiny problem."""
    try:
        with torch.no_grad():
            arm.make(_tiny(case, device))()
    except Exception as error:
        return first_line(error)
    return ""


def first_line(error: BaseException) -> str:
    """Kind and first line of an error."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__


def _tiny(case: Case, device: torch.device) -> Problem:
    """A problem to try an arm with; forward only."""
    small = torch.randn(128, 128, device=device).to(case.dtype)
    targets = torch.arange(128, device=device)
    weight = torch.ones(128, device=device) if case.weights == "token" else None
    if case.operation == "logits":
        return Problem(case=case, targets=targets, logits=small.repeat(1, 8), token_weight=weight)
    return Problem(case=case, targets=targets, hidden=small, weight=small.repeat(8, 1), token_weight=weight)


def _ours(case: Case) -> list[Arm]:
    known = "sum(g nll)/D, g known before the forward pass"
    computes = {"fused": f"{known}; gradients made during it", "logprob": "float32 logits, in chunks"}

    def make(impl: str, options: Mapping[str, Any]) -> Callable[[Problem], Call]:
        def of(problem: Problem) -> Call:
            targets, g = problem.targets, problem.token_weight
            if problem.case.operation == "logits":
                return lambda: weighted_cross_entropy(problem.given, targets, g, impl=impl, **options)[0]
            hidden, weight = problem.head
            if problem.case.operation == "logprob":
                return lambda: linear_logprob(hidden, weight, targets, impl=impl, **options)
            return lambda: linear_weighted_cross_entropy(hidden, weight, targets, g, impl=impl, **options)[0]

        return of

    def arm(impl: str, suffix: str = "", **options: bool) -> Arm:
        return Arm(
            name=f"ours, {impl}{suffix}",
            make=make(impl, options),
            computes=computes.get(case.operation, known),
            sums="fp32",
            ours=True,
            cuda_only=impl != "torch",
            operations=(*LOSSES, "logprob"),
        )

    return [arm("torch"), arm("triton"), arm("cuda"), arm("triton", ", compact=False", compact=False)]


def _torch_arms(case: Case) -> list[Arm]:
    how = 'reduction="none", then weighted' if case.weights == "token" else "mean only"
    logprob, low = case.operation == "logprob", case.dtype == torch.bfloat16
    whole = 16 if low else 12
    form = plain_logprob if logprob else plain_loss
    plain = Arm(
        name="plain",
        make=form,
        computes=f"F.cross_entropy of float32 logits: {how}; whole logits",
        sums="one product",
        inexact="bfloat16 logits" if logprob and low else "",
        whole_bytes=whole,
        operations=(*LOSSES, "logprob"),
    )
    compiled_plain = replace(
        plain, name="torch.compile of plain", make=compiled(form), computes=f"the same, compiled: {how}"
    )
    if not (logprob and low):
        return [plain, compiled_plain, *_linear_arms(case, how, whole)]
    wide = replace(
        plain,
        name="plain, float32 products",
        make=lambda problem: plain_logprob(problem, dtype=torch.float32),
        computes="the same, products in float32",
        inexact="",
    )
    return [plain, compiled_plain, wide, *_linear_arms(case, how, whole)]


def _linear_arms(case: Case, how: str, whole: int) -> list[Arm]:
    """F.linear_cross_entropy: its loss comes in the inputs' dtype."""
    low = case.dtype == torch.bfloat16
    reference = Arm(
        name="F.linear_cross_entropy",
        make=torch_linear(None),
        computes=f"reference form: {how}; whole logits",
        sums="one product",
        inexact="softmax and loss in bfloat16" if low else "",
        whole_bytes=whole,
        operations=(*FUSED, "logprob"),
    )
    again = "; gradients recomputed in backward" if case.weights == "token" and case.operation == "fused" else ""
    return [
        reference,
        *(
            replace(
                reference,
                name=f"F.linear_cross_entropy, chunked, {policy!r}",
                make=torch_linear(chunked_options(policy)),
                computes=f"in chunks: {how}{again}",
                sums=f"its policy {policy!r}",
                inexact=f"loss in bfloat16, sums as its policy {policy!r} has them" if low else "",
                whole_bytes=0,
            )
            for policy in ("auto", "accurate")
        ),
    ]


def _liger(case: Case) -> list[Arm]:
    token, logprob = case.weights == "token", case.operation == "logprob"
    how = 'reduction="none", then weighted; gradients recomputed in backward' if token else "mean only"
    reduction = "none" if token or logprob else "mean"

    def fused(accumulate: torch.dtype | None) -> Callable[[Problem], Call]:
        def make(problem: Problem) -> Call:
            from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as liger

            hidden, weight = problem.head
            options = {"ignore_index": IGNORED, "reduction": reduction, "accum_dtype": accumulate}
            return per_token(problem, lambda: liger(hidden, weight, problem.targets, **options), reduction)

        return make

    def given(problem: Problem) -> Call:
        from liger_kernel.transformers.functional import liger_cross_entropy as liger

        options = {"ignore_index": IGNORED, "reduction": reduction}
        return per_token(problem, lambda: liger(problem.given, problem.targets, **options), reduction)

    common = {"package": "liger_kernel", "cuda_only": True}
    if logprob:
        return [
            Arm(name="liger-kernel", make=fused(None), computes='fused linear, reduction="none", negated', sums="-",
                inexact="bfloat16 logits", operations=("logprob",), **common)
        ]  # fmt: skip
    in_place = "a second (N, V) for the weighted gradient" if token else "gradient in the logits' memory"
    return [
        Arm(name="liger-kernel, fp32 dWeight", make=fused(torch.float32), computes=how, sums="fp32", **common),
        Arm(name="liger-kernel, bf16 dWeight", make=fused(None), computes=f"{how}; its default", sums="bf16",
            inexact="dWeight summed in bfloat16", **common),
        Arm(name="liger-kernel, given logits", make=given, sums="-", operations=("logits",), inexact="per-token loss in bfloat16",
            computes=f"{how.split(';')[0]}; {in_place}", whole_bytes=2 if token else 0, **common),
    ]  # fmt: skip


def _cut(case: Case) -> list[Arm]:
    token, logprob = case.weights == "token", case.operation == "logprob"
    reduction = "none" if token or logprob else "mean"
    how = ('reduction="none", then weighted' if token else "mean only") + "; logits recomputed in backward (8NVH)"

    def make(filter_eps: str | None) -> Callable[[Problem], Call]:
        def of(problem: Problem) -> Call:
            from cut_cross_entropy import linear_cross_entropy as cut

            hidden, weight = problem.head
            options = {"ignore_index": IGNORED, "reduction": reduction, "filter_eps": filter_eps}
            return per_token(problem, lambda: cut(hidden, weight, problem.targets, **options), reduction)

        return of

    common = {"package": "cut_cross_entropy", "cuda_only": True}
    if logprob:
        return [
            Arm(name="cut-cross-entropy", make=make(None), computes='reduction="none", negated; logits stay on the chip',
                sums="-", operations=("logprob",), **common)
        ]  # fmt: skip
    exact, filtered = (
        "both gradients summed in bfloat16",
        "gradients below 2^-12 left out, the others summed in bfloat16",
    )
    return [
        Arm(name="cut-cross-entropy, no filter", make=make(None), computes=how, sums="bf16", inexact=exact, **common),
        Arm(name="cut-cross-entropy, default", make=make("high"), computes=f"{how}; small gradients left out",
            sums="bf16", inexact=filtered, **common),
    ]  # fmt: skip


def _quack(case: Case) -> list[Arm]:
    token = case.weights == "token"
    reduction = "none" if token else "mean"

    def fused(problem: Problem) -> Call:
        from quack.linear_cross_entropy import chunked_linear_cross_entropy as quack

        hidden, weight = problem.head
        return lambda: quack(hidden, weight, problem.targets, ignore_index=IGNORED, reduction="mean")

    def given(problem: Problem) -> Call:
        from quack.cross_entropy import cross_entropy as quack

        options = {"ignore_index": IGNORED, "reduction": reduction, "inplace_backward": True}
        return per_token(problem, lambda: quack(problem.given, problem.targets, **options), reduction)

    common = {"package": "quack", "cuda_only": True}
    how = 'reduction="none", then weighted' if token else "mean only"
    return [
        Arm(name="quack-kernels", make=fused, computes="mean only, in chunks of 4,096 rows", sums="fp32", weights=("uniform",),
            **common),
        Arm(name="quack-kernels, given logits", make=given, computes=f"{how}; gradient in the logits' memory", sums="-",
            operations=("logits",), **common),
    ]  # fmt: skip

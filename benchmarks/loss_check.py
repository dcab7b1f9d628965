"""Before a time counts: loss and gradients of an arm against float64, on the very tensors that are timed.

N rows, V vocabulary, H width; g token weights, D the number of targets.

The truth is computed in float64, some rows at a time: logits, log-sum-exp, both gradients. Beside it runs the plain form
in the case's dtype: logits rounded to it once, softmax in float32, gradient of the logits rounded to it, products of
exact sums rounded once. Its distance from the truth is the plain path's own error, and the measure of the others:

    an arm may be off by twice the plain path's own error, or by FLOOR where that is less than rounding may give

Twice, because a fused loss rounds once more than the plain one (g times hidden, or g times the gradient). For gradients
three distances are taken. "gradient of x" is |a - b| / |b|. "... away from targets" is the same over the rows of weight
(entries of logits) that no target names: there the gradient is the softmax alone, which in the whole norm drowns beside
the targets' ones, so that a kernel could leave it out unseen. "... scale" is |<a, b> / <b, b> - 1|: rounding averages
out in it, so that a gradient 1% too large does not hide in 2% of noise.

Some peers are less exact by choice: they sum a gradient in bfloat16, or leave out small ones. They say so (`Arm.inexact`)
and are held to LOOSE; the report marks them, and prints what they were off by. For log-probabilities the same word means
bfloat16 logits.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.loss_cases import IGNORED, Problem, loss_row_chunks

TIMES_PLAIN = 2.0
# Relative, but for "logprob" (root mean square, nats). float32: a BLAS that sums V terms in another order; bfloat16: a
# rounding more or less where the plain path happens to have a small error; 1/D and the like, the same in every row and
# stored twice, may be off by twice 2^-9 in scale.
FLOOR = {
    torch.float32: {"loss": 1e-5, "gradient": 2e-5, "away": 1e-4, "scale": 1e-5, "logprob": 1e-4},
    torch.bfloat16: {"loss": 1e-4, "gradient": 4e-3, "away": 5e-3, "scale": 5e-3, "logprob": 1e-4},
}
# "away" and "logprob" are not here: the first is what such peers leave out; the second has twice the plain error.
LOOSE = {"loss": 1e-2, "gradient": 0.1, "scale": 2e-2}
COMPARED_ELEMENTS = 1 << 25


@dataclass
class Reference:
    """The truth of a problem.

    loss: 0-d float64.  nll: (N,) float64, 0 where ignored.  gradients: float32, one per input, exact to its rounding.
    targeted: (V,) bool, the rows of weight that some target names; None without a weight.
    plain: the plain path's own errors.
    """

    loss: Tensor
    nll: Tensor
    gradients: tuple[Tensor, ...] = ()
    targeted: Tensor | None = None
    plain: dict[str, float] = field(default_factory=dict)


@torch.no_grad()
def reference_of(problem: Problem) -> Reference:
    """Truth and the plain path's own errors."""
    case, keep = problem.case, problem.targets != IGNORED
    g = keep.double() if problem.token_weight is None else problem.token_weight.double()
    factor = g / keep.sum()  # (N,)
    wants = case.operation in ("fused", "logits")
    truth = tuple(torch.zeros_like(x, dtype=torch.float64) for x in problem.inputs) if case.operation == "fused" else ()
    if case.operation == "logits":
        truth = (torch.zeros_like(problem.given, dtype=torch.float32),)
    plain = tuple(torch.zeros_like(x) for x in truth)
    matrix = None if case.operation == "logits" else problem.head[1].double()
    nll, plain_nll = (torch.zeros(case.rows, dtype=torch.float64, device=g.device) for _ in range(2))
    for rows in loss_row_chunks(keep, case.vocabulary):
        exact = problem.given[rows].double() if matrix is None else problem.head[0][rows].double() @ matrix.t()
        stored = exact.to(case.dtype) if case.operation != "logits" else problem.given[rows]
        targets = problem.targets[rows]
        nll[rows], grad = _row_losses(exact, targets, factor[rows] if wants else None)
        plain_nll[rows], plain_grad = _row_losses(stored.float(), targets, factor[rows].float() if wants else None)
        del exact, stored
        if wants:
            _add_gradients(truth, grad, rows, problem, matrix)
            _add_gradients(plain, plain_grad.to(case.dtype).double(), rows, problem, matrix)
    reference = Reference((factor * nll).sum(), nll, tuple(x.float() for x in truth))
    if matrix is not None:
        reference.targeted = torch.zeros(case.vocabulary, dtype=torch.bool, device=g.device)
        reference.targeted[problem.targets[keep]] = True
    if case.operation == "logprob":
        reference.plain = errors(problem, reference, -plain_nll, ())
    else:
        del truth
        rounded = tuple(x.to(case.dtype) for x in plain)
        reference.plain = errors(problem, reference, (factor * plain_nll).sum(), rounded)
    return reference


def _row_losses(logits: Tensor, targets: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor]:
    """logits (n, V), targets (n,), factor (n,) -> nll (n,), gradient (n, V); without factor the gradient is empty."""
    log_sum = logits.logsumexp(-1)
    nll = log_sum - logits.gather(1, targets[:, None])[:, 0]
    if factor is None:
        return nll.double(), logits.new_empty(0)
    grad = (logits - log_sum[:, None]).exp_()
    grad.scatter_(1, targets[:, None], torch.expm1(-nll)[:, None])
    return nll.double(), grad.mul_(factor[:, None])


def _add_gradients(
    total: tuple[Tensor, ...], grad: Tensor, rows: Tensor, problem: Problem, matrix: Tensor | None
) -> None:
    """Add what some rows' gradient of the logits (n, V) gives to the inputs' gradients."""
    if matrix is None:
        total[0][rows] = grad.to(total[0].dtype)
        return
    total[0][rows] = grad @ matrix
    total[1].addmm_(grad.t(), problem.head[0][rows].double())


@torch.no_grad()
def errors(problem: Problem, reference: Reference, result: Tensor, gradients: tuple[Tensor, ...]) -> dict[str, float]:
    """What an arm's result is off by: name -> error, as the head of this file defines them. NaN stays NaN.

    Args:
        result: 0-d loss, or (N,) log-probabilities.
        gradients: of the problem's inputs; empty for a forward pass.
    """
    if problem.case.operation == "logprob":
        keep = problem.targets != IGNORED
        gap = (result.double() + reference.nll)[keep]
        return {"logprob": float(gap.square().mean().sqrt()), "logprob, largest": float(gap.abs().max())}
    found = {"loss": abs(float(result.double() / reference.loss) - 1)}
    names = ("logits",) if problem.case.operation == "logits" else ("hidden", "weight")
    for name, ours, truth in zip(names, gradients, reference.gradients, strict=False):
        away = reference.targeted if name == "weight" else problem.targets if name == "logits" else None
        found.update(_gradient_errors(f"gradient of {name}", ours, truth, away))
    return found


def _gradient_errors(name: str, ours: Tensor, truth: Tensor, away: Tensor | None) -> dict[str, float]:
    """away: (rows,) bool, rows that count as targeted; or int64, the column of each row that does; or None."""
    sums = torch.zeros(5, dtype=torch.float64, device=truth.device)  # |a-b|^2, |b|^2, <a,b>, the first two away
    step = max(1, COMPARED_ELEMENTS // truth.shape[1])
    for start in range(0, len(truth), step):
        a, b = ours[start : start + step].double(), truth[start : start + step].double()
        gap = a - b
        sums[:3] += torch.stack([gap.square().sum(), b.square().sum(), (a * b).sum()])
        if away is None:
            continue
        part = away[start : start + step]
        if part.dtype == torch.bool:
            gap, b = gap[~part], b[~part]
        else:
            gap, b = (x.scatter(1, part.clamp(min=0)[:, None], 0.0) for x in (gap, b))
        sums[3:] += torch.stack([gap.square().sum(), b.square().sum()])
    gap2, norm2, inner, gap2_away, norm2_away = sums.tolist()
    found = {name: (gap2 / norm2) ** 0.5, f"{name}, scale": abs(inner / norm2 - 1)}
    if norm2_away > 0:
        found[f"{name}, away from targets"] = (gap2_away / norm2_away) ** 0.5
    return found


def bounds(problem: Problem, reference: Reference, *, inexact: bool) -> dict[str, float]:
    """name -> largest error that passes."""
    floor = FLOOR[problem.case.dtype]
    result = {}
    for name, plain in reference.plain.items():
        kind = next((k for k in ("away", "scale", "gradient") if k in name), name)
        if kind == "logprob" and not inexact:
            result[name] = floor[kind]  # the contract is float32 logits, which the plain path does not have
        elif inexact and kind in LOOSE:
            result[name] = max(LOOSE[kind], TIMES_PLAIN * plain)
        elif kind in floor and not (inexact and kind == "away"):
            result[name] = max(floor[kind], TIMES_PLAIN * plain)
    return result


def refusal(found: dict[str, float], allowed: dict[str, float]) -> str:
    """Why the arm's times may not be printed; empty when they may. A missing figure is a refusal, and so is NaN."""
    worst = [
        f"{name} is off by {found.get(name, float('nan')):.2g} (bound {bound:.2g})"
        for name, bound in allowed.items()
        if not found.get(name, float("nan")) <= bound
    ]
    return "; ".join(worst)

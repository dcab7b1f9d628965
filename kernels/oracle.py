"""The equations in plain autograd, whole logits and all: what every implementation is measured against.

Give it float64 for the truth, or the dtype of a fast path for the plain path's own error.
"""

from __future__ import annotations

import torch
from torch import Tensor


def weighted_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    token_weight: Tensor | None = None,
    *,
    denominator: float | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """sum(token_weight * nll) / denominator of logits (N, V), and nll (N,)."""
    keep = targets != ignore_index
    wide = logits if logits.dtype == torch.float64 else logits.float()
    logprob = wide.log_softmax(-1).gather(1, targets.where(keep, 0)[:, None])[:, 0]
    nll = -logprob.where(keep, 0.0)
    weight = keep if token_weight is None else token_weight.where(keep, 0.0)
    count = max(int(keep.sum()), 1) if denominator is None else denominator
    return (weight * nll).sum() / count, nll.detach()


def linear_weighted_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weight: Tensor | None = None,
    *,
    denominator: float | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """The same of logits = hidden (N, H) @ weight (V, H)^T."""
    return weighted_cross_entropy(
        hidden @ weight.T, targets, token_weight, denominator=denominator, ignore_index=ignore_index
    )


def token_weights(scores: list[float], *, alpha: float = 1.0, length_scale: bool = True) -> Tensor:
    """Eqs. 3-4 for one caption of log-probabilities, float64."""
    w = [1.0 if alpha == 0 else float(-torch.expm1(torch.tensor(r, dtype=torch.float64))) ** alpha for r in scores]
    if sum(w) == 0:
        w = [1.0] * len(w)
    k = len(w) if length_scale else 1
    return torch.tensor([k * x / sum(w) for x in w], dtype=torch.float64)

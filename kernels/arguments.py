"""Checks and defaults shared by the doors: what an implementation may take for granted.

N loss tokens, V vocabulary, H width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from .weights import kept_token_weights

DTYPES = (torch.float32, torch.bfloat16, torch.float64)  # float64 for oracles and gradcheck


@dataclass(frozen=True, kw_only=True)
class LossTerms:
    """What the loss multiplies and divides by, resolved.

    targets: (N,) int64, 0 where ignored.  keep: (N,) bool, false where ignored.
    token_weight: (N,), 0 where ignored.  denominator: 0-d, on the device of targets.
    The last two have the dtype of the reductions.
    """

    targets: Tensor
    keep: Tensor
    token_weight: Tensor
    denominator: Tensor

    def weighted_mean(self, nll: Tensor) -> Tensor:
        """sum(g * nll) / denominator of nll (N,); a weight of 0 counts for nothing even where the nll is infinite."""
        return (self.token_weight * nll).where(self.token_weight != 0, 0.0).sum() / self.denominator


def reduction_dtype(dtype: torch.dtype) -> torch.dtype:
    """Reductions run in float32, or float64 for float64 input."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_logits(logits: Tensor) -> None:
    """logits (N, V)."""
    if logits.ndim != 2 or logits.dtype not in DTYPES:
        raise ValueError(f"logits must be (N, V) {_names(DTYPES)}, not {logits.dtype} of {tuple(logits.shape)}")


def check_linear(hidden: Tensor, weight: Tensor) -> None:
    """hidden (N, H), weight (V, H); their dtypes may differ."""
    for name, matrix, shape in (("hidden", hidden, "(N, H)"), ("weight", weight, "(V, H)")):
        if matrix.ndim != 2 or matrix.dtype not in DTYPES:
            raise ValueError(f"{name} must be {shape} {_names(DTYPES)}, not {matrix.dtype} of {tuple(matrix.shape)}")
    if hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden has width {hidden.shape[1]} and weight {weight.shape[1]}: they must agree")


def check_chunk_rows(chunk_rows: int | None) -> None:
    """None or a positive number of rows."""
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, not {chunk_rows}")


def kept_targets(targets: Tensor, *, rows: int, vocabulary: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """(targets as int64 with 0 where ignored, keep). The range is checked where that is free: on the CPU."""
    if targets.shape != (rows,) or targets.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"targets must be ({rows},) int64, not {targets.dtype} of {tuple(targets.shape)}")
    keep = targets != ignore_index
    safe = targets.long().where(keep, 0)
    if safe.device.type == "cpu":
        outside = (safe < 0) | (safe >= vocabulary)
        if outside.any():
            first = int(outside.nonzero()[0])
            raise ValueError(
                f"targets[{first}] is {targets[first].item()}: it must be in [0, {vocabulary}) "
                f"or ignore_index ({ignore_index})"
            )
    return safe, keep


def loss_terms(
    targets: Tensor,
    keep: Tensor,
    token_weight: Tensor | None,
    *,
    denominator: float | Tensor | None,
    scores: Tensor | None,
    cu_seqlens: Tensor | None,
    kind: str,
    alpha: float,
    length_scale: bool,
    dtype: torch.dtype,
    segment_weights: Callable[..., Tensor] | None = None,
) -> LossTerms:
    """Resolve weights and denominator; `targets` and `keep` come from `kept_targets`, dtype from `reduction_dtype`.
    `segment_weights` is the implementation's own form of Eqs. 3-4, where it has one."""
    if (scores is None) != (cu_seqlens is None):
        raise ValueError("scores and cu_seqlens go together: give both or neither")
    if scores is not None and cu_seqlens is not None:
        if token_weight is not None:
            raise ValueError("give token_weight or scores, not both")
        _check_per_token("scores", scores, targets)
        token_weight = kept_token_weights(
            scores, cu_seqlens, keep, kind=kind, alpha=alpha, length_scale=length_scale, compute=segment_weights
        )
    if token_weight is None:
        token_weight = keep
    _check_per_token("token_weight", token_weight, targets)
    token_weight = token_weight.detach().to(dtype).where(keep, 0.0)
    return LossTerms(
        targets=targets, keep=keep, token_weight=token_weight, denominator=_denominator(denominator, keep, dtype)
    )


def _check_per_token(name: str, values: Tensor, targets: Tensor) -> None:
    if values.shape != targets.shape:
        raise ValueError(
            f"{name} has shape {tuple(values.shape)} and targets {tuple(targets.shape)}: one value per target"
        )


def _denominator(value: float | Tensor | None, keep: Tensor, dtype: torch.dtype) -> Tensor:
    """0-d tensor beside `keep`. One on an accelerator is not read back: below 1 it becomes NaN, and so the loss."""
    if value is None:
        return keep.sum().clamp(min=1).to(dtype)
    if isinstance(value, Tensor):
        if value.ndim != 0:
            raise ValueError(f"denominator must be a number or a 0-d tensor, not of shape {tuple(value.shape)}")
        if value.device.type != "cpu":
            value = value.detach().to(keep.device, dtype)
            return value.where(value >= 1, math.nan)
        value = value.item()
    if not isinstance(value, Real) or not 1 <= value < math.inf:
        raise ValueError(
            f"denominator must be finite and at least 1, not {value}: it counts the loss tokens of the batch"
        )
    return torch.full((), float(value), dtype=dtype, device=keep.device)


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return "/".join(str(dtype).removeprefix("torch.") for dtype in dtypes)

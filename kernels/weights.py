"""Token weights from per-token scores: Eqs. 3 and 4 of PRIOR.

N tokens, S segments (captions).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

KINDS = ("logprob", "importance")
LOGPROB_SLACK = 1e-6  # rounding of the scorer; log-probabilities beyond it are refused


def token_weights(
    scores: Tensor, cu_seqlens: Tensor, *, kind: str = "logprob", alpha: float = 1.0, length_scale: bool = True
) -> Tensor:
    """Weights g of every token, one caption per segment.

        w_i = (1 - exp(r_i))^alpha      kind="logprob": scores are r_i = log p_r(t_i | t_<i), natural log
        w_i = scores_i                  kind="importance": used as it is, alpha has no effect
        g_i = (k * w_i) / sum_j w_j     over the k tokens of the caption; w_i / sum_j w_j without length_scale

    Every w_i is divided by the caption's largest before the power, which leaves g unchanged and keeps a large alpha
    from underflowing. alpha = 0 gives w = 1 everywhere (0^0 = 1); a caption whose w are all 0 gets w = 1 as well.

    Args:
        scores: (N,), floating. "logprob": <= 0, -inf allowed (w = 1), up to 1e-6 above 0 is taken as rounding.
            "importance": >= 0 and finite.
        cu_seqlens: (S+1,) int32 or int64, from 0 to N, non-decreasing; a segment may be empty.
        alpha: >= 0 and finite.

    Returns:
        (N,) float32, computed in float64 and rounded once (float64 when the scores are float64). Not differentiable.

    Raises:
        ValueError: a NaN, positive (logprob), negative or infinite (importance) score, named by position; boundaries
            that do not run from 0 to N; unknown kind; alpha out of range; wrong shapes or dtypes.

    The checks read one pair of flags back when the scores live on an accelerator.
    """
    return kept_token_weights(scores, cu_seqlens, None, kind=kind, alpha=alpha, length_scale=length_scale)


def kept_token_weights(
    scores: Tensor,
    cu_seqlens: Tensor,
    keep: Tensor | None,
    *,
    kind: str,
    alpha: float,
    length_scale: bool,
    compute: Callable[..., Tensor] | None = None,
) -> Tensor:
    """`token_weights` over the tokens where keep (N,) bool is true: the others get 0, count neither in k nor in
    sum(w), and their scores are not looked at (NaN is fine there). `compute` stands in for `segment_weights`."""
    _check_arguments(scores, cu_seqlens, kind=kind, alpha=alpha)
    if keep is None:
        keep = torch.ones_like(scores, dtype=torch.bool)
    _check_values(scores, cu_seqlens, keep, kind=kind)
    return (compute or segment_weights)(scores, cu_seqlens, keep, kind=kind, alpha=alpha, length_scale=length_scale)


@torch.no_grad()
def segment_weights(
    scores: Tensor, cu_seqlens: Tensor, keep: Tensor, *, kind: str, alpha: float, length_scale: bool
) -> Tensor:
    """Eqs. 3 and 4 in plain torch; arguments as in `token_weights`, checked, and keep (N,) bool."""
    segments, lengths = cu_seqlens.numel() - 1, cu_seqlens.diff()
    segment = torch.repeat_interleave(  # (N,): the caption of each token
        torch.arange(segments, device=scores.device), lengths, output_size=scores.numel()
    )

    def total(values: Tensor) -> Tensor:  # (N,) -> (S,)
        return values.new_zeros(segments).index_add_(0, segment, values)

    importance = scores.double()
    if kind == "logprob":
        importance = torch.expm1(importance.clamp(max=0)).abs()  # keeps its precision where p_r is near 1
    importance = importance.where(keep, 0.0)
    largest = importance.new_zeros(segments).scatter_reduce_(0, segment, importance, "amax")[segment]
    w = (importance / largest).where(largest > 0, 1.0)
    if kind == "logprob":
        w = w.pow(alpha)
    w = w.where(keep, 0.0)
    k = total(keep.double())[segment] if length_scale else 1.0
    weights = ((k * w) / total(w)[segment]).where(keep, 0.0)
    return weights if scores.dtype == torch.float64 else weights.float()


def _check_arguments(scores: Tensor, cu_seqlens: Tensor, *, kind: str, alpha: float) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, not {kind!r}")
    if not 0 <= alpha < math.inf:
        raise ValueError(f"alpha must be finite and at least 0, not {alpha}")
    if scores.ndim != 1 or not scores.is_floating_point():
        raise ValueError(f"scores must be a floating (N,) tensor, not {scores.dtype} of shape {tuple(scores.shape)}")
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() == 0 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens must be (S+1,) int32, not {cu_seqlens.dtype} of {tuple(cu_seqlens.shape)}")


def _check_values(scores: Tensor, cu_seqlens: Tensor, keep: Tensor, *, kind: str) -> None:
    """Boundaries and scores, with one read back from the device."""
    if kind == "logprob":
        good, wanted = scores <= LOGPROB_SLACK, "at most 0 (they are log-probabilities)"  # NaN compares false
    else:
        good, wanted = (scores >= 0) & scores.isfinite(), "finite and at least 0 (they are importances)"
    bad = keep & ~good
    broken = (cu_seqlens[0] != 0) | (cu_seqlens[-1] != scores.numel()) | (cu_seqlens.diff() < 0).any()
    any_bad, any_broken = torch.stack([bad.any(), broken]).tolist()
    if any_broken:
        raise ValueError(f"cu_seqlens must run from 0 to N = {scores.numel()} without falling: {cu_seqlens.tolist()}")
    if any_bad:
        first = int(bad.nonzero()[0])
        raise ValueError(f"scores[{first}] is {scores[first].item()}: scores must be {wanted}; score the shard again")

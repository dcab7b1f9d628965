"""The public door: four functions, several implementations behind `impl=`.

N loss tokens, V vocabulary, H width, S segments (captions). The loss is

    loss = sum_i token_weight_i * nll_i / denominator        nll_i = -log softmax(logits_i)[target_i]

`impl`: "torch" runs everywhere and is the plain twin of the others; "auto" takes the fastest that can run here and
never fails; "triton" and "cuda" raise RuntimeError saying why where they cannot run. choice.py decides.

Every function here takes float32 or bfloat16 (and float64, for oracles), raises ValueError for wrong shapes, dtypes or
values, and is not affected by autocast: products run in hidden's dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import check_chunk_rows, check_linear, check_logits, kept_targets, loss_terms, reduction_dtype
from .choice import implementation


def weighted_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    token_weight: Tensor | None = None,
    *,
    denominator: float | Tensor | None = None,
    ignore_index: int = -100,
    impl: str = "auto",
    scores: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    kind: str = "logprob",
    alpha: float = 1.0,
    length_scale: bool = True,
    chunk_rows: int | None = None,
    compact: bool = True,
) -> tuple[Tensor, Tensor]:
    """Token-weighted cross entropy of given logits.

    Args:
        logits: (N, V). May be overwritten when they require a gradient.
        targets: (N,) int64 (int32 is taken too), in [0, V) or `ignore_index`. The range is checked on the CPU; on a
            GPU, "triton" and "cuda" give NaN for a target beyond it.
        token_weight: (N,), used in float32, not differentiated. None means 1 everywhere, bit for bit. A weight of 0
            drops the token's gradient, never its nll. Values at ignored positions are not looked at.
        denominator: a finite number or a 0-d tensor, at least 1. None: the number of targets that are not ignored. A
            0-d tensor on an accelerator is not read back; below 1 it makes the loss NaN.
        scores, cu_seqlens, kind, alpha, length_scale: in place of token_weight, as in `token_weights`. Ignored
            positions count neither in a caption's k nor in its sum of w; their scores may be NaN.
        chunk_rows: rows handled at a time; None chooses by V and device, never by N.
        compact: leave out rows without target, and the gradient of rows of weight 0, also where finding them makes the
            host wait for the device once ("triton" and "cuda"). False, for callers whose rows all carry loss, never
            waits; the results are the same.

    Returns:
        loss: 0-d float32. 0, still connected to logits, when every target is ignored.
        nll: (N,) float32, detached, 0 at ignored positions.
        Both are float64 for float64 logits. Any upstream gradient and repeated backwards are honoured.
    """
    check_logits(logits)
    check_chunk_rows(chunk_rows)
    chosen = implementation(impl, logits.device, logits.dtype)
    rows, vocabulary = logits.shape
    terms = loss_terms(
        *kept_targets(targets, rows=rows, vocabulary=vocabulary, ignore_index=ignore_index),
        token_weight,
        denominator=denominator,
        scores=scores,
        cu_seqlens=cu_seqlens,
        kind=kind,
        alpha=alpha,
        length_scale=length_scale,
        dtype=reduction_dtype(logits.dtype),
        segment_weights=chosen.segment_weights,
    )
    with torch.autocast(logits.device.type, enabled=False):
        return chosen.weighted_cross_entropy(logits, terms, chunk_rows=chunk_rows, compact=compact)


def linear_weighted_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weight: Tensor | None = None,
    *,
    denominator: float | Tensor | None = None,
    ignore_index: int = -100,
    impl: str = "auto",
    scores: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    kind: str = "logprob",
    alpha: float = 1.0,
    length_scale: bool = True,
    chunk_rows: int | None = None,
    compact: bool = True,
) -> tuple[Tensor, Tensor]:
    """The same loss of logits = hidden @ weight^T, which never exist as a whole.

    Products run in hidden's dtype and reductions in float32; the gradient of weight is accumulated in float32 and
    returned in weight's dtype. Gradients are computed during the forward pass, chunk by chunk and only for what
    requires them; 1/denominator and the upstream gradient are applied in backward, without a device sync.

    Args:
        hidden: (N, H).
        weight: (V, H); its dtype may differ from hidden's (it is then copied in hidden's dtype).
        Others: as in `weighted_cross_entropy`.

    Returns:
        (loss, nll) as in `weighted_cross_entropy`; with no target at all the loss is 0, still connected to hidden and
        weight.
    """
    check_linear(hidden, weight)
    check_chunk_rows(chunk_rows)
    chosen = implementation(impl, hidden.device, hidden.dtype)
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    terms = loss_terms(
        *kept_targets(targets, rows=rows, vocabulary=vocabulary, ignore_index=ignore_index),
        token_weight,
        denominator=denominator,
        scores=scores,
        cu_seqlens=cu_seqlens,
        kind=kind,
        alpha=alpha,
        length_scale=length_scale,
        dtype=reduction_dtype(hidden.dtype),
        segment_weights=chosen.segment_weights,
    )
    with torch.autocast(hidden.device.type, enabled=False):
        return chosen.linear_weighted_cross_entropy(hidden, weight, terms, chunk_rows=chunk_rows, compact=compact)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    impl: str = "auto",
    chunk_rows: int | None = None,
    compact: bool = True,
) -> Tensor:
    """log softmax(hidden @ weight^T)[target] in nats, with products and logits in float32 whatever the inputs' dtype:
    bfloat16 logits would shift w = 1 - p by 5% at p = 0.9.

    Args: as in `linear_weighted_cross_entropy`.

    Returns:
        (N,) float32 (float64 for float64 hidden), at most 0, detached, 0 at ignored positions.
    """
    check_linear(hidden, weight)
    check_chunk_rows(chunk_rows)
    chosen = implementation(impl, hidden.device, hidden.dtype)
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    targets, keep = kept_targets(targets, rows=rows, vocabulary=vocabulary, ignore_index=ignore_index)
    with torch.autocast(hidden.device.type, enabled=False):
        return chosen.linear_logprob(hidden, weight, targets, keep, chunk_rows=chunk_rows, compact=compact)

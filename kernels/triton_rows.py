"""Triton kernels: cross entropy of given logits row by row, scaling in place, Eqs. 3-4 per caption.

n rows, V vocabulary, S segments (captions), N tokens. Everything is reduced in float32 (Eqs. 3-4 in float64); bfloat16 is
widened right after each load and narrowed just before each store. No libdevice call is made by hand, so that the same
source runs in Triton's interpreter on a CPU.
"""

# Kernels are called by Triton, with its own arguments and types.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

LOWEST = tl.constexpr(-3.0e38)  # finite: a row may begin with logits of -inf, and -inf - -inf is NaN
SERIES = tl.constexpr(0.25)  # below it expm1 is summed as a series; twelve terms are exact to float64 there

# A program holds one block of its row in registers, 32 logits a thread: at 63 registers in bfloat16 four programs fit on a
# multiprocessor, 64 KB of loads in flight where 23 KB hide the latency, and one's barriers are the others' time. Chosen by
# V alone, never by the number of rows.
WIDEST_BLOCK = 8192
ELEMENTS_PER_THREAD = 32
TOKENS_PER_BLOCK = 256  # of a caption, in float64
SCALED_PER_BLOCK, SCALE_WARPS = 4096, 8


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why these kernels cannot run on tensors of `dtype` there; None when they can."""
    if dtype not in (torch.float32, torch.bfloat16):
        return f"it takes float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if not isinstance(cross_entropy_kernel, JITFunction):
        return None if device.type == "cpu" else "TRITON_INTERPRET is set, and the interpreter takes tensors on the CPU"
    if device.type != "cuda":
        return f"tensors are on the {device.type.upper()}, and Triton needs a CUDA device (or TRITON_INTERPRET=1)"
    return None


def row_block(vocabulary: int) -> tuple[int, int]:
    """(columns per block, warps per program) for a row of V logits."""
    block = min(WIDEST_BLOCK, max(128, triton.next_power_of_2(vocabulary)))
    return block, max(1, block // (32 * ELEMENTS_PER_THREAD))


def cross_entropy_rows(logits: Tensor, targets: Tensor, factor: Tensor, nll: Tensor, *, gradient: bool) -> None:
    """nll_i = -log softmax(logits_i)[target_i], and with `gradient` logits_i <- factor_i (softmax(logits_i) - onehot).

    Args:
        logits: (n, V) float32 or bfloat16, columns contiguous, rows strided as you like.
        targets: (n,) int64; negative means none: nll 0, and the row becomes 0. V or above makes the nll NaN.
        factor: (n,) float32. Where it is 0 the row becomes 0, whatever was in it.
        nll: (n,) float32, written.
    """
    rows, vocabulary = logits.shape
    if rows == 0:
        return
    block, warps = row_block(vocabulary)
    with _on(logits):
        cross_entropy_kernel[(rows,)](
            logits, logits.stride(0), targets, factor, nll, vocabulary, GRADIENT=gradient, BLOCK=block, num_warps=warps
        )  # fmt: skip


def scale_(values: Tensor, scale: Tensor) -> None:
    """values (n, V) *= scale, a 0-d float32 beside them. Nothing is read or written when it is 1: no host need know."""
    rows, columns = values.shape
    if values.numel() == 0:
        return
    blocks = triton.cdiv(columns, SCALED_PER_BLOCK)
    with _on(values):
        scale_kernel[(rows * blocks,)](
            values, values.stride(0), scale, columns, blocks, BLOCK=SCALED_PER_BLOCK, num_warps=SCALE_WARPS
        )


def segment_weights(
    scores: Tensor, cu_seqlens: Tensor, keep: Tensor, *, kind: str, alpha: float, length_scale: bool
) -> Tensor:
    """Eqs. 3 and 4 over the kept tokens of every segment; arguments and result as in `weights.segment_weights`."""
    scores, cu_seqlens, keep = scores.contiguous(), cu_seqlens.contiguous(), keep.contiguous()
    weights = torch.zeros_like(scores, dtype=torch.float32)
    segments = cu_seqlens.numel() - 1
    if segments and scores.numel():
        with _on(scores):
            logprob = kind == "logprob"  # importances are not raised to a power
            segment_weights_kernel[(segments,)](
                scores, cu_seqlens, keep, weights, ALPHA=float(alpha) if logprob else 1.0, LOGPROB=logprob,
                LENGTH_SCALE=length_scale, BLOCK=TOKENS_PER_BLOCK,
            )  # fmt: skip
    return weights


def _on(tensor: Tensor):
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)


@triton.jit
def _expm1(x):
    """e^x - 1 for x <= 0 without cancellation near 0: the series x (1 + x/2 (1 + x/3 (...))), by Horner's rule."""
    near = tl.maximum(x, -SERIES)
    total = near * 0 + 1
    for term in tl.static_range(12, 1, -1):
        total = 1 + near * total / term
    return tl.where(x > -SERIES, near * total, tl.exp(x) - 1)


@triton.jit
def _online(x, largest, total):
    """(largest, sum of exp(. - largest)) of a row, carried on over the block x."""
    now = tl.maximum(largest, tl.max(x, 0))
    return now, total * tl.exp(largest - now) + tl.sum(tl.exp(x - now), 0)


@triton.jit
def _store_gradient(at, x, columns, target, share, largest, at_target, mask):
    """factor (p - onehot) in place of the logits x, with share = factor / sum exp(x - largest). The target's own value was
    made without cancellation; x - log sum exp(x) would lose what a large logit has no bits for."""
    slope = tl.where(columns == target, at_target, share * tl.exp(x - largest))
    tl.store(at, slope.to(at.dtype.element_ty), mask=mask)


@triton.jit
def _store_zeros(row, vocabulary, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    for start in range(0, vocabulary, BLOCK):
        at = row + start + lanes
        tl.store(at, tl.zeros((BLOCK,), at.dtype.element_ty), mask=start + lanes < vocabulary)


@triton.jit
def cross_entropy_kernel(
    logits, row_stride, targets, factors, nlls, vocabulary, GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):
    """One row per program: a pass for max and sum, a second, backwards, for the gradient.

    Whole blocks come without a mask, so that their loads stay 16 bytes wide for a vocabulary of any size. The second pass
    runs backwards because what was read last is what the cache still holds.
    """
    index = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + index).to(tl.int32)  # no vocabulary needs more, and comparing costs half the registers
    factor = tl.load(factors + index)
    row = logits + index * row_stride
    if target < 0:
        tl.store(nlls + index, 0.0)
        if GRADIENT:
            _store_zeros(row, vocabulary, BLOCK)
    else:
        # A target beyond the vocabulary makes its nll NaN: nothing beside the row is read, and the loss tells.
        at_target = tl.load(row + target, mask=target < vocabulary, other=float("nan")).to(tl.float32)
        lanes = tl.arange(0, BLOCK)
        whole = vocabulary // BLOCK * BLOCK
        largest = tl.full((), LOWEST, tl.float32)
        total = tl.zeros((), tl.float32)
        for start in range(0, whole, BLOCK):
            x = tl.load(row + start + lanes).to(tl.float32)
            largest, total = _online(x, largest, total)
        tail = whole + lanes
        inside = tail < vocabulary
        if whole < vocabulary:
            x = tl.load(row + tail, mask=inside, other=-float("inf")).to(tl.float32)
            largest, total = _online(x, largest, total)
        nll = (largest - at_target) + tl.log(total)  # neither term is negative, and nothing underflows
        tl.store(nlls + index, nll)
        if GRADIENT:
            if factor == 0:
                _store_zeros(row, vocabulary, BLOCK)
            else:
                share = factor / total
                of_target = factor * _expm1(-nll)
                if whole < vocabulary:
                    x = tl.load(row + tail, mask=inside, other=0.0).to(tl.float32)
                    _store_gradient(row + tail, x, tail, target, share, largest, of_target, inside)
                for back in range(0, whole, BLOCK):
                    columns = whole - BLOCK - back + lanes
                    x = tl.load(row + columns).to(tl.float32)
                    _store_gradient(row + columns, x, columns, target, share, largest, of_target, None)


@triton.jit
def scale_kernel(values, row_stride, scale, columns, blocks, BLOCK: tl.constexpr):
    """values *= scale, one block of a row per program, which ends at once when the scale is 1."""
    factor = tl.load(scale)
    if factor != 1:
        index = tl.program_id(0).to(tl.int64)
        lanes = (index % blocks) * BLOCK + tl.arange(0, BLOCK)
        at = values + (index // blocks) * row_stride + lanes
        x = tl.load(at, mask=lanes < columns, other=0.0).to(tl.float32)
        tl.store(at, (x * factor).to(at.dtype.element_ty), mask=lanes < columns)


@triton.jit
def _importance(scores, keep, at, inside, LOGPROB: tl.constexpr):
    """(w before its division by the largest, kept or not) of a block of tokens, float64 and bool."""
    kept = tl.load(keep + at, mask=inside, other=0) != 0
    r = tl.load(scores + at, mask=inside, other=0.0).to(tl.float64)
    if LOGPROB:
        r = -_expm1(tl.minimum(tl.where(kept, r, 0.0), 0.0))
    return tl.where(kept, r, 0.0), kept


@triton.jit
def _power(w, kept, largest, ALPHA: tl.constexpr):
    """w^alpha with w divided by the caption's largest first; 1 where every w is 0, 0 where not kept."""
    w = tl.where(largest > 0, w / tl.where(largest > 0, largest, 1.0), 1.0)
    if ALPHA == 0:
        w = w * 0 + 1
    elif ALPHA != 1:
        w = tl.where(w > 0, tl.exp(ALPHA * tl.log(tl.where(w > 0, w, 1.0))), 0.0)
    return tl.where(kept, w, 0.0)


@triton.jit
def segment_weights_kernel(
    scores,
    edges,
    keep,
    weights,
    ALPHA: tl.constexpr,
    LOGPROB: tl.constexpr,
    LENGTH_SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One caption per program, three passes over its tokens: the largest w, sum w^alpha and k, k w / sum w."""
    segment = tl.program_id(0)
    first = tl.load(edges + segment).to(tl.int64)
    last = tl.load(edges + segment + 1).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    largest = tl.zeros((), tl.float64)
    for start in range(first, last, BLOCK):
        at = start + lanes
        w, kept = _importance(scores, keep, at, at < last, LOGPROB)
        largest = tl.maximum(largest, tl.max(w, 0))
    total = tl.zeros((), tl.float64)
    count = tl.zeros((), tl.float64)
    for start in range(first, last, BLOCK):
        at = start + lanes
        w, kept = _importance(scores, keep, at, at < last, LOGPROB)
        total += tl.sum(_power(w, kept, largest, ALPHA), 0)
        count += tl.sum(kept.to(tl.float64), 0)
    for start in range(first, last, BLOCK):
        at = start + lanes
        w, kept = _importance(scores, keep, at, at < last, LOGPROB)
        g = _power(w, kept, largest, ALPHA)
        if LENGTH_SCALE:
            g = g * count
        tl.store(weights + at, tl.where(kept, g / tl.where(total > 0, total, 1.0), 0.0).to(tl.float32), mask=at < last)

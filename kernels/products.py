"""Matrix products of the fused loss: operands in hidden's dtype, sums in float32 (float64 for float64).

n rows of a chunk, V vocabulary, H width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import reduction_dtype

VOCABULARY_RUN = 8192  # of a CPU: shorter runs cost time at V = 32,000, longer ones precision


def logits_of(states: Tensor, matrix: Tensor, *, out: Tensor) -> Tensor:
    """states (n, H) @ matrix (V, H)^T into `out` (n, V), of the operands' dtype or float32; rows of `out` may be strided."""
    if out.dtype == states.dtype:
        return torch.mm(states, matrix.t(), out=out)
    if (
        states.device.type == "cuda"
    ):  # bfloat16 operands multiply exactly in float32: nothing is lost, at bfloat16's speed
        return torch.mm(states, matrix.t(), out_dtype=out.dtype, out=out)
    return torch.mm(states.to(out.dtype), matrix.t().to(out.dtype), out=out)


def product_over_vocabulary(left: Tensor, right: Tensor) -> Tensor:
    """left (n, V) @ right (V, H) in left's dtype, summed in float32.

    On a CPU in runs of V: a BLAS may add up a product of fewer than four rows term after term, 3e-4 off at
    V = 128,256 and 9e-6 in runs.
    """
    wide = reduction_dtype(left.dtype)
    if left.device.type == "cuda":  # asked for in float32, so that partial sums of a split product are not rounded
        return left @ right if wide == left.dtype else torch.mm(left, right, out_dtype=wide).to(left.dtype)
    total = left.new_zeros(len(left), right.shape[1], dtype=wide)
    for columns, rows in zip(left.split(VOCABULARY_RUN, dim=1), right.split(VOCABULARY_RUN), strict=True):
        total += columns @ rows
    return total.to(left.dtype)


def add_product(total: Tensor, left: Tensor, right: Tensor, *, first: bool = False) -> None:
    """total (V, H) += left (V, n) @ right (n, H), accumulated in total's dtype; `first`: what total holds is nothing yet."""
    beta = 0 if first else 1
    if total.dtype == left.dtype:
        total.addmm_(left, right, beta=beta)
    elif total.device.type == "cuda":  # accumulates inside the product: total is read and written once
        torch.addmm(total, left, right, out_dtype=total.dtype, beta=beta, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype), beta=beta)

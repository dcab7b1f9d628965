"""impl="torch": chunks of rows, one softmax in place per chunk, gradients while the chunk is still at hand.

N loss tokens, n rows of a chunk, V vocabulary, H width. With p = softmax(logits),

    d loss / d logits = g / denominator * (p - onehot(target))

A row's factor commutes with both products, so g and 1/denominator multiply (n, H) matrices, never the (n, V) one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .arguments import LossTerms, reduction_dtype
from .products import add_product, product_over_vocabulary
from .weights import segment_weights as segment_weights

MIB = 1 << 20
# Bytes of a chunk's float32 logits, and its most rows. Measured on a CPU for V 8,192 to 128,256 and H 128 and 256: flat
# between 256 and 1,024 rows; below 128 the traffic of the (V, H) gradient shows. Accelerators need more rows before
# arithmetic is what bounds the products.
CPU_CHUNK = (128 * MIB, 512)
ACCELERATOR_CHUNK = (256 * MIB, 4096)

Rows = slice | Tensor  # a run of rows, or their positions


def weighted_cross_entropy(
    logits: Tensor, terms: LossTerms, *, chunk_rows: int | None, compact: bool
) -> tuple[Tensor, Tensor]:
    """logits (N, V) -> (loss, nll). The logits are kept for backward, not overwritten. `compact` changes nothing: where
    rows can be told apart for free they are, elsewhere never."""
    chunk_rows = chunk_rows or default_chunk_rows(logits.shape[1], logits.device)
    if torch.is_grad_enabled() and logits.requires_grad:
        return _CrossEntropy.apply(logits, terms, chunk_rows)
    nll = _nll_of_logits(logits.detach(), terms, chunk_rows)
    return terms.weighted_mean(nll), nll


def linear_weighted_cross_entropy(
    hidden: Tensor, weight: Tensor, terms: LossTerms, *, chunk_rows: int | None, compact: bool
) -> tuple[Tensor, Tensor]:
    """hidden (N, H), weight (V, H) -> (loss, nll)."""
    chunk_rows = chunk_rows or default_chunk_rows(weight.shape[0], weight.device)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _LinearCrossEntropy.apply(hidden, weight, terms, chunk_rows)
    with torch.no_grad():
        nll = _linear_nll(hidden, weight.to(hidden.dtype), terms.targets, terms.keep, chunk_rows)
    return terms.weighted_mean(nll), nll


@torch.no_grad()
def linear_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, keep: Tensor, *, chunk_rows: int | None, compact: bool
) -> Tensor:
    """(N,) log-probabilities; products and logits in float32 (float64 for float64 hidden)."""
    chunk_rows = chunk_rows or default_chunk_rows(weight.shape[0], weight.device)
    dtype = reduction_dtype(hidden.dtype)
    return _linear_nll(hidden.to(dtype), weight.to(dtype), targets, keep, chunk_rows).neg_()


def default_chunk_rows(vocabulary: int, device: torch.device) -> int:
    """Rows per chunk: a function of V and the device, never of N."""
    budget, most = CPU_CHUNK if device.type == "cpu" else ACCELERATOR_CHUNK
    return max(16, min(most, budget // (4 * vocabulary) // 16 * 16))


class _LinearCrossEntropy(torch.autograd.Function):
    """Keeps d nll_i / d hidden_i, (N, H) and still without g_i, and sum_i g_i d nll_i / d weight, (V, H)."""

    @staticmethod
    def forward(ctx, hidden, weight, terms, chunk_rows):
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=reduction_dtype(hidden.dtype)) if need_weight else None
        nll = hidden.new_zeros(len(hidden), dtype=reduction_dtype(hidden.dtype))
        matrix = weight.to(hidden.dtype)
        chunk = _Chunk(hidden, min(chunk_rows, len(hidden)), len(weight))
        for rows, active in _blocks(terms.keep, terms.token_weight != 0, chunk_rows):
            states, targets = hidden[rows], terms.targets[rows]
            chunk_nll = nll[rows] = chunk.softmax_nll(states, matrix, targets)
            if not active:
                continue
            grad_logits = chunk.minus_onehot(targets, chunk_nll)
            if grad_hidden is not None:
                grad_hidden[rows] = product_over_vocabulary(grad_logits, matrix)
            if grad_weight is not None:
                weighted = (states * terms.token_weight[rows, None]).to(hidden.dtype)
                add_product(grad_weight, grad_logits.t(), weighted)
        nll.masked_fill_(~terms.keep, 0)
        ctx.save_for_backward(grad_hidden, grad_weight, terms.token_weight, terms.denominator)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(nll)
        return terms.weighted_mean(nll), nll

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _):
        grad_hidden, grad_weight, token_weight, denominator = ctx.saved_tensors
        scale = grad_loss / denominator
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * (token_weight * scale)[:, None]).to(grad_hidden.dtype)
        if grad_weight is not None:  # one pass, no float32 copy; what is saved stays as it is for another backward
            grad_weight = torch.mul(grad_weight, scale, out=torch.empty_like(grad_weight, dtype=ctx.weight_dtype))
        return grad_hidden, grad_weight, None, None


class _CrossEntropy(torch.autograd.Function):
    """Keeps the logits and repeats their softmax in backward: no second (N, V) tensor before the gradient itself."""

    @staticmethod
    def forward(ctx, logits, terms, chunk_rows):
        nll = _nll_of_logits(logits, terms, chunk_rows)
        ctx.save_for_backward(logits, nll, terms.targets, terms.keep, terms.token_weight, terms.denominator)
        ctx.chunk_rows = chunk_rows
        ctx.mark_non_differentiable(nll)
        return terms.weighted_mean(nll), nll

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _):
        logits, nll, targets, keep, token_weight, denominator = ctx.saved_tensors
        factor = token_weight * (grad_loss / denominator)
        grad_logits = torch.zeros_like(logits)
        buffer = _chunk_probs(logits, ctx.chunk_rows)
        for rows, active in _blocks(keep, token_weight != 0, ctx.chunk_rows):
            if not active:
                continue
            chunk = logits[rows]
            probs = buffer[: len(chunk)]
            torch.softmax(chunk if chunk.dtype == probs.dtype else probs.copy_(chunk), -1, out=probs)
            probs.scatter_(1, targets[rows, None], torch.expm1(-nll[rows, None]))
            grad_logits[rows] = probs.mul_(factor[rows, None]).to(logits.dtype)
        return grad_logits, None, None


class _Chunk:
    """The buffers of one chunk, allocated once: pages touched for the first time cost as much as the softmax.

    products: (rows, V) in hidden's dtype.  probs: (rows, V) in the reductions' dtype, the same memory where they agree.
    """

    def __init__(self, hidden: Tensor, rows: int, vocabulary: int) -> None:
        wide = reduction_dtype(hidden.dtype)
        self.products = hidden.new_empty(rows, vocabulary)
        self.probs = self.products if wide == hidden.dtype else hidden.new_empty(rows, vocabulary, dtype=wide)

    def softmax_nll(self, states: Tensor, matrix: Tensor, targets: Tensor) -> Tensor:
        """states (n, H), matrix (V, H) -> nll (n,); leaves the softmax in `probs`."""
        logits = torch.mm(states, matrix.t(), out=self.products[: len(states)])
        return _softmax_nll(logits, targets, out=self.probs[: len(states)])

    def minus_onehot(self, targets: Tensor, nll: Tensor) -> Tensor:
        """p - onehot(target) (n, V) in hidden's dtype; p - 1 as expm1(-nll), which has no cancellation."""
        probs, products = self.probs[: len(targets)], self.products[: len(targets)]
        probs.scatter_(1, targets[:, None], torch.expm1(-nll)[:, None])
        return products if self.probs is self.products else products.copy_(probs)


def _softmax_nll(logits: Tensor, targets: Tensor, *, out: Tensor) -> Tensor:
    """logits (n, V) -> nll (n,); `out` becomes their softmax and may be the logits themselves.

    nll = (max - logit[target]) - log max p: neither term is negative, and nothing underflows.
    """
    if logits.dtype != out.dtype:
        logits = out.copy_(logits)
    below_largest = logits.amax(-1) - logits.gather(1, targets[:, None])[:, 0]
    torch.softmax(logits, -1, out=out)
    return below_largest - out.amax(-1).log()


def _linear_nll(hidden: Tensor, matrix: Tensor, targets: Tensor, keep: Tensor, chunk_rows: int) -> Tensor:
    """(N,), 0 where ignored; hidden (N, H) and matrix (V, H) of one dtype."""
    nll = hidden.new_zeros(len(hidden), dtype=reduction_dtype(hidden.dtype))
    chunk = _Chunk(hidden, min(chunk_rows, len(hidden)), len(matrix))
    for rows, _ in _blocks(keep, keep, chunk_rows):
        nll[rows] = chunk.softmax_nll(hidden[rows], matrix, targets[rows])
    return nll.masked_fill_(~keep, 0)


def _nll_of_logits(logits: Tensor, terms: LossTerms, chunk_rows: int) -> Tensor:
    """(N,), 0 where ignored."""
    nll = logits.new_zeros(len(logits), dtype=reduction_dtype(logits.dtype))
    probs = _chunk_probs(logits, chunk_rows)
    for rows, _ in _blocks(terms.keep, terms.keep, chunk_rows):
        chunk = logits[rows]
        nll[rows] = _softmax_nll(chunk, terms.targets[rows], out=probs[: len(chunk)])
    return nll.masked_fill_(~terms.keep, 0)


def _chunk_probs(logits: Tensor, chunk_rows: int) -> Tensor:
    """Room for the softmax of one chunk of logits (N, V)."""
    rows, vocabulary = logits.shape
    return logits.new_empty(min(chunk_rows, rows), vocabulary, dtype=reduction_dtype(logits.dtype))


def _blocks(keep: Tensor, active: Tensor, chunk_rows: int) -> Iterator[tuple[Rows, bool]]:
    """Chunks of rows, and whether they carry gradient. Ignored rows are left out and rows of weight 0 come apart, where
    telling them from the others is free: on the CPU. Elsewhere it would make the host wait for the device, so every row
    is worked on, and its weight of 0 does the rest.
    """
    if keep.device.type != "cpu" or bool((keep & active).all()):
        for start in range(0, len(keep), chunk_rows):
            yield slice(start, start + chunk_rows), True
        return
    for members, carries in ((keep & active, True), (keep & ~active, False)):
        for rows in members.nonzero()[:, 0].split(chunk_rows):
            if len(rows):
                yield rows, carries

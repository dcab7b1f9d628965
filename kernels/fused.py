"""impl="triton" and impl="cuda": what both share, around a kernel that turns rows of logits into their own gradient.

The linear-fused loss sorts the rows once - those that carry gradient, those that have a target only, those that have
none and are left out - and takes them in chunks:

    logits = states @ weight^T          the BLAS, into one buffer that is used again and again
    logits -> nll, g (p - onehot)       one kernel, in place
    d hidden = g (p - onehot) @ weight
    d weight += (g (p - onehot))^T @ states        float32

so that gradients exist when forward ends and backward only scales them. N rows, n rows of a chunk, V vocabulary, H width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .arguments import LossTerms
from .products import add_product, logits_of, product_over_vocabulary

# Bytes of a chunk's logits, and its most rows: 4,096 rows of 128,256 in bfloat16. From about 2,000 rows the three products
# are bound by arithmetic and reading and writing the float32 (V, H) gradient once per chunk costs a few per cent.
CHUNK = (1 << 30, 8192)
ROW_MULTIPLE = 128  # chunks are whole tiles of a product
COLUMN_MULTIPLE = 64  # rows of logits begin at 128-byte boundaries, whatever V is


class RowKernels(Protocol):
    """A module of row kernels; see `triton_rows` for what the two functions do."""

    def cross_entropy_rows(
        self, logits: Tensor, targets: Tensor, factor: Tensor, nll: Tensor, *, gradient: bool
    ) -> None: ...

    def scale_(self, values: Tensor, scale: Tensor) -> None: ...


@dataclass(frozen=True)
class Rows:
    """Which rows are worked on, and in what order.

    order: (N,) int64, rows with gradient, then rows with a target only, then the rest; None is every row as it comes.
    active: how many carry gradient.  kept: how many have a target, the active ones included.
    """

    order: Tensor | None
    active: int
    kept: int

    @classmethod
    def of(cls, keep: Tensor, active: Tensor, *, compact: bool) -> Rows:
        """keep, active (N,) bool. With `compact` the host waits for two counts, once; without it every row is taken."""
        if not compact:
            return cls(None, len(keep), len(keep))
        active = active & keep
        carrying, kept = torch.stack([active.sum(), keep.sum()]).tolist()
        if carrying == len(keep):
            return cls(None, carrying, kept)
        return cls((2 - keep.int() - active.int()).argsort(stable=True), carrying, kept)

    def pick(self, values: Tensor, part: slice) -> Tensor:
        """Those rows of values (N, ...) that stand at `part` of the order."""
        return values[part] if self.order is None else values.index_select(0, self.order[part])

    def spread(self, values: Tensor, size: int) -> Tensor:
        """values (n, ...) of the first n rows of the order, back in their places among `size`, zeros elsewhere."""
        if self.order is None:
            return values
        return values.new_zeros(size, *values.shape[1:]).index_copy_(0, self.order[: len(values)], values)


@dataclass(frozen=True)
class Fused:
    """The losses and log-probabilities over one set of row kernels; what an implementation offers the door.

    segment_weights: Eqs. 3-4, as `weights.segment_weights`.
    """

    kernels: RowKernels
    segment_weights: Callable[..., Tensor]

    def weighted_cross_entropy(
        self, logits: Tensor, terms: LossTerms, *, chunk_rows: int | None, compact: bool
    ) -> tuple[Tensor, Tensor]:
        """logits (N, V) -> (loss, nll). Logits that require a gradient are overwritten by it; the other two arguments
        have nothing to do: a row without target or weight costs no more than writing its zeros."""
        if torch.is_grad_enabled() and logits.requires_grad:
            return _CrossEntropy.apply(logits, terms, self.kernels)
        nll = logits.new_empty(len(logits), dtype=torch.float32)
        self.kernels.cross_entropy_rows(_rows_of(logits), _signed(terms), terms.token_weight, nll, gradient=False)
        return terms.weighted_mean(nll), nll

    def linear_weighted_cross_entropy(
        self, hidden: Tensor, weight: Tensor, terms: LossTerms, *, chunk_rows: int | None, compact: bool
    ) -> tuple[Tensor, Tensor]:
        """hidden (N, H), weight (V, H) -> (loss, nll)."""
        rows = Rows.of(terms.keep, terms.token_weight != 0, compact=compact)
        if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
            return _LinearCrossEntropy.apply(hidden, weight, terms, rows, self.kernels, chunk_rows)
        with torch.no_grad():
            chunks = _Chunks(hidden, weight, hidden.dtype, rows, _signed(terms), self.kernels, chunk_rows)
            for part in chunks.parts(0, rows.kept):
                chunks.logits_and_nll(part)
            nll = rows.spread(chunks.nll, len(hidden))
        return terms.weighted_mean(nll), nll

    @torch.no_grad()
    def linear_logprob(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, keep: Tensor, *, chunk_rows: int | None, compact: bool
    ) -> Tensor:
        """(N,) log-probabilities; logits in float32. Two bfloat16 operands stay so: their products are exact in it."""
        rows = Rows.of(keep, keep, compact=compact)
        if hidden.dtype != weight.dtype:
            hidden, weight = hidden.float(), weight.float()
        signed = targets.where(keep, -1)
        chunks = _Chunks(hidden, weight, torch.float32, rows, signed, self.kernels, chunk_rows)
        for part in chunks.parts(0, rows.kept):
            chunks.logits_and_nll(part)
        return rows.spread(chunks.nll, len(hidden)).neg_()


class _Chunks:
    """Chunk after chunk of logits in one buffer, and the nll (kept,) float32 of the rows in their order."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        dtype: torch.dtype,
        rows: Rows,
        targets: Tensor,
        kernels: RowKernels,
        chunk_rows: int | None,
    ) -> None:
        vocabulary = len(weight)
        self.rows, self.targets, self.hidden, self.kernels = rows, targets, hidden, kernels
        self.matrix = weight.to(hidden.dtype)
        self.most = chunk_rows or default_chunk_rows(vocabulary, dtype)
        self.nll = hidden.new_empty(rows.kept, dtype=torch.float32)
        padded = -(-vocabulary // COLUMN_MULTIPLE) * COLUMN_MULTIPLE
        self.buffer = hidden.new_empty(min(self.most, rows.kept), padded, dtype=dtype)[:, :vocabulary]

    def parts(self, start: int, stop: int) -> Iterator[slice]:
        """[start, stop) in as few runs as `most` allows, of about one length: no last run too short for its products."""
        if stop > start:
            count = -(-(stop - start) // self.most)
            length = -(-(stop - start) // count)
            length = min(self.most, -(-length // ROW_MULTIPLE) * ROW_MULTIPLE)
            for at in range(start, stop, length):
                yield slice(at, min(at + length, stop))

    def logits_and_nll(self, part: slice, token_weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(states (n, H), logits (n, V)) of those rows of the order; with token_weight (N,) float32 the logits have become
        g (p - onehot). Their nll is kept."""
        states = self.rows.pick(self.hidden, part)
        logits = logits_of(states, self.matrix, out=self.buffer[: len(states)])
        nll = self.nll[part]
        factor = nll if token_weight is None else self.rows.pick(token_weight, part)  # not looked at without gradient
        self.kernels.cross_entropy_rows(
            logits, self.rows.pick(self.targets, part), factor, nll, gradient=token_weight is not None
        )
        return states, logits


class _LinearCrossEntropy(torch.autograd.Function):
    """Keeps sum_i g_i d nll_i / d weight (V, H) float32 and g_i d nll_i / d hidden_i of the active rows, (active, H)."""

    @staticmethod
    def forward(ctx, hidden, weight, terms, rows, kernels, chunk_rows):
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = hidden.new_empty(rows.active, hidden.shape[1]) if need_hidden else None
        grad_weight = torch.empty_like(weight, dtype=torch.float32) if need_weight else None
        chunks = _Chunks(hidden, weight, hidden.dtype, rows, _signed(terms), kernels, chunk_rows)
        for part in chunks.parts(0, rows.active):
            states, grad_logits = chunks.logits_and_nll(part, terms.token_weight)
            if grad_hidden is not None:
                grad_hidden[part] = product_over_vocabulary(grad_logits, chunks.matrix)
            if grad_weight is not None:
                add_product(grad_weight, grad_logits.t(), states, first=part.start == 0)
        for part in chunks.parts(rows.active, rows.kept):
            chunks.logits_and_nll(part)
        if grad_weight is not None and rows.active == 0:
            grad_weight.zero_()
        nll = rows.spread(chunks.nll, len(hidden))
        ctx.save_for_backward(grad_hidden, grad_weight, terms.denominator)
        ctx.rows, ctx.size, ctx.weight_dtype = rows, len(hidden), weight.dtype
        ctx.mark_non_differentiable(nll)
        return terms.weighted_mean(nll), nll

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _):
        grad_hidden, grad_weight, denominator = ctx.saved_tensors
        scale = (grad_loss / denominator).view(1, 1)
        if grad_hidden is not None:
            grad_hidden = ctx.rows.spread(_scaled(grad_hidden, scale, grad_hidden.dtype), ctx.size)
        if grad_weight is not None:
            grad_weight = _scaled(grad_weight, scale, ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None


class _CrossEntropy(torch.autograd.Function):
    """Leaves g / denominator (p - onehot), the gradient for an upstream gradient of 1, in the memory of the logits."""

    @staticmethod
    def forward(ctx, logits, terms, kernels):
        rows = _rows_of(logits)
        nll = logits.new_empty(len(logits), dtype=torch.float32)
        factor = terms.token_weight / terms.denominator
        kernels.cross_entropy_rows(rows, _signed(terms), factor, nll, gradient=True)
        if rows.data_ptr() == logits.data_ptr():  # whoever kept the logits for a backward of their own is told so
            torch.autograd.graph.increment_version(logits)
        ctx.save_for_backward(rows)
        ctx.kernels = kernels
        ctx.mark_non_differentiable(nll)
        return terms.weighted_mean(nll), nll

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _):
        (rows,) = ctx.saved_tensors
        if _graph_is_kept():  # there may be another backward, and what the last one returned is in someone's hands
            return _scaled(rows, grad_loss.view(1, 1), rows.dtype), None, None
        ctx.kernels.scale_(rows, grad_loss)
        return rows.detach(), None, None


def default_chunk_rows(vocabulary: int, dtype: torch.dtype) -> int:
    """Rows per chunk: a function of V and the dtype of the logits, never of N."""
    budget, most = CHUNK
    rows = budget // (dtype.itemsize * vocabulary)
    return max(ROW_MULTIPLE, min(most, rows // ROW_MULTIPLE * ROW_MULTIPLE))


def _signed(terms: LossTerms) -> Tensor:
    """(N,) int64 targets, -1 where there is none."""
    return terms.targets.where(terms.keep, -1)


def _rows_of(logits: Tensor) -> Tensor:
    """logits (N, V), or a copy where its rows are not runs of memory of their own."""
    logits = logits.detach()
    return logits if logits.stride(1) == 1 and logits.stride(0) >= logits.shape[1] else logits.contiguous()


def _scaled(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """values (n, H) * scale (1, 1) in one pass, rounded once; `values` stay as they are for another backward. (A 0-d scale
    would be rounded to bfloat16 before it multiplies.)"""
    return torch.mul(values, scale, out=torch.empty_like(values, dtype=dtype))


def _graph_is_kept() -> bool:
    """Whether the running backward keeps its graph for another one; true where torch does not say."""
    autograd = getattr(torch._C, "_autograd", None)
    return getattr(autograd, "_get_current_graph_task_keep_graph", lambda: True)()

"""No implementation does work or keeps memory, and the plain one waits for no device, beyond what the loss needs."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megaprior.kernels import linear_logprob, linear_weighted_cross_entropy, torch_impl, weighted_cross_entropy
from megaprior.kernels.arguments import kept_targets, loss_terms

F32, BF16 = torch.float32, torch.bfloat16
EVERY = pytest.mark.usefixtures("impl")
V = 70  # where products are told apart by their shapes


class Operations(TorchDispatchMode):
    """What ran: the shapes that went into products, the bytes of the largest tensor made."""

    def __init__(self):
        super().__init__()
        self.products, self.largest = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if name in ("mm", "addmm_"):
            self.products.append(tuple(args[-2].shape))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.nbytes)
        return out


def rows_in_products(*case):
    """(rows that met the weight, forwards and backwards; rows that entered the weight's gradient) of hidden (N, 8)."""
    with Operations() as seen:
        linear_weighted_cross_entropy(*case)
    gradient = sum(inner for outer, inner in seen.products if outer == V)
    return sum(outer for outer, _ in seen.products if outer != V), gradient


@EVERY
def test_nothing_is_computed_that_nobody_asked_for(loss_problem):
    hidden, weight, *rest = loss_problem(40, V, 8)
    assert rows_in_products(hidden, weight, *rest) == (80, 40)
    assert rows_in_products(hidden, weight.detach(), *rest) == (80, 0)
    assert rows_in_products(hidden.detach(), weight, *rest) == (40, 40)
    assert rows_in_products(hidden.detach(), weight.detach(), *rest) == (40, 0)
    with torch.no_grad():
        assert rows_in_products(hidden, weight, *rest) == (40, 0)


@EVERY
def test_rows_of_weight_zero_cost_no_gradient_and_ignored_rows_nothing(loss_problem):
    case = loss_problem(40, V, 8, ignored=range(10), zero=range(5, 22))
    assert rows_in_products(*case) == (30 + 18, 18)
    loss, nll = linear_weighted_cross_entropy(*case)
    loss.backward()
    assert (case[0].grad[:22] == 0).all()
    assert (case[0].grad[22:] != 0).any(dim=1).all()
    assert (nll[:10] == 0).all()
    assert (nll[10:] > 0).all()


@EVERY
def test_results_that_carry_no_gradient(loss_problem):
    hidden, weight, targets, token_weight = loss_problem(10, 20, 4)
    weighted = token_weight.requires_grad_()
    loss, nll = linear_weighted_cross_entropy(hidden, weight, targets, weighted)
    loss.backward()
    assert weighted.grad is None
    assert not nll.requires_grad
    assert not weighted_cross_entropy(hidden @ weight.T, targets, weighted)[1].requires_grad
    assert not linear_logprob(hidden, weight, targets).requires_grad
    assert not linear_weighted_cross_entropy(hidden.detach(), weight.detach(), targets, weighted)[0].requires_grad
    with torch.no_grad():
        for quiet in (linear_weighted_cross_entropy(hidden, weight, targets, weighted),
                      weighted_cross_entropy(hidden @ weight.T, targets, weighted)):  # fmt: skip
            assert not quiet[0].requires_grad
            torch.testing.assert_close(quiet[0], loss.detach())


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_whole_logits_never_exist(loss_problem, impl, dtype):
    n, vocabulary, width, rows = 256, 1_000, 4, 16
    hidden, weight, targets, token_weight = loss_problem(n, vocabulary, width, dtype=dtype, zero=(3,), ignored=(8,))
    with Operations() as seen:
        linear_weighted_cross_entropy(hidden, weight, targets, token_weight, chunk_rows=rows)[0].backward()
        linear_logprob(hidden, weight, targets, chunk_rows=rows)
        with torch.no_grad():
            linear_weighted_cross_entropy(hidden, weight, targets, token_weight, chunk_rows=rows)
    padded = 1_024 if impl == "triton" else vocabulary  # rows of whole cache lines
    assert seen.largest == rows * padded * F32.itemsize  # against n * vocabulary


def test_chunks_are_bounded_and_know_nothing_of_n():
    for device, budget in (("cpu", 128 << 20), ("cuda", 256 << 20)):
        for vocabulary in (50, 32_004, 128_256, 256_000):
            rows = torch_impl.default_chunk_rows(vocabulary, torch.device(device))
            assert rows % 16 == 0
            assert rows * vocabulary * 4 <= budget
            assert rows >= (64 if device == "cpu" else 256)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("own_denominator", [True, False])
def test_nothing_is_read_back_from_a_device(dtype, own_denominator):
    """Meta tensors stand in for an accelerator's: they have no values, so looking at one raises."""
    make = {"device": "meta", "dtype": dtype, "requires_grad": True}
    hidden, weight, logits = torch.empty(300, 16, **make), torch.empty(900, 16, **make), torch.empty(300, 900, **make)
    rows = {"rows": 300, "vocabulary": 900, "ignore_index": -100}
    targets, keep = kept_targets(torch.empty(300, dtype=torch.int64, device="meta"), **rows)
    denominator = torch.empty((), device="meta") if own_denominator else None
    options = {"scores": None, "cu_seqlens": None, "kind": "logprob", "alpha": 1.0, "length_scale": True, "dtype": F32}
    terms = loss_terms(targets, keep, torch.empty(300, device="meta"), denominator=denominator, **options)
    torch_impl.linear_weighted_cross_entropy(hidden, weight, terms, chunk_rows=128, compact=True)[0].backward()
    torch_impl.weighted_cross_entropy(logits, terms, chunk_rows=128, compact=True)[0].backward()
    assert (hidden.grad.dtype, weight.grad.dtype, logits.grad.dtype) == (dtype, dtype, dtype)
    assert torch_impl.linear_logprob(hidden, weight, targets, keep, chunk_rows=128, compact=True).dtype == F32

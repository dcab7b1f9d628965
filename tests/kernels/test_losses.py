"""Every implementation that runs here against float64 autograd with whole logits: every corner, dtype and repeated backward.

Triton runs on a GPU where there is one, else in its interpreter. Letters: N loss tokens, V vocabulary, H width.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megaprior.kernels import (
    linear_logprob,
    linear_weighted_cross_entropy,
    oracle,
    torch_impl,
    weighted_cross_entropy,
)

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64


pytestmark = pytest.mark.usefixtures("impl")


def linear(hidden, weight, targets, token_weight, *, upstream=1.0, run=linear_weighted_cross_entropy, **options):
    """loss, nll, d hidden, d weight on fresh leaves."""
    hidden, weight = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    loss, nll = run(hidden, weight, targets, token_weight, **options)
    (loss * upstream).backward()
    return loss.detach(), nll, hidden.grad, weight.grad


def given_logits(hidden, weight, targets, token_weight, *, upstream=1.0, run=weighted_cross_entropy, **options):
    """loss, nll, d logits. The logits are a product, as in a model, so they may be overwritten."""
    leaf = (hidden @ weight.T).detach().requires_grad_()
    loss, nll = run(leaf * 1, targets, token_weight, **options)
    (loss * upstream).backward()
    return loss.detach(), nll, leaf.grad


def exact(call, hidden, weight, targets, token_weight, **options):
    """The oracle's answer in float64 to `linear` or `given_logits`."""
    run = oracle.linear_weighted_cross_entropy if call is linear else oracle.weighted_cross_entropy
    wide = None if token_weight is None else token_weight.double()
    return call(hidden.double(), weight.double(), targets, wide, run=run, **options)


def assert_all_close(got, want, *, tolerance):
    """Every answer within `tolerance` of the largest magnitude of the exact one (or of 1)."""
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        error = (a.double() - b).abs().max().item() if a.numel() else 0.0
        assert error <= tolerance * max(1.0, b.abs().max().item() if b.numel() else 0.0)


CALLS = pytest.mark.parametrize("call", [linear, given_logits])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), call=st.sampled_from([linear, given_logits]))
def test_any_shape_matches_float64(loss_problem, impl, data, call):
    dtype = data.draw(st.sampled_from([F32, F64] if impl == "torch" else [F32]))
    n, vocabulary = data.draw(st.integers(0, 40)), data.draw(st.sampled_from([1, 2, 17, 64, 129, 1000]))
    positions = st.sets(st.integers(0, n - 1)) if n else st.just(set())
    case = loss_problem(
        n, vocabulary, data.draw(st.sampled_from([1, 5, 16])), dtype=dtype, seed=data.draw(st.integers(0, 99)),
        ignored=data.draw(positions), zero=data.draw(positions),
    )  # fmt: skip
    options = {
        "upstream": data.draw(st.sampled_from([1.0, -2.5])),
        "denominator": data.draw(st.sampled_from([None, 7])),
    }
    got = call(*case, **options, chunk_rows=data.draw(st.sampled_from([None, 1, 3, 16])))
    assert_all_close(got, exact(call, *case, **options), tolerance=2e-6 if dtype == F32 else 1e-13)
    assert (got[1] >= 0).all()


@CALLS
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(
    ("n", "ignored", "zero"),
    [(5, (), ()), (5, (0,), ()), (5, (), (2,)), (5, (0, 4), (1, 3)), (5, range(5), ()), (5, (), range(5)), (1, (), ())],
    ids=["weights", "first masked", "weight 0", "mixed", "all masked", "all weights 0", "one token"],
)
def test_a_vocabulary_of_128256(loss_problem, call, n, ignored, zero, weighted):
    *case, token_weight = loss_problem(n, 128_256, 16, ignored=ignored, zero=zero)
    case.append(token_weight if weighted else None)
    got, want = call(*case, upstream=0.37, chunk_rows=2), exact(call, *case, upstream=0.37)
    assert_all_close(got, want, tolerance=2e-5)  # 9e-6 seen; 3e-4 where a product sums 128,256 terms one by one
    assert [answer.dtype for answer in got] == [F32] * len(got)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_rows_are_as_precise_as_many(loss_problem, n):
    """A BLAS may take other ways there; a sum of 128,256 terms, one after the other, is off by 1e-4."""
    for seed in range(4):
        case = loss_problem(n, 128_256, 16, seed=seed)
        assert_all_close(linear(*case)[2:3], exact(linear, *case)[2:3], tolerance=2e-5)


@CALLS
@pytest.mark.parametrize("n", [0, 6])
def test_no_target_at_all_gives_zero_still_connected(loss_problem, call, n):
    case = loss_problem(n, 12, 4, ignored=range(n))
    for token_weight in (None, case[3], torch.full((n,), math.nan)):
        loss, nll, *gradients = call(*case[:3], token_weight)
        assert loss == 0
        assert nll.tolist() == [0] * n
        assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("impl", ["torch"], indirect=True)
def test_gradcheck(loss_problem):
    hidden, weight, targets, token_weight = loss_problem(6, 9, 4, dtype=F64, ignored=(1,), zero=(3,))

    def fused(hidden, weight):
        return linear_weighted_cross_entropy(hidden, weight, targets, token_weight, denominator=11, chunk_rows=2)[0]

    def from_logits(hidden, weight):
        return weighted_cross_entropy(hidden @ weight.T, targets, token_weight, denominator=11, chunk_rows=2)[0]

    assert torch.autograd.gradcheck(fused, (hidden, weight))
    assert torch.autograd.gradcheck(from_logits, (hidden, weight))


@CALLS
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_no_weights_ones_and_alpha_zero_agree_bit_for_bit(loss_problem, call, dtype):
    hidden, weight, targets, _ = loss_problem(50, 301, 8, dtype=dtype, ignored=(0, 7, 31))
    scores, edges = -torch.rand(50).index_fill(0, torch.tensor([2, 9]), 0.0), torch.tensor([0, 1, 20, 50])
    scores[11] = -math.inf
    want = call(hidden, weight, targets, None)
    for token_weight, options in (
        (torch.ones(50), {}),
        (None, {"denominator": 47}),
        (None, {"denominator": torch.tensor(47.0)}),
        (None, {"scores": scores, "cu_seqlens": edges, "alpha": 0.0}),
        (None, {"scores": torch.full((50,), -0.7), "cu_seqlens": edges, "alpha": 0.5}),
    ):
        got = call(hidden, weight, targets, token_weight, **options)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@CALLS
def test_bfloat16_errs_at_most_twice_what_the_plain_path_errs(loss_problem, call):
    case = loss_problem(300, 500, 32, dtype=BF16, ignored=(5,), zero=(9, 10))
    plain = oracle.linear_weighted_cross_entropy if call is linear else oracle.weighted_cross_entropy
    want, theirs, ours = exact(call, *case), call(*case, run=plain), call(*case, chunk_rows=64)
    if call is given_logits:  # the logits themselves were rounded to bfloat16 before either path saw them
        leaf = (case[0] @ case[1].T).detach().double().requires_grad_()
        loss, nll = oracle.weighted_cross_entropy(leaf, case[2], case[3].double())
        loss.backward()
        want = loss.detach(), nll, leaf.grad
    for exactly, plainly, fused in zip(want[1:], theirs[1:], ours[1:], strict=True):
        assert fused.dtype == plainly.dtype
        assert (fused.double() - exactly).norm() <= 2 * (plainly.double() - exactly).norm() + 1e-6


def test_the_weight_gradient_accumulates_in_float32(loss_problem, impl):
    n = 4096 if impl == "torch" else 1024
    case = loss_problem(n, 8, 4, dtype=BF16)
    want = exact(linear, *case)[3]
    plain = linear(*case, run=oracle.linear_weighted_cross_entropy)[3]
    ours = linear(*case, chunk_rows=16)[3]  # up to 256 partial sums
    hidden, weight, targets, token_weight = case
    in_bfloat16 = torch.zeros_like(weight)
    for at in range(0, n, 16):
        rows = slice(at, at + 16)
        in_bfloat16 += linear(hidden[rows], weight, targets[rows], token_weight[rows], denominator=n)[3]
    plain_error, error, rough = ((g.double() - want).norm() for g in (plain, ours, in_bfloat16))
    assert ours.dtype == BF16
    assert error <= 2 * plain_error
    assert rough > 2 * plain_error  # so the line above can fail


def test_a_float32_weight_under_bfloat16_states_keeps_its_dtype(loss_problem):
    hidden, weight, targets, token_weight = loss_problem(40, 60, 8)
    got = linear(hidden.bfloat16(), weight, targets, token_weight)
    assert [answer.dtype for answer in got] == [F32, F32, BF16, F32]
    rounded = exact(linear, hidden.bfloat16(), weight.bfloat16(), targets, token_weight)
    assert_all_close(got, rounded, tolerance=2e-2)


@CALLS
def test_a_second_backward_is_right(loss_problem, call):
    hidden, weight, targets, token_weight = loss_problem(20, 33, 5, zero=(3,))
    if call is linear:
        leaves, run, wide = (hidden, weight), linear_weighted_cross_entropy, (hidden.double(), weight.double())
        loss, _ = run(hidden, weight, targets, token_weight, chunk_rows=8)
        true, _ = oracle.linear_weighted_cross_entropy(*wide, targets, token_weight.double())
    else:
        leaves = ((hidden @ weight.T).detach().requires_grad_(),)
        loss, _ = weighted_cross_entropy(leaves[0] * 1, targets, token_weight, chunk_rows=8)
        true, _ = oracle.weighted_cross_entropy(leaves[0].double(), targets, token_weight.double())
    want = torch.autograd.grad(true, leaves)
    for upstream in (1.0, 0.0, -4.0, 1.0):
        got = torch.autograd.grad(loss, leaves, torch.tensor(upstream), retain_graph=True)
        assert all(torch.allclose(a, upstream * b, atol=1e-6) for a, b in zip(got, want, strict=True))
    with pytest.raises(RuntimeError):
        torch.autograd.grad(torch.autograd.grad(loss, leaves, create_graph=True)[0].sum(), leaves)


def test_micro_batches_under_one_denominator_add_up(loss_problem):
    hidden, weight, targets, token_weight = loss_problem(32, 40, 8, ignored=(2, 30))
    whole = linear(hidden, weight, targets, token_weight, denominator=30)
    parts = [linear(hidden[at : at + 8], weight, targets[at : at + 8], token_weight[at : at + 8], denominator=30)
             for at in range(0, 32, 8)]  # fmt: skip
    torch.testing.assert_close(sum(part[0] for part in parts), whole[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.cat([part[2] for part in parts]), whole[2], rtol=0, atol=1e-7)
    torch.testing.assert_close(sum(part[3] for part in parts), whole[3], rtol=0, atol=1e-6)


def test_frozen_sides_get_no_gradient(loss_problem):
    hidden, weight, targets, token_weight = loss_problem(10, 20, 4)
    want = linear(hidden, weight, targets, token_weight)
    linear_weighted_cross_entropy(hidden, weight.detach(), targets, token_weight)[0].backward()
    assert torch.equal(hidden.grad, want[2])
    assert weight.grad is None
    hidden.grad = None
    linear_weighted_cross_entropy(hidden.detach(), weight, targets, token_weight)[0].backward()
    assert torch.equal(weight.grad, want[3])
    assert hidden.grad is None


@pytest.mark.parametrize("impl", ["torch"], indirect=True)
@CALLS
def test_the_path_of_accelerators(loss_problem, call, monkeypatch):
    """There every row is worked on, since sorting them out would wait for the device."""

    def runs(keep, active, chunk_rows):
        return ((slice(at, at + chunk_rows), True) for at in range(0, len(keep), chunk_rows))

    monkeypatch.setattr(torch_impl, "_blocks", runs)
    case = loss_problem(20, 60, 8, ignored=(0, 5, 19), zero=(3, 4))
    assert_all_close(call(*case, chunk_rows=8), exact(call, *case), tolerance=1e-6)


@CALLS
def test_the_far_ends_of_softmax(call):
    logits = torch.tensor([[200.0, 0.0, -300.0], [0.0, -200.0, -200.0], [1e4, 1e4, -1e4], [0.0, 0.0, 0.0]])
    hidden, weight = logits, torch.eye(3)
    targets, token_weight = torch.tensor([2, 0, 1, 2]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    got = call(hidden, weight, targets, token_weight)
    assert got[1].tolist() == pytest.approx([500, 0, math.log(2), math.log(3)], abs=1e-6)
    assert_all_close(got, exact(call, hidden, weight, targets, token_weight), tolerance=1e-6)


def test_masked_logits_and_an_infinite_nll_of_weight_zero():
    logits = torch.randn(3, 5)
    logits[:, 4] = -math.inf
    targets, token_weight = torch.tensor([4, 1, 2]), torch.tensor([0.0, 1.0, 2.0])
    leaf = logits.requires_grad_()
    loss, nll = weighted_cross_entropy(leaf * 1, targets, token_weight)
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert nll[0] == math.inf
    want = -logits.detach()[1:, :4].double().log_softmax(-1)[[0, 1], [1, 2]]
    assert loss.item() == pytest.approx((want * torch.tensor([1.0, 2.0])).sum().item() / 3, rel=1e-6)
    assert (gradient[0] == 0).all()
    assert (gradient[:, 4] == 0).all()
    assert gradient.isfinite().all()


def test_logprob_takes_its_logits_in_float32(loss_problem, impl):
    hidden, weight, targets, _ = loss_problem(200, 300, 64, dtype=BF16, ignored=(4,))
    got = linear_logprob(hidden, weight, targets, chunk_rows=64)
    nll = oracle.linear_weighted_cross_entropy(hidden.double(), weight.double(), targets)[1]
    assert got.dtype == F32
    assert (got <= 0).all()
    assert got[4] == 0
    torch.testing.assert_close(got.double(), -nll, rtol=1e-6, atol=1e-5)
    in_bfloat16 = oracle.linear_weighted_cross_entropy(hidden, weight, targets)[1]
    assert (in_bfloat16 - nll).abs().max() > 1e-2  # so the line above can fail
    for dtype, tolerance in ((F32, 1e-5), (F64, 1e-12)) if impl == "torch" else ((F32, 1e-5),):
        again = linear_logprob(hidden.to(dtype), weight, targets)
        assert again.dtype == dtype
        torch.testing.assert_close(again.double(), -nll, rtol=1e-6, atol=tolerance)


def test_logprob_is_minus_the_nll_of_the_loss(loss_problem):
    hidden, weight, targets, token_weight = loss_problem(50, 80, 8, ignored=(0,))
    _, nll = linear_weighted_cross_entropy(hidden, weight, targets, token_weight)
    assert torch.equal(linear_logprob(hidden, weight, targets), -nll)

"""What Triton's row kernels do beyond the losses' arithmetic: Eqs. 3-4 in one launch, memory, strides, chunks, no waiting.

On a GPU where there is one, else in Triton's interpreter.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from megaprior.kernels import (
    choice,
    fused,
    linear_logprob,
    linear_weighted_cross_entropy,
    triton_rows,
    weighted_cross_entropy,
)
from megaprior.kernels import weights as plain
from megaprior.kernels.arguments import kept_targets, loss_terms

F32, BF16 = torch.float32, torch.bfloat16
DTYPES = pytest.mark.parametrize("dtype", [F32, BF16])


def rows_of(logits, targets, factor, *, gradient=True):
    """nll (n,) of the kernel; the logits become their gradient."""
    nll = torch.full((len(logits),), math.nan)
    triton_rows.cross_entropy_rows(logits, targets, factor, nll, gradient=gradient)
    return nll


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_token_weights_are_the_plain_ones(data):
    lengths = data.draw(st.lists(st.sampled_from([0, 1, 2, 7, 255, 256, 257]), min_size=1, max_size=4))
    n, seed = sum(lengths), data.draw(st.integers(0, 99))
    make = torch.Generator().manual_seed(seed)
    uniform = torch.rand(n, generator=make, device="cpu")
    kind = data.draw(st.sampled_from(["logprob", "importance"]))
    scores = torch.log(uniform) * data.draw(st.sampled_from([1.0, 1e-3, 1e-6])) if kind == "logprob" else uniform
    keep = torch.rand(n, generator=make, device="cpu") > data.draw(st.sampled_from([-1.0, 0.3, 1.0]))
    for special, value in (
        (3, 0.0),
        (5, -math.inf if kind == "logprob" else 0.0),
        (7, 1e-7 if kind == "logprob" else 2.0),
    ):
        scores[special::11] = value
    scores = scores.where(keep, math.nan)
    edges = torch.tensor([0, *torch.tensor(lengths, device="cpu").cumsum(0).tolist()], dtype=torch.int32)
    options = {"kind": kind, "alpha": data.draw(st.sampled_from([0.0, 0.3, 1.0, 2.0, 40.0])),
               "length_scale": data.draw(st.booleans())}  # fmt: skip
    device = torch.get_default_device()
    case = scores.to(device), edges, keep.to(device)
    got, want = triton_rows.segment_weights(*case, **options), plain.segment_weights(*case, **options)
    assert got.dtype == F32
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    assert (got[~case[2]] == 0).all()


def test_token_weights_of_every_second_score():
    scores, keep = -torch.rand(40), torch.rand(40) > 0.2
    case = scores[::2], torch.tensor([0, 99, 7, 99, 20])[::2], keep[::2]
    options = {"kind": "logprob", "alpha": 1.0, "length_scale": True}
    torch.testing.assert_close(triton_rows.segment_weights(*case, **options), plain.segment_weights(*case, **options))


@DTYPES
def test_the_gradient_is_left_in_the_memory_of_the_logits(loss_problem, dtype):
    hidden, weight, targets, token_weight = loss_problem(6, 50, 4, dtype=dtype, ignored=(1,), zero=(2,))
    logits = hidden @ weight.T
    loss, _ = weighted_cross_entropy(logits, targets, token_weight, impl="triton")
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.data_ptr() == logits.data_ptr()
    assert not gradient.requires_grad
    again = hidden @ weight.T
    loss, _ = weighted_cross_entropy(again, targets, token_weight, impl="triton")
    kept = [torch.autograd.grad(loss * scale, again, retain_graph=True)[0] for scale in (1.0, -2.0)]
    assert again.data_ptr() not in [
        g.data_ptr() for g in kept
    ]  # what an earlier backward returned is not touched again
    torch.testing.assert_close(kept[0], gradient)
    torch.testing.assert_close(kept[1], -2 * gradient, rtol=1e-2 if dtype == BF16 else 1e-6, atol=0)


def test_whoever_kept_the_logits_is_told_that_they_are_gone(loss_problem):
    hidden, weight, targets, _ = loss_problem(6, 50, 4)
    capped = (hidden @ weight.T).tanh()  # its own backward needs its output
    loss, _ = weighted_cross_entropy(capped, targets, impl="triton")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@DTYPES
@pytest.mark.parametrize("gradient", [True, False])
def test_padding_between_rows_is_nobodys(dtype, gradient):
    storage = torch.full((4, 80), 7.0, dtype=dtype)
    logits = storage[:, :71]
    logits.copy_(torch.linspace(-3, 3, 71).expand(4, 71))
    before = logits.clone()
    nll = rows_of(logits, torch.tensor([0, -1, 70, 5]), torch.tensor([1.0, 1.0, 2.0, 0.0]), gradient=gradient)
    assert (storage[:, 71:] == 7).all()
    want = -before.double().log_softmax(-1)[[0, 2, 3], [0, 70, 5]]
    torch.testing.assert_close(nll[[0, 2, 3]].double(), want, rtol=1e-6, atol=1e-6)
    assert nll[1] == 0
    assert torch.equal(logits, before) is not gradient
    if gradient:
        assert (logits[[1, 3]] == 0).all()


def test_a_target_beyond_the_vocabulary_tells():
    logits = torch.zeros(2, 9)
    assert rows_of(logits, torch.tensor([9, 3]), torch.ones(2)).isnan().tolist() == [True, False]


def test_rows_of_weight_zero_become_zero_whatever_was_in_them():
    logits = torch.full((2, 9), math.nan)
    rows_of(logits, torch.tensor([1, -1]), torch.zeros(2))
    assert (logits == 0).all()


def test_offsets_beyond_two_to_the_31():
    """Two rows 2^31 elements apart; what lies between them is never touched, so never in memory."""
    vocabulary, apart = 300, 2**31 + 64
    logits = torch.empty(apart + vocabulary, dtype=BF16).as_strided((2, vocabulary), (apart, 1))
    logits.copy_(torch.linspace(-3, 3, 2 * vocabulary).view(2, vocabulary))
    before, targets = logits.double(), torch.tensor([7, 299])
    nll = rows_of(logits, targets, torch.ones(2))
    want = before.softmax(-1) - torch.eye(vocabulary, dtype=torch.float64)[targets]
    torch.testing.assert_close(logits.double(), want, rtol=1e-2, atol=1e-4)
    torch.testing.assert_close(nll.double(), -before.log_softmax(-1)[[0, 1], targets], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("vocabulary", [8191, 8192, 8193, 16384, 20001])
def test_whole_blocks_and_tails(loss_problem, vocabulary):
    hidden, weight, targets, token_weight = loss_problem(3, vocabulary, 4)
    targets[:] = torch.tensor([0, vocabulary - 1, min(8192, vocabulary - 2)])
    logits = (hidden @ weight.T).detach()
    want = (logits.double().softmax(-1)).scatter_add(1, targets[:, None], -torch.ones(3, 1).double()) * token_weight[
        :, None
    ]
    rows_of(logits, targets, token_weight)
    torch.testing.assert_close(logits.double(), want, rtol=1e-5, atol=1e-8)


@DTYPES
def test_scaling_by_one_touches_nothing_and_by_another_everything(dtype):
    values = torch.linspace(-4, 4, 3 * 5000).view(3, 5000).to(dtype)[:, :4999]
    before = values.clone()
    triton_rows.scale_(values, torch.tensor(1.0))
    assert torch.equal(values, before)
    triton_rows.scale_(values, torch.tensor(-0.3))
    torch.testing.assert_close(values, (before.float() * -0.3).to(dtype), rtol=2**-7 if dtype == BF16 else 0, atol=0)


@settings(deadline=None)
@given(count=st.integers(1, 20_000), most=st.integers(100, 9_000))
def test_chunks_cover_the_rows_in_as_few_parts_as_can_be_and_none_is_a_remnant(count, most):
    chunks = fused._Chunks.__new__(fused._Chunks)
    chunks.most = most
    parts = list(chunks.parts(11, 11 + count))
    assert [part.start for part in parts] == [11, *(part.stop for part in parts[:-1])]
    assert parts[-1].stop == 11 + count
    lengths = [part.stop - part.start for part in parts]
    assert max(lengths) <= most
    assert len(parts) == -(-count // most)


@DTYPES
def test_a_chunk_is_bounded_and_knows_nothing_of_n(dtype):
    for vocabulary in (50, 32_004, 128_256, 256_000):
        rows = fused.default_chunk_rows(vocabulary, dtype)
        assert rows % fused.ROW_MULTIPLE == 0
        assert 1024 <= rows <= 8192
        assert rows * vocabulary * dtype.itemsize <= 1 << 30


class Reads(TorchDispatchMode):
    """Operations that make the host wait for a value of the device."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if name in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select"):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("compact", [True, False])
def test_the_host_waits_once_to_compact_and_never_otherwise(loss_problem, compact, monkeypatch):
    reads = set()  # by tensor: the default device of these tests calls a method twice
    real = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: reads.add(id(tensor)) or real(tensor))
    hidden, weight, targets, token_weight = loss_problem(40, 70, 8, ignored=(1, 2), zero=(5,))
    named = kept_targets(targets, rows=40, vocabulary=70, ignore_index=-100)
    options = {"denominator": None, "kind": "logprob", "alpha": 1.0, "length_scale": True, "dtype": F32}
    terms = loss_terms(*named, token_weight, scores=None, cu_seqlens=None, **options)
    triton = choice._load("triton")
    with Reads() as seen:
        loss, nll = triton.linear_weighted_cross_entropy(hidden, weight, terms, chunk_rows=16, compact=compact)
        loss.backward(torch.tensor(2.5))
    assert not seen.seen
    assert len(reads) == compact
    want = linear_weighted_cross_entropy(hidden, weight, targets, token_weight, impl="torch")
    torch.testing.assert_close((loss, nll), want, rtol=1e-6, atol=1e-6)
    gradients = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    (want[0] * 2.5).backward()
    torch.testing.assert_close(gradients, (hidden.grad, weight.grad), rtol=1e-5, atol=1e-6)


def test_rows_come_back_to_their_places(loss_problem):
    hidden, weight, targets, token_weight = loss_problem(60, 30, 4, ignored=range(0, 60, 7), zero=range(0, 60, 5))
    for compact in (True, False):
        for impl in ("torch", "triton"):
            case = {"impl": impl, "compact": compact, "chunk_rows": 11}
            loss, nll = linear_weighted_cross_entropy(hidden, weight, targets, token_weight, **case)
            (gradient,) = torch.autograd.grad(loss, hidden)
            if (impl, compact) == ("torch", True):
                first = nll, gradient
            torch.testing.assert_close((nll, gradient), first, rtol=1e-5, atol=1e-6)
            logprob = linear_logprob(hidden, weight, targets, impl=impl, compact=compact)
            torch.testing.assert_close(logprob, -nll, rtol=1e-6, atol=1e-6)

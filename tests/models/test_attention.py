"""Packed attention against its formula, segment by segment in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from megaprior.errors import UsageError
from megaprior.models.attention import attend, make_packing

LENGTHS = (7, 1, 90, 16, 15, 64, 88, 2, 40)


def boundaries(lengths) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)


def formula(q, k, v, lengths):
    """softmax(q k^T / sqrt(E)) v over the causal pairs of each segment; [A, T, E] and [K, T, E] -> [T, A, E], float64."""
    q, k, v = q.double(), k.double(), v.double()
    k, v = (x.repeat_interleave(q.shape[0] // k.shape[0], dim=0) for x in (k, v))
    outputs, start = [], 0
    for n in lengths:
        here = slice(start, start + n)
        logits = q[:, here] @ k[:, here].transpose(1, 2) / math.sqrt(q.shape[-1])
        logits = logits.masked_fill(torch.ones(n, n).triu(1).bool(), -math.inf)
        outputs.append((logits.softmax(-1) @ v[:, here]).transpose(0, 1))
        start += n
    return torch.cat(outputs)


@pytest.mark.parametrize("backend", ["segments", "masked"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_output_and_gradients_are_the_formula(backend, kv_heads):
    torch.manual_seed(0)
    total = sum(LENGTHS)
    q, k, v = (torch.randn(1, heads, total, 8, requires_grad=True) for heads in (4, kv_heads, kv_heads))
    upstream = torch.randn(1, total, 4, 8)
    packing = make_packing(boundaries(LENGTHS), max(LENGTHS), backend=backend, dtype=torch.float32)

    out, weights = attend(torch.nn.Module(), q, k, v, None, scaling=8**-0.5, packing=packing)
    gradients = torch.autograd.grad(out, (q, k, v), upstream)
    expected = formula(q[0], k[0], v[0], LENGTHS)
    expected_gradients = torch.autograd.grad(expected, (q, k, v), upstream[0].double())

    assert weights is None
    assert (out[0] - expected).abs().max() < 1e-6
    for got, want in zip(gradients, expected_gradients, strict=True):
        assert (got - want).abs().max() < 5e-6  # 1.4e-6 measured


def test_groups_of_a_worked_example():
    # Lengths 40, 2, 33, 60: 60 stands alone (40 < 0.8 * 60 and 20 tokens short), 33 pads to 40, 2 stands alone.
    packing = make_packing(boundaries([40, 2, 33, 60]), 60, backend="auto", dtype=torch.float32)
    groups = packing.groups
    assert packing.backend == "segments"
    assert groups.shapes == ((1, 60), (2, 40), (1, 2))
    assert groups.gather.tolist() == [*range(75, 135), *range(40), *range(42, 75), *[74] * 7, 40, 41]
    assert groups.holes.tolist() == list(range(133, 140))
    assert groups.gather[groups.restore].tolist() == list(range(135))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=40).filter(any))
def test_groups_hold_every_token_once_and_pad_little(lengths):
    groups = make_packing(boundaries(lengths), max(lengths), backend="segments", dtype=torch.float32).groups
    total = sum(lengths)
    filled = torch.ones(len(groups.gather), dtype=torch.bool)
    filled[groups.holes] = False
    assert sorted(groups.gather[filled].tolist()) == list(range(total))
    assert groups.gather[groups.restore].tolist() == list(range(total))
    assert len(groups.gather) == sum(count * length for count, length in groups.shapes)
    assert len(groups.holes) <= sum(
        max(n / 4, 16) for n in lengths
    )  # a fifth of the padded length is a quarter of its own


@pytest.mark.parametrize("backend", ["varlen", "flash"])
def test_a_backend_that_cannot_run_here_is_refused_with_the_remedy(backend):
    with pytest.raises(UsageError, match=rf"model.attention={backend} needs CUDA .* cpu .* use model.attention=auto"):
        make_packing(boundaries([4]), 4, backend=backend, dtype=torch.bfloat16)


def test_dropout_is_refused():
    x = torch.randn(1, 1, 4, 8)
    packing = make_packing(boundaries([4]), 4, backend="auto", dtype=torch.float32)
    with pytest.raises(UsageError, match=r"attention_dropout is 0[.]1"):
        attend(torch.nn.Module(), x, x, x, None, scaling=1.0, dropout=0.1, packing=packing)


def test_torch_takes_the_arguments_of_the_varlen_backend():
    with FakeTensorMode():  # shapes and signatures of the CUDA operator, without a device or a result
        q, kv = (torch.empty(1, heads, 64, 32, device="cuda", dtype=torch.bfloat16) for heads in (8, 2))
        packing = make_packing(torch.empty(4, device="cuda", dtype=torch.int32), 32, backend="varlen", dtype=q.dtype)
        out, _ = attend(torch.nn.Module(), q, kv, kv, None, scaling=0.2, packing=packing)
    assert out.shape == (1, 64, 8, 32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_varlen_errs_at_most_twice_what_the_oracle_errs_in_bf16():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, sum(LENGTHS), 64, device="cuda").bfloat16() for heads in (4, 2, 2))
    expected = formula(q[0].cpu(), k[0].cpu(), v[0].cpu(), LENGTHS)
    errors = {}
    for backend in ("varlen", "masked"):
        packing = make_packing(boundaries(LENGTHS).cuda(), max(LENGTHS), backend=backend, dtype=q.dtype)
        out, _ = attend(torch.nn.Module(), q, k, v, None, scaling=64**-0.5, packing=packing)
        errors[backend] = (out[0].cpu() - expected).abs().max()
    assert errors["varlen"] <= 2 * errors["masked"]

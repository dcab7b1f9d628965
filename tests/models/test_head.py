"""The head: logits, the weighted loss and log-probabilities, each against its formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megaprior.models.head import LossHead


@pytest.fixture
def problem():
    torch.manual_seed(0)
    head = LossHead.adopt(nn.Linear(16, 50, bias=False))
    return head, torch.randn(9, 16, requires_grad=True), torch.randint(50, (9,)), torch.rand(9)


def formula(head, hidden, targets):
    logits = hidden.double() @ head.weight.double().T
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


def test_hidden_alone_gives_logits(problem):
    head, hidden, _, _ = problem
    assert torch.equal(head(hidden[None, :, None]), (hidden @ head.weight.T)[None, :, None])


def test_loss_and_gradients_are_the_formula(problem):
    head, hidden, targets, weight = problem
    loss, nll = head(hidden, targets, weight, 23.0)
    got = torch.autograd.grad(loss, (hidden, head.weight))
    expected = -(weight * formula(head, hidden, targets)).sum() / 23
    want = torch.autograd.grad(expected, (hidden, head.weight))
    assert abs(loss - expected) < 1e-6
    assert (nll + formula(head, hidden, targets)).abs().max() < 1e-5
    assert not nll.requires_grad
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() < 1e-6


def test_logprob_mode_is_the_formula(problem):
    head, hidden, targets, _ = problem
    logprob = head(hidden, targets, mode="logprob")
    assert logprob.dtype == torch.float32
    assert not logprob.requires_grad
    assert (logprob - formula(head, hidden, targets)).abs().max() < 1e-5


def test_autocast_reaches_the_fused_loss(problem):
    head, hidden, targets, weight = problem
    with torch.autocast("cpu", torch.bfloat16):
        loss, nll = head(hidden, targets, weight, 9.0)
    rounded = hidden.bfloat16().double() @ head.weight.bfloat16().double().T
    want = -rounded.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert nll.dtype == torch.float32
    assert (nll - want).abs().max() < 0.02  # logits of about 1 rounded to bf16: 2^-8 each
    loss.backward()
    assert head.weight.grad.dtype == torch.float32


def test_adopting_keeps_the_object_and_its_tie():
    embedding, linear = nn.Embedding(50, 16), nn.Linear(16, 50, bias=False)
    linear.weight = embedding.weight
    head = LossHead.adopt(linear)
    assert head is linear
    assert head.weight is embedding.weight
    assert list(head.state_dict()) == ["weight"]

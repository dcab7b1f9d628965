"""Random loss problems for the kernels' tests; N loss tokens, V vocabulary, H width."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session", autouse=True)
def _on_the_gpu_if_there_is_one():
    with torch.device(DEVICE):
        yield


def _problem(n, vocabulary, width, *, seed=0, dtype=torch.float32, ignored=(), zero=()):
    """hidden, weight, targets, token_weight; non-uniform weights, sharp enough logits."""
    make, cpu = torch.Generator().manual_seed(seed), {"device": "cpu"}
    hidden = torch.randn(n, width, generator=make, **cpu).to(DEVICE, dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=make, **cpu).to(DEVICE, dtype).requires_grad_()
    targets = torch.randint(vocabulary, (n,), generator=make, **cpu).to(DEVICE)
    token_weight = 3 * torch.rand(n, generator=make, **cpu).to(DEVICE)
    targets[list(ignored)] = -100
    token_weight[list(zero)] = 0
    return hidden, weight, targets, token_weight


@pytest.fixture(scope="session")
def loss_problem() -> Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """`loss_problem(N, V, H, seed=0, dtype=float32, ignored=(), zero=())`: positions ignored, positions of weight 0."""
    return _problem


@pytest.fixture(params=["torch", "triton"])
def impl(request, monkeypatch):
    """What "auto" is in each test."""
    monkeypatch.setenv("MEGAPRIOR_LOSS_IMPL", request.param)
    return request.param

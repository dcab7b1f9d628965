"""Which implementation a call gets, and why another cannot run.

"auto" takes the first of FASTEST_FIRST that can run on the tensors' device and that has given the plain form's answers
there: a small problem, once per process, device and dtype. MEGAPRIOR_LOSS_IMPL=torch (or triton, cuda) puts that one in
the place of "auto" in a whole program.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor

from .arguments import LossTerms, kept_targets, loss_terms, reduction_dtype

FASTEST_FIRST = ("cuda", "triton", "torch")
OVERRIDE = "MEGAPRIOR_LOSS_IMPL"


class Implementation(Protocol):
    """What stands behind the door: `torch_impl`, or `fused.Fused` over a module of row kernels."""

    def weighted_cross_entropy(
        self, logits: Tensor, terms: LossTerms, *, chunk_rows: int | None, compact: bool
    ) -> tuple[Tensor, Tensor]: ...

    def linear_weighted_cross_entropy(
        self, hidden: Tensor, weight: Tensor, terms: LossTerms, *, chunk_rows: int | None, compact: bool
    ) -> tuple[Tensor, Tensor]: ...

    def linear_logprob(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, keep: Tensor, *, chunk_rows: int | None, compact: bool
    ) -> Tensor: ...

    @property
    def segment_weights(self) -> Callable[..., Tensor]: ...


def implementation(impl: str, device: torch.device, dtype: torch.dtype) -> Implementation:
    """The implementation for tensors of `dtype` on `device`.

    Raises:
        ValueError: an unknown name.
        RuntimeError: a named implementation cannot run there, and why. "auto" never raises.
    """
    if impl == "auto":
        return _load(chosen(device, dtype))
    if impl not in FASTEST_FIRST:
        raise ValueError(f"impl must be one of {('auto', *FASTEST_FIRST)}, not {impl!r}")
    return _load(_able(impl, device, dtype))


def chosen(device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """The name that "auto" stands for there: the fastest that runs and agrees, or what MEGAPRIOR_LOSS_IMPL says.

    Raises:
        ValueError, RuntimeError: MEGAPRIOR_LOSS_IMPL names none, or one that cannot run there.
    """
    override = os.environ.get(OVERRIDE, "auto")
    if override not in ("auto", *FASTEST_FIRST):
        raise ValueError(f"{OVERRIDE} must be one of {('auto', *FASTEST_FIRST)}, not {override!r}")
    if override != "auto":
        return _able(override, device, dtype)
    names = FASTEST_FIRST if device.type != "cpu" else ("torch",)  # an interpreter is there to be right, not fast
    return next(n for n in names if unavailable(n, device, dtype) is None and _agrees(n, device, dtype))


def _able(impl: str, device: torch.device, dtype: torch.dtype) -> str:
    reason = unavailable(impl, device, dtype)
    if reason is not None:
        raise RuntimeError(f"impl={impl!r} cannot run here: {reason}; use 'auto' or 'torch'")
    return impl


def unavailable(impl: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `impl` cannot run on tensors of `dtype` there; None when it can."""
    if impl == "torch":
        return None
    try:
        rows = import_module(f".{impl}_rows", __package__)
    except ImportError as error:
        return f"{error.name or impl} is not installed"
    return rows.unavailable(device, dtype)


@functools.cache
def _load(name: str) -> Implementation:
    if name == "torch":
        module: Any = import_module(".torch_impl", __package__)
        return module
    from .fused import Fused
    from .weights import segment_weights

    rows: Any = import_module(f".{name}_rows", __package__)
    return Fused(rows, getattr(rows, "segment_weights", segment_weights))


@functools.cache
def _agrees(name: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `name` may be trusted on that device; says so once where it may not."""
    if name == "torch":
        return True
    try:
        worst = largest_difference(_load(name), _load("torch"), device, dtype)
    except Exception as error:  # a compiler that is not there, a driver too old: the plain form runs all the same
        warnings.warn(f"loss kernels impl={name!r} are set aside on {device}: {error}", stacklevel=2)
        return False
    bound = 2e-2 if dtype == torch.bfloat16 else 1e-4
    if not worst <= bound:
        warnings.warn(
            f"loss kernels impl={name!r} are set aside on {device}: they differ from the plain form by {worst:.1e} of the "
            f"largest value in {dtype} (bound {bound:.0e}); please report this", stacklevel=2,
        )  # fmt: skip
    return worst <= bound


def largest_difference(one: Implementation, other: Implementation, device: torch.device, dtype: torch.dtype) -> float:
    """The worst difference, in units of each result's largest value, over losses, nll, log-probabilities and gradients of
    a problem with every kind of row: 37 rows, a vocabulary of 1,003, captions of 12, 0 and 25 tokens."""
    worst = 0.0
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        for a, b in zip(_answers(one, device, dtype), _answers(other, device, dtype), strict=True):
            gap = (a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30)
            worst = max(worst, gap.item()) if gap == gap else float("nan")
            if worst != worst:
                break
    return worst


def _answers(impl: Implementation, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    n, vocabulary, width = 37, 1003, 64
    wave = torch.arange(n * width, device=device).view(n, width)
    hidden = (wave * 0.7).sin().mul(2).to(dtype).requires_grad_()
    weight = (torch.arange(vocabulary * width, device=device).view(vocabulary, width) * 1.3).sin().div(2).to(dtype)
    weight.requires_grad_()
    targets = torch.arange(n, device=device) * 97 % vocabulary
    targets[3] = -100
    scores = -(torch.arange(n, device=device) * 0.9).sin().abs()
    scores[5] = 0.0
    edges = torch.tensor([0, 12, 12, n], dtype=torch.int32, device=device)
    options = {"denominator": None, "kind": "logprob", "alpha": 1.0, "length_scale": True}
    named = kept_targets(targets, rows=n, vocabulary=vocabulary, ignore_index=-100)
    terms = loss_terms(
        *named, None, scores=scores, cu_seqlens=edges, dtype=reduction_dtype(dtype),
        segment_weights=impl.segment_weights, **options,
    )  # fmt: skip
    how = {"chunk_rows": 16, "compact": True}
    fused, nll = impl.linear_weighted_cross_entropy(hidden, weight, terms, **how)
    logits = (hidden @ weight.t()).detach().requires_grad_()
    given, given_nll = impl.weighted_cross_entropy(logits * 1, terms, **how)
    gradients = *torch.autograd.grad(fused * 3, (hidden, weight)), *torch.autograd.grad(given * 3, logits)
    logprob = impl.linear_logprob(hidden, weight, *named, **how)
    return [fused.detach(), nll, given.detach(), given_nll, *gradients, logprob]

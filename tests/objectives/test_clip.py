"""Symmetric cross-entropy over a row's pairs, in float64 and by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megaprior.data.samples import Batch, Segment, assemble
from megaprior.data.vision import TowerSpec
from megaprior.models.outputs import PairStates
from megaprior.objectives.clip import ClipContrast, same

SPEC = TowerSpec(8, 4, "square", (0, 0, 0), None)


def row(captions: list[list[int]], pictures: list[int], *, denominator: float | None = None) -> Batch:
    """Captions beside pictures; equal numbers are equal pictures."""
    segments = []
    for i, (caption, picture) in enumerate(zip(captions, pictures, strict=True)):
        patches = np.random.default_rng(picture).integers(0, 256, (4, 48), dtype=np.uint8)
        segments.append(Segment(i, np.array(caption), np.ones(len(caption), np.float32), grid=(2, 2), patches=patches))
    total = denominator or sum(map(len, captions))
    return assemble(segments, bos_id=1, spec=SPEC, denominator=total, max_tokens=512, pad_to=16)


def embeddings(count: int) -> PairStates:
    generator = torch.Generator().manual_seed(2)
    images, captions = (
        torch.nn.functional.normalize(torch.randn(count, 6, generator=generator), dim=-1).requires_grad_()
        for _ in range(2)
    )
    return PairStates(images=images, captions=captions, scale=torch.tensor(7.0, requires_grad=True))


def by_hand(states: PairStates, excluded: set[tuple[int, int]]) -> torch.Tensor:
    """The mean over the pairs, float64, pair by pair."""
    logits = states.scale.double() * states.images.double() @ states.captions.double().T
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(logits)):
        others = [j for j in range(len(logits)) if (i, j) not in excluded and (j, i) not in excluded]
        total = total + logits[i, others].logsumexp(0) + logits[others, i].logsumexp(0) - 2 * logits[i, i]
    return total / (2 * len(logits))


CAPTIONS = [[5, 6, 2], [7, 2], [5, 6, 2], [6, 5, 2], [8, 9, 9, 2]]
PICTURES = [0, 1, 2, 3, 1]


@pytest.mark.parametrize("denominator", [15, 60])
def test_loss_and_gradients_are_the_formula(denominator):
    """Captions 0 and 2 are equal, and so are pictures 1 and 4: no negatives of each other. Caption 3 has 0's words."""
    states, batch = embeddings(5), row(CAPTIONS, PICTURES, denominator=denominator)
    expected = by_hand(states, {(0, 2), (1, 4)})
    wanted = torch.autograd.grad(expected * 15 / denominator, [states.images, states.captions, states.scale])
    loss, nll = ClipContrast()(None, states, batch)
    got = torch.autograd.grad(loss, [states.images, states.captions, states.scale])
    assert loss.item() == pytest.approx(expected.item() * 15 / denominator, abs=1e-6)
    assert nll.shape == (15,)
    assert (nll - expected).abs().max() < 1e-6
    assert not nll.requires_grad
    for one, other in zip(got, wanted, strict=True):
        assert (one - other).abs().max() < 1e-6


def test_products_are_fp32_under_autocast():
    states, batch = embeddings(5), row(CAPTIONS, PICTURES)
    exact, _ = ClipContrast()(None, states, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = ClipContrast()(None, states, batch)
    assert loss.dtype == torch.float32
    assert loss.item() == exact.item()


def test_rows_add_up_by_their_tokens():
    one, other = row(CAPTIONS[:2], PICTURES[:2], denominator=12), row(CAPTIONS[2:], PICTURES[2:], denominator=12)
    parts = [ClipContrast()(None, embeddings(n), b) for n, b in ((2, one), (3, other))]
    means = [nll[0].item() for _, nll in parts]
    assert sum(loss.item() for loss, _ in parts) == pytest.approx((5 * means[0] + 10 * means[1]) / 12, abs=1e-6)


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_pairs_cost_nothing_and_touch_everything(count):
    states, batch = embeddings(count), row(CAPTIONS[:count], PICTURES[:count], denominator=9)
    loss, nll = ClipContrast()(None, states, batch)
    loss.backward()
    assert loss.item() == 0
    assert nll.tolist() == [0.0] * len(batch.targets)
    assert all(not t.grad.any() for t in (states.images, states.captions, states.scale))


def test_same_means_every_byte_and_every_token():
    batch = row(CAPTIONS, PICTURES)
    expected = torch.zeros(5, 5, dtype=torch.bool)
    for i, j in ((0, 2), (1, 4)):
        expected[i, j] = expected[j, i] = True
    assert torch.equal(same(batch, 5), expected)
    patches = batch.patches.clone()
    patches[4 * 4 + 3, 47] += 1  # the last value of picture 4
    changed = SimpleNamespace(**{name: getattr(batch, name) for name in vars(batch)} | {"patches": patches})
    assert same(changed, 5).nonzero().tolist() == [[0, 2], [2, 0]]

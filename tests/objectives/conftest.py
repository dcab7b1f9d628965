"""Rows of captions for the objectives' tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from megaprior.data.samples import Batch, Segment, assemble


@pytest.fixture
def row_of() -> Callable[..., Batch]:
    """`row_of([[5, 6, 2], [7, 2]], weights=[[1, 0, 2], [1, 1]], denominator=5)`: text captions in one row padded to 16."""

    def make(
        captions: Sequence[Sequence[int]],
        *,
        weights: Sequence[Sequence[float]] | None = None,
        denominator: float | None = None,
    ) -> Batch:
        weights = weights or [[1.0] * len(c) for c in captions]
        segments = [
            Segment(i, np.array(c), np.array(g, dtype=np.float32))
            for i, (c, g) in enumerate(zip(captions, weights, strict=True))
        ]
        total = denominator or sum(map(len, captions))
        return assemble(segments, bos_id=1, spec=None, denominator=total, max_tokens=512, pad_to=16)

    return make

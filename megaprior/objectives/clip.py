"""Contrastive learning of pairs (CLIP): a caption should be nearest to its own image among those of the row, and the image
to its caption.

    l_ij = scale * <image_i, caption_j>
    L    = (N / D) * mean over i of  -1/2 (log softmax_j l_ij + log softmax_j l_ji) at j = i

N is the row's loss tokens and D those of the global batch, so that one row gives the mean and several of them its mean
weighted by their sizes. Negatives come from the row alone. Equal pictures (one with several captions) and equal captions are
no negatives of each other: l_ij leaves the softmax.

Letters: T tokens of a row, N loss tokens, I images and captions, E width of an embedding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from megaprior.data.samples import Batch
    from megaprior.models.outputs import PairStates


class ClipContrast:
    """The loss above; the products are fp32 whatever computed the embeddings."""

    def __call__(self, model: Any, states: PairStates, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss, nll): 0-d, and float32 [N], for every loss token of the row the mean over its pairs, detached."""
        images, captions, scale = states.images, states.captions, states.scale
        assert images is not None
        assert captions is not None
        assert scale is not None
        with torch.autocast(images.device.type, enabled=False):
            logits = scale * (images.float() @ captions.float().T)  # [I, I]
            logits = logits.masked_fill(same(batch, len(images)), -torch.inf)
            both = logits.log_softmax(dim=1).diagonal() + logits.log_softmax(dim=0).diagonal()
            mean = -both.sum() / (2 * max(len(images), 1))
        tokens = len(batch.targets)
        return mean * (tokens / batch.denominator), mean.detach().expand(tokens)


def same(batch: Batch, pairs: int) -> torch.Tensor:
    """bool [I, I], off the diagonal: two pairs of a row have the same picture or the same caption."""
    images = _fingerprints(batch.patches.reshape(pairs, -1)) if pairs else batch.patches.new_empty(0, dtype=torch.int64)
    captions = _caption_fingerprints(batch, pairs)
    equal = (images[:, None] == images) | (captions[:, None] == captions)
    return equal.fill_diagonal_(False)


def _caption_fingerprints(batch: Batch, pairs: int) -> torch.Tensor:
    """int64 [I], equal where the segments' tokens are."""
    segment = torch.cumsum(batch.position_ids == 0, dim=0) - 1  # int64 [T]
    values = (batch.input_ids + 1) * _weights(len(segment), segment.device)[batch.position_ids]
    return torch.zeros(len(batch.cu_seqlens) - 1, dtype=torch.int64, device=segment.device).index_add_(
        0, segment, values
    )[:pairs]


def _fingerprints(rows: torch.Tensor) -> torch.Tensor:
    """int64 [I] of uint8 [I, n]: exact sums modulo 2^64 under random weights; two different rows agree once in 2^56."""
    weights = _weights(rows.shape[1], rows.device)
    return torch.stack(
        [(row.long() * weights).sum() for row in rows]
    )  # a row at a time: int64 takes eight times the memory


def _weights(count: int, device: torch.device) -> torch.Tensor:
    """int64 [count], the same numbers every time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator).to(device, non_blocking=True)

"""The record that a model and an objective see: one row of segments, with targets and weights built on the host.

    pair   BOS image caption EOS         what an image's tokens are: vision.py
    text   BOS text EOS

Letters: T tokens of the row, N loss tokens, S segments (samples) in the row, P patches, D values of a patch (3 * patch^2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from megaprior.data.vision import VisionSpec


@dataclass(frozen=True)
class Segment:
    """One sample on its way into a row; `tokens` has no BOS, k entries; n of them are loss tokens."""

    sample_id: int
    tokens: np.ndarray  # int [k]
    token_weight: np.ndarray  # float32 [n]
    loss: np.ndarray | None = None  # int64 [n], which of `tokens` are in the loss; None means all
    scores: np.ndarray | None = None  # float32 [n], raw
    grid: tuple[int, int] | None = None  # (columns, rows) of the image
    patches: np.ndarray | None = None  # uint8 [columns * rows, D]


_INPUTS = ("input_ids", "position_ids", "cu_seqlens", "max_seqlen", "patches", "patch_index", "loss_index")


@dataclass(frozen=True)
class Batch:
    """One row = one micro-step. The padding tail (and all of a dummy row) is a last segment of its own, without a loss."""

    input_ids: torch.Tensor  # int64 [T]
    position_ids: torch.Tensor  # int64 [T], restart at 0 in each segment
    cu_seqlens: torch.Tensor  # int32 [segments + 1], from 0 to T
    max_seqlen: int  # longest segment, the tail included
    loss_index: torch.Tensor  # int64 [N], the position whose hidden state predicts the target
    targets: torch.Tensor  # int64 [N]
    token_weight: torch.Tensor  # float32 [N], g
    loss_cu: torch.Tensor  # int32 [S + 1], where each sample's loss tokens begin and end
    sample_ids: torch.Tensor  # int64 [S]
    patches: torch.Tensor  # uint8 [P, D]
    patch_index: torch.Tensor  # int64 [P], the position of each patch's token
    scores: torch.Tensor  # float32 [N], raw scores; NaN where there are none
    denominator: float  # D of the global batch, at least 1
    num_real_tokens: int  # T without the padding tail

    @property
    def inputs(self) -> dict[str, Any]:
        """What a model's `states` reads, by its names."""
        return {name: getattr(self, name) for name in _INPUTS}

    def to(self, device: torch.device | str) -> Batch:
        """The same record on `device`; asynchronous from pinned memory."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same record in page-locked memory, for an asynchronous `to` (CUDA only)."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        tensors = {
            f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), torch.Tensor)
        }
        return replace(self, **{name: function(tensor) for name, tensor in tensors.items()})


def assemble(
    segments: Sequence[Segment],
    *,
    bos_id: int,
    spec: VisionSpec | None,
    denominator: float,
    max_tokens: int,
    pad_to: int,
) -> Batch:
    """Lay segments one after another into a row, padded to a multiple of `pad_to` but never beyond `max_tokens`.

    No segments give a dummy row: `pad_to` BOS tokens (at most `max_tokens`) and no loss token, so that it adds exactly 0.
    """
    pieces: list[np.ndarray] = []
    bos = np.array([bos_id], dtype=np.int64)
    caption_at, patch_index = np.empty(len(segments), dtype=np.int64), []
    edges = [0]
    for number, segment in enumerate(segments):
        image, offsets = _NO_IMAGE if segment.grid is None else _known(spec).layout(*segment.grid)
        pieces += [bos, image, segment.tokens]
        patch_index.append(offsets + (edges[-1] + 1))
        caption_at[number] = edges[-1] + 1 + len(image)
        edges.append(int(caption_at[number]) + len(segment.tokens))
    real = edges[-1]
    length = max(real, min(-(-max(real, 1) // pad_to) * pad_to, max_tokens))
    if length > real:
        pieces.append(np.full(length - real, bos_id, dtype=np.int64))
        edges.append(length)
    input_ids = np.concatenate(pieces, dtype=np.int64, casting="same_kind")
    starts, lengths = np.array(edges[:-1]), np.diff(edges)

    loss = [np.arange(len(s.tokens)) if s.loss is None else s.loss for s in segments]
    targets_at = _joined([at + where for at, where in zip(caption_at, loss, strict=True)], np.int64)
    scores = [np.full(len(s.token_weight), np.nan, np.float32) if s.scores is None else s.scores for s in segments]
    patches = [s.patches for s in segments if s.patches is not None]
    empty = np.empty((0, spec.patch_values if spec is not None else 0), dtype=np.uint8)
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(np.arange(length) - np.repeat(starts, lengths)),
        cu_seqlens=torch.tensor(edges, dtype=torch.int32),
        max_seqlen=int(lengths.max()),
        loss_index=torch.from_numpy(targets_at - 1),
        targets=torch.from_numpy(input_ids[targets_at]),
        token_weight=torch.from_numpy(_joined([s.token_weight for s in segments], np.float32)),
        loss_cu=torch.tensor([0, *np.cumsum([len(where) for where in loss])], dtype=torch.int32),
        sample_ids=torch.tensor([s.sample_id for s in segments], dtype=torch.int64),
        patches=torch.from_numpy(np.concatenate([empty, *patches])),
        patch_index=torch.from_numpy(_joined(patch_index, np.int64)),
        scores=torch.from_numpy(_joined(scores, np.float32)),
        denominator=float(denominator),
        num_real_tokens=real,
    )


_NO_IMAGE = (np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))


def _known(spec: VisionSpec | None) -> VisionSpec:
    assert spec is not None, "a segment with an image needs a VisionSpec"
    return spec


def _joined(arrays: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype=dtype), *arrays]).astype(dtype, copy=False)

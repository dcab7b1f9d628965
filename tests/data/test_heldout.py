"""Rows for evaluation: every sample once, whose loss is where, and other images on request."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from megaprior.data.heldout import rows
from megaprior.data.images import decode_rgb, patchify
from megaprior.data.samples import Batch
from megaprior.data.shards import ShardSet
from megaprior.data.vision import VisionSpec
from megaprior.errors import DataError

Write = Callable[..., Path]
CAPTIONS = [[10 + i] * (1 + i % 5) + [2] for i in range(12)]
SIZES = [(4 * (1 + i % 3), 4 * (1 + i % 2)) for i in range(12)]
SCORES = [[-1.0 - i, *[-0.5] * (len(c) - 1)] for i, c in enumerate(CAPTIONS)]


@pytest.fixture(scope="module")
def folder(write_shards: Write, content: type) -> Path:
    return write_shards("pairs", content(CAPTIONS, sizes=SIZES, scores=SCORES, shards=2))


def by_sample(batches: list[Batch], name: str) -> dict[int, list[float]]:
    """The entries of a per-loss-token tensor that belong to each sample."""
    found = {}
    for batch in batches:
        for sample, start, end in zip(batch.sample_ids, batch.loss_cu, batch.loss_cu[1:], strict=False):
            assert int(sample) not in found
            found[int(sample)] = getattr(batch, name)[start:end].tolist()
    return found


def images(batches: list[Batch]) -> dict[int, torch.Tensor]:
    """The patches shown in each sample's segment."""
    found = {}
    for batch in batches:
        for number, sample in enumerate(batch.sample_ids.tolist()):
            start, end = batch.cu_seqlens[number : number + 2]
            found[sample] = batch.patches[(batch.patch_index >= start) & (batch.patch_index < end)]
    return found


def test_every_sample_once_with_weight_1_and_its_scores(folder: Path, spec: VisionSpec) -> None:
    ids = [11, 3, 4, 0, 7, 8]
    shards = ShardSet.open(folder, scores="ref_logprob")
    found = list(rows(shards, ids, spec=spec, max_tokens=40, pad_to=8))
    assert len(found) > 1
    assert by_sample(found, "targets") == {i: CAPTIONS[i] for i in ids}
    assert by_sample(found, "scores") == {i: SCORES[i] for i in ids}
    assert {float(g) for batch in found for g in batch.token_weight} == {1.0}
    assert {batch.denominator for batch in found} == {float(sum(len(CAPTIONS[i]) for i in ids))}
    assert all(len(batch.input_ids) <= 40 for batch in found)
    assert all(batch.input_ids[0] == 1 for batch in found)  # BOS of the shards' own tokenizer


def test_other_images_before_the_same_captions(folder: Path, spec: VisionSpec) -> None:
    ids, other = [2, 5, 9], [5, 9, 2]
    shards = ShardSet.open(folder)
    found = list(rows(shards, ids, spec=spec, max_tokens=64, image_of=other))
    assert by_sample(found, "targets") == {i: CAPTIONS[i] for i in ids}
    assert all(np.isnan(scores).all() for scores in by_sample(found, "scores").values())
    for sample, source in zip(ids, other, strict=True):
        expected = patchify(decode_rgb(shards.image(source)), patch=4, size=SIZES[source])
        np.testing.assert_array_equal(images(found)[sample], expected)


def test_text_only_rows_need_no_vision(folder: Path) -> None:
    found = list(rows(ShardSet.open(folder), range(12), spec=None, max_tokens=16, bos_id=7))
    assert by_sample(found, "targets") == dict(enumerate(CAPTIONS))
    assert all(batch.patches.shape == (0, 0) for batch in found)
    assert all(batch.input_ids[0] == 7 for batch in found)
    assert list(rows(ShardSet.open(folder), [], spec=None, max_tokens=16)) == []


def test_an_evaluation_drops_nothing(write_shards: Write, content: type, spec: VisionSpec) -> None:
    folder = write_shards("bad", content([[10, 2], [11, 2]], sizes=[(4, 4)] * 2, images={1: b"GIF89a"}))
    with pytest.raises(DataError, match=r"bad/00000 sample 1 \(key key1\)"):
        list(rows(ShardSet.open(folder), [0, 1], spec=spec, max_tokens=64))


def test_an_image_too_long_for_a_row_is_refused(folder: Path, spec: VisionSpec) -> None:
    with pytest.raises(DataError, match="takes 11 tokens, a row holds 10; raise max_tokens to at least 11"):
        next(rows(ShardSet.open(folder), [0, 5], spec=spec, max_tokens=10))

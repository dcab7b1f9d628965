"""Rows for evaluation: any samples of one folder, each token counted alike, under any image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from megaprior.data.corpus import Corpus, Dropped
from megaprior.data.packing import pack_best_fit
from megaprior.data.prefetch import Prefetch
from megaprior.data.samples import Batch, Segment, assemble
from megaprior.data.shards import ShardSet
from megaprior.data.vision import VisionSpec
from megaprior.errors import DataError


def rows(
    shards: ShardSet,
    ids: Sequence[int],
    *,
    spec: VisionSpec | None,
    max_tokens: int,
    image_of: Sequence[int] | None = None,
    bos_id: int | None = None,
    pad_to: int = 256,
    workers: int = 2,
) -> Iterator[Batch]:
    """Samples of one folder as rows of weight 1, for evaluation; `loss_cu` and `sample_ids` say whose loss tokens are where.

    Args:
        ids: indices in `shards`; they come packed, so in another order.
        image_of: for each of `ids`, the sample whose image is shown before its caption (its own by default).
        bos_id: None asks the tokenizer that the shards carry.

    Yields:
        Batch, with `denominator` = loss tokens of all `ids`; `scores` where the shards were opened with them.

    Raises:
        DataError: an image cannot be decoded or is too long for a row, or scores are wrong: an evaluation drops nothing.
    """
    corpus = Corpus([shards], spec=spec, max_tokens=max_tokens, workers=workers)
    try:
        bos = shards.tokenizer().bos_id if bos_id is None else bos_id
        wanted = np.asarray(ids, dtype=np.int64)
        images = wanted if image_of is None else np.asarray(image_of, dtype=np.int64)
        assert wanted.shape == images.shape, (wanted.shape, images.shape)
        lengths = corpus.lengths(wanted, images)
        corpus.refuse_long_images(images, lengths)
        total = max(int(lengths.loss.sum()), 1)

        def row(positions: list[int]) -> Batch:
            found = corpus.read(
                wanted[positions].tolist(), lengths.caption[positions].tolist(), images[positions].tolist()
            )
            for item in found:
                if isinstance(item, Dropped):
                    raise DataError(f"{item.reason}; rebuild the shards, an evaluation leaves nothing out")
            segments = [item for item in found if isinstance(item, Segment)]
            return assemble(segments, bos_id=bos, spec=spec, denominator=total, max_tokens=max_tokens, pad_to=pad_to)

        prepared = Prefetch(map(row, pack_best_fit(lengths.segment.tolist(), max_tokens)), depth=2)
        try:
            yield from prepared
        finally:
            prepared.close()
    finally:
        corpus.close()

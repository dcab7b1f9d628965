"""Several shard folders as one numbered set of samples: their lengths in a row, known from the index, and their content.

    sample id = position in the concatenation of the sources
    ids -> lengths (index only: nothing is read or decoded) -> packing -> read (tokens, scores, decoded patches)

Letters: n samples asked for, k caption tokens of a sample, P patches, D values of a patch.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from megaprior.data.images import ImageError, decode_rgb
from megaprior.data.samples import Segment
from megaprior.data.shards import ShardSet
from megaprior.data.vision import VisionSpec
from megaprior.data.weighting import check_scores
from megaprior.errors import DataError

_SURVEY_CHUNK = 1 << 20  # samples looked at together, so that a survey of any corpus stays within some 100 MB


@dataclass(frozen=True)
class Lengths:
    """Tokens of n samples as they stand in a row, int64 [n] each."""

    image: np.ndarray  # patches and separators, 0 without an image
    caption: np.ndarray  # what the row's end leaves of the caption
    loss: np.ndarray  # loss tokens among those
    cut: np.ndarray  # bool, the caption was cut

    @property
    def segment(self) -> np.ndarray:
        """BOS, image and caption together."""
        return 1 + self.image + self.caption


@dataclass(frozen=True)
class Survey:
    """What one source looks like in rows."""

    mean_loss_tokens: float
    mean_tokens: float
    cut: int  # captions that are cut to fit


@dataclass(frozen=True)
class Dropped:
    """A sample that could not be shown: it stays in D and adds nothing else."""

    sample_id: int
    reason: str


class PatchReader:
    """Decodes images into patches on a few threads; the first `cache_mb` MiB of patches are kept for good.

    Nothing is evicted: every epoch shows all images in a new order, so the one shown last is the one needed least, and a
    cache of the most recent would hit in about c^2 / 2 of all cases where keeping the share c of the images hits in c.
    """

    def __init__(self, spec: VisionSpec, *, cache_mb: int, workers: int) -> None:
        self.spec = spec
        self._room = cache_mb << 20  # bytes
        self._kept: dict[tuple[str, str, int], np.ndarray] = {}
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="megaprior-decode")

    def many(self, wanted: Sequence[tuple[ShardSet, int]]) -> list[np.ndarray | ImageError]:
        """The patches, uint8 [P, D] and read-only, of each (shards, index); an ImageError stands where one cannot be decoded."""
        keys = [_image_key(shards, index) for shards, index in wanted]
        new = {key: place for key, place in zip(keys, wanted, strict=True) if key not in self._kept}
        decoded = dict(zip(new, self._pool.map(self._one, new, new.values()), strict=True))
        return [decoded[key] if key in decoded else self._kept[key] for key in keys]

    def close(self) -> None:
        """Stop the threads; work not begun is forgotten."""
        self._pool.shutdown(cancel_futures=True)

    def _one(self, key: tuple[str, str, int], wanted: tuple[ShardSet, int]) -> np.ndarray | ImageError:
        shards, index = wanted
        sizes = shards.image_sizes
        assert sizes is not None, shards.folder
        grid = self.spec.grid((int(sizes[index, 0]), int(sizes[index, 1])))
        try:
            patches = self.spec.patches(decode_rgb(shards.image(index)), grid)
        except ImageError as error:
            return error
        patches.flags.writeable = False
        with self._lock:
            if patches.nbytes <= self._room and key not in self._kept:
                self._kept[key] = patches
                self._room -= patches.nbytes
        return patches


class Corpus:
    """The samples of several sources, numbered through; rows hold at most `max_tokens`. Without `spec`, text only."""

    def __init__(
        self, sets: Sequence[ShardSet], *, spec: VisionSpec | None, max_tokens: int, cache_mb: int = 0, workers: int = 2
    ) -> None:
        self.sets, self.spec, self.max_tokens = tuple(sets), spec, max_tokens
        self.ends = np.cumsum([len(shards) for shards in sets], dtype=np.int64)
        self.starts = self.ends - np.array([len(shards) for shards in sets], dtype=np.int64)
        self._patches = PatchReader(spec, cache_mb=cache_mb, workers=workers) if spec is not None else None
        self._spanned = [any("loss_spans" in shard.streams for shard in shards.shards) for shards in sets]

    def source_of(self, ids: np.ndarray) -> np.ndarray:
        """int64 [n]: the source of each sample id."""
        return np.searchsorted(self.ends, ids, side="right")

    def has_image(self, source: int) -> bool:
        """Whether the samples of a source enter rows with their images."""
        return self.spec is not None and self.sets[source].kind == "pairs"

    def place(self, sample_id: int) -> tuple[ShardSet, int]:
        """The shards that hold a sample, and its index there."""
        source = int(self.source_of(np.asarray(sample_id)))
        return self.sets[source], int(sample_id - self.starts[source])

    def describe(self, sample_id: int) -> str:
        """For messages: pairs/00000 sample 17 (key 000000017)."""
        shards, index = self.place(sample_id)
        return shards.describe(index)

    def close(self) -> None:
        """Stop the decoding threads."""
        if self._patches is not None:
            self._patches.close()

    # ------------------------------------------------------------ from the index

    def lengths(self, ids: np.ndarray, images: np.ndarray | None = None) -> Lengths:
        """The lengths of samples, int64 [n] ids, before the images of `images` (their own by default).

        A caption that does not fit behind its image is cut at the row's end, which removes its EOS. The count may come out
        below 1: `survey` and `refuse_long_images` find that before anything is trained.
        """
        counts = np.empty(len(ids), dtype=np.int64)
        image = np.zeros(len(ids), dtype=np.int64)
        for source, here, index in self._by_source(ids):
            counts[here] = self.sets[source].token_counts[index]
        for source, here, index in self._by_source(ids if images is None else images):
            if self.has_image(source):
                image[here] = self._image_tokens(self._sizes(source)[index])
        caption = np.minimum(counts, self.max_tokens - 1 - image)
        loss = caption.copy()
        for source, here, index in self._by_source(ids):
            if self._spanned[source]:
                spans = [self.sets[source].loss_spans(int(i)) for i in index]
                loss[here] = [
                    len(_in_loss(s, k)) if s is not None else k for s, k in zip(spans, caption[here], strict=True)
                ]
        return Lengths(image=image, caption=caption, loss=loss, cut=caption < counts)

    def refuse_long_images(self, ids: np.ndarray, lengths: Lengths) -> None:
        """Refuse images that leave no room for one caption token.

        Raises:
            DataError: names the sample with the longest image, what it needs, what a row holds, and the knobs.
        """
        worst = int(np.argmax(lengths.image)) if len(ids) else 0
        if not len(ids) or lengths.caption[worst] >= 1:
            return
        needed = int(lengths.image[worst]) + 2
        assert self.spec is not None
        raise DataError(
            f"{self.describe(int(ids[worst]))}: its image with BOS and one caption token takes {needed:,} tokens, a row holds "
            f"{self.max_tokens:,}; raise max_tokens to at least {needed:,} or {self.spec.fewer_tokens}"
        )

    def survey(self, source: int) -> Survey:
        """Look at every sample of a source, by its index entry alone (0.3 to 1.5 s a million, by how many sizes images have).

        Raises:
            DataError: the longest image leaves no room for a caption.
        """
        loss = tokens = cut = 0
        for start in range(int(self.starts[source]), int(self.ends[source]), _SURVEY_CHUNK):
            ids = np.arange(start, min(start + _SURVEY_CHUNK, int(self.ends[source])))
            lengths = self.lengths(ids)
            self.refuse_long_images(ids, lengths)
            loss += int(lengths.loss.sum())
            tokens += int(lengths.segment.sum())
            cut += int(lengths.cut.sum())
        n = max(len(self.sets[source]), 1)
        return Survey(mean_loss_tokens=loss / n, mean_tokens=tokens / n, cut=cut)

    def _by_source(self, ids: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(source, positions in `ids`, indices within the source)."""
        sources = self.source_of(ids)
        for source in np.unique(sources):
            here = np.flatnonzero(sources == source)
            yield int(source), here, ids[here] - self.starts[source]

    def _sizes(self, source: int) -> np.ndarray:
        sizes = self.sets[source].image_sizes
        assert sizes is not None, self.sets[source].folder
        return sizes

    def _image_tokens(self, sizes: np.ndarray) -> np.ndarray:
        """int64 [n] from int32 [n, 2]; the rule is applied once per distinct size."""
        assert self.spec is not None
        packed = sizes[:, 0].astype(np.int64) << 32 | sizes[:, 1]
        distinct, which = np.unique(packed, return_inverse=True)
        table = [self.spec.tokens((int(size >> 32), int(size & 0xFFFFFFFF))) for size in distinct]
        return np.array(table, dtype=np.int64)[which]

    # ------------------------------------------------------------ the content

    def read(
        self, ids: Sequence[int], captions: Sequence[int], images: Sequence[int] | None = None
    ) -> list[Segment | Dropped]:
        """The samples with `captions` tokens kept of each, weight 1 each; scores, where the source was opened with them.

        Raises:
            DataError: scores that are NaN, positive or of the wrong length, naming the sample.
        """
        places = [self.place(i) for i in (ids if images is None else images)]
        shown = [place if self.spec is not None and place[0].kind == "pairs" else None for place in places]
        wanted = [place for place in shown if place is not None]
        decoded = iter(self._patches.many(wanted) if self._patches is not None else [])
        found: list[Segment | Dropped] = []
        for sample_id, kept, place in zip(ids, captions, shown, strict=True):
            patches = next(decoded) if place is not None else None
            if isinstance(patches, ImageError):
                assert place is not None
                found.append(Dropped(int(sample_id), f"{place[0].describe(place[1])}: {patches}"))
            else:
                found.append(self._segment(int(sample_id), int(kept), place, patches))
        return found

    def _segment(
        self, sample_id: int, kept: int, place: tuple[ShardSet, int] | None, patches: np.ndarray | None
    ) -> Segment:
        shards, index = self.place(sample_id)
        tokens = shards.tokens(index)
        spans = shards.loss_spans(index)
        loss = None if spans is None else _in_loss(spans, kept)
        scores = None
        if shards.score_kind is not None:
            scores = shards.scores(index)
            check_scores(shards.describe(index), scores, kind=shards.score_kind, tokens=len(tokens))
            scores = scores[:kept] if loss is None else scores[loss]
        grid = None
        if place is not None and self.spec is not None:
            sizes = place[0].image_sizes
            assert sizes is not None
            grid = self.spec.grid((int(sizes[place[1], 0]), int(sizes[place[1], 1])))
        return Segment(
            sample_id=sample_id,
            tokens=tokens[:kept],
            token_weight=np.ones(kept if loss is None else len(loss), dtype=np.float32),
            loss=loss,
            scores=scores,
            grid=grid,
            patches=patches,
        )


def _in_loss(spans: np.ndarray, kept: int) -> np.ndarray:
    """int64 [n]: the tokens below `kept` that the [start, end) spans cover."""
    parts = [np.arange(start, min(end, kept)) for start, end in spans.tolist()]
    return np.concatenate([np.empty(0, dtype=np.int64), *parts])


def _image_key(shards: ShardSet, index: int) -> tuple[str, str, int]:
    shard, local = shards.locate(index)
    return str(shard.folder), shard.prefix, int(shard.streams["images"].pointers[local])

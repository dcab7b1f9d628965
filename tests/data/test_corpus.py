"""Sources numbered through, their lengths from the index alone, and images decoded once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megaprior.data.corpus import Corpus, Dropped, PatchReader
from megaprior.data.images import decode_rgb, patchify
from megaprior.data.samples import Segment
from megaprior.data.shards import ShardSet
from megaprior.data.vision import PatchSpec, VisionSpec
from megaprior.errors import DataError

Write = Callable[..., Path]
CAPTIONS = [[10, 2], [11, 12, 2], [13, 14, 15, 16, 2], [17, 2]]
SIZES = [(4, 4), (16, 8), (30, 40), (3, 200)]  # 1x1, 4x2, 3x4 and 1x4 patches of 4 pixels under a limit of 16


@pytest.fixture(scope="module")
def pairs(write_shards: Write, content: type) -> ShardSet:
    return ShardSet.open(write_shards("pairs", content(CAPTIONS, sizes=SIZES, shards=2)))


@pytest.fixture(scope="module")
def text(write_shards: Write, content: type) -> ShardSet:
    return ShardSet.open(write_shards("text", content([[20, 21, 22, 2], [23, 2]])))


def test_lengths_of_every_sample(pairs: ShardSet, text: ShardSet, spec: VisionSpec) -> None:
    corpus = Corpus([text, pairs], spec=spec, max_tokens=100)
    ids = np.array([5, 0, 2, 3, 4, 1])
    lengths = corpus.lengths(ids)
    image = [1 * 4 + 3 + 2, 0, 1 + 2, 4 * 2 + 1 + 2, 3 * 4 + 3 + 2, 0]
    assert lengths.image.tolist() == image
    assert lengths.caption.tolist() == lengths.loss.tolist() == [2, 4, 2, 3, 5, 2]
    assert lengths.segment.tolist() == [1 + i + c for i, c in zip(image, [2, 4, 2, 3, 5, 2], strict=True)]
    assert not lengths.cut.any()
    assert corpus.source_of(ids).tolist() == [1, 0, 1, 1, 1, 0]
    assert corpus.describe(4) == "pairs/00001 sample 0 (key key2)"


def test_the_image_rule_is_that_of_one_image(pairs: ShardSet, spec: VisionSpec) -> None:
    corpus = Corpus([pairs], spec=spec, max_tokens=100)
    assert corpus.lengths(np.arange(4)).image.tolist() == [spec.tokens(size) for size in SIZES]


def test_a_caption_is_cut_at_the_end_of_the_row(pairs: ShardSet, spec: VisionSpec) -> None:
    corpus = Corpus([pairs], spec=spec, max_tokens=20)  # sample 2 has 1 + 17 tokens before its 5 caption tokens
    lengths = corpus.lengths(np.arange(4))
    assert lengths.caption.tolist() == [2, 3, 2, 2]
    assert lengths.cut.tolist() == [False, False, True, False]
    assert lengths.segment.max() == 20
    (segment,) = corpus.read([2], [2])
    assert isinstance(segment, Segment)
    assert segment.tokens.tolist() == [13, 14]


def test_an_image_that_leaves_no_room_is_refused_with_both_numbers_and_the_knobs(
    pairs: ShardSet, spec: VisionSpec
) -> None:
    assert Corpus([pairs], spec=spec, max_tokens=19).survey(0).cut == 1
    with pytest.raises(DataError) as caught:
        Corpus([pairs], spec=spec, max_tokens=18).survey(0)
    assert "pairs/00001 sample 0 (key key2)" in str(caught.value)
    assert "takes 19 tokens, a row holds 18; raise max_tokens to at least 19" in str(caught.value)
    assert "lower the image limit of 16 pixels" in str(caught.value)


def test_a_survey_has_the_means_over_the_samples(pairs: ShardSet, text: ShardSet, spec: VisionSpec) -> None:
    corpus = Corpus([pairs, text], spec=spec, max_tokens=100)
    assert corpus.survey(0).mean_loss_tokens == 12 / 4
    assert corpus.survey(0).mean_tokens == (4 + 3 + 11 + 17 + 9 + 12) / 4
    assert corpus.survey(1).mean_tokens == (2 + 6) / 2


def test_without_a_vision_spec_pairs_are_text(pairs: ShardSet) -> None:
    corpus = Corpus([pairs], spec=None, max_tokens=100)
    assert corpus.lengths(np.arange(4)).segment.tolist() == [3, 4, 6, 3]
    (segment,) = corpus.read([1], [3])
    assert isinstance(segment, Segment)
    assert segment.grid is None
    assert segment.tokens.tolist() == [11, 12, 2]


def test_loss_spans_count_what_is_kept_of_them(write_shards: Write, content: type) -> None:
    spans = [[(1, 3), (5, 6)], [(0, 6)], []]
    shards = ShardSet.open(write_shards("talk", content([[10, 11, 12, 13, 14, 2]] * 3, spans=spans)))
    assert Corpus([shards], spec=None, max_tokens=7).lengths(np.arange(3)).loss.tolist() == [3, 6, 0]
    corpus = Corpus([shards], spec=None, max_tokens=3)
    assert corpus.lengths(np.arange(3)).loss.tolist() == [1, 2, 0]
    (segment,) = corpus.read([0], [2])
    assert isinstance(segment, Segment)
    assert segment.loss is not None
    assert segment.loss.tolist() == [1]
    assert segment.token_weight.tolist() == [1.0]


def test_scores_follow_the_tokens_in_the_loss(write_shards: Write, content: type) -> None:
    scores = [[-1.0, -2, -3, -4, -5], [-1.0, -6, -7, -8, -9]]
    whole = write_shards("whole", content([[10, 11, 12, 13, 2]] * 2, scores=scores))
    spans = write_shards("spans", content([[10, 11, 12, 13, 2]] * 2, scores=scores, spans=[[(1, 2), (3, 5)]] * 2))
    for folder, kept, expected in ((whole, 5, [-1, -6, -7, -8, -9]), (whole, 2, [-1, -6]), (spans, 4, [-6, -8])):
        corpus = Corpus([ShardSet.open(folder, scores="ref_logprob")], spec=None, max_tokens=100)
        (segment,) = corpus.read([1], [kept])
        assert isinstance(segment, Segment)
        assert segment.scores is not None
        assert segment.scores.tolist() == expected


def test_patches_are_those_of_the_image_and_come_from_the_cache_the_second_time(
    pairs: ShardSet, spec: VisionSpec
) -> None:
    reader = PatchReader(spec, cache_mb=1, workers=2)
    first, second = reader.many([(pairs, 2), (pairs, 0)]), reader.many([(pairs, 0), (pairs, 2)])
    assert first[0] is second[1]
    assert first[1] is second[0]
    np.testing.assert_array_equal(first[0], patchify(decode_rgb(pairs.image(2)), patch=4, size=(12, 16)))
    with pytest.raises(ValueError, match="read-only"):
        first[0][0, 0] = 1  # type: ignore[index]
    reader.close()


def test_an_image_of_several_captions_is_decoded_once(write_shards: Write, content: type, spec: VisionSpec) -> None:
    folder = write_shards("pairs", content(CAPTIONS, sizes=[(8, 8)] * 4, image_keys=["a", "b", "a", "b"]))
    reader = PatchReader(spec, cache_mb=1, workers=2)
    shards = ShardSet.open(folder)
    found = reader.many([(shards, i) for i in range(4)])
    assert found[0] is found[2]
    assert found[1] is found[3]
    assert found[0] is not found[1]
    reader.close()


def test_the_cache_stays_within_its_bound(write_shards: Write, content: type) -> None:
    spec = PatchSpec(patch=256, limit=512, patch_id=3, start_id=4, row_id=5, end_id=6)
    shards = ShardSet.open(write_shards("pairs", content(CAPTIONS, sizes=[(9, 8), (500, 500), (9, 9), (8, 8)])))
    reader = PatchReader(spec, cache_mb=1, workers=1)  # a patch has 196,608 bytes: five fit into 1 MiB
    kept = reader.many([(shards, i) for i in range(4)])
    again = reader.many([(shards, i) for i in range(4)])
    assert [a is b for a, b in zip(kept, again, strict=True)] == [True, True, False, False]
    reader.close()
    off = PatchReader(spec, cache_mb=0, workers=1)
    assert off.many([(shards, 0)])[0] is not off.many([(shards, 0)])[0]
    off.close()


def test_an_undecodable_image_is_reported_in_its_place(write_shards: Write, content: type, spec: VisionSpec) -> None:
    folder = write_shards("pairs", content(CAPTIONS, sizes=SIZES, images={1: b"<html>404</html>", 3: b"\xff\xd8\xff"}))
    corpus = Corpus([ShardSet.open(folder)], spec=spec, max_tokens=100)
    found = corpus.read([0, 1, 2, 3], [2, 3, 5, 2])
    assert [isinstance(item, Dropped) for item in found] == [False, True, False, True]
    assert isinstance(found[1], Dropped)
    assert found[1].sample_id == 1
    assert found[1].reason.startswith("pairs/00000 sample 1 (key key1): html")

"""The batches of a run: the same samples for any number of ranks, exact D and weights, and a resume that cannot be told."""

from __future__ import annotations

import itertools
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megaprior.data.loader import DataConfig, Loader, SourceConfig, StepBatch, plan_rows
from megaprior.data.samples import Batch
from megaprior.data.shards import Shard
from megaprior.data.vision import VisionSpec
from megaprior.data.weighting import WeightingConfig
from megaprior.errors import DataError, UsageError
from megaprior.tokenizer import Tokenizer, train_sentencepiece

Write = Callable[..., Path]
RNG = np.random.default_rng(7)
CAPTIONS = [[*RNG.integers(10, 300, 1 + i % 7).tolist(), 2] for i in range(30)]
SIZES = [(int(w), int(h)) for w, h in RNG.integers(1, 33, (30, 2))]
SCORES = [(-3 * RNG.random(len(caption))).round(3).tolist() for caption in CAPTIONS]
TEXT = [[100 + i] * (3 + 4 * (i % 3)) + [2] for i in range(9)]
PRIOR = WeightingConfig(kind="prior")
NTP = WeightingConfig()


@pytest.fixture(scope="module")
def pairs(write_shards: Write, content: type) -> str:
    # Equal first tokens would need equal scores: all of them start alike.
    scores = [[-1.0, *rest[1:]] for rest in SCORES]
    return str(write_shards("pairs", content(CAPTIONS, sizes=SIZES, scores=scores, shards=2)))


@pytest.fixture(scope="module")
def text(write_shards: Write, content: type) -> str:
    return str(write_shards("text", content(TEXT)))


@pytest.fixture
def make(tokenizer: Tokenizer, spec: VisionSpec) -> Any:
    """`make(train, text=..., weighting=..., rank=..., ...)` opens a loader; all are closed at the end."""
    opened: list[Loader] = []

    def loader(
        train: list[str | SourceConfig] | str,
        *,
        weighting: WeightingConfig = NTP,
        spec: VisionSpec | None = spec,
        tokenizer: Tokenizer = tokenizer,
        seed: int = 5,
        rank: int = 0,
        world: int = 1,
        start_step: int = 0,
        **data: Any,
    ) -> Loader:
        sources = [train] if isinstance(train, str) else train
        data = {"batch_size": 12, "max_tokens": 64, "pad_to": 16} | data
        cfg = DataConfig(train=[s if isinstance(s, SourceConfig) else SourceConfig(path=s) for s in sources], **data)
        opened.append(
            Loader(
                cfg,
                seed=seed,
                weighting=weighting,
                spec=spec,
                tokenizer=tokenizer,
                rank=rank,
                world=world,
                start_step=start_step,
            )
        )
        return opened[-1]

    yield loader
    for one in opened:
        one.close()


def captions_of(batches: list[StepBatch]) -> Counter[tuple[int, tuple[int, ...]]]:
    """How often each (sample id, targets) is in the rows."""
    found: Counter[tuple[int, tuple[int, ...]]] = Counter()
    for row in itertools.chain.from_iterable(batch.micro for batch in batches):
        for sample, start, end in zip(row.sample_ids.tolist(), row.loss_cu, row.loss_cu[1:], strict=False):
            found[sample, tuple(row.targets[start:end].tolist())] += 1
    return found


def equal(a: Batch, b: Batch) -> bool:
    """Bit for bit, NaN included."""
    pairs = [(getattr(a, f.name), getattr(b, f.name)) for f in fields(Batch)]
    return all(np.array_equal(x, y, equal_nan=torch.is_tensor(x) and x.is_floating_point()) for x, y in pairs)


# ---------------------------------------------------------------- order, split, rows


@pytest.mark.parametrize("world", [2, 3, 5, 16])
def test_the_samples_and_their_order_do_not_depend_on_the_world_size(
    make: Any, pairs: str, text: str, world: int
) -> None:
    alone = make(pairs, text=[SourceConfig(path=text)])
    ranks = [make(pairs, text=[SourceConfig(path=text)], rank=rank, world=world) for rank in range(world)]
    for step in (0, 1, 7):
        whole, parts = alone.batch(step), [loader.batch(step) for loader in ranks]
        assert all(np.array_equal(part.sample_ids, whole.sample_ids) for part in parts)
        assert captions_of(parts) == captions_of([whole])
        assert {part.denominator for part in parts} == {whole.denominator}
        assert len({part.digest() for part in parts}) == 1
        assert len({len(part.micro) for part in parts}) == 1


def test_every_sample_of_the_batch_is_in_one_row_and_rows_are_not_too_long(make: Any, pairs: str) -> None:
    batch = make(pairs).batch(2)
    expected = Counter((int(i), tuple(CAPTIONS[i])) for i in batch.sample_ids)
    assert captions_of([batch]) == expected
    assert len(batch.micro) > 1
    assert all(len(row.input_ids) <= 64 for row in batch.micro)
    assert batch.fill == sum(r.num_real_tokens for r in batch.micro) / sum(len(r.input_ids) for r in batch.micro)
    assert 0.5 < batch.fill <= 1


def test_ranks_without_enough_rows_run_dummies(make: Any, pairs: str) -> None:
    parts = [make(pairs, batch_size=3, rank=rank, world=5).batch(0) for rank in range(5)]
    assert [len(part.micro) for part in parts] == [1] * 5
    assert [part.num_loss_tokens > 0 for part in parts] == [True, True, True, False, False]
    assert parts[4].micro[0].num_real_tokens == 0
    assert parts[4].denominator == parts[0].denominator == sum(part.num_loss_tokens for part in parts)


def test_all_ranks_agree_on_the_number_of_micro_steps() -> None:
    lengths = [60, 50, 20, 20, 20]
    assert plan_rows(lengths, rank=0, world=2, max_tokens=64) == ([[0], [3]], 2)
    assert plan_rows(lengths, rank=1, world=2, max_tokens=64) == ([[1], [2, 4]], 2)
    assert plan_rows([60], rank=1, world=2, max_tokens=64) == ([], 1)


def test_each_epoch_shows_every_sample_once_also_inside_one_batch(make: Any, pairs: str) -> None:
    loader = make(pairs, batch_size=12)
    ids = np.concatenate([loader.sample_ids(step) for step in range(5)])  # two epochs of 30
    assert sorted(ids[:30]) == sorted(ids[30:]) == list(range(30))
    small = make(pairs, batch_size=75).batch(0)
    assert sorted(Counter(small.sample_ids.tolist()).values()) == [2] * 15 + [3] * 15
    assert captions_of([small]) == Counter((int(i), tuple(CAPTIONS[i])) for i in small.sample_ids)


def test_ids_count_through_the_sources_and_a_weight_of_0_is_never_drawn(make: Any, pairs: str, text: str) -> None:
    sources = [SourceConfig(path=text, weight=0), SourceConfig(path=pairs, weight=3), SourceConfig(path=text)]
    loader = make(sources)
    batch = loader.batch(0)
    assert np.bincount(loader.corpus.source_of(batch.sample_ids)).tolist() == [0, 9, 3]
    for sample, targets in captions_of([batch]):
        assert list(targets) == (CAPTIONS[sample - 9] if sample < 39 else TEXT[sample - 39])


# ---------------------------------------------------------------- D and weights


def test_d_and_the_weights_are_those_of_the_formulas(make: Any, pairs: str, text: str) -> None:
    batch = make(pairs, text=[SourceConfig(path=text)], weighting=PRIOR).batch(4)
    captions = CAPTIONS + TEXT
    assert batch.denominator == sum(len(captions[i]) for i in batch.sample_ids)
    assert batch.source_tokens == tuple(
        sum(len(captions[i]) for i in batch.sample_ids if (i >= 30) == is_text) for is_text in (False, True)
    )
    for row in batch.micro:
        assert row.denominator == batch.denominator
        for sample, start, end in zip(row.sample_ids.tolist(), row.loss_cu, row.loss_cu[1:], strict=False):
            g, k = row.token_weight[start:end].double(), int(end - start)
            if sample >= 30:
                assert g.tolist() == [1.0] * k
                assert row.scores[start:end].isnan().all()
            else:
                w = -np.expm1(np.array([-1.0, *SCORES[sample][1:]], dtype=np.float32).astype(np.float64))
                np.testing.assert_allclose(g, k * w / w.sum(), rtol=1e-5)
                assert float(g.sum()) == pytest.approx(k, rel=1e-5)
    assert batch.sum_g == pytest.approx(batch.denominator, rel=1e-6)


def test_ntp_has_weight_1_everywhere_and_reads_no_scores(make: Any, pairs: str) -> None:
    batch = make(pairs, scores="never_written").batch(0)
    assert all((row.token_weight == 1).all() and row.scores.isnan().all() for row in batch.micro)


def test_without_length_scale_weights_sum_to_1_and_alpha_0_is_ntp(make: Any, pairs: str) -> None:
    batch = make(pairs, weighting=WeightingConfig(kind="prior", length_scale=False)).batch(0)
    assert batch.sum_g == pytest.approx(12, rel=1e-6)
    assert batch.denominator == sum(len(CAPTIONS[i]) for i in batch.sample_ids)
    flat = make(pairs, weighting=WeightingConfig(kind="prior", alpha=0.0)).batch(0)
    assert all((row.token_weight == 1).all() for row in flat.micro)
    assert flat.num_flat == 0


def test_d_counts_what_truncation_leaves(make: Any, write_shards: Write, content: type, capsys: Any) -> None:
    long = [[*range(10, 60), 2], [70, 2]]
    scores = [[-1.0] * 51, [-1.0] * 2]
    folder = str(write_shards("long", content(long, sizes=[(16, 16), (4, 4)], scores=scores)))
    batch = make(folder, batch_size=2, max_tokens=32, weighting=PRIOR).batch(0)
    room = 32 - 1 - (4 * 4 + 3 + 2)
    assert batch.denominator == room + 2
    assert captions_of([batch]) == {(0, tuple(range(10, 10 + room))): 1, (1, (70, 2)): 1}
    assert batch.sum_g == pytest.approx(room + 2)
    assert "1 of 2 captions are cut to fit rows of data.max_tokens = 32" in capsys.readouterr().err


def test_captions_known_by_heart_are_counted(make: Any, write_shards: Write, content: type) -> None:
    folder = write_shards("known", content([[10, 2], [11, 2]], sizes=[(4, 4)] * 2, scores=[[0, 0], [-1, 0]]))
    batch = make(str(folder), batch_size=2, weighting=PRIOR).batch(0)
    assert batch.num_flat == 1
    weights = {int(row.targets[0]): row.token_weight.tolist() for row in batch.micro}
    if len(batch.micro) == 1:
        row = batch.micro[0]
        weights = {int(row.targets[i]): row.token_weight[i : i + 2].tolist() for i in (0, 2)}
    assert weights == {10: [1, 1], 11: [2, 0]}


# ---------------------------------------------------------------- dropped images


def test_a_dropped_image_keeps_its_tokens_in_d_and_adds_nothing(make: Any, write_shards: Write, content: type) -> None:
    broken = {3: b"<html>gone</html>", 8: b"\x89PNG\r\n\x1a\n"}
    scores = [[-1.0] * len(caption) for caption in CAPTIONS]
    folder = str(write_shards("holes", content(CAPTIONS, sizes=SIZES, images=broken, scores=scores)))
    batch = make(folder, batch_size=30, weighting=PRIOR).batch(0)
    assert sorted(batch.sample_ids) == list(range(30))
    assert batch.denominator == sum(map(len, CAPTIONS))
    assert sorted(drop.sample_id for drop in batch.dropped) == [3, 8]
    assert "holes/00000 sample 3 (key key3): html" in {d.sample_id: d.reason for d in batch.dropped}[3]
    assert captions_of([batch]) == Counter((i, tuple(CAPTIONS[i])) for i in range(30) if i not in broken)
    kept = sum(map(len, CAPTIONS)) - len(CAPTIONS[3]) - len(CAPTIONS[8])
    assert batch.num_loss_tokens == kept
    assert batch.sum_g == pytest.approx(kept)


def test_a_batch_of_broken_images_only_is_a_dummy(make: Any, write_shards: Write, content: type) -> None:
    broken = dict.fromkeys(range(2), b"GIF89a")
    folder = str(write_shards("holes", content([[10, 2], [11, 12, 2]], sizes=[(4, 4)] * 2, images=broken)))
    batch = make(folder, batch_size=2).batch(0)
    assert batch.denominator == 5
    assert [len(row.targets) for row in batch.micro] == [0]
    assert len(batch.dropped) == 2


# ---------------------------------------------------------------- language mix


@pytest.mark.parametrize("unit", ["loss_tokens", "tokens", "samples"])
@pytest.mark.parametrize("ratio", [1.0, 0.25, 3.0])
def test_the_language_mix_has_its_share_of_the_unit(make: Any, pairs: str, text: str, unit: str, ratio: float) -> None:
    loader = make(pairs, text=[SourceConfig(path=text)], mix_ratio=ratio, mix_unit=unit, batch_size=90)
    steps = 30  # whole epochs of the 30 pairs; the text's last epoch is cut, which costs below 1%
    ids = np.concatenate([loader.sample_ids(step) for step in range(steps)])
    lengths = loader.corpus.lengths(ids)
    amount = {"loss_tokens": lengths.loss, "tokens": lengths.segment, "samples": np.ones(len(ids))}[unit]
    assert amount[ids >= 30].sum() / amount[ids < 30].sum() == pytest.approx(ratio, rel=0.01)
    assert np.sum(ids < 30) == steps * 90  # the batch counts pairs, the mix comes on top


def test_each_step_has_the_floor_or_the_ceiling_of_the_mix(make: Any, pairs: str, text: str) -> None:
    loader = make(pairs, text=[SourceConfig(path=text)], mix_ratio=0.35, mix_unit="samples", batch_size=10)
    assert loader.text_per_step == 3.5
    texts = [loader.sample_ids(step)[10:] for step in range(18)]
    assert [len(t) for t in texts] == [3, 4] * 9
    assert np.bincount(np.concatenate(texts)).tolist()[30:] == [7] * 9  # seven whole epochs


def test_no_mix_without_a_ratio_or_a_weight(make: Any, pairs: str, text: str) -> None:
    off = make(pairs, text=[SourceConfig(path=text)], mix_ratio=0)
    unweighted = make(pairs, text=[SourceConfig(path=text, weight=0)])
    assert off.sample_ids(3).tolist() == unweighted.sample_ids(3).tolist() == make(pairs).sample_ids(3).tolist()


# ---------------------------------------------------------------- resume, digest, background work


def test_a_resume_at_any_step_equals_the_straight_run(make: Any, pairs: str, text: str) -> None:
    mix = [SourceConfig(path=text)]
    straight = list(itertools.islice(iter(make(pairs, text=mix, weighting=PRIOR)), 10))
    resumed = list(itertools.islice(iter(make(pairs, text=mix, weighting=PRIOR, start_step=7, cache_mb=0)), 3))
    assert [batch.step for batch in resumed] == [7, 8, 9]
    for a, b in zip(straight[7:], resumed, strict=True):
        assert len(a.micro) == len(b.micro)
        assert all(equal(x, y) for x, y in zip(a.micro, b.micro, strict=True))
        assert (a.digest(), a.denominator, a.sum_g) == (b.digest(), b.denominator, b.sum_g)
    direct = make(pairs, text=mix, weighting=PRIOR, start_step=7).batch(7)
    assert all(equal(x, y) for x, y in zip(direct.micro, straight[7].micro, strict=True))


def test_the_digest_tells_ranks_apart_that_differ(make: Any, pairs: str, text: str) -> None:
    same = make(pairs, workers=1, prefetch=1, cache_mb=0).batch(3).digest()
    assert same == make(pairs).batch(3).digest()
    other = [
        make(pairs).batch(4),
        make(pairs, seed=6).batch(3),
        make(pairs, weighting=PRIOR).batch(3),
        make(pairs, pad_to=8).batch(3),
        make(pairs, text=[SourceConfig(path=text)]).batch(3),
    ]
    assert len({same, *(batch.digest() for batch in other)}) == 6


def test_bad_scores_in_the_background_surface_in_the_loop(make: Any, pairs: str, tmp_path: Path) -> None:
    folder = shutil.copytree(pairs, tmp_path / "pairs")
    loader = make(str(folder), weighting=PRIOR, batch_size=30)
    stream = Shard.open(folder, "00001").streams["tokens"]
    with open(folder / "00001.ref_logprob.bin", "r+b") as file:  # sample 18 is the fourth of the second shard
        file.seek(4 * int(stream.lengths[:3].sum()))
        file.write(np.array([np.nan], dtype="<f4").tobytes())
    with pytest.raises(DataError, match=r"pairs/00001 sample 3 \(key key18\): score nan at token 0"):
        next(iter(loader))


def test_closing_stops_all_background_work(make: Any, pairs: str) -> None:
    before = set(threading.enumerate())  # an unclosed loader of another test keeps its threads until it is collected
    loader = make(pairs, prefetch=3)
    batches = iter(loader)
    next(batches)
    assert loader.data_wait_s > 0
    assert any(thread.name.startswith("megaprior") for thread in set(threading.enumerate()) - before)
    loader.close()
    loader.close()
    assert not set(threading.enumerate()) - before
    with pytest.raises(StopIteration):
        next(batches)


# ---------------------------------------------------------------- text only, refusals


def test_a_text_stage_looks_at_no_image(make: Any, pairs: str, text: str) -> None:
    batch = make([pairs, text], spec=None).batch(0)
    assert all(row.patches.shape == (0, 0) and row.patch_index.numel() == 0 for row in batch.micro)
    captions = CAPTIONS + TEXT
    assert captions_of([batch]) == Counter((int(i), tuple(captions[i])) for i in batch.sample_ids)


def test_what_cannot_be_trained_on_is_refused_before_a_step(
    make: Any, pairs: str, text: str, write_shards: Write, content: type, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"weighting\.kind=prior needs a model that sees images"):
        make(pairs, weighting=PRIOR, spec=None)
    with pytest.raises(UsageError, match=r"prior needs data\.scores"):
        make(pairs, weighting=PRIOR, scores=None)
    with pytest.raises(UsageError, match=r"data\.train is empty"):
        make([])
    with pytest.raises(DataError, match=r"megaprior score --shards .*unscored"):
        make(str(write_shards("unscored", content(CAPTIONS, sizes=SIZES))), weighting=PRIOR)
    with pytest.raises(DataError, match=r"data\.text takes shards of text, these are pairs"):
        make(pairs, text=[SourceConfig(path=pairs)])
    with pytest.raises(DataError, match="a row holds 20; raise max_tokens to at least"):
        make(pairs, max_tokens=20)
    other = train_sentencepiece(["quite another text about boats and harbours"] * 9, tmp_path / "other", vocab_size=280)
    with pytest.raises(DataError, match="tokenizer"):
        make(pairs, tokenizer=other)


def test_a_source_without_samples_is_refused(make: Any, pairs: str, write_shards: Write, content: type) -> None:
    empty = str(write_shards("empty", content([], sizes=[])))
    with pytest.raises(DataError, match=r"empty: 0 samples; remove this source"):
        make([pairs, empty])

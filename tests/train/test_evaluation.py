"""Held-out loss: every token once, split by importance, weights of the training objective play no part."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from train_children import config, settings

from megaprior.data.shards import ShardSet
from megaprior.distributed import Peers, Place
from megaprior.errors import DataError
from megaprior.train import assembly
from megaprior.train.evaluation import HeldOut


def parts(world: Path, **data: object) -> tuple:
    values = settings(world, Path("unused"))
    values["data"] |= data
    cfg = config(values)
    tokenizer = assembly.open_tokenizer(cfg)
    model = assembly.build_model(cfg, tokenizer)
    return cfg, tokenizer, assembly.vision_spec(model), assembly.local_engine(cfg, model, groups=1)


def held_out(cfg, tokenizer, spec, **changes: object) -> HeldOut:
    options = {"samples": 100, "threshold": 0.5, "peers": Peers(Place()), **changes}
    return HeldOut(cfg.data, spec=spec, tokenizer=tokenizer, **options)


def test_the_split_is_that_of_a_loop_over_single_samples(world: Path) -> None:
    cfg, tokenizer, spec, engine = parts(world)
    measured = held_out(cfg, tokenizer, spec, threshold=0.7).measure(engine)
    shards = ShardSet.open(world / "heldout", scores="ref_logprob")
    nll, importance = [], []
    from megaprior.data.loader import rows

    for i in range(len(shards)):
        (row,) = rows(shards, [i], spec=spec, max_tokens=96)
        nll += engine.evaluate(row).tolist()
        importance += (1 - np.exp(shards.scores(i).astype(np.float64))).tolist()
    nll_array, above = np.array(nll), np.array(importance) > 0.7
    assert 0 < above.sum() < len(above)
    assert measured["heldout_ntp"] == pytest.approx(nll_array.mean(), rel=1e-6)
    assert measured["heldout_ntp_above"] == pytest.approx(nll_array[above].mean(), rel=1e-6)
    assert measured["heldout_ntp_below"] == pytest.approx(nll_array[~above].mean(), rel=1e-6)
    assert measured["share_above"] == pytest.approx(above.mean())
    assert measured["threshold"] == 0.7


def test_a_threshold_that_nothing_passes_has_no_upper_part(world: Path) -> None:
    cfg, tokenizer, spec, engine = parts(world)
    measured = held_out(cfg, tokenizer, spec, threshold=2.0).measure(engine)
    assert "heldout_ntp_above" not in measured
    assert measured["heldout_ntp_below"] == pytest.approx(measured["heldout_ntp"])


def test_without_scores_there_is_no_split(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg, tokenizer, spec, engine = parts(world, scores="another")
    assert set(held_out(cfg, tokenizer, spec).measure(engine)) == {"heldout_ntp"}
    assert "has no 'another' scores" in capsys.readouterr().err


def test_the_part_is_fixed_and_at_most_the_folder(world: Path) -> None:
    cfg, tokenizer, spec, engine = parts(world)
    first, second = (held_out(cfg, tokenizer, spec, samples=5).measure(engine) for _ in range(2))
    assert first == second
    assert first != held_out(cfg, tokenizer, spec, samples=6).measure(engine)


def test_ranks_share_the_rows_and_call_alike(world: Path) -> None:
    cfg, tokenizer, spec, _ = parts(world, max_tokens=40)
    shares = [held_out(cfg, tokenizer, spec, peers=Peers(Place(rank, 3, rank)))._rows for rank in range(3)]
    assert len({len(share) for share in shares}) == 1
    counted = sorted(i for share in shares for row, counts in share if counts for i in row.sample_ids.tolist())
    assert counted == list(range(12))
    assert any(not counts for share in shares for _, counts in share)  # 12 samples do not fill three equal shares here


def test_an_empty_part_is_refused(world: Path) -> None:
    cfg, tokenizer, spec, _ = parts(world)
    with pytest.raises(DataError, match="has no samples"):
        held_out(cfg, tokenizer, spec, samples=0)


def test_the_rows_weigh_every_token_alike(world: Path) -> None:
    cfg, tokenizer, spec, _ = parts(world)
    rows = held_out(cfg, tokenizer, spec)._rows
    assert all(torch.equal(row.token_weight, torch.ones_like(row.token_weight)) for row, _ in rows)

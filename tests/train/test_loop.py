"""The loop keeps its size and its losses, and never updates on what is not finite."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from train_children import GOLDEN, GOLDEN_RUNS, config, measure_golden, settings, train

from megaprior.data.loader import Loader
from megaprior.errors import MegapriorError
from megaprior.models.flops import shape_of, train_flops
from megaprior.train import assembly, loop


def test_the_loop_fits_a_screen() -> None:
    assert len(Path(loop.__file__).read_text().splitlines()) <= 80


@pytest.mark.parametrize("name", sorted(GOLDEN_RUNS))
def test_golden_losses(world: Path, tmp_path: Path, name: str) -> None:
    """Committed losses of 20 steps; the tolerance is relative, some 100 times what other CPUs and threads change."""
    expected = json.loads((GOLDEN / f"{name}.json").read_text())
    measured = measure_golden(world, tmp_path / "run", name)
    for kind, values in measured.items():
        assert values == pytest.approx(expected[kind], rel=expected["tolerance"]), kind
    assert measured["loss"][-1] < measured["loss"][0] - 1.0  # it learns


@pytest.fixture
def poisoned(world: Path, tmp_path: Path) -> Path:
    """A starting model in which one token's embedding is not a number."""
    values = settings(world, tmp_path / "unused")
    cfg = config(values)
    tokenizer = assembly.open_tokenizer(cfg)
    model: Any = assembly.build_model(cfg, tokenizer)
    with torch.no_grad():
        model.model.embed_tokens.weight[207] = float("nan")  # a word of some captions only
    model.save_pretrained(tmp_path / "poisoned")
    tokenizer.save(tmp_path / "poisoned" / "tokenizer")
    return tmp_path / "poisoned"


def test_a_nan_stops_before_the_update_with_the_sample_ids(world: Path, poisoned: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    values = settings(world, out, save_every=1, model={"init": str(poisoned)}, weighting={"kind": "ntp"})
    with pytest.raises(MegapriorError, match=r"step \d: the loss is nan on rank 0; nothing was updated") as error:
        train(config(values))
    step = int(str(error.value).split()[1].rstrip(":"))
    cfg = config(values)
    loader = assembly.open_loader(cfg, assembly.open_tokenizer(cfg), None)
    ids = loader.sample_ids(step - 1).tolist()
    loader.close()
    assert str(error.value).endswith("Its sample ids: " + " ".join(map(str, ids)))
    assert sorted(p.name for p in (out / "checkpoints").glob("step_*")) == [f"step_{n:08d}" for n in range(1, step)]


def test_an_infinite_gradient_stops_too(world: Path, tmp_path: Path) -> None:
    # A rate so large that the weights overflow: the loss of the next step, or its gradient, is not finite.
    out = tmp_path / "run"
    values = settings(world, out, steps=20, save_every=1, optim={"lr": 1e30, "clip": 0.0, "schedule": "constant"})
    with pytest.raises(MegapriorError, match="nothing was updated"):
        train(config(values))
    last = torch.load(max((out / "checkpoints").iterdir()) / "state" / "local.pt", weights_only=True)
    assert all(bool(torch.isfinite(t).all()) for t in last["module"].values())


def test_every_step_is_logged_once_with_all_fields(world: Path, tmp_path: Path) -> None:
    optim = {"lr": 4e-3, "warmup_steps": 4}
    values = settings(world, tmp_path / "run", steps=4, save_every=4, log_every=2, optim=optim, peak_tflops=0.5)
    train(config(values))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in lines] == [2, 4]
    assert [line["lr"] for line in lines] == pytest.approx([2e-3, 4e-3])
    cfg = config(values)
    tokenizer = assembly.open_tokenizer(cfg)
    model: Any = assembly.build_model(cfg, tokenizer)
    loader: Loader = assembly.open_loader(cfg, tokenizer, assembly.vision_spec(model))
    for line in lines:
        batch = loader.batch(line["step"] - 1)
        assert line["denominator"] == batch.denominator == line["loss_tokens"]
        assert line["sum_g"] == pytest.approx(batch.sum_g)
        assert line["micro_steps"] == len(batch.micro)
        assert line["fill"] == pytest.approx(batch.fill)
        assert line["source0_share"] + line["source1_share"] == pytest.approx(1.0)
        assert line["source0_share"] == batch.source_tokens[0] / batch.denominator
        mixed = sum(line[f"source{s}_ntp_loss"] * batch.source_tokens[s] for s in (0, 1)) / batch.denominator
        assert line["ntp_loss"] == pytest.approx(mixed, rel=1e-9)
        assert 0 <= line["data_wait_s"] <= line["step_s"]
        assert line["data_wait_share"] == pytest.approx(line["data_wait_s"] / line["step_s"])
        assert line["loss_tokens_per_s"] == pytest.approx(line["loss_tokens"] / line["step_s"])
        real = sum(row.num_real_tokens for row in batch.micro)
        assert line["tokens_per_s"] == pytest.approx(real / line["step_s"])
        assert line["pairs_per_s"] == pytest.approx(8 / line["step_s"])
        lengths = [n for row in batch.micro for n in row.cu_seqlens.diff().tolist()[: len(row.sample_ids)]]
        assert sorted(lengths) == sorted(batch.segment_tokens.tolist())
        flops = train_flops(
            shape_of(model.config),
            segments=lengths,
            loss_tokens=batch.denominator,
            images=0,
            patches=sum(len(row.patches) for row in batch.micro),
            trained="all",
        )
        assert line["tflops_per_rank"] == pytest.approx(flops.total / line["step_s"] / 1e12)
        assert line["mfu"] == pytest.approx(line["tflops_per_rank"] / 0.5)
    loader.close()

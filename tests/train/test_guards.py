"""Guards: what is not finite is dropped within a budget or ends the run, spikes and norms are told by the formula, and a
resumed run decides as the straight one."""

from __future__ import annotations

import json
import math
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from train_children import config, settings, train

from megaprior.errors import MegapriorError
from megaprior.train import assembly
from megaprior.train.guards import Guard, GuardConfig
from megaprior.train.replay import replay_step
from megaprior.train.step import Totals

STEPS = 8
# What of a line is a function of the steps.
FACTS = (
    "kind",
    "step",
    "loss",
    "grad_norm",
    "grad_norm_median",
    "lr",
    "skipped_steps",
    "reason",
    "sample_ids",
    "expected",
    "what",
)


def facts(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in FACTS if key in line} for line in lines if line["kind"] != "save"]


def kinds(out: Path) -> list[tuple[int, str]]:
    return [(fact["step"], fact["kind"]) for fact in facts(out)]


def weights(out: Path, step: int) -> dict[str, bytes]:
    tensors = load_file(out / "checkpoints" / f"step_{step:08d}" / "model" / "model.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def poisoned(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A starting model in which a word of some captions is not a number: whether a step is NaN is a function of its samples."""
    folder = tmp_path_factory.mktemp("models")
    cfg = config(settings(world, folder / "unused"))
    tokenizer = assembly.open_tokenizer(cfg)
    model: Any = assembly.build_model(cfg, tokenizer)
    with torch.no_grad():
        model.model.embed_tokens.weight[207] = float("nan")
    model.save_pretrained(folder / "poisoned")
    tokenizer.save(folder / "poisoned" / "tokenizer")
    return folder / "poisoned"


def poisoned_settings(world: Path, poisoned: Path, out: Path, *, budget: int) -> dict[str, Any]:
    return settings(
        world,
        out,
        steps=STEPS,
        save_every=1,
        model={"init": str(poisoned)},
        weighting={"kind": "ntp"},
        guards={"skip_budget": budget},
    )


@pytest.fixture(scope="module")
def dropping(world: Path, poisoned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that drops every step that is not finite."""
    out = tmp_path_factory.mktemp("runs") / "dropping"
    assert train(config(poisoned_settings(world, poisoned, out, budget=STEPS))) == 0
    return out


def dropped_steps(out: Path) -> list[int]:
    return [step for step, kind in kinds(out) if kind == "skip"]


def test_a_step_that_is_not_finite_is_dropped_and_the_run_goes_on(dropping: Path, world: Path, poisoned: Path) -> None:
    gone = dropped_steps(dropping)
    assert 2 <= len(gone) < STEPS - 1, gone
    assert [step for step, kind in kinds(dropping) if kind == "train"] == [
        s for s in range(1, STEPS + 1) if s not in gone
    ]
    for step in range(2, STEPS + 1):  # dropped: no weight moves; kept: some do
        assert (weights(dropping, step) == weights(dropping, step - 1)) == (step in gone), step
    cfg = config(poisoned_settings(world, poisoned, dropping, budget=0))
    loader = assembly.open_loader(cfg, assembly.open_tokenizer(cfg), None)
    for count, line in enumerate((f for f in facts(dropping) if f["kind"] == "skip"), start=1):
        assert line["sample_ids"] == loader.sample_ids(line["step"] - 1).tolist()
        assert line["skipped_steps"] == count
        assert line["reason"] == "the loss is nan"
    loader.close()
    rates = {f["step"]: f["lr"] for f in facts(dropping) if f["kind"] == "train"}
    last = max(rates)
    assert (
        rates[last] < 3e-3 * (1 - 0.9 * (last - 3) / (STEPS - 2)) + 1e-3
    )  # the schedule went on under the dropped ones
    assert json.loads((dropping / "summary.json").read_text())["skipped_steps"] == len(gone)


def test_resumed_anywhere_it_drops_the_same_steps(dropping: Path, world: Path, poisoned: Path, tmp_path: Path) -> None:
    for step in range(1, STEPS):
        out = shutil.copytree(dropping, tmp_path / f"from {step}")
        for folder in (out / "checkpoints").iterdir():
            if folder.name > f"step_{step:08d}":
                shutil.rmtree(folder)
        assert train(config(poisoned_settings(world, poisoned, out, budget=STEPS))) == 0
        assert facts(out) == facts(dropping)
        assert weights(out, STEPS) == weights(dropping, STEPS)


def test_a_spent_budget_stops_and_a_larger_one_goes_on(
    dropping: Path, world: Path, poisoned: Path, tmp_path: Path
) -> None:
    out, gone = tmp_path / "run", dropped_steps(dropping)
    with pytest.raises(MegapriorError) as error:
        train(config(poisoned_settings(world, poisoned, out, budget=1)))
    said = str(error.value)
    assert said.startswith(
        f"step {gone[1]}: the loss is nan on rank 0; all 1 steps of guards.skip_budget are dropped; nothing was"
    )
    assert f"`megaprior replay RUN --step {gone[1]}`" in said
    assert dropped_steps(out) == gone[:1]
    assert train(config(poisoned_settings(world, poisoned, out, budget=STEPS))) == 0
    assert facts(out) == facts(dropping)
    assert weights(out, STEPS) == weights(dropping, STEPS)


def test_replay_drops_them_again_and_shows_them(dropping: Path) -> None:
    (dropping / "config.yaml").write_text((dropping / "config.yaml").read_text())
    first, after = dropped_steps(dropping)[0], max(step for step, kind in kinds(dropping) if kind == "train")
    assert math.isnan(replay_step(dropping, first).totals.loss)
    alone = shutil.copytree(dropping, dropping.with_name("alone"))
    shutil.rmtree(alone / "checkpoints")  # from the very beginning
    logged = next(f for f in facts(dropping) if f["kind"] == "train" and f["step"] == after)
    assert replay_step(alone, after).totals.loss == logged["loss"]


# ---------------------------------------------------------------- spikes and norms

QUIET = {"lr": 1e-7, "schedule": "constant"}  # losses differ by their samples alone


def expected_spikes(losses: list[float], factor: float, window: int) -> list[int]:
    """Steps (from 1) whose loss is beyond median + factor * max(1.4826 MAD, 1% of the median) of those before."""
    found = []
    for step in range(17, len(losses) + 1):
        past = losses[max(0, step - 1 - window) : step - 1]
        median = statistics.median(past)
        spread = max(1.4826 * statistics.median([abs(v - median) for v in past]), 0.01 * median)
        if losses[step - 1] > median + factor * spread:
            found.append(step)
    return found


def test_spikes_are_told_by_the_formula_and_change_nothing(world: Path, tmp_path: Path) -> None:
    guards = {"spike_factor": 0.3, "window": 20, "norm_factor": 1.05, "vanish_factor": 1.05, "norm_steps": 2}
    run = {"steps": 40, "save_every": 40, "optim": QUIET}
    train(config(settings(world, tmp_path / "plain", **run, guards={"window": 20})))
    train(config(settings(world, tmp_path / "watched", **run, guards=guards)))
    plain, watched = (facts(tmp_path / name) for name in ("plain", "watched"))
    assert [f for f in watched if f["kind"] == "train"] == plain
    spikes = [f for f in watched if f["kind"] == "spike"]
    steps = [f["step"] for f in spikes]
    assert steps == expected_spikes([f["loss"] for f in plain], 0.3, 20)
    assert 3 <= len(steps) <= 20
    assert all(f["sample_ids"] and f["loss"] > f["expected"] for f in spikes)

    norms, found = [f["grad_norm"] for f in plain], []
    runs = {"high": 0, "vanished": 0}
    for step in range(17, 41):
        median = statistics.median(norms[max(0, step - 21) : step - 1])
        for what, holds in (("high", norms[step - 1] > 1.05 * median), ("vanished", norms[step - 1] < median / 1.05)):
            runs[what] = runs[what] + 1 if holds else 0
            if runs[what] == 2:
                found.append((step, what))
    assert [(f["step"], f["what"]) for f in watched if f["kind"] == "norm"] == found
    assert found


def test_spikes_are_dropped_within_the_budget_the_same_after_a_resume(world: Path, tmp_path: Path) -> None:
    guards = {"spike_factor": 0.3, "window": 20, "spike_action": "skip", "skip_budget": 2}
    values = settings(world, tmp_path / "run", steps=40, save_every=10, optim=QUIET, guards=guards)
    train(config(values))
    out = tmp_path / "run"
    gone, told = ([step for step, kind in kinds(out) if kind == what] for what in ("skip", "spike"))
    assert len(gone) == 2  # the budget
    assert len(told) >= 1
    assert max(gone) < min(told)  # beyond it they are told
    assert [step for step, kind in kinds(out) if kind == "train"] == [s for s in range(1, 41) if s not in gone]
    for step in (20, 30):
        copy = shutil.copytree(out, tmp_path / f"from {step}")
        for folder in (copy / "checkpoints").iterdir():
            if folder.name > f"step_{step:08d}":
                shutil.rmtree(folder)
        train(config({**values, "out": str(copy)}))
        assert facts(copy) == facts(out)
        assert weights(copy, 40) == weights(out, 40)


def test_a_history_survives_json_to_the_bit(world: Path, tmp_path: Path) -> None:
    cfg = config(settings(world, tmp_path))
    tokenizer = assembly.open_tokenizer(cfg)
    loader = assembly.open_loader(cfg, tokenizer, assembly.vision_spec(assembly.build_model(cfg, tokenizer)))
    batch = loader.batch(0)
    loader.close()
    counts: dict[str, Any] = {"nll": (), "tokens": (), "sum_g": 0.0, "dropped": 0, "flat": 0, "fill": 1.0, "patches": 0}
    generator = torch.Generator().manual_seed(1)
    series = (2 + torch.randn(200, 2, generator=generator, dtype=torch.float64).square()).tolist()
    totals = [Totals(loss=loss, norm=norm, stop=False, **counts) for loss, norm in series]
    options = GuardConfig(
        spike_factor=2.0, norm_factor=1.5, norm_steps=1, window=64, spike_action="skip", skip_budget=5
    )
    once, again = Guard(options), Guard(options)
    verdicts = []
    for step, one in enumerate(totals, start=1):
        again = Guard(options, json.loads(json.dumps(again.state())))
        verdicts.append(once.judge(step, batch, one))
        assert again.judge(step, batch, one) == verdicts[-1]
    assert sum(verdict.skip for verdict in verdicts) == 5
    assert once.state() == again.state()


# ---------------------------------------------------------------- two ranks


@pytest.mark.slow
def test_a_nan_on_one_rank_is_dropped_by_all_and_leaves_no_trace(
    world: Path, tmp_path: Path, launch: Callable[..., list[int]], spawn: Callable[..., Any]
) -> None:
    guards = {"skip_budget": 1}
    values = settings(world, tmp_path / "both", steps=6, guards=guards)
    assert launch(values, fault={"rows": 3, "poison": True, "only_rank": 1}) == [0, 0]
    both = [json.loads(line) for line in (tmp_path / "both" / "metrics.jsonl").read_text().splitlines()]
    (skip,) = (line for line in both if line["kind"] == "skip")
    assert skip["ranks"] == [1]
    assert skip["skipped_steps"] == 1
    said = (tmp_path / "both.rank0.err").read_text()
    assert f"warning: step {skip['step']}: the loss is nan on rank 1; the step is dropped (1 of 1" in said
    # One process that drops the same step: the rows of one rank are a part of its own.
    rows = 2 * (skip["step"] - 1) + 1
    single = spawn({**values, "out": str(tmp_path / "local")}, {"rows": rows, "poison": True})
    single.join(120)
    assert single.exitcode == 0
    losses = {}
    for name in ("both", "local"):
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses[name] = {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}
    assert losses["both"] == pytest.approx(losses["local"], rel=0, abs=1e-5)
    assert len(losses["both"]) == 5

"""Preflight: the longest rows that the sources can give, no trace in the run, and one line where they do not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from train_children import SIZES, config, hlvlm_settings, make_bases, settings, train

from megaprior.train import assembly
from megaprior.train.preflight import longest_rows, preflight, wants_preflight


def rows_of(values: dict[str, Any]) -> list[Any]:
    cfg = config(values)
    tokenizer = assembly.open_tokenizer(cfg)
    spec = assembly.vision_spec(assembly.build_model(cfg, tokenizer))
    loader = assembly.open_loader(cfg, tokenizer, spec)
    try:
        return longest_rows(loader, bos_id=tokenizer.bos_id)
    finally:
        loader.close()


def counts(row: Any) -> tuple[int, int, int, int]:
    """(tokens, loss tokens, patches, longest segment) of a row."""
    return len(row.input_ids), len(row.targets), len(row.patches), row.max_seqlen


def test_a_ulvlms_rows_hold_the_most_images_and_the_most_loss_tokens(world: Path, tmp_path: Path) -> None:
    # limit 32, patch 16: the largest image is 2 x 2 patches, 7 tokens; the shortest caption of the world has 3 tokens or more.
    images, text = rows_of(settings(world, tmp_path / "run"))
    tokens, loss, patches, _ = counts(images)
    assert tokens == images.num_real_tokens == 96
    each = 1 + 7 + (loss - 1) // max(patches // 4, 1)
    assert patches // 4 == len(images.sample_ids) == 8  # as many as a batch has
    assert loss == 96 - 8 * (1 + 7)
    assert each >= 8
    assert counts(text) == (96, 95, 0, 96)
    # Without text, the most loss tokens stand behind the smallest image: 1 x 1 patch, 3 tokens.
    values = settings(world, tmp_path / "run")
    values["data"] |= {"text": [], "max_tokens": 50}
    images, caption = rows_of(values)
    assert counts(caption) == (50, 50 - 1 - 3, 1, 50)
    assert counts(images)[0] == 50
    assert len(images.sample_ids) == counts(images)[2] // 4 < 8  # as many as fit


def test_a_text_lms_row_is_one_document(world: Path, tmp_path: Path) -> None:
    values = settings(world, tmp_path / "run", stage="textlm", weighting={"kind": "ntp"})
    values["data"] |= {"train": values["data"]["text"], "text": []}
    (row,) = rows_of(values)
    assert counts(row) == (96, 95, 0, 96)


def test_an_hlvlms_images_take_their_tokens(world: Path, tmp_path: Path) -> None:
    make_bases(tmp_path)
    images, text = rows_of(hlvlm_settings(world, tmp_path, tmp_path / "run"))
    assert counts(images)[0] == 96
    assert counts(images)[2] == 4 * len(images.sample_ids) == 4 * 8
    assert counts(text)[1:3] == (95, 0)


def test_by_default_it_runs_where_a_failure_costs_most(world: Path, tmp_path: Path) -> None:
    for changes, expected in (
        ({}, torch.cuda.is_available()),
        ({"engine": "zero3"}, True),
        ({"engine": "zero3", "preflight": False}, False),
        ({"preflight": True}, True),
    ):
        assert wants_preflight(config(settings(world, tmp_path / "run", **changes))) == expected


def lines(out: Path) -> list[dict[str, Any]]:
    """The metrics without times."""
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    timed = ("_s", "_per_s", "_share", "tflops_per_rank", "slowest_rank", "slowest_part")
    return [
        {k: v for k, v in line.items() if not k.endswith(timed)} for line in found if line["kind"] in ("train", "eval")
    ]


def model(out: Path, step: int) -> bytes:
    return (out / "checkpoints" / f"step_{step:08d}" / "model" / "model.safetensors").read_bytes()


def test_it_leaves_no_random_state_and_no_gradient(world: Path, tmp_path: Path) -> None:
    cfg = config(settings(world, tmp_path / "run"))
    tokenizer = assembly.open_tokenizer(cfg)
    model = assembly.build_model(cfg, tokenizer)
    loader = assembly.open_loader(cfg, tokenizer, assembly.vision_spec(model))
    engine = assembly.local_engine(cfg, model, groups=2)
    torch.manual_seed(5)
    before, weights = torch.random.get_rng_state(), {name: w.clone() for name, w in engine.weights()}
    preflight(engine, loader, cfg=cfg, bos_id=tokenizer.bos_id, fresh=True)
    loader.close()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not dict(engine.gradients())
    assert engine.sums() == [0.0] * 4
    assert all(torch.equal(w, weights[name]) for name, w in engine.weights())


def test_it_leaves_no_trace_in_a_run(world: Path, tmp_path: Path) -> None:
    for name, wanted in (("with", True), ("without", False)):
        values = settings(world, tmp_path / name, steps=4, save_every=2, eval_every=2, eval_batches=1, preflight=wanted)
        train(config(values))
    assert lines(tmp_path / "with") == lines(tmp_path / "without")
    assert len(lines(tmp_path / "with")) == 6
    for step in (2, 4):
        assert model(tmp_path / "with", step) == model(tmp_path / "without", step)
    states = [
        torch.load(tmp_path / name / "checkpoints/step_00000004/state/local.pt", weights_only=True)["optimizer"][
            "state"
        ]
        for name in ("with", "without")
    ]
    assert states[0].keys() == states[1].keys()
    for one, other in zip(states[0].values(), states[1].values(), strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.slow
def test_it_leaves_no_trace_under_zero3(world: Path, tmp_path: Path, launch: Callable[..., list[int]]) -> None:
    for name, wanted in (("with", True), ("without", False)):
        values = settings(world, tmp_path / name, steps=3, save_every=3, preflight=wanted)
        assert launch(values) == [0, 0]
        said = (tmp_path / f"{name}.rank0.err").read_text()
        assert (
            "preflight: the longest rows fit (a row of 96 tokens, 32 of them in the loss, 8 images; " in said
        ) == wanted
    assert lines(tmp_path / "with") == lines(tmp_path / "without")
    assert model(tmp_path / "with", 3) == model(tmp_path / "without", 3)


def test_a_row_that_does_not_fit_is_one_line_before_step_1(
    world: Path, tmp_path: Path, spawn: Callable[..., Any]
) -> None:
    """The process may map 1 GiB more. Rows of 8,192 tokens ask for 0.5 GiB and again, in each MLP; the run's own rows, of
    some hundred tokens, would not."""
    model = {"llama": {**SIZES, "intermediate_size": 16_384}, "patch": 16, "limit": 32}
    values = settings(world, tmp_path / "run", steps=2, save_every=2, preflight=True, model=model)
    values["data"] |= {"max_tokens": 8192}
    small = spawn({**values, "preflight": False, "out": str(tmp_path / "small")}, {"address_space": 1 << 30})
    process = spawn(values, {"address_space": 1 << 30})
    for one in (small, process):
        one.join(120)
    assert small.exitcode == 0, (tmp_path / "small.rank0.err").read_text()
    said = (tmp_path / "run.rank0.err").read_text()
    assert process.exitcode == 2, said
    (line,) = [line for line in said.splitlines() if line.startswith("child:")]
    assert "preflight: a row of 8,192 tokens, " in line
    assert "does not fit into the memory of rank 0 (asked for " in line
    assert "nothing was trained. lower data.max_tokens (8,192), set activation_checkpointing=full, or spread" in line
    assert not list((tmp_path / "run").glob("checkpoints/*"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()

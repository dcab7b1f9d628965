"""The plain engine: gradients do not depend on how a batch is cut into rows, and a step is what its formulas say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from train_children import config, settings

from megaprior.train import assembly
from megaprior.train.engine import LocalEngine
from megaprior.train.step import row_sources

WEIGHTINGS = [{"kind": "ntp"}, {"kind": "prior"}, {"kind": "prior", "alpha": 2.0, "length_scale": False}]


def engine_after(
    world: Path, *, steps: range = range(1), data: dict | None = None, **changes: object
) -> tuple[LocalEngine, list]:
    """An engine that has accumulated the rows of `steps`, not updated; and those steps' batches."""
    values = settings(world, Path("unused"), **changes)
    values["data"] = {**values["data"], **(data or {})}
    cfg = config(values)
    tokenizer = assembly.open_tokenizer(cfg)
    model = assembly.build_model(cfg, tokenizer)
    loader = assembly.open_loader(cfg, tokenizer, assembly.vision_spec(model))
    engine = assembly.local_engine(cfg, model, groups=len(loader.sources))
    batches = [loader.batch(step) for step in steps]
    for batch in batches:
        for row in batch.micro:
            engine.accumulate(row, row_sources(loader.corpus, row), last=row is batch.micro[-1])
    loader.close()
    return engine, batches


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=["ntp", "prior", "alpha2"])
def test_one_packed_row_equals_many_small_ones(world: Path, weighting: dict) -> None:
    packed, one = engine_after(world, data={"max_tokens": 512}, weighting=weighting)
    # Rows of 22 tokens hold one to three samples, none of them cut.
    unpacked, many = engine_after(world, data={"max_tokens": 22, "pad_to": 1}, weighting=weighting)
    assert [len(one[0].micro), len(many[0].micro)] == [1, 6]
    assert one[0].denominator == many[0].denominator == one[0].num_loss_tokens == many[0].num_loss_tokens
    first, second = dict(packed.gradients()), dict(unpacked.gradients())
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=2e-6)
    assert packed.sums() == pytest.approx(unpacked.sums(), rel=2e-6)


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=["ntp", "prior", "alpha2"])
@pytest.mark.parametrize("ranks", [2, 8])
def test_one_row_of_eight_samples_equals_the_rows_of_several_ranks(world: Path, weighting: dict, ranks: int) -> None:
    # With as many ranks as samples, every row holds one: 1x8 against 8x1.
    data = {"max_tokens": 512, "text": []}
    one, (batch,) = engine_after(world, data=data, weighting=weighting)
    assert [len(row.sample_ids) for row in batch.micro] == [8]
    values = settings(world, Path("unused"), weighting=weighting)
    cfg = config({**values, "data": {**values["data"], **data}})
    tokenizer = assembly.open_tokenizer(cfg)
    model = assembly.build_model(cfg, tokenizer)
    many = assembly.local_engine(cfg, model, groups=1)
    seen = []
    for rank in range(ranks):
        loader = assembly.open_loader(cfg, tokenizer, assembly.vision_spec(model), rank=rank, world=ranks)
        part = loader.batch(0)
        assert part.denominator == batch.denominator
        for row in part.micro:
            many.accumulate(row, row_sources(loader.corpus, row), last=row is part.micro[-1])
            seen.append(row.sample_ids.tolist())
        loader.close()
    assert [len(ids) for ids in seen] == [8 // ranks] * ranks
    assert sorted(number for ids in seen for number in ids) == sorted(batch.sample_ids.tolist())
    first, second = dict(one.gradients()), dict(many.gradients())
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=2e-6)
    assert one.sums() == pytest.approx(many.sums(), rel=2e-6)


def test_prior_with_alpha_0_is_ntp_bit_for_bit(world: Path) -> None:
    ntp, _ = engine_after(world, weighting={"kind": "ntp"})
    flat, _ = engine_after(world, weighting={"kind": "prior", "alpha": 0.0})
    weighted, _ = engine_after(world, weighting={"kind": "prior", "alpha": 1.0})
    first, second, third = (dict(engine.gradients()) for engine in (ntp, flat, weighted))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert ntp.sums() == flat.sums() != weighted.sums()
    assert not all(torch.equal(first[name], third[name]) for name in first)


def test_sums_are_loss_nll_by_source_and_squared_norm(world: Path) -> None:
    engine, (batch,) = engine_after(world)
    norm = sum(float(g.double().square().sum()) for _, g in engine.gradients())
    expected_loss, by_source = 0.0, [0.0, 0.0]
    for row in batch.micro:
        with torch.no_grad():
            loss, nll = engine.module(row)
        expected_loss += float(loss)
        for number, value in enumerate(nll.tolist()):
            sample = int(torch.searchsorted(row.loss_cu, number, right=True)) - 1
            by_source[int(row.sample_ids[sample] >= 40)] += value
    assert engine.sums() == pytest.approx([norm, expected_loss, *by_source], rel=1e-6)
    assert engine.sums()[1:] == [0.0, 0.0, 0.0]  # taken once, they start again; the gradients are still there


def test_update_is_adamw_on_scaled_gradients_at_the_given_rate(world: Path) -> None:
    engine, _ = engine_after(world)
    twin, _ = engine_after(world)
    plain = torch.optim.AdamW(assembly_groups(twin), lr=1.0, betas=(0.9, 0.95), eps=1e-8)
    for group in plain.param_groups:
        group["lr"] = 0.01
    for parameter in twin.module.parameters():
        parameter.grad *= 0.5
    plain.step()
    engine.update(lr=0.01, scale=0.5)
    for (name, one), (_, other) in zip(engine.weights(), twin.weights(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7, msg=name)
    assert list(engine.gradients()) == []


def assembly_groups(engine: LocalEngine) -> list[dict]:
    parameters = list(engine.module.parameters())
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def test_discard_leaves_no_trace(world: Path) -> None:
    engine, (_batch,) = engine_after(world)
    before = {name: tensor.clone() for name, tensor in engine.weights()}
    engine.discard()
    assert list(engine.gradients()) == []
    assert engine.sums() == [0.0, 0.0, 0.0, 0.0]
    for name, tensor in engine.weights():
        assert torch.equal(tensor, before[name])


def test_checkpointed_activations_change_nothing(world: Path) -> None:
    plain, _ = engine_after(world)
    saving, _ = engine_after(world, activation_checkpointing="full")
    first, second = dict(plain.gradients()), dict(saving.gradients())
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=1e-7)


def test_bf16_is_near_fp32_and_keeps_fp32_weights(world: Path) -> None:
    exact, _ = engine_after(world)
    rough, _ = engine_after(world, precision="bf16")
    assert all(tensor.dtype == torch.float32 for _, tensor in rough.weights())
    one, other = exact.sums(), rough.sums()
    assert other[1] == pytest.approx(one[1], rel=5e-3)
    assert other[1] != one[1]  # it did compute in bf16
    assert other[0] == pytest.approx(one[0], rel=5e-2)


def test_evaluate_leaves_gradients_and_mode_alone(world: Path) -> None:
    engine, (batch,) = engine_after(world)
    before = dict(engine.gradients())
    row = replace(batch.micro[0], token_weight=torch.zeros_like(batch.micro[0].token_weight))
    nll = engine.evaluate(row)
    assert nll.dtype == torch.float32
    assert nll.shape == row.targets.shape
    assert float(nll.min()) > 0  # a zero weight drops a gradient, never the NLL
    assert engine.module.training
    for name, gradient in engine.gradients():
        assert torch.equal(gradient, before[name])


def test_tied_weights_are_given_once(world: Path) -> None:
    values = settings(world, Path("unused"))
    tied, _ = engine_after(
        world, model={**values["model"], "llama": {**values["model"]["llama"], "tie_word_embeddings": True}}
    )
    names = [name for name, _ in tied.weights()]
    assert "lm_head.weight" not in names
    assert "model.embed_tokens.weight" in names
    assert len(names) == len({id(p) for p in tied.module.parameters()})

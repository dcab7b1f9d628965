"""L = (1 / D) * sum_s sum_i g_{s,i} * (-log p(t_i | t_<i)), in float64 and from stock transformers."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

from megaprior.models.lm import ModelConfig, build_text_lm
from megaprior.objectives.base import Step
from megaprior.objectives.weighted_ntp import WeightedNTP

CAPTIONS = [[5, 6, 7, 2], [8, 2], [9, 10, 11, 12, 13, 14, 2], [2]]
WEIGHTS = [[0.5, 0.0, 2.5, 1.0], [2.0, 0.0], [1.0] * 7, [1.0]]
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
}


@pytest.fixture
def step():
    return Step(build_text_lm(ModelConfig(llama=SIZES), vocab_size=97, bos_id=1, eos_id=2), WeightedNTP())


def stock(step, dtype=torch.float64) -> LlamaForCausalLM:
    twin = LlamaForCausalLM(type(step.model.config)(**step.model.config.to_dict()))
    twin.load_state_dict(step.model.state_dict())
    return twin.to(dtype)


def caption_nll(model, caption) -> torch.Tensor:
    """-log p(t_i | BOS, t_<i) of every token of one caption, on its own."""
    ids = torch.tensor([1, *caption])
    logprob = model(ids[None]).logits[0, :-1].log_softmax(-1)
    return -logprob.gather(1, ids[1:, None])[:, 0]


def test_loss_and_gradients_are_the_formula(step, row_of):
    twin = stock(step)
    nll = torch.cat([caption_nll(twin, c) for c in CAPTIONS])
    g = torch.cat([torch.tensor(g, dtype=torch.float64) for g in WEIGHTS])
    expected = (g * nll).sum() / 23
    expected.backward()

    loss, got = step(row_of(CAPTIONS, weights=WEIGHTS, denominator=23))
    loss.backward()
    assert abs(loss.item() - expected.item()) < 1e-6
    assert (got - nll).abs().max() < 1e-5  # every loss token, those of weight 0 too
    for (name, ours), theirs in zip(step.model.named_parameters(), twin.parameters(), strict=True):
        assert (ours.grad - theirs.grad).abs().max() < 2e-6, name


def test_all_ones_is_the_loss_of_stock_transformers(step, row_of):
    twin = stock(step, torch.float32)
    width = 1 + max(map(len, CAPTIONS))
    ids, labels = torch.zeros(4, width, dtype=torch.int64), torch.full((4, width), -100)
    for i, caption in enumerate(CAPTIONS):
        ids[i, : 1 + len(caption)] = torch.tensor([1, *caption])
        labels[i, 1 : 1 + len(caption)] = torch.tensor(caption)
    theirs = twin(ids, attention_mask=(labels != -100).long().index_fill(1, torch.tensor(0), 1), labels=labels).loss
    ours, _ = step(row_of(CAPTIONS))
    assert abs(ours.item() - theirs.item()) < 1e-6


def test_rows_add_up_however_captions_are_packed(step, row_of):
    together, _ = step(row_of(CAPTIONS, weights=WEIGHTS, denominator=14))
    apart = [step(row_of([c], weights=[g], denominator=14))[0] for c, g in zip(CAPTIONS, WEIGHTS, strict=True)]
    want = torch.autograd.grad(together, list(step.parameters()))
    got = torch.autograd.grad(sum(apart), list(step.parameters()))
    assert abs(together.item() - sum(apart).item()) < 1e-6
    largest = max(b.abs().max() for b in want)
    assert all((a - b).abs().max() < 3e-6 * largest for a, b in zip(got, want, strict=True))  # 6e-7 measured


def test_a_dummy_row_adds_nothing_but_touches_everything(step, row_of):
    loss, nll = step(row_of([], denominator=14))
    loss.backward()
    assert loss.item() == 0
    assert nll.shape == (0,)
    assert all(p.grad is not None and not p.grad.any() for p in step.parameters())

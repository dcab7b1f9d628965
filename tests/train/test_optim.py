"""The learning rate's formulas, clipping, and which parameters decay."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from megaprior.errors import UsageError
from megaprior.train.optim import OptimConfig, adamw, check_optim, clip_scale, learning_rate, parameter_groups


def rates(cfg: OptimConfig, steps: int) -> list[float]:
    return [learning_rate(cfg, step, steps=steps) for step in range(1, steps + 1)]


def test_warm_up_is_linear_and_reaches_the_rate_at_its_last_step() -> None:
    cfg = OptimConfig(lr=8.0, warmup_steps=4, schedule="constant")
    assert rates(cfg, 6) == [2.0, 4.0, 6.0, 8.0, 8.0, 8.0]


def test_cosine_ends_at_the_floor_and_is_half_way_in_the_middle() -> None:
    cfg = OptimConfig(lr=1.0, warmup_steps=2, schedule="cosine", min_lr_ratio=0.1)
    found = rates(cfg, 12)
    assert found[1] == 1.0
    assert found[6] == pytest.approx(0.55)  # step 7: x = 5 / 10
    assert found[11] == pytest.approx(0.1)
    assert found[3] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 0.2)) / 2)


def test_linear_and_wsd() -> None:
    linear = OptimConfig(lr=1.0, schedule="linear", min_lr_ratio=0.0)
    assert rates(linear, 4) == pytest.approx([0.75, 0.5, 0.25, 0.0])
    wsd = OptimConfig(lr=1.0, warmup_steps=2, schedule="wsd", decay_steps=4, min_lr_ratio=0.0)
    assert rates(wsd, 10) == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0])


def test_decay_steps_shorter_than_the_run_stay_at_the_floor() -> None:
    cfg = OptimConfig(lr=1.0, schedule="linear", decay_steps=2, min_lr_ratio=0.25)
    assert rates(cfg, 4) == pytest.approx([0.625, 0.25, 0.25, 0.25])


def test_clip_scale_is_that_of_torch() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    parameter.grad = torch.tensor([3.0, 4.0, 12.0])
    norm = float(torch.nn.utils.clip_grad_norm_([parameter], 2.0))
    assert norm == 13.0
    assert torch.allclose(parameter.grad, torch.tensor([3.0, 4.0, 12.0]) * clip_scale(13.0, 2.0), rtol=1e-6)
    assert clip_scale(0.5, 2.0) == 1.0
    assert clip_scale(1e9, 0.0) == 1.0


def test_only_trainable_matrices_decay() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2), nn.Linear(2, 2))
    module[2].weight.requires_grad_(False)
    decayed, plain = parameter_groups(module, 0.1)
    assert [id(p) for p in decayed["params"]] == [id(module[0].weight)]
    assert decayed["weight_decay"] == 0.1
    assert {id(p) for p in plain["params"]} == {id(p) for p in module.parameters() if p.ndim == 1}
    assert plain["weight_decay"] == 0.0
    optimizer = adamw(module, OptimConfig(lr=0.5, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-7), fused=True)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert optimizer.defaults["betas"] == (0.8, 0.9)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"warmup_steps": 11}, "warmup_steps is 11 but the run has 10 steps"),
        ({"decay_steps": 0}, "decay_steps is 0"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"min_lr_ratio": 1.5}, "min_lr_ratio"),
    ],
)
def test_contradictions_are_refused(wrong: dict, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        check_optim(OptimConfig(**wrong), steps=10)

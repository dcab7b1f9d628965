"""AdamW's settings, the learning rate as a function of the step, and the one place that clips gradients."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

from megaprior.config import configclass
from megaprior.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

_NORM_EPS = 1e-6  # as torch.nn.utils.clip_grad_norm_
_WSD_DECAY_SHARE = 0.1


@configclass
class OptimConfig:
    """AdamW with warm-up; `decay_steps` None: cosine and linear decay until the last step, wsd over the last tenth."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1  # on matrices only: norms and biases are never decayed
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine", "linear", "wsd"] = "cosine"
    decay_steps: int | None = None
    min_lr_ratio: float = 0.1
    clip: float = 1.0  # largest gradient norm; 0 switches clipping off


def check_optim(cfg: OptimConfig, *, steps: int) -> None:
    """Refuse settings that contradict each other before anything is built.

    Raises:
        UsageError: names the key, both numbers and the remedy.
    """
    if cfg.lr <= 0 or cfg.clip < 0 or cfg.weight_decay < 0 or not 0 <= cfg.min_lr_ratio <= 1:
        raise UsageError("optim: lr must be above 0, clip and weight_decay not below 0, min_lr_ratio between 0 and 1")
    if not 0 <= cfg.warmup_steps <= steps:
        raise UsageError(f"optim.warmup_steps is {cfg.warmup_steps} but the run has {steps} steps; lower it")
    if cfg.decay_steps is not None and not 0 < cfg.decay_steps <= steps:
        raise UsageError(
            f"optim.decay_steps is {cfg.decay_steps}, it must be between 1 and the {steps} steps of the run"
        )


def learning_rate(cfg: OptimConfig, step: int, *, steps: int) -> float:
    """The rate of update number `step` (1 is the first) of `steps`.

    Warm-up: lr * step / warmup_steps. Then, with x from 0 to 1 over the decay:
    cosine lr_min + (lr - lr_min) (1 + cos(pi x)) / 2; linear lr + (lr_min - lr) x; wsd stays at lr, then decays linearly.
    """
    if step <= cfg.warmup_steps:
        return cfg.lr * step / cfg.warmup_steps
    floor = cfg.lr * cfg.min_lr_ratio
    if cfg.schedule == "constant":
        return cfg.lr
    if cfg.schedule == "wsd":
        length = cfg.decay_steps or max(1, round(steps * _WSD_DECAY_SHARE))
        start = max(steps - length, cfg.warmup_steps)
    else:
        start = cfg.warmup_steps
        length = cfg.decay_steps or steps - start
    x = min(max((step - start) / length, 0.0), 1.0)
    if cfg.schedule == "cosine":
        return floor + (cfg.lr - floor) * (1 + math.cos(math.pi * x)) / 2
    return cfg.lr + (floor - cfg.lr) * x


def clip_scale(norm: float, clip: float) -> float:
    """What all gradients are multiplied with so that their norm does not exceed `clip`; 0 for no limit."""
    return min(1.0, clip / (norm + _NORM_EPS)) if clip > 0 else 1.0


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices with decay, vectors (norms, biases) without."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def adamw(module: nn.Module, cfg: OptimConfig, *, fused: bool) -> Any:
    """torch.optim.AdamW over `parameter_groups`; `fused` runs each update as one kernel."""
    import torch

    groups = parameter_groups(module, cfg.weight_decay)
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=fused)

"""The contract between a model, an objective and an engine.

Letters: N loss tokens of a row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

if TYPE_CHECKING:
    from megaprior.data.samples import Batch


class Objective(Protocol):
    """What is trained for: any callable, an `nn.Module` where it has parameters of its own."""

    def __call__(self, model: Any, states: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss (0-d, already divided by the global batch's D) and negative log-likelihoods (float32 [N], detached)."""
        ...


class Step(nn.Module):
    """Model and objective as the one module that an engine gets: nothing trainable or gathered lives outside it."""

    model: Any  # a module with `states` and `lm_head`; nn.Module alone promises neither

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """One row: (loss, nll), as the objective returns them. The batch lies on the model's device."""
        states = self.model.states(**batch.inputs)
        return self.objective(self.model, states, batch)

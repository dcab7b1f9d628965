"""`Step` is the one module an engine gets."""

from __future__ import annotations

import torch
from torch import nn

from megaprior.models.lm import ModelConfig, build_text_lm
from megaprior.objectives.base import Step


class Scaled(nn.Module):
    """An objective with a parameter of its own: the mean hidden state times it."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(3.0))

    def forward(self, model, states, batch):
        return self.scale * states.hidden.mean(), states.hidden.new_zeros(0)


def test_an_objective_with_parameters_trains_with_the_model(row_of):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    step = Step(build_text_lm(ModelConfig(llama=sizes), vocab_size=97, bos_id=1, eos_id=2), Scaled())
    loss, _ = step(row_of([[5, 6, 2]]))
    loss.backward()
    names = [name for name, _ in step.named_parameters()]
    assert "objective.scale" in names
    assert "model.lm_head.weight" in names
    assert torch.allclose(step.objective.scale.grad * 3, loss)

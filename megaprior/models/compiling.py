"""torch.compile of the decoder layers of a language model: norms, rotary embedding, gates and residuals become few kernels.

Attention stays as it is, a kernel of its own already: its segments differ from row to row, and tracing it would compile every row
anew. What is left depends on the row's length alone, which torch makes symbolic at the second length that it meets.
"""

from __future__ import annotations

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer

from megaprior.models.attention import attend

APART = "megaprior_apart"


def compile_layers(model: PreTrainedModel, *, recomputed: bool) -> None:
    """Compile every layer at its first use, in place; parameters and their names stay.

    `recomputed`: the layers are under full activation checkpointing, which torch cannot trace around attention. Then what they
    consist of is compiled, one by one.
    """
    AttentionInterface.register(APART, torch.compiler.disable(attend))
    AttentionMaskInterface.register(APART, sdpa_mask)
    model.config._attn_implementation = APART
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            for module in layer.children() if recomputed else (layer,):
                module.compile()

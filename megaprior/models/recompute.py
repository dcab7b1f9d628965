"""Activation checkpointing of the layers of a transformer: what of forward is kept for backward, and what is computed again.

full       only each layer's input is kept; backward repeats the whole layer (a third more arithmetic)
selective  the results of matrix products and of attention are kept too; backward repeats what lies between them: norms, rotary
           embedding, activation function, products of elements, half of a layer's memory and hardly any of its arithmetic

transformers checkpoints inside a layer's `forward`, so that hooks on the layer (ZeRO-3 gathers in them) run outside.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

Recompute = Literal["selective", "full"]

# By name, because some exist only where a package is installed or a device is: flash-attn's, torch's varlen.
_KEPT = (
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::baddbmm",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_attention_math",
    "torch_attn::_varlen_attn",
    "flash_attn::_flash_attn_varlen_forward",
)


def checkpoint_layers(model: PreTrainedModel, mode: Recompute) -> None:
    """Recompute the layers of a transformers model in backward, as `mode` says."""
    options: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
    # Its former name, gradient_checkpointing_enable, is deprecated from transformers 5.2x on.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options)


def _policy(context: Any, operation: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    kept = operation.name().partition(".")[0] in _KEPT
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

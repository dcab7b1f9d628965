"""A model of whatever kind a folder holds."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from megaprior.models.attention import Backend
from megaprior.models.folder import model_type
from megaprior.models.hlvlm import HLVLM, HLVLMConfig
from megaprior.models.hlvlm_folder import load_hlvlm
from megaprior.models.lm import TextLM, load_text_lm
from megaprior.models.ulvlm import ULVLMConfig, load_ulvlm


def load_model(
    folder: Path | str, *, dtype: str = "float32", backend: Backend = "auto", device: torch.device | str = "cpu"
) -> TextLM | HLVLM:
    """The text LM, U-LVLM or H-LVLM that the folder's config.json names, in evaluation mode.

    Args:
        dtype: of the parameters, "float32" or "bfloat16".
        device: where they go.

    Raises:
        DataError: no such folder, an unknown kind of model, no safetensors, or weights missing or of another shape.
    """
    loaders = {ULVLMConfig.model_type: load_ulvlm, HLVLMConfig.model_type: load_hlvlm}
    load = loaders.get(model_type(folder), load_text_lm)
    model = load(folder, dtype=dtype, backend=backend)
    nn.Module.to(model, device)  # in place; transformers wraps its own `to` in a way that loses the type
    return model

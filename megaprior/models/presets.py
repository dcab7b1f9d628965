"""Sizes by name, for models that start from random weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """Sizes of one model.

    Attributes:
        llama: fields of transformers' LlamaConfig.
        patch: side of a patch, in pixels.
        limit: longest side of an image after scaling, in pixels.
    """

    llama: dict[str, Any]
    patch: int
    limit: int


PRESETS = {
    # For CPUs: 0.8M parameters beside the vocabulary's (and 0.1M of patch projection).
    "tiny": Preset(
        llama={
            "hidden_size": 128,
            "intermediate_size": 352,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        },
        patch=16,
        limit=1024,
    ),
    # Llama-3-8B and the patches of SOLO, as in the paper.
    "paper": Preset(
        llama={
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
        },
        patch=32,
        limit=1024,
    ),
}


@dataclass(frozen=True)
class ClipPreset:
    """Sizes of a small two-tower model.

    Attributes:
        vision, text: fields of transformers' CLIPVisionConfig and CLIPTextConfig.
        projection_dim: width of the embeddings that are compared.
    """

    vision: dict[str, Any]
    text: dict[str, Any]
    projection_dim: int


CLIP_PRESETS = {
    # For CPUs: 1.0M parameters in the vision tower, 0.4M in the text tower beside the vocabulary's.
    "tiny": ClipPreset(
        vision={
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "image_size": 64,
            "patch_size": 16,
            "hidden_act": "gelu",
        },
        text={
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "hidden_act": "gelu",
        },
        projection_dim=128,
    ),
}

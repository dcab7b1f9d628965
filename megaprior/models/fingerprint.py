"""Which model a folder holds, by content: the same weights and configuration have the same fingerprint wherever they lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megaprior.errors import DataError
from megaprior.files import block_digests, digest_bytes, digest_json

# What saving the same model with another release of transformers, or from another folder, may change.
_PASSING = ("transformers_version", "_name_or_path")


def model_fingerprint(folder: Path | str) -> str:
    """xxh3-128 over the digests of every safetensors file and the configuration; reads all weights once.

    Raises:
        DataError: no config.json, or no safetensors.
    """
    folder = Path(folder)
    weights = {path.name: block_digests(path) for path in sorted(folder.glob("*.safetensors"))}
    if not weights:
        raise DataError(
            f"{folder}: no *.safetensors; a model is a Hugging Face folder with config.json and safetensors"
        )
    return digest_json({"weights": weights, "config": _configuration(folder / "config.json")})


def tensor_digest(tensor: Any) -> str:
    """xxh3-128 of a tensor's bytes, wherever it lies; equal for equal values of equal shape and dtype."""
    import torch

    flat: Any = tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy()
    return digest_bytes(memoryview(flat))


def _configuration(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        kept = {name: value for name, value in fields.items() if name not in _PASSING}
        if isinstance(
            kept.get("base"), dict
        ):  # an H-LVLM's frozen models count by what they are, not by where they lie
            kept["base"] = {name: entry["fingerprint"] for name, entry in kept["base"].items()}
        return kept
    except (OSError, ValueError, AttributeError, LookupError, TypeError) as error:
        raise DataError(f"{path}: not a model's configuration ({error})") from None

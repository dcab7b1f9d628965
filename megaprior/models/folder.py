"""Reading a model's folder: Hugging Face layout, safetensors only, every tensor accounted for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import LlamaConfig

from megaprior.errors import DataError
from megaprior.models.attention import Backend

Model = TypeVar("Model")


def model_type(folder: Path | str) -> str:
    """The model_type that the folder's config.json names.

    Raises:
        DataError: no such file, or not JSON.
    """
    path = Path(folder) / "config.json"
    try:
        return str(json.loads(path.read_text(encoding="utf-8")).get("model_type"))
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such file; a model is a Hugging Face folder with config.json and safetensors"
        ) from None
    except (ValueError, AttributeError):
        raise DataError(f"{path}: not a model's configuration") from None


def read_llama_config(folder: Path | str) -> LlamaConfig:
    """The configuration of a folder of model_type "llama"; DataError where it is another."""
    kind = model_type(folder)
    if kind != LlamaConfig.model_type:
        raise DataError(f"{folder}: model_type is {kind!r}, a text LM is a {LlamaConfig.model_type!r}")
    return LlamaConfig.from_pretrained(folder, local_files_only=True)


def from_folder(
    kind: type[Model],
    folder: Path | str,
    *,
    dtype: str,
    backend: Backend,
    llama: LlamaConfig | None = None,
    fresh: Set[str] = frozenset(),
    seed: int = 0,
) -> Model:
    """A language model from its folder: see `load_whole`."""
    model = load_whole(kind, folder, dtype=dtype, config=llama, fresh=fresh, seed=seed)
    model.attention = backend
    return model


def load_whole(
    kind: type[Any],
    folder: Path | str,
    *,
    dtype: str,
    config: Any = None,
    fresh: Set[str] = frozenset(),
    others: tuple[str, ...] = (),
    seed: int = 0,
) -> Any:
    """A transformers model with the weights of a folder, safetensors only, every tensor accounted for; in evaluation mode.

    Args:
        config: a configuration in place of the folder's own.
        fresh: names that the folder lacks; they are drawn from the seed.
        others: beginnings of names that the folder holds beside this model's.

    Raises:
        DataError: no safetensors, or weights missing, left over or of another shape.
    """
    source: dict[str, Any] = {} if config is None else {"config": config}
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            loaded: Any = kind.from_pretrained(
                folder,
                dtype=getattr(torch, dtype),
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                **source,
            )
            model, report = loaded
    except (OSError, RuntimeError) as error:
        raise DataError(f"{folder}: no readable safetensors weights: {' '.join(str(error).split())}") from None
    for problem, names in (
        ("lacks", set(report["missing_keys"]) - fresh),
        ("has unknown", {name for name in report["unexpected_keys"] if not name.startswith(others)}),
        ("has ill-shaped", {name for name, *_ in report["mismatched_keys"]}),
    ):
        if names:
            raise DataError(
                f"{folder}: {problem} {len(names)} tensors, {min(names)} among them: not this model's folder"
            )
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and its report of missing tensors: `from_folder` gives an account of its own."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()

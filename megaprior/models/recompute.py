"""Activation checkpointing of the layers of a transformer: what of forward is kept for backward, and what is computed again.

full       only each layer's input is kept; backward repeats the whole layer (a third more arithmetic)
selective  the results of matrix products and of attention are kept too; backward repeats what lies between them: norms, rotary
           embedding, activation function, products of elements, half of a layer's memory and hardly any of its arithmetic

transformers checkpoints inside a layer's `forward`, so that hooks on the layer (ZeRO-3 gathers in them) run outside.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import PreTrainedModel

Recompute = Literal["selective", "full"]
_Kept = dict[str, list[tuple[Any, list[int]] | None]]  # operation -> its results in order, and their versions

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
        options["context_fn"] = selective_contexts
    # Its former name, gradient_checkpointing_enable, is deprecated from transformers 5.2x on.
    enable: Callable[..., None] = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable(options)


def selective_contexts() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """What forward and its repetition run in, for `torch.utils.checkpoint.checkpoint(context_fn=...)`.

    torch's own create_selective_checkpoint_contexts does the same, but insists that the repetition calls every operation of
    forward as often and no other. Under ZeRO-3 the hooks of the modules inside gather weights in another order the second time,
    and it raises. These look only at the operations that are kept.
    """
    kept: _Kept = defaultdict(list)
    return _Keep(kept), _Reuse(kept)


class _Keep(TorchDispatchMode):
    def __init__(self, kept: _Kept) -> None:
        super().__init__()
        self._kept = kept

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = _name(func)
        if name in _KEPT:
            self._kept[name].append((tree_map_only(torch.Tensor, torch.Tensor.detach, out), _versions(out)))
        return out


class _Reuse(TorchDispatchMode):
    def __init__(self, kept: _Kept) -> None:
        super().__init__()
        self._kept, self._next = kept, defaultdict[str, int](int)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = _name(func)
        if name not in _KEPT:
            return func(*args, **(kwargs or {}))
        number = self._next[name]
        self._next[name] += 1
        entry, self._kept[name][number] = self._kept[name][number], None  # freed as soon as backward is through with it
        assert entry is not None, f"{name}: a second backward through the same layer"
        out, versions = entry
        assert _versions(out) == versions, f"{name}: its result was changed in place after it was kept"
        return out


@functools.cache
def _name(func: Any) -> str:
    return func.name().partition(".")[0]


def _versions(out: Any) -> list[int]:
    return [value._version for value in tree_leaves(out) if isinstance(value, torch.Tensor)]

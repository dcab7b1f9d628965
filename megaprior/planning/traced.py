"""What one layer keeps for backward and needs while it runs: the model's own code, run on fake tensors.

A fake tensor has a shape, a dtype and a storage of so many bytes, and no memory. So the counts follow whatever transformers,
torch and our attention really do, at any size, in a fraction of a second.

Letters: T tokens of a row, H width, E head width, I images, P patches of an image.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig

from megaprior.models.attention import Packing, make_packing
from megaprior.models.lm import TextLM
from megaprior.models.vision import patches_per_side, square_side

Checkpointing = Literal["none", "selective", "full"]
# Of weights: there are none (frozen); they stay where backward left them; they are added to such; they are taken at once.
Gradients = Literal["none", "new", "held", "taken"]


@dataclass(frozen=True)
class Cost:
    """Bytes of one module beside its parameters.

    Attributes:
        keep: live from its forward to its backward, its output included, its input not.
        cached: live beyond that until the whole forward ends (autocast's copies of weights).
        forward: most that is live during its forward beyond its input.
        backward: most that is live during its backward beyond what was live when that began.
        output: of its output alone.
    """

    keep: int
    cached: int
    forward: int
    backward: int
    output: int


@dataclass(frozen=True)
class LayerCosts:
    """Of a language model: one decoder layer, the final norm, and what all layers share (rotary tables)."""

    layer: Cost
    norm: Cost
    shared: int


class _Live(TorchDispatchMode):
    """Counts the bytes of all storages that operations create, while anything holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self.add(value)
        return result

    def add(self, tensor: torch.Tensor, *, free: bool = False) -> None:
        """Count a tensor's storage, if it is not yet; `free` is what was there before, of which views may come."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = 0 if free else storage.nbytes()
            self.now += self._sizes[key]
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def trace_lm(
    config: LlamaConfig,
    segments: Sequence[int],
    *,
    dtype: torch.dtype,
    backend: Literal["segments", "varlen"],
    checkpointing: Checkpointing,
    gradients: Gradients,
    autocast: torch.dtype | None = None,
) -> LayerCosts:
    """One layer and the norm of a Llama on a row of `segments` tokens each; `dtype` of weights and between layers."""
    tokens = sum(segments)
    bounds = torch.tensor([0, *torch.tensor(segments).cumsum(0).tolist()], dtype=torch.int32)
    with _fake(dtype) as mode:
        model = _one_layer(config, frozen=gradients == "none", checkpointing=checkpointing)
        packing = _fake_packing(bounds, max(segments), backend, mode)
        first: Any = model.model.layers[0]
        tables = [torch.empty(1, tokens, first.self_attn.head_dim) for _ in range(2)]
        shared = sum(table.untyped_storage().nbytes() for table in tables)
        hidden = torch.empty(1, tokens, config.hidden_size, requires_grad=True)

        def layer(states: torch.Tensor) -> torch.Tensor:
            result = first(states, attention_mask=None, position_embeddings=(tables[0], tables[1]), packing=packing)
            return result[0] if isinstance(result, tuple) else result

        costs = [
            _trace(run, part, hidden, there=tables, gradients=gradients, autocast=autocast)
            for run, part in ((layer, first), (model.model.norm, model.model.norm))
        ]
    return LayerCosts(layer=costs[0], norm=costs[1], shared=shared)


def trace_tower(
    config: CLIPVisionConfig, images: int, *, dtype: torch.dtype, autocast: torch.dtype | None = None
) -> int:
    """Most bytes that a frozen tower needs for `images` beside its parameters; nothing stays but the features."""
    with _fake(dtype), torch.no_grad():
        one = CLIPVisionConfig.from_dict({**config.to_dict(), "num_hidden_layers": 1})
        tower = CLIPVisionModel(one)
        patches = patches_per_side(config) ** 2
        states = torch.empty(images, patches + 1, config.hidden_size)
        live = _Live()
        for parameter in tower.parameters():
            live.add(parameter, free=True)
        with live, _autocast(autocast):
            live.add(states)
            out = tower.encoder.layers[0](states, attention_mask=None)
            del out
        pixels = images * 3 * square_side(config) ** 2
        # uint8 patches -> float32 in image order -> normalized -> in the tower's dtype.
        return max(live.most, pixels * (4 + 4 + dtype.itemsize))


def _one_layer(config: LlamaConfig, *, frozen: bool, checkpointing: Checkpointing) -> TextLM:
    """The text LM with one layer and a vocabulary of no size that matters."""
    small = {"num_hidden_layers": 1, "vocab_size": 8, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    one = LlamaConfig.from_dict({**config.to_dict(), **small, "model_type": "llama"})
    model = TextLM(one).train()
    if checkpointing != "none":
        model.checkpoint_activations(checkpointing)
    return model.requires_grad_(not frozen)


def _fake_packing(bounds: torch.Tensor, longest: int, backend: str, mode: FakeTensorMode) -> Packing:
    if backend != "segments":  # flash and varlen keep the same tensors, and both run on GPUs only
        return Packing("varlen", torch.empty(len(bounds), dtype=torch.int32), longest)
    with _unfaked(mode):
        real = make_packing(bounds, longest, backend="segments", dtype=torch.float32)
    groups = real.groups
    assert groups is not None
    indices = {
        name: torch.empty(len(getattr(groups, name)), dtype=torch.int64) for name in ("gather", "restore", "holes")
    }
    return replace(real, groups=replace(groups, **indices))


def _trace(
    run: Callable[[torch.Tensor], torch.Tensor],
    module: nn.Module,
    inputs: torch.Tensor,
    *,
    there: Sequence[torch.Tensor],
    gradients: Gradients,
    autocast: torch.dtype | None,
) -> Cost:
    handles = []
    for parameter in module.parameters():
        if gradients == "held":
            parameter.grad = torch.empty_like(parameter)
        elif gradients == "taken":
            handles.append(parameter.register_post_accumulate_grad_hook(_take))
    live = _Live()
    for tensor in (inputs, *there, *module.parameters(), *(p.grad for p in module.parameters() if p.grad is not None)):
        live.add(tensor, free=True)
    with live:
        with _autocast(autocast):
            result = run(inputs)
            within = live.now
        keep, forward = live.now, live.most
        output = result.untyped_storage().nbytes()
        gradient = torch.empty_like(result)
        before = live.most = live.now
        result.backward(gradient)
        cost = Cost(keep, within - keep, forward, live.most - before, output)
    for handle in handles:
        handle.remove()
    inputs.grad = None
    return cost


def _take(parameter: torch.Tensor) -> None:
    parameter.grad = None


def _autocast(dtype: torch.dtype | None) -> Any:
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype)


@contextmanager
def _fake(dtype: torch.dtype) -> Iterator[FakeTensorMode]:
    """Tensors made inside are fake, of `dtype` by default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with FakeTensorMode() as mode:
            yield mode
    finally:
        torch.set_default_dtype(before)


def _unfaked(mode: FakeTensorMode) -> Any:
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    return unset_fake_temporarily()

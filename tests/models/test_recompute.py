"""Activation checkpointing: what is kept for backward shrinks, and no bit of loss or gradient moves."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megaprior.models.lm import ModelConfig, TextLM, build_text_lm

LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
}


class Watching(TorchDispatchMode):
    """Counts the matrix products and attentions that really run, and knows which of the tensors made meanwhile still live."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = {"mm": 0, "attention": 0}
        self._storages: list[weakref.ref[torch.UntypedStorage]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        self.counts["mm"] += name == "aten::mm"
        self.counts["attention"] += "scaled_dot_product" in name and "backward" not in name
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._storages.append(weakref.ref(tensor.untyped_storage()))
        return out

    def live_bytes(self, model: TextLM) -> int:
        """Of tensors that were made under this mode, those that only backward holds too; the model's own left out."""
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        found = {s.data_ptr(): s.nbytes() for s in (ref() for ref in self._storages) if s is not None}
        return sum(size for place, size in found.items() if place not in own)


def build(mode: str) -> TextLM:
    model = build_text_lm(ModelConfig(llama=LLAMA), vocab_size=96, bos_id=1, eos_id=2)
    if mode != "none":
        model.checkpoint_activations(mode)  # type: ignore[arg-type]
    return model


def forward(model: TextLM) -> torch.Tensor:
    """The loss of a row of three segments."""
    lengths = [50, 30, 20]
    cu = torch.tensor([0, 50, 80, 100], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths])
    ids = torch.arange(100) * 7 % 96
    states = model.states(ids, positions, cu, 50)
    loss, _ = model.lm_head(states.hidden, ids)
    return loss


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_no_bit_moves(mode: str) -> None:
    plain, other = build("none"), build(mode)
    losses = [forward(plain), forward(other)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    for (name, one), (_, two) in zip(plain.named_parameters(), other.named_parameters(), strict=True):
        assert one.grad is not None, name
        assert torch.equal(one.grad, two.grad), name


def measure(mode: str) -> tuple[int, dict[str, int]]:
    """(bytes that forward leaves for backward, what runs in backward)."""
    model = build(mode)
    forward(model).backward()  # once, so that gradients and what is built lazily are there
    watching = Watching()
    with watching:
        loss = forward(model)
        kept = watching.live_bytes(model)
        before = dict(watching.counts)
        loss.backward()
    return kept, {name: watching.counts[name] - before[name] for name in before}


def test_selective_keeps_less_than_everything_and_repeats_no_product() -> None:
    """Measured: 1.84, 1.05 and 0.20 MB."""
    (none, plain), (selective, chosen), (full, all_again) = (measure(mode) for mode in ("none", "selective", "full"))
    print(none, selective, full)
    assert full < 0.15 * none
    assert selective < 0.65 * none
    assert chosen == plain, "every product and every attention ran once"
    layers, groups = 3, 2  # of segments of similar length
    assert all_again["attention"] == plain["attention"] + layers * groups
    assert all_again["mm"] > plain["mm"] + 5 * layers

"""The counted arithmetic against torch's own counter of what real models execute, and against figures worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig, CLIPVisionConfig, LlamaConfig

from megaprior.models.flops import Flops, hardware_flops, shape_of, train_flops
from megaprior.models.hlvlm_folder import build_hlvlm
from megaprior.models.lm import ModelConfig, TextLM
from megaprior.models.ulvlm import ULVLM, ULVLMConfig
from megaprior.models.vision import TowerConfig

# Equal lengths are one group of the `segments` backend without padding: what runs is what is counted.
SEGMENTS = (20, 20, 20, 40, 40)


def _attention(query: Any, key: Any, value: Any, dropout: float = 0.0, causal: bool = False, **_: Any) -> int:
    """Two products over the pairs of a query and a key: half of them where attention is causal (the docstring's t^2 / 2)."""
    batch, heads, tokens, width = query
    return 2 * 2 * batch * heads * tokens * tokens * width // (2 if causal else 1)


def _attention_backward(grad: Any, query: Any, *rest: Any, **_: Any) -> int:
    """(..., dropout, is_causal): five products, Q K^T among them once more."""
    causal = next(value for value in rest if isinstance(value, bool))
    return _attention(query, None, None, 0.0, causal) * 5 // 2


@pytest.fixture
def executed():
    """`executed(model, inputs, loss_tokens)` -> the FLOPs of forward and of backward as torch counts them on this CPU."""
    ops: Any = torch.ops.aten
    mapping = {  # the counter knows addmm, not the one in place with which the head adds up its weight's gradient
        ops.addmm_: lambda total, left, right, **_: 2 * left[0] * left[1] * right[1],
        ops._scaled_dot_product_flash_attention_for_cpu: _attention,
        ops._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }

    def count(model: Any, inputs: dict, loss_tokens: int) -> Flops:
        counter = FlopCounterMode(display=False, custom_mapping=mapping)
        where = torch.arange(loss_tokens)
        with counter:
            hidden = model.states(**inputs).hidden.index_select(0, where)
            # The fused head works out its gradients within forward: weight and input gradients are counted below.
            forward = counter.get_total_flops()
            loss, _ = model.lm_head(hidden, torch.full((loss_tokens,), 5), None, 7.0)
            head = counter.get_total_flops() - forward
            loss.backward()
        parts = 2 if model.lm_head.weight.requires_grad else 1
        forward += head // (1 + parts)
        return Flops(forward, counter.get_total_flops() - forward)

    return count


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_text_lm_executes_what_is_counted(row, llama, executed, tied, checkpointing):
    config = llama(tie_word_embeddings=tied, attention_dropout=0.0)
    model = TextLM(config).train()
    if checkpointing == "full":
        model.checkpoint_activations()
    step = {"segments": SEGMENTS, "loss_tokens": 30, "images": 0, "trained": "all"}
    counted = hardware_flops(shape_of(config), **step, checkpointing=checkpointing)
    assert executed(model, row(SEGMENTS).inputs, 30) == counted


def test_a_ulvlm_executes_what_is_counted(row, executed):
    config = ULVLMConfig(**_sizes(), patch=4, limit=32)
    patches = torch.randint(256, (12, 48), dtype=torch.uint8)
    inputs = {**row(SEGMENTS).inputs, "patches": patches, "patch_index": torch.arange(1, 13)}
    counted = hardware_flops(shape_of(config), segments=SEGMENTS, loss_tokens=30, images=0, patches=12, trained="all")
    assert executed(ULVLM(config).train(), inputs, 30) == counted


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_an_hlvlm_executes_what_is_counted(row, clip_folders, executed, checkpointing):
    config = ModelConfig(init=str(clip_folders["lm"]), tower=TowerConfig(init=str(clip_folders["clip"])))
    model = build_hlvlm(config, vocab_size=97, image_id=90, seed=1)
    if checkpointing == "full":
        model.checkpoint_activations()
    patches = torch.randint(256, (2 * 16, 192), dtype=torch.uint8)
    inputs = {**row(SEGMENTS).inputs, "patches": patches}
    inputs["patch_index"] = torch.cat([torch.arange(1, 17), torch.arange(21, 37)])
    step = {"segments": SEGMENTS, "loss_tokens": 30, "images": 2, "trained": "projector"}
    counted = hardware_flops(shape_of(model.config), **step, checkpointing=checkpointing)
    assert executed(model, inputs, 30) == counted


def test_model_flops_leave_out_what_is_done_again():
    config = LlamaConfig(**_sizes())
    step = {"segments": SEGMENTS, "loss_tokens": 30, "images": 0, "trained": "all"}
    model, kept = train_flops(shape_of(config), **step), hardware_flops(shape_of(config), **step)
    again = hardware_flops(shape_of(config), **step, checkpointing="full")
    assert model.forward == kept.forward == again.forward
    assert model.backward == 2 * model.forward < kept.backward < again.backward


def test_llama_3_8b_by_hand():
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    flops = train_flops(shape_of(config), segments=[8192], loss_tokens=8192, images=0, trained="all")
    # 32 layers of 218,103,808 weights and a head of 525,336,576; attention 2 * 8192^2 * 4096 in each layer.
    assert flops.forward == 2 * 8192 * (32 * 218_103_808 + 525_336_576) + 32 * 2 * 8192**2 * 4096
    assert flops.backward == 2 * flops.forward


def test_a_frozen_language_model_costs_once_its_forward_and_the_tower_nothing():
    text = LlamaConfig(**_sizes())
    vision = CLIPVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8
    )
    from transformers import LlavaConfig

    shape = shape_of(LlavaConfig(text_config=text, vision_config=vision))
    step = {"segments": [20], "loss_tokens": 4, "images": 1, "trained": "projector"}
    flops = train_flops(shape, **step)
    lm = train_flops(shape_of(text), **{**step, "images": 0})
    tower = 2 * 16 * 192 * 24 + 2 * 17 * 2 * (4 * 24**2 + 2 * 24 * 32) + 2 * 4 * 17**2 * 24
    mlp = 2 * 16 * (24 * 32 + 32**2)
    assert flops.forward == lm.forward + tower + mlp
    assert flops.backward == lm.backward + 2 * 16 * (24 * 32 + 2 * 32**2)


def test_a_clip_trains_both_towers():
    small = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**small, "vocab_size": 97},
        vision_config={**small, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    flops = train_flops(shape_of(config), segments=[8, 8], loss_tokens=0, images=2, trained="all")
    pixels = 2 * 32 * 192 * 24  # the one product whose input needs no gradient
    assert flops.backward == 2 * flops.forward - pixels
    layer = 4 * 24**2 + 2 * 24 * 32
    text = 3 * (2 * 16 * layer + 2 * 2 * 8**2 * 24)
    tower = 3 * (2 * 34 * layer + 4 * 2 * 17**2 * 24)
    assert flops.forward == text + tower + pixels + 2 * 4 * 24 * 16


def _sizes() -> dict[str, Any]:
    return {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }

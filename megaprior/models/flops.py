"""Arithmetic of a training step, counted from Hugging Face configurations: no weight, no device, no data.

Only matrix products count, a multiplication and an addition as two operations (FLOPs). Forward:

    a Llama layer       2 T (2 A E H + 2 K E H + 3 H F)        queries and output, keys and values, the three of the MLP
    a CLIP layer        2 T (4 H^2 + 2 H F)
    causal attention    2 * 2 * (t^2 / 2) * A E    for each segment of t tokens: Q K^T and its product with V
    attention in CLIP's vision tower               2 * 2 * t^2 * A E    for each image: P patches and CLS see all of each other
    head                2 N H V                    loss tokens alone reach it
    U-LVLM              2 P D H                    patches to embeddings
    H-LVLM              2 I P D W, the tower but for its last layer, which is not run, and 2 I P (W H + H^2) for the MLP

Backward is twice the forward where the gradients of inputs and of weights are wanted: that is every product of a model that
trains but the first one of pixels, whose input needs none. A frozen language model (H-LVLM) passes gradients on and has none
of its weights: once the forward in its products; its attention has no weights and costs twice the forward all the same. A
frozen tower stands below everything that trains and costs nothing in backward.

`train_flops` is what the mathematics asks for, whatever a program does: the numerator of an MFU. `hardware_flops` adds what
is done again: layers whose activations were not kept, and Q K^T once more in a flash attention's backward (5 products for 2).

Letters: T tokens, t of one segment, N loss tokens, A query heads, K key/value heads, E head width, H width, F width of the
MLP, V vocabulary, I images, P patches, D values of a patch, W width of the tower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Trained = Literal["all", "projector"]


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of a step over all ranks."""

    forward: int
    backward: int

    @property
    def total(self) -> int:
        """Of the whole step."""
        return self.forward + self.backward


@dataclass(frozen=True)
class Stack:
    """Layers of one kind.

    Attributes:
        layers: how many run.
        width: H.
        attended: A * E.
        weights: of one layer's matrices, all of which every token is multiplied with.
        last: of those, the weights of the last matrix: a layer that is computed again for backward stops before it, since
            nothing needs its output.
    """

    layers: int
    width: int
    attended: int
    weights: int
    last: int

    def products(self, tokens: int) -> int:
        """Forward of all matrices."""
        return 2 * self.layers * self.weights * tokens

    def attention(self, pairs: float) -> int:
        """Forward of Q K^T and of its product with V, over `pairs` of a query and a key."""
        return int(4 * self.layers * self.attended * pairs)


@dataclass(frozen=True)
class ModelShape:
    """What of a model's sizes its arithmetic depends on.

    Attributes:
        lm: the language model, or the text tower of a CLIP.
        vocabulary: V; 0 where there is no head.
        patch_values: D of the patches that a U-LVLM, a tower or a CLIP reads; 0 for a text LM.
        patches: P of an image, for a tower; 0 where images differ (U-LVLM) or are none.
        tower: the vision tower, without a last layer that is not run.
        projector: weights of the MLP's two matrices (H-LVLM), or of a CLIP's (vision, text) projections.
        joint: whether tower and text train together (CLIP), not one on top of the other.
    """

    lm: Stack
    vocabulary: int
    patch_values: int = 0
    patches: int = 0
    tower: Stack | None = None
    projector: tuple[int, int] = (0, 0)
    joint: bool = False


def shape_of(config: Any) -> ModelShape:
    """The shape of a model of ours by its configuration: LlamaConfig, ULVLMConfig, LlavaConfig, HLVLMConfig or CLIPConfig."""
    kind = config.model_type
    if kind == "clip":
        text, vision = _clip(config.text_config), _clip(config.vision_config)
        ends = (vision.width * config.projection_dim, text.width * config.projection_dim)
        return ModelShape(text, 0, *_patches(config.vision_config), tower=vision, projector=ends, joint=True)
    if getattr(config, "vision_config", None) is not None:
        lm, tower = _llama(config.text_config), _clip(config.vision_config, unused=1)
        ends = (tower.width * lm.width, lm.width**2)
        vocabulary = config.text_config.vocab_size
        return ModelShape(lm, vocabulary, *_patches(config.vision_config), tower=tower, projector=ends)
    patch = getattr(config, "patch", 0)
    return ModelShape(_llama(config), config.vocab_size, 3 * patch**2)


def train_flops(
    shape: ModelShape,
    *,
    segments: Sequence[int] | np.ndarray,
    loss_tokens: int,
    images: int,
    trained: Trained,
    patches: int = 0,
) -> Flops:
    """Model FLOPs of one optimizer step; the module's docstring has the formula.

    Args:
        segments: tokens of every packed segment of the global batch, image tokens included (CLIP: of its captions).
        loss_tokens: those that reach the head.
        images: those that a vision tower sees; a U-LVLM has none, its images are `patches`.
        trained: "projector" is an H-LVLM whose language model is frozen, "all" trains the language model too.
        patches: patch tokens of a U-LVLM, of the whole batch.
    """
    return _count(shape, segments, loss_tokens, images, patches, trained, again=False, flash=False)


def hardware_flops(
    shape: ModelShape,
    *,
    segments: Sequence[int] | np.ndarray,
    loss_tokens: int,
    images: int,
    trained: Trained,
    patches: int = 0,
    checkpointing: Literal["none", "selective", "full"] = "none",
) -> Flops:
    """FLOPs that are really executed: arguments as `train_flops`, recomputation is counted with backward (selective: none, since
    it keeps every product).

    Padding is executed too: give the padding tail as a segment and a dummy row as one.
    """
    return _count(shape, segments, loss_tokens, images, patches, trained, again=checkpointing == "full", flash=True)


def _count(
    shape: ModelShape,
    segments: Sequence[int] | np.ndarray,
    loss_tokens: int,
    images: int,
    patches: int,
    trained: Trained,
    *,
    again: bool,
    flash: bool,
) -> Flops:
    lengths = np.asarray(segments, dtype=np.int64)
    frozen = trained == "projector"
    parts = [_lm(shape, lengths, int(loss_tokens), frozen=frozen, again=again, flash=flash)]
    if shape.tower is None:
        pixels = 2 * int(patches) * shape.patch_values * shape.lm.width
        parts.append(Flops(pixels, pixels))
    else:
        parts.append(_tower(shape, int(images), len(lengths), again=again, flash=flash))
    return Flops(sum(part.forward for part in parts), sum(part.backward for part in parts))


def _lm(shape: ModelShape, lengths: np.ndarray, loss_tokens: int, *, frozen: bool, again: bool, flash: bool) -> Flops:
    tokens, pairs = int(lengths.sum()), int((lengths**2).sum()) / 2
    head = 2 * loss_tokens * shape.lm.width * shape.vocabulary
    forward = shape.lm.products(tokens) + head
    backward = forward if frozen else 2 * forward
    attention = _attention(shape.lm, pairs, flash=flash)
    backward += _recomputed(shape.lm, tokens, pairs) if again else 0
    return Flops(forward + attention.forward, backward + attention.backward)


def _tower(shape: ModelShape, images: int, captions: int, *, again: bool, flash: bool) -> Flops:
    tower = shape.tower
    assert tower is not None
    seen = images * shape.patches
    pixels = 2 * seen * shape.patch_values * tower.width
    tokens, pairs = seen + images, images * (shape.patches + 1) ** 2
    first, second = shape.projector
    products, attention = tower.products(tokens), _attention(tower, pairs, flash=flash)
    if not shape.joint:  # frozen below, the MLP above: the input of its first matrix needs no gradient
        mlp = 2 * seen * (first + second)
        return Flops(pixels + products + attention.forward + mlp, 2 * seen * (first + 2 * second))
    ends = 2 * (images * first + captions * second)
    backward = pixels + 2 * (products + ends) + attention.backward
    backward += _recomputed(tower, tokens, pairs) if again else 0
    return Flops(pixels + products + attention.forward + ends, backward)


def _attention(stack: Stack, pairs: float, *, flash: bool) -> Flops:
    forward = stack.attention(pairs)
    return Flops(forward, forward * 5 // 2 if flash else forward * 2)


def _recomputed(stack: Stack, tokens: int, pairs: float) -> int:
    return stack.products(tokens) - 2 * stack.layers * stack.last * tokens + stack.attention(pairs)


def _llama(config: Any) -> Stack:
    width, heads = config.hidden_size, config.num_attention_heads
    head = getattr(config, "head_dim", None) or width // heads
    kv = config.num_key_value_heads or heads
    mlp = width * config.intermediate_size
    weights = 2 * width * head * (heads + kv) + 3 * mlp
    return Stack(config.num_hidden_layers, width, heads * head, weights, last=mlp)


def _clip(config: Any, *, unused: int = 0) -> Stack:
    width, mlp = config.hidden_size, config.hidden_size * config.intermediate_size
    return Stack(config.num_hidden_layers - unused, width, width, 4 * width**2 + 2 * mlp, last=mlp)


def _patches(vision: Any) -> tuple[int, int]:
    """(D, P)."""
    return 3 * vision.patch_size**2, (vision.image_size // vision.patch_size) ** 2

"""Bytes of tensors on one GPU during a step: what is there all the time, and what comes and goes, moment by moment.

A micro-step goes through the same moments whatever the model: embedding, layer after layer, norm, head, and back; then comes
the update. At each one the bytes are those of the state that lies there always, of the activations kept so far, of what the
module at work needs, of the parameters that ZeRO-3 holds whole, and of gradients on their way. The peak is the largest.

The allocator's rounding, CUDA's context and NCCL's own buffers come on top; `hardware.Gpu.usable` leaves room for them.

Letters: T tokens of a row, N loss tokens, P patches, D values of a patch, I images, H width, V vocabulary, W width of a tower.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from megaprior.kernels.fused import CHUNK, ROW_MULTIPLE
from megaprior.kernels.torch_impl import default_chunk_rows
from megaprior.planning.described import Described
from megaprior.planning.gathering import Gathers, Use, gathered
from megaprior.planning.state import Setting, State, state_of
from megaprior.planning.traced import Gradients, LayerCosts, trace_lm, trace_tower


@dataclass(frozen=True)
class Row:
    """One packed row: tokens of its segments, loss tokens, patches (whole images' in an H-LVLM) and images."""

    segments: tuple[int, ...]
    loss_tokens: int
    patches: int = 0
    images: int = 0

    @property
    def tokens(self) -> int:
        """T."""
        return sum(self.segments)


@dataclass(frozen=True)
class Moment:
    """Bytes beside the state: `kept` activations, `working` memory of the module at work, parameters that are `whole`,
    `gradients` that are not yet where they stay."""

    kept: int
    working: int
    whole: int = 0
    gradients: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.kept + self.working + self.whole + self.gradients


@dataclass(frozen=True)
class Memory:
    """Of one GPU: the state that is always there, and the moments by name. `host` bytes lie in the machine's memory."""

    state: State
    moments: dict[str, Moment] = field(default_factory=dict)

    @property
    def worst(self) -> str:
        """The moment of the peak."""
        return max(self.moments, key=lambda name: self.moments[name].total)

    @property
    def peak(self) -> int:
        """Most bytes at any moment."""
        return self.state.total + self.moments[self.worst].total


@dataclass(frozen=True)
class _Head:
    """Of the fused head: most in forward, what stays until its backward, most in backward, and its weight's gradient."""

    forward: int
    keep: int
    backward: int
    gradient: int


@dataclass(frozen=True)
class Prepared:
    """What does not depend on the number of GPUs: what layers cost, and what ZeRO-3 gathers (None where all is whole)."""

    gradients: Gradients
    costs: LayerCosts
    gathers: Gathers | None


def prepare(model: Described, setting: Setting, row: Row, *, micro_steps: int) -> Prepared:
    """For `plan_memory` of the same arguments."""
    local = setting.engine == "local"
    one: Gradients = "held" if micro_steps > 1 else "new"
    gradients: Gradients = "none" if model.projector_only else one if local else "taken"
    return Prepared(gradients, _traced(model, setting, row, gradients), gathers_of(model, setting))


def plan_memory(
    model: Described,
    setting: Setting,
    row: Row,
    *,
    world: int,
    micro_steps: int,
    prepared: Prepared | None = None,
) -> Memory:
    """The memory of a step whose longest row is `row`, on each of `world` GPUs; `micro_steps` rows make one step."""
    prepared = prepared or prepare(model, setting, row, micro_steps=micro_steps)
    gradients, costs = prepared.gradients, prepared.costs
    state = state_of(model, setting, world=world)
    frozen_lm, local = model.projector_only, setting.engine == "local"
    peaks = prepared.gathers.peaks if prepared.gathers is not None and world > 1 else {}
    whole = {moment: count * setting.zero.size for moment, count in peaks.items()}
    width = setting.flow(model).itemsize
    hidden = row.tokens * model.lm.hidden_size * width
    head = _head(model, setting, row)
    embed, kept = _embedding(model, setting, row, hidden)
    kept += costs.shared + row.tokens * 4 * 8 + row.patches * _patch_values(model)  # the row itself: int64 and uint8
    layers, layer, norm = model.lm.num_hidden_layers, costs.layer, costs.norm
    held = sum(model.trained.values()) * 4 if local and micro_steps > 1 else 0  # gradients of the micro-steps before
    state = replace(state, gradients=state.gradients + held)
    size = setting.weight(model).itemsize
    table = model.lm.vocab_size * model.lm.hidden_size
    tied = bool(model.lm.tie_word_embeddings)
    new = {"head": 0, "layer": 0}
    if gradients == "new":
        weights = sum(n for name, n in model.trained.items() if "layers." in name) // layers
        new = {"head": head.gradient, "layer": weights * size}
    waiting = head.gradient if tied and not frozen_lm else 0  # a tied weight's gradient waits for the embedding's part
    reduce, late = _reduction(model, setting, world, largest=0 if frozen_lm else table)

    moments = {"embedding": Moment(kept, embed, whole.get("embedding", 0))}
    for i in range(layers):
        before = kept + i * (layer.keep + layer.cached)
        moments[f"layer {i} forward"] = Moment(before, layer.forward, whole.get(f"F{i}", 0))
    top = kept + layers * layer.keep
    within = top + layers * layer.cached
    moments["norm forward"] = Moment(within, norm.forward, whole.get("norm", 0))
    moments["head forward"] = Moment(within + norm.keep + norm.cached, head.forward, whole.get("head", 0))
    after = top + norm.keep - norm.output + head.keep
    moments["head backward"] = Moment(after, head.backward, whole.get("head", 0))
    moments["norm backward"] = Moment(
        top + norm.keep - norm.output, hidden + norm.backward, whole.get("norm", 0), head.gradient + late
    )
    for i in reversed(range(layers)):
        done = new["head"] + (layers - 1 - i) * new["layer"] + (waiting if gradients != "new" else 0)
        working = layer.backward + reduce if setting.overlaps else max(layer.backward, reduce)
        lower = kept + (i + 1) * layer.keep - layer.output
        moments[f"layer {i} backward"] = Moment(lower, hidden + working, whole.get(f"B{i}", 0), done)
    if not frozen_lm:
        done = new["head"] + layers * new["layer"] + (waiting if gradients != "new" else 0)
        moments["embedding backward"] = Moment(kept, hidden + table * size, whole.get("embedding backward", 0), done)
        moments["reduction"] = Moment(0, 0, 0, table * size * (not local) + max(reduce, late))
    grown = sum(model.trained.values()) * 4 if gradients == "new" else 0
    moments["update"] = Moment(0, state.update, 0, grown)
    return Memory(state, moments)


def _traced(model: Described, setting: Setting, row: Row, gradients: Gradients) -> LayerCosts:
    dtype, autocast = setting.flow(model), setting.autocast
    backend = "segments" if setting.device == "cpu" or torch.bfloat16 not in (dtype, autocast) else "varlen"
    return trace_lm(
        model.lm,
        row.segments,
        dtype=dtype,
        backend=backend,
        checkpointing=setting.checkpointing,
        gradients=gradients,
        autocast=autocast,
    )


def _embedding(model: Described, setting: Setting, row: Row, hidden: int) -> tuple[int, int]:
    """(most while a row is embedded, what of it is kept until backward)."""
    if model.kind == "text":
        return hidden, hidden
    width, size = model.lm.hidden_size, setting.weight(model).itemsize
    compute = size if setting.autocast is None else setting.autocast.itemsize
    if model.kind == "ulvlm":
        pixels = row.patches * _patch_values(model)
        cast = pixels * compute * (compute != 4)
        kept = cast or pixels * 4
        # Pixels normalized in fp32, then in the weight's dtype; projected; added to a copy of the embeddings.
        return 2 * hidden + pixels * 4 + cast + row.patches * width * compute, hidden + kept
    assert model.tower is not None
    frozen, seen = setting.frozen_dtype.itemsize, row.patches
    features = (seen + row.images) * model.tower.hidden_size * frozen
    flat = seen * model.tower.hidden_size * max(frozen, compute)
    projected = seen * width * compute
    tower = (
        trace_tower(model.tower, row.images, dtype=setting.frozen_dtype, autocast=setting.autocast) if row.images else 0
    )
    kept = (
        hidden + features + flat + 3 * projected
    )  # the MLP keeps its input, both sides of GELU; States keeps the result
    return max(tower, 2 * hidden + features + flat + 3 * projected), kept


def _patch_values(model: Described) -> int:
    return model.shape.patch_values


def _head(model: Described, setting: Setting, row: Row) -> _Head:
    """The fused loss as kernels/torch_impl.py (CPU) and kernels/fused.py (GPU) do it."""
    loss, width, vocabulary = row.loss_tokens, model.lm.hidden_size, model.lm.vocab_size
    flow, weight = setting.flow(model).itemsize, setting.flow(model) if model.projector_only else setting.weight(model)
    compute = setting.autocast or setting.flow(model)
    b, table = compute.itemsize, vocabulary * width
    trained = not model.projector_only
    picked = loss * width * (flow + b * (setting.autocast is not None and flow != b))
    matrix = table * b * (weight != compute)
    wide = table * 4 * trained  # the gradient of the weight adds up in fp32
    keep = loss * width * b + wide
    if setting.device == "cpu":
        rows = min(default_chunk_rows(vocabulary, torch.device("cpu")), loss)
        copies = 1 if b == 4 else 2
        logits = rows * vocabulary * (4 if b == 4 else b + 4)
        summed = rows * vocabulary * 4 * (copies - 1) * trained  # bf16 operands of a product that is summed in fp32
        states = rows * width * (4 + b)
        backward = loss * width * 4 * copies + table * weight.itemsize * trained
        return _Head(
            picked + keep + matrix + logits + summed + states, keep, backward, table * weight.itemsize * trained
        )
    budget, most = CHUNK
    rows = max(ROW_MULTIPLE, min(most, budget // (b * vocabulary) // ROW_MULTIPLE * ROW_MULTIPLE))
    rows = min(rows, loss)
    forward = picked + keep + matrix + rows * (vocabulary * b + width * (4 + b))
    backward = loss * width * b + table * weight.itemsize * trained
    return _Head(forward, keep, backward, table * weight.itemsize * trained)


def _reduction(model: Described, setting: Setting, world: int, *, largest: int) -> tuple[int, int]:
    """Bytes while a bucket of gradients is reduced: (a full one amid backward, one parameter that exceeds a bucket)."""
    zero = setting.zero
    if setting.engine == "local" or zero.stage < 3 or world == 1:
        return 0, 0
    size, total = zero.size, sum(model.trained.values())
    bucket = min(zero.reduce_bucket, total)
    amid = bucket * size + bucket * 4 // world  # one flat copy; this rank's part of it in fp32
    alone = largest * 4 // world if largest > zero.reduce_bucket else 0
    return amid, alone


def gathers_of(model: Described, setting: Setting) -> Gathers | None:
    """What ZeRO-3 gathers in a micro-step; None where every rank holds all."""
    zero = setting.zero
    if setting.engine == "local" or zero.stage < 3:
        return None
    inside = dict(model.trained) | (model.frozen if setting.partitioned else {})
    small = {name for name, count in inside.items() if count <= zero.persistence}
    uses = _uses(inside, model, setting.checkpointing)
    options = {"prefetch": zero.prefetch, "reuse": zero.reuse, "most": zero.live}
    return gathered(uses, inside, persistent=small, **options)


def _uses(inside: dict[str, int], model: Described, checkpointing: str) -> list[Use]:
    """The modules that own parameters, in the order in which they run: forward, then back, layers forward again before."""
    modules: dict[str, list[str]] = {}
    for name in sorted(inside, key=lambda n: (_order(n), list(inside).index(n))):
        modules.setdefault(name.rpartition(".")[0], []).append(name)
    forward = [Use(tuple(names), _moment(module)) for module, names in modules.items()]
    if not any(use.moment == "head" for use in forward) and any(use.moment == "norm" for use in forward):  # a tied head
        tied = next(names for module, names in modules.items() if module.endswith("embed_tokens"))
        forward.append(Use(tuple(tied), "head"))
    backward: list[Use] = []
    for use in reversed(forward):
        if use.moment.startswith("F"):
            here = use.moment.replace("F", "B")
            if checkpointing != "none" and (not backward or backward[-1].moment != here):
                backward += [replace(u, moment=here) for u in forward if u.moment == use.moment]
            backward.append(replace(use, moment=here))
        else:
            backward.append(replace(use, moment="embedding backward" if use.moment == "embedding" else use.moment))
    return forward + backward


def _order(name: str) -> int:
    place: Literal[0, 1, 2, 3] = 1
    if "layers." in name and not name.startswith("tower"):
        place = 2
    elif name.endswith(("model.norm.weight", "lm_head.weight")):
        place = 3
    elif name.startswith("tower"):
        place = 0
    return place


def _moment(module: str) -> str:
    if module.startswith("tower") or "layers." not in module:
        return "head" if module.endswith("lm_head") else "norm" if module.endswith("model.norm") else "embedding"
    return "F" + module.partition("layers.")[2].partition(".")[0]

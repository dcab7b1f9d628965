"""Time of a step: arithmetic, communication, and what of it does not overlap. Forecasts from vendors' figures and assumptions.

Ranks meet at every gather, so a micro-step takes as long as its longest row. A row takes the longer of its arithmetic and of
reading the weights (short rows are bound by that). Collectives move, per micro-step and GPU, with p the elements that train:

    ZeRO-3    what is gathered (forward and backward), and p reduced and scattered
    ZeRO-2    p reduced and scattered; once per step p gathered
    ZeRO-1    once per step p reduced by all, in fp32, and p gathered

of which a share (n - 1) / n comes from others: out of the same machine over its links, and what a machine receives from others
over its network adapters; the slower of the two counts. hpZ gathers for backward within the machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megaprior.data.packing import pack_best_fit, split_balanced
from megaprior.models.flops import hardware_flops, train_flops
from megaprior.planning.described import Described
from megaprior.planning.gathering import Gathers
from megaprior.planning.hardware import Assumptions, Gpu
from megaprior.planning.state import Setting
from megaprior.planning.workload import Workload

UPDATE_BYTES = 30  # AdamW, per element: reads gradient, master and two moments, writes three and the bf16 copy


@dataclass(frozen=True)
class Traffic:
    """Bytes that each GPU receives in one step."""

    gathered: float
    reduced: float

    @property
    def total(self) -> float:
        """Both."""
        return self.gathered + self.reduced


@dataclass(frozen=True)
class Speed:
    """Of one step on `gpus` GPUs; seconds, and shares between 0 and 1.

    Attributes:
        micro_steps: rows per GPU and step, dummies included.
        longest: tokens of the longest row, padding included.
        idle: GPUs that have no sample at all.
        busy: arithmetic of all GPUs over that of the fullest one times their number.
        arithmetic, communication, exposed, update: seconds; `exposed` is what of communication nothing hides.
        mfu: model FLOPs over peak FLOPs in that time.
    """

    gpus: int
    micro_steps: int
    longest: int
    idle: int
    busy: float
    arithmetic: float
    communication: float
    exposed: float
    update: float
    traffic: Traffic
    mfu: float

    @property
    def step(self) -> float:
        """Seconds of a whole step."""
        return self.arithmetic + self.exposed + self.update


def plan_speed(
    model: Described,
    setting: Setting,
    work: Workload,
    gathers: Gathers | None,
    *,
    gpus: int,
    gpu: Gpu,
    assumed: Assumptions,
) -> Speed:
    """A step of `work` on `gpus` GPUs."""
    ranks = [
        [[part[i] for i in row] for row in pack_best_fit([int(work.segment[p]) for p in part], work.row)]
        for part in split_balanced(work.segment.tolist(), gpus)
    ]
    micro = max(1, *(len(rows) for rows in ranks))
    seconds = np.zeros((gpus, micro))
    weights = (sum(model.trained.values()) + sum(model.frozen.values())) * setting.zero.size
    passes = 2 + (setting.checkpointing == "full") + (not model.projector_only)
    reading = passes * weights / (gpu.bandwidth * assumed.streams)
    longest = 0
    for rank, rows in enumerate(ranks):
        for number in range(micro):
            row = rows[number] if number < len(rows) else []
            flops, tokens = _row(model, setting, work, row)
            longest = max(longest, tokens)
            seconds[rank, number] = max(flops / (gpu.flops * assumed.efficiency), reading)
    per_micro = seconds.max(axis=0)
    traffic, each, once = _traffic(model, setting, gathers, gpus=gpus, gpu=gpu, assumed=assumed, micro=micro)
    exposed = float(np.maximum(each - assumed.overlap * per_micro, 0).sum()) + once
    update = _update(model, setting, gpus=gpus, gpu=gpu, assumed=assumed)
    total = float(per_micro.sum()) + exposed + update
    return Speed(
        gpus=gpus,
        micro_steps=micro,
        longest=longest,
        idle=sum(not rows for rows in ranks),
        busy=float(seconds.sum() / (gpus * per_micro.sum())) if gpus > 1 else 1.0,
        arithmetic=float(per_micro.sum()),
        communication=each * micro + once,
        exposed=exposed,
        update=update,
        traffic=traffic,
        mfu=_model_flops(model, work) / (total * gpus * gpu.flops),
    )


def _row(model: Described, setting: Setting, work: Workload, row: Sequence[int]) -> tuple[int, int]:
    """(FLOPs that are executed, tokens) of a row, its padding included; an empty one is a dummy."""
    lengths = work.segment[list(row)]
    real = int(lengths.sum())
    tokens = max(real, min(-(-max(real, 1) // work.multiple) * work.multiple, work.row))
    images = int(work.image[list(row)].sum())
    flops = hardware_flops(
        model.shape,
        segments=[*lengths.tolist(), tokens - real],
        loss_tokens=int(work.loss[list(row)].sum()),
        images=images // model.image_tokens if work.tower else 0,
        patches=0 if work.tower else images,
        trained="projector" if model.projector_only else "all",
        checkpointing=setting.checkpointing,
    )
    return flops.total, tokens


def _model_flops(model: Described, work: Workload) -> int:
    images = int(work.image.sum())
    return train_flops(
        model.shape,
        segments=work.segment,
        loss_tokens=int(work.loss.sum()),
        images=images // model.image_tokens if work.tower else 0,
        patches=0 if work.tower else images,
        trained="projector" if model.projector_only else "all",
    ).total


def _traffic(
    model: Described,
    setting: Setting,
    gathers: Gathers | None,
    *,
    gpus: int,
    gpu: Gpu,
    assumed: Assumptions,
    micro: int,
) -> tuple[Traffic, float, float]:
    """(bytes received per GPU and step, seconds of each micro-step, seconds once per step)."""
    zero, trained = setting.zero, sum(model.trained.values())
    if gpus == 1 or setting.engine == "local":
        return Traffic(0, 0), 0.0, 0.0
    share = (gpus - 1) / gpus

    def seconds(size: float, among: int = gpus) -> float:
        inside = size * (among - 1) / among / (gpu.link * assumed.links)
        machines = -(-among // assumed.per_node)
        adapters = min(assumed.per_node, among) * (assumed.network or gpu.network) * assumed.links
        return max(inside, size * (machines - 1) / machines / adapters)

    if zero.stage < 3:
        scattered = trained * zero.size if zero.stage == 2 else 0
        summed = 2 * trained * 4 if zero.stage == 1 else 0
        whole = trained * zero.size
        traffic = Traffic(share * whole, share * (scattered * micro + summed))
        return traffic, seconds(scattered), seconds(summed) + seconds(whole)
    assert gathers is not None
    forward = sum(n for moment, n in gathers.fetched.items() if not _back(moment))
    backward = sum(n for moment, n in gathers.fetched.items() if _back(moment))
    out, back = (n * zero.size / (2 if zero.quantized_weights else 1) for n in (forward, backward))
    reduced = trained * zero.size / (4 if zero.quantized_gradients else 1)
    near = min(zero.hpz, gpus) if zero.hpz > 1 else gpus
    traffic = Traffic(micro * (share * out + back * (near - 1) / near), micro * share * reduced)
    return traffic, seconds(out) + seconds(back, near) + seconds(reduced), 0.0


def _back(moment: str) -> bool:
    return moment.startswith("B") or moment.endswith("backward")


def _update(model: Described, setting: Setting, *, gpus: int, gpu: Gpu, assumed: Assumptions) -> float:
    """Seconds of AdamW: memory-bound on the GPU; offloaded, gradients go over PCIe, parameters come back."""
    part = sum(model.trained.values()) / (gpus if setting.engine == "zero3" else 1)
    away = part * setting.zero.offload
    here = (part - away) * UPDATE_BYTES / (gpu.bandwidth * assumed.streams)
    neighbours = min(gpus, assumed.per_node)
    return here + away * ((4 + 2) / assumed.pcie + UPDATE_BYTES * neighbours / (assumed.host * assumed.streams))

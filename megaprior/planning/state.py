"""What lies on a GPU all through a run: parameters, gradients and AdamW's state, as each engine lays them out.

local       fp32 parameters, their gradients and two moments
ZeRO-3      a partition of each: parameters in the dtype of compute, fp32 masters, two moments, summed gradients in fp32;
            small parameters whole; one bucket that gradients are collected in
ZeRO-1, -2  parameters whole, masters and moments partitioned; gradients whole in fp32 (1), partitioned (2)
offloaded   masters, moments and summed gradients in the machine's memory
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from megaprior.planning.described import Described
from megaprior.planning.traced import Checkpointing
from megaprior.train.settings import RunConfig
from megaprior.train.zero3_config import offload_ratio, resolve_extras, zero_stage


@dataclass(frozen=True)
class Zero:
    """DeepSpeed's options that memory and traffic depend on; elements, not bytes.

    Attributes:
        size: bytes of an element that is gathered or reduced.
        hpz: ranks that hold a second partition of the parameters between them; 1 is off.
    """

    stage: int = 3
    size: int = 2
    reduce_bucket: int = 500_000_000
    prefetch: int = 50_000_000
    reuse: int = 1_000_000_000
    live: int = 1_000_000_000
    persistence: int = 100_000
    sub_group: int = 1_000_000_000
    overlap: bool = True
    contiguous: bool = True
    offload: float = 0.0
    offload_params: bool = False
    hpz: int = 1
    quantized_weights: bool = False
    quantized_gradients: bool = False

    @classmethod
    def of(cls, extras: dict[str, Any], *, size: int) -> Zero:
        """As a DeepSpeed JSON has them, its defaults where it is silent."""
        zero = extras.get("zero_optimization", {})
        plain = cls()

        def number(name: str, otherwise: int) -> int:
            return int(zero.get(name, zero.get(f"stage3_{name}", otherwise)))

        return cls(
            stage=zero_stage(extras),
            size=size,
            reduce_bucket=number("reduce_bucket_size", plain.reduce_bucket),
            prefetch=number("prefetch_bucket_size", plain.prefetch),
            reuse=number("max_reuse_distance", plain.reuse),
            live=number("max_live_parameters", plain.live),
            persistence=number("param_persistence_threshold", plain.persistence),
            sub_group=number("sub_group_size", plain.sub_group),
            overlap=bool(zero.get("overlap_comm", True)),
            contiguous=bool(zero.get("contiguous_gradients", True)),
            offload=offload_ratio(zero),
            offload_params=(zero.get("offload_param") or {}).get("device", "none") != "none",
            hpz=int(zero.get("zero_hpz_partition_size", 1)),
            quantized_weights=bool(zero.get("zero_quantized_weights", False)),
            quantized_gradients=bool(zero.get("zero_quantized_gradients", False)),
        )


@dataclass(frozen=True)
class Setting:
    """How a run computes.

    Attributes:
        frozen_dtype: of an H-LVLM's frozen parts.
        partitioned: whether those are spread over the ranks.
        device: what runs: the backends of attention and loss differ.
    """

    engine: Literal["local", "zero3"]
    precision: Literal["fp32", "bf16"]
    checkpointing: Checkpointing
    frozen_dtype: torch.dtype
    partitioned: bool
    zero: Zero
    device: Literal["cpu", "cuda"] = "cuda"

    @classmethod
    def of(cls, cfg: RunConfig, *, device: Literal["cpu", "cuda"] = "cuda") -> Setting:
        """Of a run's configuration.

        Raises:
            UsageError: its DeepSpeed options cannot be.
        """
        zero = Zero.of(resolve_extras(cfg.zero), size=2 if cfg.precision == "bf16" else 4)
        frozen = getattr(torch, cfg.model.frozen_dtype)
        partitioned = cfg.model.frozen == "partitioned"
        return cls(cfg.engine, cfg.precision, cfg.activation_checkpointing, frozen, partitioned, zero, device)

    @property
    def autocast(self) -> torch.dtype | None:
        """The local engine's bf16 is autocast over fp32 weights, DeepSpeed's is bf16 weights."""
        return torch.bfloat16 if self.engine == "local" and self.precision == "bf16" else None

    @property
    def overlaps(self) -> bool:
        """Whether communication runs beside computation; on a CPU it does not."""
        return self.engine == "zero3" and self.zero.overlap and self.device == "cuda"

    def weight(self, model: Described) -> torch.dtype:
        """Of the trained parameters, as they compute."""
        return torch.bfloat16 if self.engine == "zero3" and self.precision == "bf16" else torch.float32

    def flow(self, model: Described) -> torch.dtype:
        """Of what flows between the language model's layers: the dtype of its embeddings."""
        return self.frozen_dtype if model.projector_only else self.weight(model)


@dataclass(frozen=True)
class State:
    """Bytes on one GPU, and in the machine's memory for it.

    Attributes:
        parameters: trained ones, in the dtype of compute.
        gradients: where they add up.
        optimizer: fp32 masters and two moments.
        frozen: parameters that do not train.
        buckets: of communication.
        update: what the update needs beside all that.
        host: in the machine's memory.
    """

    parameters: int
    gradients: int
    optimizer: int
    frozen: int
    buckets: int
    update: int
    host: int

    @property
    def total(self) -> int:
        """On the GPU, all the time."""
        return self.parameters + self.gradients + self.optimizer + self.frozen + self.buckets


def state_of(model: Described, setting: Setting, *, world: int) -> State:
    """The state of each of `world` ranks."""
    size, zero = setting.weight(model).itemsize, setting.zero
    trained = sum(model.trained.values())
    spread = world if setting.partitioned else 1
    frozen = sum(-(-count // spread) for count in model.frozen.values()) * setting.frozen_dtype.itemsize
    if setting.engine == "local":
        return State(trained * size, 0, trained * 8, frozen, 0, 0, 0)
    part = sum(-(-count // world) for count in model.trained.values())
    stays = 1 - zero.offload
    masters, sums = part * 12, part * 4
    step = min(part, zero.sub_group) * 4  # gradients of one sub-group in one piece
    if setting.device == "cpu":
        step += _unfused(model, zero, world)
    if zero.stage < 3:
        whole, gradients = trained * size, trained * 4 if zero.stage == 1 else sums
        buckets = zero.reduce_bucket * size * (2 if zero.overlap else 1)
        return State(
            whole, gradients, int(masters * stays), frozen, buckets, int(step * stays), int(masters * zero.offload)
        )
    small = sum(count for count in model.trained.values() if count <= zero.persistence) if world > 1 else 0
    here = 0 if zero.offload_params else part
    second = sum(-(-count // zero.hpz) for count in model.trained.values()) if zero.hpz > 1 else 0
    return State(
        parameters=(here + small + second) * size,
        gradients=int(sums * stays),
        optimizer=int(masters * stays),
        frozen=frozen,
        buckets=zero.reduce_bucket * size if zero.contiguous else 0,
        update=int(step * stays),
        host=int((masters + 2 * sums) * zero.offload) + (part * size if zero.offload_params else 0),
    )


def _unfused(model: Described, zero: Zero, world: int) -> int:
    """AdamW without its fused kernel: the square root of the second moment and its quotient, of one group's flat tensor."""
    matrices = sum(-(-count // world) for name, count in model.trained.items() if not name.endswith("norm.weight"))
    return min(matrices, zero.sub_group) * 8

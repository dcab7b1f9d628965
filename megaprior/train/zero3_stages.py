"""Where each of DeepSpeed's optimizers keeps this rank's gradients, and how what was accumulated is dropped.

DeepSpeed has one class for ZeRO-3, one for ZeRO-1 and 2, and one more for ZeRO-1 in bf16 with its state on the device. They agree
on `step` and `param_groups`, and on little else.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class Stage(Protocol):
    """What the engine needs to know of one of DeepSpeed's optimizers."""

    def gradients(self) -> list[Tensor]:
        """This rank's part of every accumulated gradient, fp32; changing them in place changes the update."""
        ...

    def masters(self) -> list[Tensor]:
        """This rank's flat fp32 weights, one per group of them."""
        ...

    def discard(self) -> None:
        """Drop what was accumulated."""
        ...


def stage_of(zero: Any) -> Stage:
    """The form of DeepSpeed's optimizer `zero`."""
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        return _Stage3(zero)
    if hasattr(zero, "fp32_groups_gradient_flat_partition"):
        return _Stage1Bf16(zero)
    return _Stage1And2(zero)


class _Stage3:
    def __init__(self, zero: Any) -> None:
        self._zero = zero

    def gradients(self) -> list[Tensor]:
        _settle(self._zero.offload_optimizer)
        groups = self._zero.get_fp32_grad_partitions()
        return [part for group in groups.values() for part in group.values()]

    def masters(self) -> list[Tensor]:
        return self._zero.fp32_partitioned_groups_flat

    def discard(self) -> None:
        self._zero.zero_grad()  # the next micro-step overwrites, and so does the next step's copy to host memory
        self._zero.averaged_gradients = {}


class _Stage1And2:
    def __init__(self, zero: Any) -> None:
        self._zero = zero

    def gradients(self) -> list[Tensor]:
        if self._zero.cpu_offload:
            _settle(True)
            return [flat.grad for flat in self._zero.single_partition_of_fp32_groups]
        return [part for group in self._zero.averaged_gradients.values() for part in group or ()]

    def masters(self) -> list[Tensor]:
        return self._zero.single_partition_of_fp32_groups

    def discard(self) -> None:
        """As DeepSpeed's own `step` does where it meets an overflow."""
        zero = self._zero
        zero.zero_grad()
        zero.micro_step_id = -1
        if zero.cpu_offload:
            zero.reset_cpu_buffers()
        for group in list(zero.averaged_gradients):
            zero.averaged_gradients[group] = None
            zero.all_grad_tensors[group] = None


class _Stage1Bf16:
    def __init__(self, zero: Any) -> None:
        self._zero = zero

    def gradients(self) -> list[Tensor]:
        return self._zero.fp32_groups_gradient_flat_partition

    def masters(self) -> list[Tensor]:
        return self._zero.fp32_groups_flat_partition

    def discard(self) -> None:
        self._zero.zero_grad()


def rates(zero: Any) -> list[dict[str, Any]]:
    """All parameter groups that a learning rate must be set in: with a `ratio` below 1 the part of the state that stays on the
    device is updated by an optimizer of its own, whose first group is a copy."""
    backup = getattr(zero, "backup_optimizer", None)
    return [*zero.param_groups, *(backup.param_groups if backup is not None else [])]


def _settle(offloaded: bool) -> None:
    """Gradients travel to host memory without waiting; they are read there next."""
    if offloaded and torch.cuda.is_available():
        torch.cuda.synchronize()

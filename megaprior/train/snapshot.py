"""What a checkpoint will hold, copied to host memory at a step boundary, so that it can be written while training goes on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Write:
    """Work that is left of a snapshot: `run` writes the file or folder `path`, without any collective."""

    path: Path
    run: Callable[[], None]


class HostBuffers:
    """Host memory for the copies of one save, used again by the next: fresh pages cost several times the copying itself."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._used = 0

    @property
    def nbytes(self) -> int:
        """Memory that is reserved."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def begin(self) -> None:
        """A new save: the copies of the one before may be overwritten."""
        self._used = 0

    def free(self) -> None:
        """Give the memory back."""
        self._buffers.clear()
        self._used = 0

    def copy(self, tensor: Tensor) -> Tensor:
        """A contiguous copy in host memory, without gradient, that stays as it is until the next `begin`."""
        source, at = tensor.detach(), self._used
        self._used += 1
        if at == len(self._buffers):
            self._buffers.append(torch.empty(0))
        if self._buffers[at].shape != source.shape or self._buffers[at].dtype != source.dtype:
            self._buffers[at] = torch.empty(source.shape, dtype=source.dtype)
        return self._buffers[at].copy_(source)

    def copy_all(self, state: Any) -> Any:
        """`state`, containers within containers, as it is now; nothing in the result changes when training goes on."""
        memo: dict[int, Any] = {}

        def visit(value: Any) -> None:
            if isinstance(value, Tensor):
                if id(value) not in memo:
                    memo[id(value)] = self.copy(value)
            elif isinstance(value, Mapping):
                for inner in value.values():
                    visit(inner)
            elif isinstance(value, list | tuple):
                for inner in value:
                    visit(inner)

        visit(state)
        return copy.deepcopy(state, memo)  # finds the copied tensors in `memo` and copies everything else


class DeferredWrites:
    """Stands in for DeepSpeed's checkpoint engine during a save: keeps what would be written, and writes it when asked.

    DeepSpeed's own writer does the writing, so that names and formats stay its own.
    """

    def __init__(self, writer: Any, buffers: HostBuffers | None) -> None:
        """`buffers` None keeps references: for a save that is written before training goes on."""
        self.writer, self._buffers = writer, buffers
        self.writes: list[Write] = []

    def save(self, state_dict: Any, path: str) -> None:
        """Called by DeepSpeed for every file."""
        kept = state_dict if self._buffers is None else self._buffers.copy_all(state_dict)
        self.writes.append(Write(Path(path), lambda: self.writer.save(kept, path)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.writer, name)

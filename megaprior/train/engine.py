"""What the loop asks of an engine, and the plain one: PyTorch on one process.

A step is: `accumulate` every row of the batch, `sums` once (the only wait for the device), then `update` or `discard`.
Rows are micro-steps: gradients add up because every row is divided by the same D.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn

from megaprior.distributed import Place
from megaprior.files import digest_json
from megaprior.models.fingerprint import tensor_digest
from megaprior.models.hlvlm import FROZEN, HLVLM
from megaprior.train.optim import OptimConfig, adamw
from megaprior.train.snapshot import HostBuffers, Write

if TYPE_CHECKING:
    from megaprior.data.samples import Batch

Precision = Literal["fp32", "bf16"]


class Engine(Protocol):
    """The methods that the loop, evaluation and checkpoints use; collective ones are called by all ranks alike."""

    name: str
    place: Place
    module: nn.Module  # Step(model, objective)

    def accumulate(self, row: Batch, group: Tensor, *, last: bool) -> None:
        """Forward and backward of one row; `last` marks the step's final one. Never waits for the device.

        `group` int64 [N] on the CPU: for each loss token the sum that its NLL is counted in.
        """
        ...

    def sums(self) -> list[float]:
        """[squared gradient norm, loss, NLL of group 0, ...]: this rank's parts of the step's, which are their sums."""
        ...

    def update(self, *, lr: float, scale: float) -> None:
        """Multiply the gradients with `scale`, apply AdamW at `lr`, clear them."""
        ...

    def discard(self) -> None:
        """Drop what was accumulated."""
        ...

    def evaluate(self, row: Batch) -> Tensor:
        """NLL of the row's loss tokens, float32 [N], without gradients."""
        ...

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name in the model, tensor) one by one, each good until the next is asked for; tied ones once. Collective."""
        ...

    def frozen(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of what the model holds frozen beside its own weights, one by one; often nothing. Collective."""
        ...

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """(name in the module, accumulated gradient in float32 on the CPU) one by one. Collective."""
        ...

    def save_state(self, folder: Path) -> None:
        """Write everything that resuming needs into `folder`. Collective."""
        ...

    def snapshot_state(self, folder: Path, buffers: HostBuffers | None) -> list[Write]:
        """What this rank writes in `save_state`, copied into `buffers` to be written while training goes on; with None it is
        not copied and must be written before. Collective; the writing is not."""
        ...

    def load_state(self, folder: Path, *, world: int) -> None:
        """Read what `save_state` wrote with `world` processes. Collective."""
        ...


class Sums:
    """Sums of a step on the device, in float64 so that their order hardly matters: the loss, then the NLL by group."""

    def __init__(self, device: torch.device, groups: int) -> None:
        self._totals = torch.zeros(1 + groups, dtype=torch.float64, device=device)

    def add(self, loss: Tensor, nll: Tensor, group: Tensor) -> None:
        """Count one row's loss (0-d) and NLL [N], by group int64 [N] on the CPU."""
        values = torch.cat((loss.detach().reshape(1), nll.detach())).double()
        where = torch.cat((group.new_zeros(1), group + 1)).to(self._totals.device, non_blocking=True)
        self._totals.index_add_(0, where, values)

    def take(self, gradients: list[Tensor]) -> list[float]:
        """[squared norm of `gradients`, loss, NLL by group], and start again: the one wait of a step."""
        squares = [torch.linalg.vector_norm(g).double().square() for g in gradients]
        norm = torch.stack(squares).sum() if squares else self._totals.new_zeros(())
        values = torch.cat((norm.to(self._totals.device).reshape(1), self._totals)).tolist()
        self._totals.zero_()
        return values

    def drop(self) -> None:
        """Start again."""
        self._totals.zero_()


def model_weights(module: nn.Module) -> Iterator[tuple[str, nn.Parameter | Tensor]]:
    """Parameters and saved buffers of the model inside Step(model, objective), named as in the model; no frozen parts."""
    model: Any = module.model
    saved = model.state_dict(keep_vars=True)
    seen: set[int] = set()
    for name, tensor in saved.items():
        if id(tensor) not in seen and not name.startswith(FROZEN):  # a tied head is the embedding itself
            seen.add(id(tensor))
            yield name, tensor


def frozen_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What the model inside Step(model, objective) holds frozen, as it lies on this rank."""
    model: Any = module.model
    if isinstance(model, HLVLM):
        yield from model.frozen_tensors()


def frozen_digest(engine: Engine) -> str | None:
    """xxh3-128 over every frozen tensor in turn, on rank 0; None elsewhere, and where nothing is frozen. Collective.

    It is compared on every resume: DeepSpeed's universal checkpoints, for one, restore no frozen parameter and do not say so.
    """
    entries = []
    for name, tensor in engine.frozen():
        if engine.place.rank == 0:
            entries.append([name, list(tensor.shape), str(tensor.dtype), tensor_digest(tensor)])
    return digest_json(entries) if entries else None


class LocalEngine:
    """Plain PyTorch: laptops, tests, and what the ZeRO-3 engine is compared with. bf16 is autocast over fp32 weights."""

    name = "local"

    def __init__(
        self, module: nn.Module, optim: OptimConfig, *, precision: Precision, device: torch.device, groups: int = 1
    ) -> None:
        self.place, self.device, self.module = Place(), device, module.to(device).train()
        self._precision = precision
        self._optimizer = adamw(self.module, optim, fused=True)
        self._sums = Sums(device, groups)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def accumulate(self, row: Batch, group: Tensor, *, last: bool) -> None:
        """See `Engine`; every row is treated alike here."""
        with self._autocast():
            loss, nll = self.module(row.to(self.device))
        loss.backward()
        self._sums.add(loss, nll, group)

    def sums(self) -> list[float]:
        """See `Engine`."""
        return self._sums.take([p.grad for p in self.module.parameters() if p.grad is not None])

    def update(self, *, lr: float, scale: float) -> None:
        """See `Engine`."""
        if scale != 1.0:
            torch._foreach_mul_([p.grad for p in self.module.parameters() if p.grad is not None], scale)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def discard(self) -> None:
        """See `Engine`."""
        self._optimizer.zero_grad(set_to_none=True)
        self._sums.drop()

    def evaluate(self, row: Batch) -> Tensor:
        """See `Engine`."""
        self.module.eval()
        with torch.no_grad(), self._autocast():
            _, nll = self.module(row.to(self.device))
        self.module.train()
        return nll.float().cpu()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """See `Engine`."""
        for name, tensor in model_weights(self.module):
            yield name, tensor.detach().cpu()

    def frozen(self) -> Iterator[tuple[str, Tensor]]:
        """See `Engine`."""
        return frozen_tensors(self.module)

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """See `Engine`."""
        for name, parameter in self.module.named_parameters():
            if parameter.grad is not None:
                yield name, parameter.grad.detach().float().cpu()

    def save_state(self, folder: Path) -> None:
        """See `Engine`."""
        for write in self.snapshot_state(folder, None):
            write.run()

    def snapshot_state(self, folder: Path, buffers: HostBuffers | None) -> list[Write]:
        """See `Engine`."""
        state = {"module": self.module.state_dict(), "optimizer": self._optimizer.state_dict()}
        kept, path = state if buffers is None else buffers.copy_all(state), folder / "local.pt"
        return [Write(path, lambda: torch.save(kept, path))]

    def load_state(self, folder: Path, *, world: int) -> None:
        """See `Engine`; nothing but tensors and plain values is unpickled."""
        saved = torch.load(folder / "local.pt", map_location=self.device, weights_only=True)
        self.module.load_state_dict(saved["module"])
        self._optimizer.load_state_dict(saved["optimizer"])

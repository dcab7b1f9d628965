"""The engine of every launcher: DeepSpeed ZeRO, stage 3 unless the configuration says 1 or 2.

AdamW's state is partitioned over the ranks, from stage 2 on gradients too, in stage 3 parameters too. DeepSpeed sees one
micro-step per step (`gradient_accumulation_steps` 1) because their number varies; where a step ends is told before each forward.
Gradients are averaged over ranks, so the loss is multiplied with their number: what remains is the sum, as in one process.
Clipping is ours, since DeepSpeed would clip only inside the update, after the moment at which a NaN can still be refused.

zero3_config.py says which of DeepSpeed's options are the user's; zero3_start.py brings it up; zero3_stages.py knows where each
stage keeps its gradients; zero3_state.py reads and writes its checkpoints. No file but these imports deepspeed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from megaprior.distributed import Peers
from megaprior.errors import UsageError
from megaprior.models.hlvlm import HLVLM
from megaprior.train.engine import Precision, Sums, frozen_tensors, model_weights
from megaprior.train.optim import OptimConfig, adamw, parameter_groups
from megaprior.train.snapshot import HostBuffers, Write
from megaprior.train.zero3_config import Stage, check_extras, deepspeed_config, offload_ratio, zero_stage
from megaprior.train.zero3_stages import rates, stage_of
from megaprior.train.zero3_start import check_version, prebuild_cpu_adam, start_deepspeed
from megaprior.train.zero3_state import load_state, save_state, snapshot_state

if TYPE_CHECKING:
    from megaprior.data.samples import Batch

__all__ = ["Zero3Engine", "check_version"]


class Zero3Engine:
    """See `megaprior.train.engine.Engine`; bf16 keeps bf16 weights for compute and fp32 masters for the update."""

    name = "zero3"

    def __init__(
        self,
        module: nn.Module,
        optim: OptimConfig,
        *,
        peers: Peers,
        precision: Precision,
        extras: dict[str, Any],
        groups: int = 1,
        universal: bool = False,
    ) -> None:
        """`extras` are DeepSpeed options beside ours; `universal` says that `load_state` will change the number of ranks.

        Raises:
            UsageError: an option has its home elsewhere, or DeepSpeed refuses it.
        """
        check_extras(extras)
        self._stage_number: Stage = zero_stage(extras)
        config = deepspeed_config(extras, precision=precision, world=peers.place.world, universal=universal)
        deepspeed = start_deepspeed(peers)
        refuse_unknown(config["zero_optimization"])
        self.place, self._peers = peers.place, peers
        optimizer = _optimizer(module, optim, config["zero_optimization"], peers)
        self._engine, self._zero, _, _ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
        self._stage = stage_of(self._zero)
        self.module = self._engine.module
        self.module.train()
        self.device = self._engine.device
        model = self.module.model
        if isinstance(model, HLVLM) and not model.partitioned:
            for part in model.frozen_parts.values():  # DeepSpeed moves what it is given; what is frozen lies outside
                part.to(self.device)
        self._sums = Sums(self.device, groups)

    def accumulate(self, row: Batch, group: Tensor, *, last: bool) -> None:
        """See `Engine`; all ranks must make the same number of calls per step."""
        self._engine.set_gradient_accumulation_boundary(last)
        loss, nll = self._engine(row.to(self.device))
        self._engine.backward(loss * self.place.world, scale_wrt_gas=False)
        self._sums.add(loss, nll, group)

    def sums(self) -> list[float]:
        """See `Engine`; the squared norm is that of this rank's partition."""
        return self._sums.take(self._stage.gradients())

    def update(self, *, lr: float, scale: float) -> None:
        """See `Engine`."""
        if scale != 1.0:
            torch._foreach_mul_(self._stage.gradients(), scale)
        for group in rates(self._zero):
            group["lr"] = lr
        self._engine.step()

    def discard(self) -> None:
        """See `Engine`."""
        self._stage.discard()
        self._sums.drop()

    def evaluate(self, row: Batch) -> Tensor:
        """See `Engine`; all ranks must make the same number of calls."""
        self._engine.eval()
        with torch.no_grad():
            _, nll = self._engine(row.to(self.device))
        self._engine.train()
        return nll.float().cpu()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """See `Engine`: one tensor is whole at a time, on every rank."""
        from deepspeed.runtime.zero import GatheredParameters

        for name, tensor in model_weights(self.module):
            with GatheredParameters([tensor] if hasattr(tensor, "ds_id") else []):
                yield name, tensor.detach()

    def frozen(self) -> Iterator[tuple[str, Tensor]]:
        """See `Engine`; partitioned ones are gathered one at a time."""
        from deepspeed.runtime.zero import GatheredParameters

        for name, tensor in frozen_tensors(self.module):
            with GatheredParameters([tensor] if hasattr(tensor, "ds_id") else []):
                yield name, tensor

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """See `Engine`."""
        from deepspeed.utils import safe_get_full_grad

        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                gradient = safe_get_full_grad(parameter)
                assert gradient is not None, f"{name} has no gradient"
                yield name, gradient.float().cpu()

    def save_state(self, folder: Path) -> None:
        """See `Engine`: DeepSpeed's own files, one set per rank; our manifest is the one that commits them."""
        save_state(self._engine, folder, stage=self._stage_number, peers=self._peers)

    def snapshot_state(self, folder: Path, buffers: HostBuffers | None) -> list[Write]:
        """See `Engine`."""
        return snapshot_state(self._engine, folder, buffers, stage=self._stage_number, peers=self._peers)

    def load_state(self, folder: Path, *, world: int) -> None:
        """See `Engine`; another number of ranks goes through DeepSpeed's universal format. Verify the manifest first: these
        files are pickles, and only those that a run of ours wrote may be opened.

        Raises:
            CheckpointError: another stage or optimizer wrote them.
        """
        load_state(self._engine, folder, stage=self._stage_number, world=world, peers=self._peers)

    def close(self) -> None:
        """Take DeepSpeed's hooks off the module, so that another engine may be formed in this process."""
        self._engine.destroy()


def _optimizer(module: nn.Module, optim: OptimConfig, zero: dict[str, Any], peers: Peers) -> Any:
    """AdamW for what this rank updates: torch's, fused on a GPU and in host memory; DeepSpeed's own for host memory where it
    accepts no other, which is when only a part of the state lies there."""
    share = offload_ratio(zero)
    if share in (0.0, 1.0):
        return adamw(module, optim, fused=torch.cuda.is_available() or share == 1.0)
    prebuild_cpu_adam(peers)
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    groups = parameter_groups(module, optim.weight_decay)
    return DeepSpeedCPUAdam(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, adamw_mode=True)


def refuse_unknown(zero: dict[str, Any]) -> None:
    """DeepSpeed's own opinion of its section, as one line."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**zero)
    except (ValidationError, AssertionError) as error:
        found = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        where = ".".join(["zero.zero_optimization", *map(str, found["loc"])])
        raise UsageError(f"{where}: DeepSpeed says: {found['msg']}") from None

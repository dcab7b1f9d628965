"""The engine of every launcher: DeepSpeed ZeRO-3. No other file imports deepspeed.

Parameters, gradients and AdamW's state are partitioned over the ranks. DeepSpeed sees one micro-step per step
(`gradient_accumulation_steps` 1) because their number varies; where a step ends is told before each forward. Gradients are
averaged over ranks, so the loss is multiplied with their number: what remains is the sum, as in one process. Clipping is
ours, since DeepSpeed would clip only inside the update, after the moment at which a NaN can still be refused.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from megaprior.distributed import Peers
from megaprior.errors import CheckpointError, UsageError
from megaprior.models.hlvlm import HLVLM
from megaprior.telemetry import say
from megaprior.train.engine import Precision, Sums, frozen_tensors, model_weights
from megaprior.train.optim import OptimConfig, adamw
from megaprior.train.snapshot import DeferredWrites, HostBuffers, Write

if TYPE_CHECKING:
    from megaprior.data.samples import Batch

OLDEST = (0, 19, 3)  # earlier ones corrupt frozen parameters under activation checkpointing
_TAG = "zero3"
_STALE_LOCK_S = 60.0
_OURS = {
    "gradient_accumulation_steps": 1,
    "train_micro_batch_size_per_gpu": 1,
    "gradient_clipping": 0.0,
    "data_types": {"grad_accum_dtype": "fp32"},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


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
        """`extras` are DeepSpeed options beside ours; `universal` says that `load_state` will change the number of ranks."""
        config = deepspeed_config(extras, precision=precision, world=peers.place.world, universal=universal)
        deepspeed = _start_deepspeed(peers)
        self.place, self._peers = peers.place, peers
        optimizer = adamw(module, optim, fused=torch.cuda.is_available())
        self._engine, self._zero, _, _ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
        self.module = self._engine.module
        self.module.train()
        self.device = self._engine.device
        if isinstance(self.module.model, HLVLM) and not self.module.model.partitioned:
            self.module.model.to(self.device)  # DeepSpeed moves what it partitions, and what is frozen lies outside
        self._sums = Sums(self.device, groups)

    def accumulate(self, row: Batch, group: Tensor, *, last: bool) -> None:
        """See `Engine`; all ranks must make the same number of calls per step."""
        self._engine.set_gradient_accumulation_boundary(last)
        loss, nll = self._engine(row.to(self.device))
        self._engine.backward(loss * self.place.world, scale_wrt_gas=False)
        self._sums.add(loss, nll, group)

    def sums(self) -> list[float]:
        """See `Engine`; the squared norm is that of this rank's partition."""
        return self._sums.take(self._partitions())

    def update(self, *, lr: float, scale: float) -> None:
        """See `Engine`."""
        if scale != 1.0:
            torch._foreach_mul_(self._partitions(), scale)
        for group in self._zero.param_groups:
            group["lr"] = lr
        self._engine.step()

    def discard(self) -> None:
        """See `Engine`."""
        self._zero.zero_grad()
        self._zero.averaged_gradients = {}
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
        for write in self.snapshot_state(folder, None):
            write.run()

    def snapshot_state(self, folder: Path, buffers: HostBuffers | None) -> list[Write]:
        """See `Engine`."""
        deferred = DeferredWrites(self._engine.checkpoint_engine, buffers)
        self._engine.checkpoint_engine = deferred
        try:
            self._engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False, exclude_frozen_parameters=True)
        finally:
            self._engine.checkpoint_engine = deferred.writer
        return deferred.writes

    def load_state(self, folder: Path, *, world: int) -> None:
        """See `Engine`; another number of ranks goes through DeepSpeed's universal format. Verify the manifest first: these
        files are pickles, and only those that a run of ours wrote may be opened."""
        if world == self.place.world:
            self._load(folder)
            return
        whole = folder.parent.with_name(f".{folder.parent.name}.universal")
        say(f"resuming the state of {world} ranks on {self.place.world}: converting it")
        self._peers.first_does(lambda: _convert_universal(folder / _TAG, whole / _TAG))
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self._zero.param_groups]
        try:
            self._load(whole)
            # DeepSpeed 0.19.8 gives every group the settings of the first (weight decay on norms, measured: losses off by
            # 2e-3 after three steps), and all partitions one `step` tensor, which each of them then increments.
            for group, own in zip(self._zero.param_groups, settings, strict=True):
                group.update(own)
            for state in self._zero.optimizer.state.values():
                state["step"] = state["step"].clone()
        finally:
            self._peers.settle()
            if self.place.rank == 0:
                shutil.rmtree(whole, ignore_errors=True)

    def _load(self, folder: Path) -> None:
        path, _ = self._engine.load_checkpoint(str(folder), tag=_TAG, load_module_strict=False)
        if path is None:
            raise CheckpointError(f"{folder}: DeepSpeed found nothing to load; resume from an earlier checkpoint")

    def _partitions(self) -> list[Tensor]:
        """This rank's part of every accumulated gradient, fp32; changing them in place changes the update."""
        groups = self._zero.get_fp32_grad_partitions()
        return [part for group in groups.values() for part in group.values()]


def deepspeed_config(extras: dict[str, Any], *, precision: Precision, world: int, universal: bool) -> dict[str, Any]:
    """`extras` with what the loop's contract fixes laid over them.

    Raises:
        UsageError: an extra contradicts the contract.
    """
    fixed = {**_OURS, "train_batch_size": world, "bf16": {"enabled": precision == "bf16"}}
    for key, value in fixed.items():
        if extras.get(key, value) not in (value, "auto"):
            raise UsageError(f"zero.{key} is {extras[key]!r}, the training loop needs {value!r}; remove it")
    zero = extras.get("zero_optimization", {})
    if zero.get("stage", 3) != 3:
        raise UsageError(f"zero.zero_optimization.stage is {zero['stage']}; this engine is ZeRO stage 3, remove it")
    merged = {"steps_per_print": 1 << 62, **extras, **fixed, "zero_optimization": {**zero, "stage": 3}}
    if universal:
        merged["checkpoint"] = {**extras.get("checkpoint", {}), "load_universal": True}
    return merged


def read_extras(path: Path) -> dict[str, Any]:
    """A DeepSpeed JSON file, for example one of launch/deepspeed/.

    Raises:
        UsageError: it is missing or no JSON object.
    """
    try:
        extras = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: not a DeepSpeed configuration ({error})") from None
    if not isinstance(extras, dict):
        raise UsageError(f"{path}: a DeepSpeed configuration is a JSON object")
    return extras


def check_version() -> None:
    """Refuse a DeepSpeed that is missing or too old, before anything is loaded.

    Raises:
        UsageError: gives both versions and the command.
    """
    remedy = f"pip install 'deepspeed>={'.'.join(map(str, OLDEST))}', or train on one process with engine=local"
    try:
        found = importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        raise UsageError(f"engine=zero3 needs DeepSpeed, which is not installed: {remedy}") from None
    numbers = tuple(int(part) for part in found.split("+")[0].split(".")[:3] if part.isdigit())
    if numbers < OLDEST:
        raise UsageError(
            f"DeepSpeed {found} is older than {'.'.join(map(str, OLDEST))}, the first that trains right: {remedy}"
        )


def prepare_environment() -> None:
    """Settle what DeepSpeed reads from the environment when it is imported."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")
    # Another ninja on PATH (Debian's) would find this environment's build out of date and compile it again, and back.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    if "TORCH_EXTENSIONS_DIR" not in os.environ:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        os.environ["TORCH_EXTENSIONS_DIR"] = str(cache / "megaprior" / "torch_extensions")


def _start_deepspeed(peers: Peers) -> Any:
    """Import DeepSpeed on top of the process group that exists already, its compiled operators built by one rank per machine."""
    prepare_environment()
    if not torch.distributed.is_initialized():  # one process: DeepSpeed still wants a group
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    if peers.place.local_rank == 0:
        prebuild()
    peers.settle()
    # DeepSpeed calls collectives under names that torch 2.13 deprecates, once per rank and call site.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed

    deepspeed.init_distributed(verbose=False)
    return deepspeed


def prebuild() -> None:
    """Compile the operator that DeepSpeed loads on CPU before its first collective (about a minute, once per machine).

    A build that was killed leaves a lock behind on which every later one waits without a word: while we hold our own lock,
    one older than a minute is such a leftover.
    """
    if torch.cuda.is_available():
        return
    folder = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".megaprior.lock", "w") as ours:
        fcntl.flock(ours, fcntl.LOCK_EX)
        for lock in (path for path in folder.glob("**/lock") if is_stale(path)):
            say(f"removed the lock of a killed build, {lock}")
            lock.unlink(missing_ok=True)
        if not any(folder.glob("**/deepspeed_shm_comm*.so")):
            say("compiling DeepSpeed's CPU communication operator (about a minute, once per machine)")
        from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

        ShareMemCommBuilder().load(verbose=False)


def is_stale(lock: Path) -> bool:
    """Whether a build lock outlives any build that is still going on without our own lock."""
    while lock.exists():
        age = time.time() - lock.stat().st_mtime
        if age > _STALE_LOCK_S:
            return True
        time.sleep(0.2)
    return False


def _convert_universal(source: Path, target: Path) -> None:
    """DeepSpeed's checkpoint of any number of ranks -> its universal format, which any number of ranks loads."""
    from argparse import Namespace

    from deepspeed.checkpoint import ds_to_universal

    shutil.rmtree(target.parent, ignore_errors=True)
    options = Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=False,
    )
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        ds_to_universal.main(options)

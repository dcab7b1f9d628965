"""DeepSpeed's own checkpoint files inside ours: written, read by as many ranks or by others, and told apart.

Letters: none. `state/layout.json` says which of DeepSpeed's forms the files beside it have: read under another, they would fail
late, or be read in part.
"""

from __future__ import annotations

import json
import os
import shutil
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from megaprior.distributed import Peers
from megaprior.errors import CheckpointError
from megaprior.telemetry import say
from megaprior.train.snapshot import DeferredWrites, HostBuffers, Write
from megaprior.train.zero3_config import Stage
from megaprior.train.zero3_stages import stage_of

_TAG = "zero3"
_LAYOUT = "layout.json"
_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def save_state(engine: Any, folder: Path, *, stage: Stage, peers: Peers) -> None:
    """Write one set of files per rank, and the layout. Collective."""
    for write in snapshot_state(engine, folder, None, stage=stage, peers=peers):
        write.run()


def snapshot_state(
    engine: Any, folder: Path, buffers: HostBuffers | None, *, stage: Stage, peers: Peers
) -> list[Write]:
    """What this rank writes in `save_state`, copied into `buffers` to be written later; with None it is not copied. Collective.

    What is frozen is left out: it is read again from the base models and proved by its digest.
    """
    deferred = DeferredWrites(engine.checkpoint_engine, buffers)
    engine.checkpoint_engine = deferred
    try:
        with _one_optimizer(engine.optimizer):
            engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False, exclude_frozen_parameters=True)
    finally:
        engine.checkpoint_engine = deferred.writer
    if peers.place.rank == 0:
        (folder / _LAYOUT).write_text(json.dumps(_layout(engine.optimizer, stage)))
    return deferred.writes


def load_state(engine: Any, folder: Path, *, stage: Stage, world: int, peers: Peers) -> None:
    """Read what `save_state` wrote with `world` ranks; another number goes through DeepSpeed's universal format. Collective.

    Verify the manifest first: these files are pickles, and only those that a run of ours wrote may be opened.

    Raises:
        CheckpointError: another stage or optimizer wrote them.
    """
    same = world == peers.place.world
    _refuse_other_layout(folder, _layout(engine.optimizer, stage), same_world=same, peers=peers)
    if same:
        _load(engine, folder)
        return
    whole = folder.parent.with_name(f".{folder.parent.name}.universal")
    say(f"resuming the state of {world} ranks on {peers.place.world}: converting it")
    peers.first_does(lambda: _convert_universal(folder / _TAG, whole / _TAG))
    zero = engine.optimizer
    settings = [{k: v for k, v in group.items() if k != "params"} for group in zero.param_groups]
    try:
        _load(engine, whole)
        # DeepSpeed 0.19.8 gives every group the settings of the first (weight decay on norms, measured: losses off by
        # 2e-3 after three steps), and all partitions one `step` tensor, which each of them then increments.
        for group, own in zip(zero.param_groups, settings, strict=True):
            group.update(own)
        for optimizer in (zero.optimizer, getattr(zero, "backup_optimizer", zero.optimizer)):
            for state in optimizer.state.values():
                if isinstance(state.get("step"), torch.Tensor):
                    state["step"] = state["step"].clone()
    finally:
        peers.settle()
        if peers.place.rank == 0:
            shutil.rmtree(whole, ignore_errors=True)


def _load(engine: Any, folder: Path) -> None:
    with _one_optimizer(engine.optimizer), _plain_values_only():
        # What is frozen is not among the names saved; the digest of every file and that of what is frozen are compared elsewhere.
        path, _ = engine.load_checkpoint(str(folder), tag=_TAG, load_module_strict=False)
    if path is None:
        raise CheckpointError(f"{folder}: DeepSpeed found nothing to load; resume from an earlier checkpoint")


@contextmanager
def _plain_values_only() -> Iterator[None]:
    """DeepSpeed unpickles whatever a file holds (`weights_only=False`). Inside the block torch builds tensors, plain values and
    the few objects of DeepSpeed's that its own states hold, and refuses all else, whoever wrote the file.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        if before is None:
            del os.environ[_FORCE]
        else:
            os.environ[_FORCE] = before


@contextmanager
def _one_optimizer(zero: Any) -> Iterator[None]:
    """With a `ratio` below 1, two optimizers share the partitions, and DeepSpeed 0.19.8 saves and loads only the first's state:
    AdamW's moments of the other part would begin again at zero, without a word. Inside the block the first holds all.

    A load also leaves the first's partitions in the groups of the second, which would update them as well at every step.
    """
    backup = getattr(zero, "backup_optimizer", None)
    if backup is None:
        yield
        return
    for i, flat in enumerate(zero.fp32_partitioned_groups_flat):
        if zero.subgroup_to_device[i] != "cpu" and flat in backup.state:
            zero.optimizer.state[flat] = backup.state.pop(flat)
    yield
    for i, flat in enumerate(zero.fp32_partitioned_groups_flat):
        if zero.subgroup_to_device[i] != "cpu" and flat in zero.optimizer.state:
            backup.state[flat] = zero.optimizer.state.pop(flat)
    for group in backup.param_groups:
        group["params"] = []


def _layout(zero: Any, stage: Stage) -> dict[str, Any]:
    sizes = [flat.numel() for flat in stage_of(zero).masters()]
    return {"stage": stage, "optimizer": type(zero.optimizer).__name__, "partitions": sizes}


def _refuse_other_layout(folder: Path, now: dict[str, Any], *, same_world: bool, peers: Peers) -> None:
    then = peers.share(_read_layout(folder))
    remedies = {
        "stage": "put zero.zero_optimization.stage back",
        "optimizer": "put zero.zero_optimization.offload_optimizer.ratio back",
        "partitions": "put zero.zero_optimization.sub_group_size back",
    }
    for key, remedy in remedies.items():
        if key in then and then[key] != now[key] and (same_world or key != "partitions"):
            raise CheckpointError(
                f"{folder}: its {key} of ZeRO is {then[key]}, the configuration's is {now[key]}: {remedy}, or begin a new run "
                f"from its weights with model.init={folder.parent}"
            )


def _read_layout(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / _LAYOUT).read_text())
    except FileNotFoundError:  # written before the other stages were
        return {"stage": 3}


def _convert_universal(source: Path, target: Path) -> None:
    """DeepSpeed's checkpoint of any number of ranks -> its universal format, which any number of ranks loads."""
    from deepspeed.checkpoint import ds_to_universal

    shutil.rmtree(target.parent, ignore_errors=True)
    options = Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,  # what stages 1 and 2 leave to the client; it is a version number
    )
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere), _plain_values_only():
        ds_to_universal.main(options)

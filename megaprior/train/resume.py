"""Taking hold of a run's folder, and the point from which it goes on."""

from __future__ import annotations

import os
import pickle
import secrets
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import yaml

from megaprior.config import dump_config
from megaprior.distributed import Peers
from megaprior.errors import CheckpointError, DataError, UsageError
from megaprior.files import atomic_write, owner_lock
from megaprior.telemetry import say
from megaprior.train.checkpoint import Checkpoint, newest, offer, open_checkpoint
from megaprior.train.engine import frozen_digest
from megaprior.train.retention import remove_leftovers
from megaprior.train.settings import RunConfig, refuse_other_run

if TYPE_CHECKING:
    from megaprior.data.loader import Loader
    from megaprior.train.engine import Engine


def claim(cfg: RunConfig, peers: Peers, stack: ExitStack) -> Checkpoint | None:
    """Lock `out` for the life of `stack`, record the configuration, and return the checkpoint to resume from, if any.

    Raises:
        UsageError: `out` holds something else, or the run there was begun with another configuration.
        DataError: another process trains there, or a machine does not see the folder.
        CheckpointError: a file of the checkpoint was changed after it was written; the one before it is offered.
    """
    out = cfg.out

    def first() -> tuple[str, Path | None]:
        if out.is_dir() and any(out.iterdir()) and not (out / "config.yaml").exists():
            raise UsageError(f"{out}: not empty and not a run of ours; choose another `out`, nothing there was touched")
        out.mkdir(parents=True, exist_ok=True)
        stack.enter_context(owner_lock(out))
        remove_leftovers(out)
        found = newest(out)
        if found is not None:
            refuse_other_run(cfg, found.manifest["trajectory"], done=found.step, where=out)
        atomic_write(out / "config.yaml", yaml.safe_dump(dump_config(cfg), sort_keys=False))
        token = secrets.token_hex(8)
        (out / ".seen").write_text(token)
        return token, found.path if found is not None else None

    token, path = peers.first_does(first)
    peers.settle(_unseen(out, token))
    peers.first_does(lambda: (out / ".seen").unlink(missing_ok=True))
    if path is None:
        return None
    checkpoint = open_checkpoint(path)
    if checkpoint.step < cfg.steps:
        _verify(checkpoint, peers)
    return checkpoint


def restore(checkpoint: Checkpoint, *, cfg: RunConfig, engine: Engine, loader: Loader, peers: Peers) -> None:
    """Load the engine's state, after the run's data were compared; then compare what is frozen.

    Raises:
        CheckpointError: another engine wrote it, the data differ, or the frozen weights do.
    """
    manifest = checkpoint.manifest
    if manifest["engine"] != engine.name:
        raise CheckpointError(
            f"{checkpoint.path}: written by engine={manifest['engine']}, this is engine={engine.name}: resume with the former, "
            f"or begin a new run from its weights with model.init={checkpoint.path}"
        )
    for field, before in manifest["data"].items():
        if loader.identity.get(field) != before:
            raise CheckpointError(
                f"{checkpoint.path}: the data differ from what this run was trained on, in {field}: "
                f"{_short(loader.identity.get(field))} now, {_short(before)} then; restore those shards or begin a new run"
            )
    if manifest["threads"] != torch.get_num_threads():
        say(f"warning: {manifest['threads']} threads before, {torch.get_num_threads()} now: sums may round differently")
    try:
        engine.load_state(checkpoint.state, world=manifest["world"])
    except pickle.UnpicklingError as error:
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(
            f"{checkpoint.state}: holds more than tensors and plain values: no run of ours wrote it, none of it was executed "
            f"({reason}); {offer(checkpoint.path)}"
        ) from None
    frozen = peers.share(frozen_digest(engine))
    if frozen != manifest.get("frozen"):
        raise CheckpointError(
            f"{checkpoint.path}: its frozen language model and vision tower were {manifest.get('frozen')}, those loaded now are "
            f"{frozen}: the MLP means nothing to others; restore model.init and model.tower.init, and model.frozen_dtype"
        )
    say(f"{cfg.out}: resuming after step {checkpoint.step} of {cfg.steps}")


def _verify(checkpoint: Checkpoint, peers: Peers) -> None:
    """Compare every file with its digest before anything of it is read, the ranks sharing the work."""
    error: Exception | None = None
    try:
        for half in ("state", "model"):
            checkpoint.verify(half, rank=peers.place.rank, world=peers.place.world)
    except DataError as found:
        error = found
    peers.settle(error)


def _unseen(out: Path, token: str) -> DataError | None:
    """The complaint of a rank whose machine does not see the folder that rank 0 wrote to."""
    try:
        if (out / ".seen").read_text() == token:
            return None
        found = "other content"
    except OSError as error:
        found = error.strerror or str(error)
    return DataError(
        f"{out.absolute()} on {os.uname().nodename}: {found}; `out` must be on a file system all machines share"
    )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 160 else text[:157] + "..."

"""Writing a checkpoint: both halves into a temporary folder, digests, manifest, rename. Killed anywhere, the last stands."""

from __future__ import annotations

import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaprior.distributed import Peers
from megaprior.errors import CheckpointError
from megaprior.files import atomic_folder, atomic_write, block_digests, write_manifest
from megaprior.train.checkpoint import FORMAT, MANIFEST, Checkpoint, step_folder
from megaprior.train.engine import frozen_digest

if TYPE_CHECKING:
    from megaprior.tokenizer import Tokenizer
    from megaprior.train.engine import Engine

_STATE_BYTES_PER_PARAMETER = 12  # fp32 weight and AdamW's two moments
_ROOM = 1.05
_CANNOT_WRITE = ("write", "inline_container", "I/O error")  # of torch, its archive writer, safetensors


def save_checkpoint(
    run: Path, step: int, *, engine: Engine, peers: Peers, tokenizer: Tokenizer, facts: dict[str, Any]
) -> Checkpoint:
    """Write the checkpoint after `step` updates and point `latest` at it. Collective.

    Args:
        facts: plain values for the manifest, for example the run's identity that a resume compares.

    Raises:
        CheckpointError: the disk is full (bytes needed and free are named); earlier checkpoints are intact.
    """
    target, first = step_folder(run, step), engine.place.rank == 0
    with ExitStack() as stack:

        def begin() -> Path:
            _check_room(target, engine)
            folder = stack.enter_context(atomic_folder(target))
            (folder / "state").mkdir()
            return folder

        temporary = peers.first_does(begin)
        _guarded(peers, temporary, lambda: engine.save_state(temporary / "state"))
        _guarded(peers, temporary, lambda: _save_model(engine, temporary / "model", tokenizer))
        frozen = frozen_digest(engine)
        parts = peers.gather_objects(_digests(temporary, rank=engine.place.rank, world=engine.place.world))
        if first:
            files = {name: entry for part in parts for name, entry in part.items()}
            body = {
                **facts,
                "format": FORMAT,
                "version": 1,
                "step": step,
                "engine": engine.name,
                "world": engine.place.world,
                "frozen": frozen,
            }
            manifest = write_manifest(temporary / MANIFEST, {**body, "files": files})
    if first:
        atomic_write(run / "latest", target.name + "\n")
    manifest = peers.share(manifest if first else None)
    return Checkpoint(target, manifest)


def remove_leftovers(run: Path) -> None:
    """Delete the temporary folders of killed saves (call it while holding the run's lock)."""
    for path in (run / "checkpoints").glob(".step_*"):
        shutil.rmtree(path, ignore_errors=True)


def _guarded(peers: Peers, folder: Path, write: Any) -> None:
    """Run one rank's part of a save; a failure anywhere is raised on all ranks, and a full disk is explained."""
    error: Exception | None = None
    try:
        write()
    except Exception as found:
        error = found
        free = shutil.disk_usage(folder).free
        if isinstance(found, OSError) or any(word in str(found) for word in _CANNOT_WRITE):
            error = CheckpointError(
                f"{folder}: cannot be written ({' '.join(str(found).split())[:120]}; {free:,} bytes free); the earlier "
                "checkpoints are intact: free some space and repeat the command"
            )
    peers.settle(error)


def _save_model(engine: Engine, folder: Path, tokenizer: Tokenizer) -> None:
    """The Hugging Face half; all ranks gather, rank 0 writes."""
    first = engine.place.rank == 0
    state = {}
    for name, tensor in engine.weights():
        if first:
            state[name] = tensor
    if first:
        folder.mkdir()
        model: Any = engine.module.model
        model.save_pretrained(folder, state_dict=state)
        tokenizer.save(folder / "tokenizer")


def _digests(folder: Path, *, rank: int, world: int) -> dict[str, dict[str, Any]]:
    """Sizes and digests of this rank's share of the files."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    shares = names[rank::world]
    return {n: {"bytes": os.path.getsize(folder / n), "blocks": block_digests(folder / n)} for n in shares}


def _check_room(target: Path, engine: Engine) -> None:
    """Refuse to begin a save that cannot fit: a full disk is cheaper to explain before than after."""
    target.parent.mkdir(parents=True, exist_ok=True)
    needed = 0.0
    for p in engine.module.parameters():
        state = _STATE_BYTES_PER_PARAMETER if p.requires_grad else 0
        needed += _ROOM * getattr(p, "ds_numel", p.numel()) * (p.element_size() + state)
    free = shutil.disk_usage(target.parent).free
    if needed > free:
        raise CheckpointError(
            f"{target}: disk full ({needed:,.0f} bytes needed, {free:,} bytes free); earlier checkpoints are intact: free some "
            "space and repeat the command"
        )

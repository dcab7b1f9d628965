"""Finding and trusting checkpoints.

    RUN/checkpoints/step_00000500/manifest.json   every file's size and digests; written last, then the folder is renamed
                                 /state/          the engine's own, for resuming only
                                 /model/          a Hugging Face folder in safetensors, with its tokenizer
    RUN/latest                                    the newest one's name, for people and scripts

A checkpoint without a valid manifest does not exist; one whose files contradict it is refused, never repaired. Everything
downstream (the next stage, scoring, evaluation, export) reads `model/` only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megaprior.errors import CheckpointError, DataError
from megaprior.files import block_digests, read_manifest
from megaprior.telemetry import say

if TYPE_CHECKING:
    from megaprior.models.hlvlm import HLVLM
    from megaprior.models.lm import TextLM

FORMAT = "megaprior.checkpoint"
MANIFEST = "manifest.json"
_NAME = re.compile(r"step_(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its manifest was read and all its files have the sizes that it names."""

    path: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """Updates done when it was written."""
        return self.manifest["step"]

    @property
    def state(self) -> Path:
        """The engine's half."""
        return self.path / "state"

    @property
    def model(self) -> Path:
        """Everybody's half."""
        return self.path / "model"

    def verify(self, half: Literal["state", "model"], *, rank: int = 0, world: int = 1) -> None:
        """Compare the half's files with their digests; `world` ranks share the files among themselves.

        Raises:
            CheckpointError: names the file and the 64 MiB block that differ, and offers the checkpoint before this one.
        """
        names = sorted(name for name in self.manifest["files"] if name.startswith(half + "/"))
        for name in names[rank::world]:
            expected = self.manifest["files"][name]["blocks"]
            for block, (found, wanted) in enumerate(zip(block_digests(self.path / name), expected, strict=True)):
                if found != wanted:
                    raise CheckpointError(
                        f"{self.path / name}: block {block} has digest {found}, its manifest says {wanted}: "
                        f"changed after it was written; {offer(self.path)}"
                    )


def step_folder(run: Path, step: int) -> Path:
    """Where the checkpoint after `step` updates lives."""
    return run / "checkpoints" / f"step_{step:08d}"


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Open one checkpoint folder.

    Raises:
        CheckpointError: it is half-written, of a newer version, or a file is missing or of another size.
    """
    path = Path(path)
    try:
        manifest = read_manifest(path / MANIFEST, format=FORMAT)
    except DataError as error:
        raise CheckpointError(f"{path}: not a complete checkpoint ({error}); {offer(path)}") from None
    for name, entry in manifest["files"].items():
        file = path / name
        found = file.stat().st_size if file.is_file() else None
        if found != entry["bytes"]:
            size = "missing" if found is None else f"{found:,} bytes"
            raise CheckpointError(f"{file}: {size}, its manifest says {entry['bytes']:,} bytes; {offer(path)}")
    return Checkpoint(path, manifest)


def complete_checkpoints(run: Path, *, warn: bool = True) -> list[Checkpoint]:
    """A run's complete checkpoints, newest first; the others are skipped with a warning."""
    found = []
    for folder in sorted(_named_folders(run / "checkpoints"), key=_step_of, reverse=True):
        try:
            found.append(open_checkpoint(folder))
        except CheckpointError as error:
            if warn:
                say(f"warning: skipped {error}")
    return found


def complete_steps(run: Path) -> list[int]:
    """The steps of a run's complete checkpoints, in no order; their files are looked for and not measured."""
    return [_step_of(folder) for folder in _named_folders(run / "checkpoints") if _is_complete(folder)]


def newest(run: Path) -> Checkpoint | None:
    """The newest complete checkpoint of a run, whatever `latest` says; warns where `latest` says something else."""
    complete = complete_checkpoints(run)
    if not complete:
        return None
    best, pointer = complete[0], run / "latest"
    try:
        named = pointer.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        named = f"unreadable ({type(error).__name__})"
    if named != best.path.name:
        say(f"warning: {pointer} says {named[:60]!r}; going by the newest complete checkpoint, {best.path.name}")
    return best


def resolve_model(path: Path | str) -> Path:
    """The Hugging Face folder that `path` means: a run (its newest complete checkpoint), a checkpoint, or such a folder itself.

    Raises:
        CheckpointError: there is nothing to read, it is half-written or corrupted, or it has no safetensors.
    """
    path = Path(path)
    if (path / "checkpoints").is_dir():
        found = newest(path)
        if found is None:
            raise CheckpointError(f"{path}: this run has no complete checkpoint yet; repeat its training command")
        return _verified_model(found)
    if (path / MANIFEST).is_file() or _NAME.fullmatch(path.name):
        return _verified_model(open_checkpoint(path))
    if path.name == "model" and _NAME.fullmatch(path.absolute().parent.name):
        return _verified_model(open_checkpoint(path.absolute().parent))
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path}: neither a run, nor a checkpoint, nor a Hugging Face folder (no config.json)")
    if not any(path.glob("*.safetensors")):
        raise CheckpointError(
            f"{path}: no *.safetensors; weights in other formats can run code and are never loaded, convert them"
        )
    return path


def checkpoint_name(model: Path) -> str | None:
    """step_00000500, where the folder `model` is that checkpoint's."""
    return model.parent.name if _NAME.fullmatch(model.parent.name) else None


def load_model_folder(path: Path | str, *, dtype: str = "float32") -> TextLM | HLVLM:
    """The model that `resolve_model(path)` holds (text LM, U-LVLM or H-LVLM, by its configuration), in evaluation mode.

    Raises:
        DataError: as `resolve_model`, or the folder is not such a model's.
    """
    from megaprior.models.load import load_model

    return load_model(resolve_model(path), dtype=dtype)


def _verified_model(checkpoint: Checkpoint) -> Path:
    checkpoint.verify("model")
    return checkpoint.model


def _named_folders(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []


def _step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def offer(path: Path) -> str:
    """The remedy for a bad checkpoint: the newest complete one before it."""
    step = _step_of(path)
    for folder in sorted(_named_folders(path.parent), key=_step_of, reverse=True):
        if _step_of(folder) < step and _is_complete(folder):
            return f"remove this folder to go on from the one before it, {folder}"
    return "there is no complete one before it: remove this folder to start again"


def _is_complete(folder: Path) -> bool:
    try:
        manifest = read_manifest(folder / MANIFEST, format=FORMAT)
    except DataError:
        return False
    return all((folder / name).is_file() for name in manifest["files"])

"""What a run leaves behind besides checkpoints: metrics without doubles, and a summary that says how it was made."""

from __future__ import annotations

import json
import os
import platform
import resource
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megaprior.data.manifest import tokenizer_entry
from megaprior.distributed import Peers
from megaprior.errors import UsageError
from megaprior.files import atomic_write, digest_json
from megaprior.kernels.choice import chosen
from megaprior.train.settings import RunConfig, trajectory

if TYPE_CHECKING:
    from megaprior.data.loader import Loader
    from megaprior.tokenizer import Tokenizer
    from megaprior.train.checkpoint import Checkpoint
    from megaprior.train.guards import Guard


def versions() -> dict[str, str]:
    """What computed: equal on all ranks of a run, or it stops at the start."""
    import transformers

    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "loss_kernels": chosen(device),
    }


def refuse_other_versions(peers: Peers) -> None:
    """Compare what computes on all ranks. Collective.

    Raises:
        UsageError: on every rank; names the first rank that differs from rank 0, what differs, and both versions.
    """
    found = peers.gather_objects(versions())
    for rank, theirs in enumerate(found):
        for name, first in found[0].items():
            if theirs.get(name) != first:
                raise UsageError(
                    f"rank {rank} has {name} {theirs.get(name)}, rank 0 has {first}: their sums would differ; give all machines "
                    "the same environment"
                )


class Record:
    """The facts that every checkpoint carries and the summary tells, over all restarts of the run."""

    def __init__(
        self, cfg: RunConfig, tokenizer: Tokenizer, loader: Loader, *, guard: Guard, resumed: Checkpoint | None
    ) -> None:
        before = resumed.manifest if resumed is not None else {}
        self._guard = guard
        self._cfg, self._began, self._wall_s = cfg, time.monotonic(), before.get("wall_s", 0.0)
        self._restarts = before.get("restarts", -1) + 1
        self._constant = {
            "stage": cfg.stage,
            "train_sources": len(cfg.data.train),  # the first ones in metrics.jsonl; the language mix comes after them
            "trajectory": trajectory(cfg),
            "data": loader.identity,
            "tokenizer": tokenizer_entry(tokenizer),
            "versions": versions(),
            "threads": torch.get_num_threads(),
        }

    def facts(self) -> dict[str, Any]:
        """For a checkpoint's manifest."""
        wall_s = round(self._wall_s + time.monotonic() - self._began, 3)
        now = {"restarts": self._restarts, "wall_s": wall_s, "peak_memory_mib": peak_memory_mib()}
        return {**self._constant, **now, "guards": self._guard.state()}


def write_summary(cfg: RunConfig, last: Checkpoint) -> None:
    """Write RUN/summary.json from the last checkpoint's manifest and the metrics."""
    lines = read_metrics(cfg.out / "metrics.jsonl")
    train = [line for line in lines if line["kind"] == "train"]
    evals = [line for line in lines if line["kind"] == "eval"]
    seconds = sum(line["step_s"] for line in train)
    manifest = last.manifest
    weights = {k: v for k, v in manifest["files"].items() if k.startswith("model/") and k.endswith(".safetensors")}
    body = {
        **{
            name: value
            for name, value in manifest.items()
            if name not in ("files", "digest", "format", "version", "step", "guards")
        },
        "skipped_steps": manifest.get("guards", {}).get("skipped", 0),
        "steps": last.step,
        "precision": cfg.precision,
        "loss_tokens_per_s": sum(line["loss_tokens"] for line in train) / seconds if seconds else None,
        "data_wait_share": sum(line["data_wait_s"] for line in train) / seconds if seconds else None,
        "final": train[-1] if train else None,
        "heldout": evals[-1] if evals else None,
        "fingerprints": {
            "tokenizer": manifest["tokenizer"]["fingerprint"],
            "model": digest_json(weights),
            "shards": [source["build_id"] for source in manifest["data"]["sources"]],
        },
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
    atomic_write(cfg.out / "summary.json", json.dumps(body, indent=1, sort_keys=True, default=str) + "\n")


def has_summary(cfg: RunConfig, last: Checkpoint) -> bool:
    """Whether the summary is that of this checkpoint; a run killed just before its end has an older one or none."""
    try:
        return json.loads((cfg.out / "summary.json").read_text(encoding="utf-8"))["steps"] == last.step
    except (OSError, ValueError, LookupError, TypeError):
        return False


def peak_memory_mib() -> float:
    """This process's largest use so far: device memory on a GPU, resident memory otherwise, in MiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, bytes on macOS
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file; a line that a kill cut short is left out."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def truncate_metrics(path: Path, step: int) -> None:
    """Drop what was logged after `step`: the resumed run computes it again, and every step stands there once."""
    lines = read_metrics(path)
    kept = [line for line in lines if line.get("step", 0) <= step]
    if path.exists() and (len(kept) < len(lines) or not path.read_bytes().endswith(b"\n")):
        atomic_write(path, "".join(json.dumps(line) + "\n" for line in kept))


def set_threads(local_world: int) -> None:
    """Share the machine's processors among its ranks, unless OMP_NUM_THREADS has decided."""
    if "OMP_NUM_THREADS" not in os.environ and local_world > 1:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world))

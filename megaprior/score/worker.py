"""One process of a scorer: a model, and the units it works through.

    unit -> its samples, longest first -> rows of at most `row_tokens` -> log-probabilities -> the unit's file

Rows are a function of the unit alone, so that a unit has the same bytes whichever process computes it. A segment is BOS and
all tokens of the caption but its last: the last is only predicted, so what it would predict is never computed.

Letters: T tokens of a row, S segments in it, H width.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megaprior import __version__
from megaprior.data.shards import ShardSet
from megaprior.errors import DataError, MegapriorError
from megaprior.kernels.choice import chosen
from megaprior.score.ledger import Ledger, Unit, plan_units
from megaprior.tokenizer import Tokenizer


@dataclass(frozen=True)
class Job:
    """What every process of one scoring run must know."""

    model: str  # Hugging Face folder
    shards: str
    name: str  # of the score stream
    row_tokens: int
    unit_tokens: int
    dtype: str
    threads: int

    @property
    def ledger(self) -> Path:
        """Folder of the ledger."""
        return Path(self.shards) / f".score-{self.name}"


def plan(shards: ShardSet, unit_tokens: int) -> dict[str, list[Unit]]:
    """The units of every shard, by its prefix."""
    units, base = {}, 0
    for shard in shards.shards:
        counts = shards.token_counts[base : base + len(shard)]
        units[shard.prefix] = plan_units(shard.prefix, counts, unit_tokens=unit_tokens, base=base)
        base += len(shard)
    return units


def pack_rows(lengths: np.ndarray, row_tokens: int) -> Iterator[np.ndarray]:
    """Positions in `lengths`, int [n], row by row: longest first, each row filled until the next does not fit."""
    order = np.argsort(-lengths, kind="stable")
    row, used = [], 0
    for at in order.tolist():
        if row and used + lengths[at] > row_tokens:
            yield np.array(row)
            row, used = [], 0
        row.append(at)
        used += int(lengths[at])
    if row:
        yield np.array(row)


class Reference:
    """A reference LM on its device."""

    def __init__(self, job: Job, tokenizer: Tokenizer, *, local_rank: int = 0) -> None:
        """Raises: DataError, the folder holds no model, or one with fewer embeddings than the tokenizer has ids."""
        from megaprior.models.lm import check_vocabulary  # transformers, which a parent of workers never needs
        from megaprior.models.load import load_model

        self.device = _device(local_rank)
        self.model = load_model(job.model, dtype=job.dtype, device=self.device)
        check_vocabulary(self.model, tokenizer.vocab_size, source=job.model)
        self.bos_id, self.row_tokens = tokenizer.bos_id, job.row_tokens

    @torch.inference_mode()
    def unit(self, shards: ShardSet, unit: Unit) -> np.ndarray:
        """log p_r(t_i | BOS, t_1..t_{i-1}) of all tokens of the unit in order: float32 [unit.tokens], natural log.

        Raises:
            DataError: a NaN, naming the sample.
        """
        ids = range(unit.base + unit.start, unit.base + unit.stop)
        captions = [shards.tokens(i) for i in ids]
        lengths = np.array([len(tokens) for tokens in captions])
        starts = np.cumsum(lengths) - lengths
        scores = np.empty(unit.tokens, dtype=np.float32)
        for row in pack_rows(lengths, self.row_tokens):
            values = self._row([captions[at] for at in row])
            for at, part in zip(row, np.split(values, np.cumsum(lengths[row])[:-1]), strict=True):
                scores[starts[at] : starts[at] + lengths[at]] = part
        if np.isnan(scores).any():
            at = int(np.searchsorted(starts + lengths, int(np.argmax(np.isnan(scores))), side="right"))
            raise DataError(
                f"{shards.describe(ids[at])}: the reference gives NaN; try --dtype float32 or another checkpoint"
            )
        return scores

    def _row(self, captions: Sequence[np.ndarray]) -> np.ndarray:
        targets = np.concatenate(captions).astype(np.int64)  # [T]
        edges = np.cumsum([0, *(len(tokens) for tokens in captions)])  # [S+1]
        lengths = np.diff(edges)
        inputs = np.roll(targets, 1)
        inputs[edges[:-1]] = self.bos_id
        positions = np.arange(len(targets)) - np.repeat(edges[:-1], lengths)
        states = self.model.states(
            torch.from_numpy(inputs).to(self.device),
            torch.from_numpy(positions).to(self.device),
            torch.from_numpy(edges.astype(np.int32)).to(self.device),
            int(lengths.max()),
        )
        assert states.hidden is not None  # [T, H]
        values = self.model.lm_head(states.hidden, torch.from_numpy(targets).to(self.device), mode="logprob")
        return values.cpu().numpy()


def work_through(
    job: Job,
    *,
    rank: int,
    world: int,
    local_rank: int = 0,
    on_unit: Callable[[Unit], None] | None = None,
) -> None:
    """Compute this process's share of the missing units, then whatever the others have not finished yet.

    Helping out costs a few units computed twice, with equal bytes; in return no unit waits for a process that is gone.
    """
    shards = ShardSet.open(job.shards)
    units = [unit for units in plan(shards, job.unit_tokens).values() for unit in units]
    ledger, reference = Ledger(job.ledger), None
    for unit in [*units[rank::world], *reversed(units)]:
        if ledger.has(unit) or (Path(job.shards) / f"{unit.prefix}.{job.name}.json").exists():
            continue
        reference = reference or Reference(job, shards.tokenizer(), local_rank=local_rank)
        scores = reference.unit(shards, unit)
        try:
            ledger.write(unit, scores)
        except FileNotFoundError:
            if job.ledger.exists():
                raise
            return  # rank 0 has seen all units and finished the stream
        if on_unit is not None:
            on_unit(unit)


def hardware_record(threads: int, local_rank: int = 0) -> dict[str, Any]:
    """What may change the last bits of a score; byte-identity is promised under equal records."""
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name(_device(local_rank)) if cuda else _processor(),
        "instructions": f"CUDA {torch.version.cuda}" if cuda else torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
        "megaprior": __version__,
        "torch": str(torch.__version__),
        "transformers": version("transformers"),
        "loss_kernels": chosen(_device(local_rank)),
    }


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> int:
    """`python -m megaprior.score.worker JOB RANK WORLD`: started by `score`, ends when its parent does."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    job, rank, world = Job(**json.loads(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(job.threads)
    try:
        work_through(job, rank=rank, world=world, local_rank=rank)
    except MegapriorError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def _end_with_parent() -> None:
    sys.stdin.buffer.read()  # returns when the parent closes the pipe, which it does even when it is killed
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())

"""`megaprior score`: ref_logprob streams from a text-only reference LM, aligned token for token with the captions.

    1. check      tokenizer against the shards, before a model is loaded; scores that are there already
    2. plan       units of work, a function of the shards alone                       (ledger.py)
    3. compute    any number of processes fill the missing units                      (worker.py)
    4. assemble   unit files -> one stream a shard, then the ledger goes

Killed anywhere and repeated with any number of processes, the streams have the same bytes.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from megaprior.data import manifest as mf
from megaprior.data.scores import ScoreWriter, open_scores
from megaprior.data.shards import Shard, ShardSet
from megaprior.distributed import Place, place
from megaprior.errors import DataError, UsageError
from megaprior.files import owner_lock
from megaprior.models.fingerprint import model_fingerprint
from megaprior.score.ledger import Ledger, Unit
from megaprior.score.processes import run_processes
from megaprior.score.worker import Job, hardware_record, plan, work_through
from megaprior.telemetry import progress, say
from megaprior.tokenizer import load_model_tokenizer
from megaprior.train.checkpoint import resolve_model

_POLL_S = 0.2
_JOIN_S = 120.0  # how long another rank waits for rank 0 to begin


def score(
    *,
    model: Path | str,
    shards: Path | str,
    name: str = "ref_logprob",
    processes: int = 1,
    row_tokens: int = 8192,
    unit_tokens: int = 65536,
    dtype: Literal["float32", "bfloat16"] = "float32",
    threads: int = 1,
    allow_other_hardware: bool = False,
) -> dict[str, Any]:
    """Score every caption of a shard folder; repeat the command to go on after a kill.

    Under a launcher (RANK and WORLD_SIZE set) each rank is one process and rank 0 writes the streams; else `processes` are
    started here. Each computes with `threads` CPU threads. How many processes there are changes nothing in the bytes.

    Args:
        model: a run folder, a checkpoint, or a Hugging Face folder.
        row_tokens: a packed row's length; a row never holds more.
        unit_tokens: about how many tokens are finished, and kept, at a time.
        allow_other_hardware: go on with a ledger begun on another device, version or thread count.

    Returns:
        name, scorer (fingerprint), captions, tokens, perplexity, mean_importance (alpha = 1), and of this call seconds,
        tokens_computed (0 when the scores were there already) and tokens_per_s. Only {"name", "rank"} on other ranks than 0.

    Raises:
        UsageError: an option that cannot be.
        DataError: shards and reference differ in their tokenizer, scores of another scorer are in the way, an unfinished
            ledger belongs to another run or other hardware, or the disk is full.
        MegapriorError: a worker process died; what it finished is kept.
    """
    here = place()
    _check_options(name, processes, row_tokens, unit_tokens, threads, here)
    opened = ShardSet.open(shards)
    folder = resolve_model(model)
    _check_tokenizer(opened, folder)
    _check_lengths(opened, row_tokens)
    scorer = {"kind": "reference", "fingerprint": model_fingerprint(folder), "dtype": dtype}
    job = Job(str(folder), str(shards), name, row_tokens, unit_tokens, dtype, threads)
    if here.rank:
        return _join(job, opened, scorer, here, allow_other_hardware)
    start = time.monotonic()
    with owner_lock(shards, f".score-{name}.lock"):
        tokens = _fill(job, opened, scorer, here, processes, allow_other_hardware)
    seconds = time.monotonic() - start
    if tokens is None:
        say(f"{shards}: {name!r} is complete already, by this very scorer: nothing to do")
    summary = {
        "name": name,
        "scorer": scorer["fingerprint"],
        **_statistics(opened, name),
        "seconds": round(seconds, 3),
        "tokens_computed": tokens or 0,
        "tokens_per_s": round((tokens or 0) / seconds, 1),
    }
    say(
        f"{shards}: {summary['tokens']:,} tokens of {summary['captions']:,} captions, perplexity "
        f"{summary['perplexity']:.2f}, mean importance {summary['mean_importance']:.4f}"
        + (f", {summary['tokens_per_s']:,.0f} tokens/s" if tokens else "")
    )
    return summary


# ---------------------------------------------------------------- checks


def _check_options(name: str, processes: int, row_tokens: int, unit_tokens: int, threads: int, here: Place) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UsageError(f"--name {name!r}: a stream's name is small letters, digits and _, such as ref_logprob")
    for option, value in (
        ("processes", processes),
        ("row-tokens", row_tokens),
        ("unit-tokens", unit_tokens),
        ("threads", threads),
    ):
        if value < 1:
            raise UsageError(f"--{option} {value}: must be at least 1")
    if here.world > 1 and processes > 1:
        raise UsageError(
            f"--processes {processes} under a launcher with {here.world} ranks: the ranks are the processes, drop it"
        )


def _check_tokenizer(shards: ShardSet, folder: Path) -> None:
    """Refuse a reference that reads other ids than the shards hold, before its weights are touched."""
    entry = mf.tokenizer_entry(load_model_tokenizer(folder))
    mf.refuse_other_tokenizer(str(shards.folder), shards.build["tokenizer"], entry, f"the reference {folder}")


def _check_lengths(shards: ShardSet, row_tokens: int) -> None:
    if len(shards) and shards.token_counts.max() > row_tokens:
        at = int(shards.token_counts.argmax())
        raise UsageError(
            f"{shards.describe(at)}: {shards.token_counts[at]:,} tokens, a row holds {row_tokens:,}; "
            f"raise --row-tokens to at least {shards.token_counts[at]:,}"
        )


def _is_complete(shard: Shard, name: str, scorer: dict[str, Any]) -> bool:
    """Whether the shard has this stream by this scorer.

    Raises:
        DataError: it has one by another scorer, or one that belongs to other tokens.
    """
    if name in shard.manifest["streams"]:
        raise UsageError(f"--name {name}: is a stream of {shard.name} itself; choose another name for the scores")
    if not (shard.folder / f"{shard.prefix}.{name}.json").exists():
        return False
    _, record = open_scores(shard, name)
    for field, value in scorer.items():
        if record["scorer"].get(field) != value:
            raise DataError(
                f"{shard.name}: has scores {name!r} with {field} {record['scorer'].get(field)}, this scorer's is {value}; "
                f"choose another --name, or delete {shard.folder}/*.{name}.* to score again"
            )
    return True


# ---------------------------------------------------------------- the work of rank 0


def _fill(
    job: Job, shards: ShardSet, scorer: dict[str, Any], here: Place, processes: int, allow_other_hardware: bool
) -> int | None:
    """Compute what is missing and assemble it; the number of tokens computed now, None when nothing was to be done."""
    units = plan(shards, job.unit_tokens)
    open_shards = [shard for shard in shards.shards if not _is_complete(shard, job.name, scorer)]
    if not open_shards:
        Ledger(job.ledger).remove()
        return None
    record = hardware_record(job.threads, here.local_rank)
    work = {"scorer": scorer, "row_tokens": job.row_tokens, "unit_tokens": job.unit_tokens, "build_id": shards.build_id}
    ledger = Ledger.open(job.ledger, work=work, record=record, allow_other_hardware=allow_other_hardware)
    wanted = [unit for shard in open_shards for unit in units[shard.prefix]]
    missing = [unit for unit in wanted if not ledger.has(unit)]
    if len(missing) < len(wanted):
        say(f"{job.shards}: going on, {len(wanted) - len(missing)} of {len(wanted)} units are done")
    with progress(sum(unit.tokens for unit in missing), "score", "tokens") as shown:

        def advance(unit: Unit) -> None:
            shown.advance(unit.tokens)

        if processes > 1:
            run_processes(job, ledger, missing, count=min(processes, len(missing)), on_unit=advance)
        elif missing:
            with _threads(job.threads):
                work_through(job, rank=here.rank, world=here.world, local_rank=here.local_rank, on_unit=advance)
    _assemble(job, ledger, open_shards, units, scorer)
    return sum(unit.tokens for unit in missing)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _assemble(
    job: Job, ledger: Ledger, shards: list[Shard], units: dict[str, list[Unit]], scorer: dict[str, Any]
) -> None:
    """Turn unit files into streams, shard by shard; a shard's units go when its manifest stands."""
    whole = scorer | {"row_tokens": job.row_tokens, "unit_tokens": job.unit_tokens, "records": ledger.records()}
    for shard in shards:
        for leftover in shard.folder.glob(
            f".{shard.prefix}.{job.name}.*.tmp-*"
        ):  # of a killed attempt; we hold the lock
            leftover.unlink()
        counts = shard.streams["tokens"].lengths
        with ScoreWriter(shard, job.name, kind="logprob", scorer=whole) as writer:
            for values in ledger.scores(units[shard.prefix], counts):
                writer.add(values)
            writer.finish()
        shard.close()
        ledger.forget(units[shard.prefix])
    ledger.remove()


def _statistics(shards: ShardSet, name: str) -> dict[str, Any]:
    """Captions, tokens, perplexity and mean importance of a finished stream, read shard by shard."""
    count, total, importance = 0, 0.0, 0.0
    for shard in shards.shards:
        stream, _ = open_scores(shard, name)
        r = stream.flat().astype(np.float64)
        count, total, importance = count + len(r), total + float(r.sum()), importance - float(np.expm1(r).sum())
        stream.close()
    mean = total / max(count, 1)
    return {
        "captions": len(shards),
        "tokens": count,
        "perplexity": math.exp(-mean) if mean > -700 else math.inf,
        "mean_importance": importance / max(count, 1),
    }


# ---------------------------------------------------------------- the other ranks of a launcher


def _join(
    job: Job, shards: ShardSet, scorer: dict[str, Any], here: Place, allow_other_hardware: bool
) -> dict[str, Any]:
    """Work beside rank 0 on its ledger; nothing is left to do when it has finished the streams."""
    told = {"name": job.name, "rank": here.rank}
    give_up = time.monotonic() + _JOIN_S
    while not (job.ledger / "ledger.json").exists():
        if all(_is_complete(shard, job.name, scorer) for shard in shards.shards):
            return told
        if time.monotonic() > give_up:
            raise DataError(
                f"{job.ledger}: rank {here.rank} sees no ledger after {_JOIN_S:.0f} s; "
                "do all machines see the same folder, and does rank 0 still run?"
            )
        time.sleep(_POLL_S)
    record = hardware_record(job.threads, here.local_rank)
    if record not in Ledger(job.ledger).records() and not allow_other_hardware:
        raise DataError(
            f"rank {here.rank}: device, versions or threads differ from rank 0's ({record}), under which the last bits of "
            "scores may differ; start all ranks alike, or add --allow-other-hardware"
        )
    with _threads(job.threads):
        work_through(job, rank=here.rank, world=here.world, local_rank=here.local_rank)
    return told

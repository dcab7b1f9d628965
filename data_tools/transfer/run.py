"""`megaprior-data transfer-scores`: a score stream carried over to shards of the same captions made with another tokenizer.

    1. open     scored shards and target shards, each with its own tokenizer
    2. match    a target caption is the source caption of the same key that spells the same bytes   (transfer_shard.py)
    3. spread   its log-probabilities over the bytes, onto the target's tokens                      (byte_scores.py)
    4. write    a score stream a shard, as a scorer writes it; the manifest names what it came from

A shard's stream is a function of the two folders, so that killed, repeated, and with any number of workers, the bytes are
the same.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from megaprior.data.scores import open_scores
from megaprior.data_tools.pool import WorkerDied, each
from megaprior.data_tools.transfer.shard import REASONS, Request, Transfer
from megaprior.errors import MegapriorError, UsageError
from megaprior.files import owner_lock
from megaprior.telemetry import progress

__all__ = ["Request", "transfer_scores"]


def transfer_scores(request: Request, *, workers: int = 1) -> dict[str, Any]:
    """Write `request.name` for every shard of the target; repeat the command to go on after a kill.

    Returns:
        name, scorer (fingerprint), captions and tokens written or found, source_captions, unscored (captions by reason),
        done_before (shards), seconds.

    Raises:
        UsageError: an option that cannot be; scores of another kind than log-probabilities; windows of documents.
        DataError: shards or scores are refused, other scores of that name are in the way, a caption has no scores in the
            source (unless `unscored` is "ntp"), or the disk is full.
        MegapriorError: a worker process died; the shards it finished are kept.
    """
    start = time.monotonic()
    if not re.fullmatch(r"[a-z][a-z0-9_]*", request.name):
        raise UsageError(f"--name {request.name!r}: small letters, digits and _, such as ref_logprob")
    if workers < 1:
        raise UsageError(f"--workers {workers}: at least 1")
    work = Transfer(request)
    with owner_lock(request.target, f".score-{request.name}.lock"):
        for leftover in Path(request.target).glob(f".*.{request.name}.*.tmp-*"):
            leftover.unlink(missing_ok=True)  # of a killed attempt, since we hold the lock
        open_places = [at for at, shard in enumerate(work.target.shards) if not work.is_complete(shard)]
        with progress(len(work.target), "transfer", "captions") as shown:
            shown.advance(len(work.target) - sum(len(work.target.shards[at]) for at in open_places))
            for at in _each(work, request, open_places, workers):
                shown.advance(len(work.target.shards[at]))
    unscored: Counter[str] = Counter()
    for shard in work.target.shards:
        unscored.update(open_scores(shard, request.name)[1]["scorer"]["unscored"])
    return {
        "name": request.name,
        "scorer": work.scorer["fingerprint"],
        "captions": len(work.target),
        "tokens": int(work.target.token_counts.sum(dtype=np.int64)),
        "source_captions": len(work.source),
        "unscored": {reason: unscored[reason] for reason in REASONS},
        "done_before": len(work.target.shards) - len(open_places),
        "seconds": round(time.monotonic() - start, 3),
    }


# ---------------------------------------------------------------- processes


def _each(work: Transfer, request: Request, places: list[int], workers: int) -> Iterator[int]:
    """Transfer the shards at `places`, telling each when it is done."""
    if min(workers, len(places)) <= 1:
        for at in places:
            work.shard(at)
            yield at
        return
    try:
        yield from each(partial(_transfer, request), places, workers=workers)
    except WorkerDied as death:
        raise MegapriorError(f"{request.target}: {death}") from None


_opened = cache(Transfer)  # once in each worker process


def _transfer(request: Request, at: int) -> int:
    _opened(request).shard(at)
    return at

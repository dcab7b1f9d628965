"""Held-out next-token loss inside the loop, whatever the training weights, split by how much the reference knew.

Letters: N loss tokens of a row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from megaprior.data.heldout import rows
from megaprior.data.order import permute
from megaprior.data.shards import ShardSet
from megaprior.distributed import Peers
from megaprior.errors import DataError
from megaprior.telemetry import say

if TYPE_CHECKING:
    from megaprior.data.loader import DataConfig
    from megaprior.data.samples import Batch
    from megaprior.data.vision import VisionSpec
    from megaprior.tokenizer import Tokenizer
    from megaprior.train.engine import Engine


class HeldOut:
    """A fixed part of a held-out folder, kept ready as rows; each rank measures its share and all ranks add up."""

    def __init__(
        self,
        cfg: DataConfig,
        *,
        spec: VisionSpec | None,
        tokenizer: Tokenizer,
        peers: Peers,
        samples: int,
        threshold: float,
    ) -> None:
        """`samples` at most are measured, the same ones in every run.

        `threshold` splits tokens by importance w, alpha = 1, where `cfg.scores` were written for the folder.

        Raises:
            DataError: the folder or its scores are refused (see `ShardSet.open`).
        """
        assert cfg.heldout is not None
        shards = _open(cfg.heldout, scores=cfg.scores, tokenizer=tokenizer)
        self._kind, self._threshold, self._peers = shards.score_kind, threshold, peers
        ids = permute(np.arange(min(samples, len(shards))), len(shards), 0).tolist()
        found = rows(shards, ids, spec=spec, max_tokens=cfg.max_tokens, bos_id=tokenizer.bos_id, pad_to=cfg.pad_to)
        mine, count, last = [], 0, None
        for count, last in enumerate(found, start=1):
            if count % peers.place.world == peers.place.rank:
                mine.append(last)
        if last is None:
            raise DataError(f"{cfg.heldout}: has no samples; set eval_every=0 or name another folder")
        # All ranks must call the engine alike: those with fewer rows measure one again and do not count it.
        spare = -(-count // peers.place.world) - len(mine)
        self._rows = [(row, True) for row in mine] + [(last, False)] * spare

    def measure(self, engine: Engine) -> dict[str, float]:
        """{"heldout_ntp", and with scores "heldout_ntp_above", "heldout_ntp_below", "threshold", "share_above"}, nats a token."""
        totals = torch.zeros(4, dtype=torch.float64)  # NLL and tokens, of all and of those above
        for row, counts in self._rows:
            nll = engine.evaluate(row).double()
            if counts:
                above = self._above(row)
                totals += torch.tensor([nll.sum(), len(nll), nll[above].sum(), above.sum()], dtype=torch.float64)
        nll, tokens, nll_above, above = (
            sum(column) for column in zip(*self._peers.gather(totals.tolist()), strict=True)
        )
        measured = {"heldout_ntp": nll / max(tokens, 1)}
        if self._kind is None:
            return measured
        if above:
            measured["heldout_ntp_above"] = nll_above / above
        if above < tokens:
            measured["heldout_ntp_below"] = (nll - nll_above) / (tokens - above)
        return {**measured, "threshold": self._threshold, "share_above": above / max(tokens, 1)}

    def _above(self, row: Batch) -> torch.Tensor:
        """bool [N]: the importance of the token is above the threshold; never without scores."""
        importance = -torch.expm1(row.scores) if self._kind == "logprob" else row.scores
        return importance > self._threshold  # NaN is not above


def _open(folder: str, *, scores: str | None, tokenizer: Tokenizer) -> ShardSet:
    """With its scores where there are any; a score stream that is there but wrong is refused, not ignored."""
    plain = ShardSet.open(folder, tokenizer=tokenizer)
    scored = [
        scores is not None and (plain.folder / f"{shard.prefix}.{scores}.json").exists() for shard in plain.shards
    ]
    if not any(scored):
        if plain.kind == "pairs":
            say(f"{folder}: has no {scores!r} scores, so the held-out loss is not split by importance")
        return plain
    if not all(scored):
        raise DataError(
            f"{folder}: only {sum(scored)} of {len(scored)} shards have {scores!r} scores; finish scoring it"
        )
    return ShardSet.open(folder, scores=scores, tokenizer=tokenizer)

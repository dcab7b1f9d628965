"""From scores to token weights (Eqs. 3-4), with every batch's scores checked once more before they touch a gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field

from megaprior.config import configclass
from megaprior.data.samples import Segment
from megaprior.data.scores import refuse_bad_scores
from megaprior.errors import DataError


@configclass
class WeightingConfig:
    """`ntp` gives every loss token weight 1; `prior` weighs a caption's tokens by their scores."""

    kind: Literal["ntp", "prior"] = "ntp"
    alpha: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    length_scale: bool = True


def weigh(
    segments: Sequence[Segment], kinds: Sequence[str | None], config: WeightingConfig
) -> tuple[list[Segment], int]:
    """Give captions behind images their token weights; whatever has no image or no scores keeps g = 1.

    Args:
        kinds: of each segment's scores; None without.

    Returns:
        (the segments in order, how many captions have w = 0 throughout).
    """
    weighted, flat = list(segments), 0
    for kind in ("logprob", "importance"):
        chosen = {i: s.scores for i, s in enumerate(segments) if s.grid and s.scores is not None and kinds[i] == kind}
        scores = list(chosen.values())
        g = caption_weights(scores, kind=kind, alpha=config.alpha, length_scale=config.length_scale)
        parts = np.split(g, np.cumsum([len(s) for s in scores])[:-1]) if scores else []
        for i, part in zip(chosen, parts, strict=True):
            weighted[i] = replace(segments[i], token_weight=part)
        flat += sum(is_flat(s, kind=kind, alpha=config.alpha) for s in scores)
    return weighted, flat


def caption_weights(scores: Sequence[np.ndarray], *, kind: str, alpha: float, length_scale: bool) -> np.ndarray:
    """g = k * w / sum(w) per caption (without `length_scale`: w / sum(w)), w from the scores of its loss tokens.

    Args:
        scores: per caption, float32 [k], scores of the tokens that are really in the loss.
        kind: "logprob" (w = (1 - e^r)^alpha) or "importance" (w is the score; alpha does not touch it).

    Returns:
        float32 [N], the captions' weights one after another.
    """
    if not scores:
        return np.empty(0, dtype=np.float32)
    from megaprior.kernels import token_weights

    joined = torch.from_numpy(np.concatenate(scores).astype(np.float32, copy=False))
    edges = torch.tensor([0, *np.cumsum([len(s) for s in scores])], dtype=torch.int32)
    return token_weights(joined, edges, kind=kind, alpha=alpha, length_scale=length_scale).numpy()


def check_scores(where: str, scores: np.ndarray, *, kind: str, tokens: int) -> None:
    """Refuse one caption's scores that cannot be what they claim; `where` names the sample in messages.

    Raises:
        DataError: their number is not `tokens`; NaN; a log-probability above 1e-6; an importance below 0 or infinite.
    """
    if scores.shape != (tokens,):
        raise DataError(f"{where}: {scores.size:,} scores for {tokens:,} tokens; score these shards again")
    refuse_bad_scores(where, scores, kind)


def is_flat(scores: np.ndarray, *, kind: str, alpha: float) -> bool:
    """Whether every w of the caption is 0 (the reference knows it by heart), so that its tokens fall back to equal weights."""
    return alpha > 0 and len(scores) > 0 and bool((scores >= 0 if kind == "logprob" else scores == 0).all())

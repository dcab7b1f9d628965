"""Losses of held-out caption tokens as they are kept, and what they sum up to.

Letters: S captions, N loss tokens of all S captions, G distinct images.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from megaprior.analysis.bootstrap import intervals, owners, per_image
from megaprior.analysis.importance import RELATED
from megaprior.errors import DataError
from megaprior.files import atomic_write, digest_bytes, kept_manifest, read_manifest, write_manifest

FORMAT = "megaprior.heldout"
THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)  # of w, alpha = 1


@dataclass(frozen=True)
class TokenLosses:
    """Losses of S captions, flat: caption s holds tokens `cu[s]:cu[s+1]`."""

    ids: np.ndarray  # int64 [S], indices in the shard set, rising
    cu: np.ndarray  # int64 [S+1]
    image: np.ndarray  # int64 [S], equal where captions share an image; each its own for text
    nll: np.ndarray  # float32 [N], natural log
    nll_shuffled: np.ndarray | None  # float32 [N], another image before the caption; NaN where that cut the caption
    w: np.ndarray | None  # float64 [N], importance at alpha = 1
    word_class: np.ndarray | None  # uint8 [N]


# ---------------------------------------------------------------- summing up


def summarize(losses: TokenLosses) -> dict[str, Any]:
    """Mean losses in nats a token: over all, by class of word where the truth is known, by w, and the gap of shuffling.

    `shuffle_gap` is mean NLL with shuffled minus with true images, over tokens that both have; its 95% interval is a percentile
    bootstrap over images. What cannot be known is None.
    """
    gap = losses.nll_shuffled - losses.nll if losses.nll_shuffled is not None else None
    summary: dict[str, Any] = {
        "captions": len(losses.ids),
        "tokens": len(losses.nll),
        "loss": _mean(losses.nll),
        "loss_shuffled": _mean(losses.nll_shuffled),
        "shuffle_gap": _mean(gap),
        "shuffle_gap_interval": _interval(gap, losses) if gap is not None else None,
        "loss_related": None,
        "loss_unrelated": None,
        "thresholds": by_threshold(losses.nll, losses.w) if losses.w is not None else [],
    }
    if losses.word_class is not None:
        related = losses.word_class == RELATED
        for name, mask in (("related", related), ("unrelated", ~related)):
            summary[f"loss_{name}"] = _mean(losses.nll[mask])
            summary[f"shuffle_gap_{name}"] = _mean(gap[mask]) if gap is not None else None
    return summary


def by_threshold(nll: np.ndarray, w: np.ndarray, thresholds: Sequence[float] = THRESHOLDS) -> list[dict[str, Any]]:
    """Fig. 9: mean NLL of the tokens with w above and not above each threshold; `nll` and `w` float [N]."""
    return [
        {"threshold": t, "share_above": _mean(w > t), "above": _mean(nll[w > t]), "below": _mean(nll[w <= t])}
        for t in thresholds
    ]


def _mean(values: np.ndarray | None) -> float | None:
    if values is None or not np.isfinite(values).any():
        return None
    return float(np.nanmean(values, dtype=np.float64))


def _interval(gap: np.ndarray, losses: TokenLosses) -> list[float] | None:
    sums, counts = per_image(owners(losses.image, losses.cu), gap, np.isfinite(gap))
    return intervals(sums[:, None], counts[:, None])[0]


# ---------------------------------------------------------------- keeping


def keep(path: Path, losses: TokenLosses, head: dict[str, Any]) -> dict[str, Any]:
    """Write the losses beside `path` (as .npz), then `path` with `head` and their summary; returns what it holds."""
    arrays = {name: value for name, value in vars(losses).items() if value is not None}
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path.with_suffix(".npz"), file.getvalue())
    return write_manifest(
        path,
        {"format": FORMAT, "version": 1, **head, "npz": digest_bytes(file.getvalue()), "summary": summarize(losses)},
    )


def kept(path: Path, key: dict[str, Any]) -> dict[str, Any] | None:
    """What `keep` wrote, if it is whole and all of `key` is as it was."""
    body, npz = kept_manifest(path, key, format=FORMAT), path.with_suffix(".npz")
    return body if body and npz.is_file() and digest_bytes(npz.read_bytes()) == body["npz"] else None


def read_losses(path: Path | str) -> tuple[dict[str, Any], TokenLosses]:
    """What `heldout_losses` kept, from its json.

    Raises:
        DataError: one of the two files is missing or not what was written.
    """
    path = Path(path)
    body = read_manifest(path, format=FORMAT)
    npz = path.with_suffix(".npz")
    raw = npz.read_bytes() if npz.is_file() else b""
    if digest_bytes(raw) != body["npz"]:
        raise DataError(f"{npz}: not the losses that {path.name} names; run `megaprior evaluate --shards` again")
    arrays = np.load(io.BytesIO(raw), allow_pickle=False)
    return body, TokenLosses(**{field.name: arrays.get(field.name) for field in fields(TokenLosses)})

"""Captions beside their images, token by token: what the report colours, lists in a table, and sorts.

Letters: k tokens of a caption.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megaprior.analysis.importance import importance
from megaprior.analysis.losses import TokenLosses
from megaprior.analysis.names import compared, family_name, method_name
from megaprior.data.images import decode_rgb
from megaprior.data.shards import ShardSet
from megaprior.errors import DataError
from megaprior.tokenizer import Tokenizer

Losses = Mapping[str, Mapping[str, TokenLosses]]  # family -> method -> losses of its first seed

_LONGEST = 96  # tokens shown of a caption
_SIDE = 336  # pixels of a shown image's longer side
_FULL_LOSS, _FULL_CHANGE = 6.0, 1.5  # nats that count as all of the colour
_ALT = 160  # characters of a caption in its image's text alternative
_CLASSES = ("other word", "image-related word", "noise word")
ORDERS = ("changed", "better", "worse")


def caption_views(shards: ShardSet, losses: Losses, *, count: int, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """`count` evenly spaced captions (nobody chose them), with the losses of each family and method where it has them.

    Returns:
        Per caption: key, image (data URI, or None), alt, pixelated, cut, changes, style (its place in every order, as CSS
        variables), and tokens: space, text, end, style (CSS variables, 0 to 1), tip, worse (families whose second method,
        PRIOR, expects it less than the first, NTP), w, p_ref, g, truth and losses.
    """
    parts = [part for methods in losses.values() for part in methods.values()]
    ids = parts[0].ids if parts else np.arange(len(shards))
    if not len(ids):
        return []
    chosen = np.unique(np.linspace(0, len(ids) - 1, min(count, len(ids))).astype(int))
    views = [_view(shards, int(ids[at]), losses, tokenizer) for at in chosen]
    for view, places in zip(views, ranks([view["changes"] for view in views]), strict=True):
        view["style"] = ";".join(f"--{name}:{place}" for name, place in places.items())
    return views


def ranks(changes: Sequence[Mapping[str, Mapping[str, float]]]) -> list[dict[str, int]]:
    """For each caption its place (0 first) under every family's orders: {"ulvlm-changed": 3, "ulvlm-better": 0, ...}.

    changed: by the mean size of the change, largest first; better: most negative mean first; worse: most positive first. Equal
    ones stay in the order in which they are given, and captions without a change come last.
    """
    places: list[dict[str, int]] = [{} for _ in changes]
    for family in dict.fromkeys(family for change in changes for family in change):
        for order, key in zip(ORDERS, (lambda c: -c["size"], lambda c: c["mean"], lambda c: -c["mean"]), strict=True):
            known = [at for at, change in enumerate(changes) if family in change]
            rest = [at for at, change in enumerate(changes) if family not in change]
            for place, at in enumerate([*sorted(known, key=lambda at: key(changes[at][family])), *rest]):
                places[at][f"{family}-{order}"] = place
    return places


# ---------------------------------------------------------------- one caption


def _view(shards: ShardSet, index: int, losses: Losses, tokenizer: Tokenizer) -> dict[str, Any]:
    tokens = shards.tokens(index)
    places = _loss_places(shards, index)
    nll = {
        family: {m: part for m in methods if (part := _caption(methods[m], index, places, len(tokens))) is not None}
        for family, methods in losses.items()
    }
    w = g = None
    if shards.score_kind is not None:
        w = importance(shards.scores(index), shards.score_kind)
        g = np.full(len(w), np.nan)
        g[places] = _weights(w[places])
    truth = shards.word_class(index) if shards.has_word_class else None
    texts = tokenizer.texts(tokens[:_LONGEST].tolist())
    shown = []
    for at, text in enumerate(texts):
        numbers = {
            "w": None if w is None else float(w[at]),
            "p_ref": 1 - float(w[at]) if w is not None and shards.score_kind == "logprob" else None,
            "g": None if g is None or np.isnan(g[at]) else float(g[at]),
            "truth": None if truth is None else _CLASSES[truth[at]],
            "losses": {
                family: {m: float(part[at]) for m, part in methods.items() if np.isfinite(part[at])}
                for family, methods in nll.items()
            },
        }
        changes = {family: found for family, part in numbers["losses"].items() if (found := _change(part)) is not None}
        shown.append(
            {
                "space": text[: len(text) - len(text.lstrip())],
                "text": text.lstrip(),
                "end": int(tokens[at]) == tokenizer.eos_id,
                "style": _style(numbers, changes),
                "tip": _tip(numbers),
                "worse": [family for family, change in changes.items() if change > 0],
                "changes": changes,
                **numbers,
            }
        )
    image, small = _thumbnail(shards, index)
    return {
        "key": shards.key(index),
        "tokens": shown,
        "image": image,
        "alt": _alt("".join(texts)),
        "pixelated": small,
        "cut": max(0, len(tokens) - _LONGEST),
        "changes": {family: found for family, methods in nll.items() if (found := _changes(methods)) is not None},
    }


def _loss_places(shards: ShardSet, index: int) -> np.ndarray:
    """int64: which tokens of the caption carry loss."""
    spans = shards.loss_spans(index)
    if spans is None:
        return np.arange(len(shards.tokens(index)))
    return np.concatenate([np.arange(0), *(np.arange(start, end) for start, end in np.reshape(spans, (-1, 2)))])


def _caption(losses: TokenLosses, index: int, places: np.ndarray, length: int) -> np.ndarray | None:
    """NLL of one caption's tokens, float32 [k]; NaN where a token carries no loss or was cut off."""
    at = int(np.searchsorted(losses.ids, index))
    if at == len(losses.ids) or losses.ids[at] != index:
        return None
    found = losses.nll[losses.cu[at] : losses.cu[at + 1]]
    whole = np.full(length, np.nan, dtype=np.float32)
    whole[places[: len(found)]] = found
    return whole


def _weights(w: np.ndarray) -> np.ndarray:
    """g = k w / sum(w) of one caption at alpha = 1, in the order in which training computes it; 1 where every w is 0."""
    total = w.sum()
    return (len(w) * w) / total if total > 0 else np.ones_like(w)


def _change(losses: Mapping[str, float]) -> float | None:
    """PRIOR minus NTP, or the second method minus the first."""
    pair = compared(losses)
    return losses[pair[1]] - losses[pair[0]] if pair is not None else None


def _changes(nll: Mapping[str, np.ndarray]) -> dict[str, float] | None:
    """Of a whole caption, nats a token: mean losses of the two methods, mean change, and mean size of the change."""
    pair = compared(nll)
    if pair is None:
        return None
    first, second = nll[pair[0]], nll[pair[1]]
    change = second - first
    if not np.isfinite(change).any():
        return None
    means = {name: float(np.nanmean(part, dtype=np.float64)) for name, part in (("first", first), ("second", second))}
    size = float(np.nanmean(np.abs(change), dtype=np.float64))
    return {**means, "mean": float(np.nanmean(change, dtype=np.float64)), "size": size}


# ---------------------------------------------------------------- how a token is shown


def _style(numbers: Mapping[str, Any], changes: Mapping[str, float]) -> str:
    """Every quantity as a CSS variable from 0 to 1."""
    parts = {"w": numbers["w"]}
    for family, methods in numbers["losses"].items():
        parts |= {f"{family}-{method}": value / _FULL_LOSS for method, value in methods.items()}
        if family in changes:
            parts[f"{family}-change"] = abs(changes[family]) / _FULL_CHANGE
    return ";".join(f"--{name}:{min(max(value, 0.0), 1.0):.2f}" for name, value in parts.items() if value is not None)


def _tip(numbers: Mapping[str, Any]) -> str:
    parts = [f"{name} {numbers[name]:.2f}" for name in ("w", "p_ref", "g") if numbers[name] is not None]
    for family, methods in numbers["losses"].items():
        if len(numbers["losses"]) == 1:
            parts += [f"{method_name(method)} loss {value:.2f}" for method, value in methods.items()]
        elif methods:
            each = ", ".join(f"{method_name(method)} {value:.2f}" for method, value in methods.items())
            parts.append(f"{family_name(family)} loss: {each}")
    if numbers["truth"] is not None:
        parts.append(numbers["truth"])
    return " · ".join(parts)


def _alt(caption: str) -> str:
    text = " ".join(caption.split())
    return f"Picture with the caption: {text[:_ALT].rstrip()}{'…' if len(text) > _ALT else ''}"


def _thumbnail(shards: ShardSet, index: int) -> tuple[str | None, bool]:
    """(data URI of a small copy, whether it is so small that it is shown enlarged); (None, False) without an image."""
    if shards.kind != "pairs":
        return None, False
    try:
        picture = decode_rgb(shards.image(index))
    except DataError:
        return None, False
    small = max(picture.size) <= 128
    picture.thumbnail((_SIDE, _SIDE))
    file = io.BytesIO()
    if small:
        picture.save(file, "PNG", optimize=True)
    else:
        picture.save(file, "JPEG", quality=80, optimize=True)
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}", small

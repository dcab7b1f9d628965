"""Captions beside their images, token by token: what the report colours.

Letters: k tokens of a caption.
"""

from __future__ import annotations

import base64
import codecs
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megaprior.analysis.importance import importance
from megaprior.analysis.losses import TokenLosses
from megaprior.data.images import decode_rgb
from megaprior.data.shards import ShardSet
from megaprior.errors import DataError
from megaprior.tokenizer import Tokenizer

_LONGEST = 96  # tokens shown of a caption
_SIDE = 336  # pixels of a shown image's longer side
_FULL = {"ntp": 6.0, "prior": 6.0, "change": 1.5}  # nats that count as all of the colour
_CLASSES = ("other word", "image-related word", "noise word")


def caption_views(
    shards: ShardSet, losses: Mapping[str, TokenLosses], *, count: int, tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    """`count` evenly spaced captions (nobody chose them), with the losses of each method where it has them.

    Returns:
        Per caption: key, image (data URI, or None), pixelated, cut, and tokens: space, text, end, style (CSS variables,
        0 to 1), tip and worse (PRIOR expects it less than NTP does).
    """
    ids = next((part.ids for part in losses.values()), np.arange(len(shards)))
    if not len(ids):
        return []
    chosen = np.unique(np.linspace(0, len(ids) - 1, min(count, len(ids))).astype(int))
    return [_view(shards, int(ids[at]), losses, tokenizer) for at in chosen]


def _view(shards: ShardSet, index: int, losses: Mapping[str, TokenLosses], tokenizer: Tokenizer) -> dict[str, Any]:
    tokens = shards.tokens(index)
    values = {method: part for method in losses if (part := _caption(losses[method], index)) is not None}
    w = None
    if shards.score_kind is not None:
        w = importance(shards.scores(index), shards.score_kind)
    truth = shards.word_class(index) if shards.has_word_class else None
    shown = []
    for at, text in enumerate(token_texts(tokenizer, tokens[:_LONGEST].tolist())):
        here = {method: float(part[at]) for method, part in values.items() if at < len(part)}
        shown.append(
            {
                "space": text[: len(text) - len(text.lstrip())],
                "text": text.lstrip(),
                "end": int(tokens[at]) == tokenizer.eos_id,
                "style": _style(w[at] if w is not None else None, here),
                "tip": _tip(w[at] if w is not None else None, here, truth[at] if truth is not None else None),
                "worse": here.get("prior", 0.0) > here.get("ntp", 0.0),
            }
        )
    image, small = _thumbnail(shards, index)
    return {
        "key": shards.key(index),
        "tokens": shown,
        "image": image,
        "pixelated": small,
        "cut": max(0, len(tokens) - _LONGEST),
    }


def _caption(losses: TokenLosses, index: int) -> np.ndarray | None:
    """NLL of one caption's tokens, float32 [k]."""
    at = int(np.searchsorted(losses.ids, index))
    if at == len(losses.ids) or losses.ids[at] != index:
        return None
    return losses.nll[losses.cu[at] : losses.cu[at + 1]]


def _style(w: float | None, nll: Mapping[str, float]) -> str:
    """Every quantity as a CSS variable from 0 to 1."""
    parts = {"w": w, **{f"{method}-loss": value / _FULL[method] for method, value in nll.items()}}
    if len(nll) == 2:
        parts["change"] = abs(nll["prior"] - nll["ntp"]) / _FULL["change"]
    return ";".join(f"--{name}:{min(max(value, 0.0), 1.0):.2f}" for name, value in parts.items() if value is not None)


def _tip(w: float | None, nll: Mapping[str, float], truth: int | None) -> str:
    parts = []
    if w is not None:
        parts += [f"w {w:.2f}", f"p_ref {1 - w:.2f}"]
    parts += [
        f"{name} loss {nll[method]:.2f}" for method, name in (("ntp", "NTP"), ("prior", "PRIOR")) if method in nll
    ]
    if truth is not None:
        parts.append(_CLASSES[truth])
    return " · ".join(parts)


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The text that each id adds; a character spread over several ids appears with the last of them."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    texts = [decoder.decode(tokenizer.token_bytes(token)) for token in ids]
    if texts:
        texts[0] = texts[0].removeprefix(" ")
    return texts


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

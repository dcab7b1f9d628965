"""Log-probabilities of one tokenizer's tokens as those of another's, over the bytes that both of them spell.

    source    The| quick|</s>     r_i, each spread evenly over its bytes
    bytes     T h e   q u i c k $
    target    The| qu|ick|<eos>   s_j, the sum over its bytes

        s_j = sum_i  r_i * |bytes_i and bytes_j| / |bytes_i|          hence  sum_j s_j = sum_i r_i

Evenly, because the source model gave the token one number and says nothing about its inside: any other split would add a
belief of ours, and would depend on more than the two sets of edges. EOS is treated as a last byte of its own ($), which
no other token shares. A token without bytes (the dummy space that SentencePiece may write as a token of its own) announces
what follows: its log-probability goes to the next token that has bytes.

Letters: k source tokens, m target tokens, n bytes of a caption.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megaprior.tokenizer import Tokenizer

_FOLDED = "\u2581".encode()  # SentencePiece reads this character as a space


@dataclass(frozen=True)
class Spelled:
    """A caption as its tokens spell it: `edges`, int64 [k + 1], where each token begins and ends; EOS is one byte at the end."""

    data: bytes  # n bytes, without the dummy space before the first
    edges: np.ndarray
    closed: bool  # ends in EOS: the caption was not cut


class Spelling:
    """The bytes of one tokenizer's tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._pieces = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        self._widths = np.array([len(piece) for piece in self._pieces], np.int64)
        self._eos = tokenizer.eos_id
        self._dummy_space = self._join(tokenizer.encode("a")) == b" a"
        self.folds_spaces = self._join(tokenizer.encode("a\u2581")).endswith(b"a ")

    def _join(self, ids: Sequence[int]) -> bytes:
        return b"".join(map(self._pieces.__getitem__, ids))

    def spell(self, ids: np.ndarray) -> Spelled | int:
        """The bytes of a caption's ids; or the position of an id that stands for none, an unknown word's for example."""
        closed = bool(len(ids)) and int(ids[-1]) == self._eos
        widths = self._widths[ids]
        if closed:
            widths[-1] = 1
        if not widths.all():
            return int(np.argmin(widths))
        data = self._join(ids[: len(ids) - closed].tolist())
        edges = np.concatenate([[0], np.cumsum(widths)])
        if self._dummy_space and data.startswith(b" "):
            data, edges = data[1:], np.maximum(edges - 1, 0)
        return Spelled(data, edges, closed)


def refusal(source: Spelled, target: Spelled) -> str | None:
    """Why the scores of `source` are not those of `target`: "different", "truncated", or None when they are.

    A target that was cut takes the scores of its part of the caption. A source that was cut before the target ends has none
    for the rest.
    """
    common = min(len(source.data), len(target.data))
    if source.data[:common] != target.data[:common]:
        return "different"
    if len(source.data) > common:
        return "different" if target.closed else None
    if len(target.data) > common:
        return "different" if source.closed else "truncated"
    return "truncated" if target.closed and not source.closed else None


def in_common(source: Spelled, target: Spelled, *, folds: tuple[bool, bool]) -> tuple[Spelled, Spelled]:
    """Both on the bytes of the original caption, where one of the tokenizers (`folds`) reads U+2581 as a space."""
    if folds[0] == folds[1] or source.data == target.data:
        return source, target
    folded, original = (source, target) if folds[0] else (target, source)
    plain = original.data.replace(_FOLDED, b" ")
    common = min(len(plain), len(folded.data))
    if original.data == plain or plain[:common] != folded.data[:common]:
        return source, target
    at, places = -1, []  # of each U+2581, in folded bytes
    while (at := original.data.find(_FOLDED, at + 1)) >= 0:
        places.append(at - 2 * len(places))
    edges = folded.edges + 2 * np.searchsorted(np.array(places), folded.edges)
    tail = folded.data[common:]
    unfolded = Spelled(original.data[: int(_grown(common, places))] + tail, edges, folded.closed)
    return (unfolded, original) if folds[0] else (original, unfolded)


def _grown(folded: int, places: Sequence[int]) -> int:
    """How many original bytes the first `folded` bytes stand for."""
    return folded + 2 * sum(place < folded for place in places)


def spread(scores: np.ndarray, source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """float64 [m], the sums over target tokens; `scores` float [k], edges int64 [k + 1] and [m + 1], target's within source's.

    -inf reaches every target token that shares a byte with its source token.
    """
    widths = np.diff(source)
    scores = _onto_bytes(scores.astype(np.float64), widths)
    points = np.unique(np.concatenate([source, target]))
    points = points[points <= target[-1]]
    starts = points[:-1]
    # Of tokens that begin at the same byte only the last one has bytes.
    giver = np.searchsorted(source, starts, side="right") - 1
    taker = np.searchsorted(target, starts, side="right") - 1
    return np.bincount(taker, scores[giver] * np.diff(points) / widths[giver], minlength=len(target) - 1)


def _onto_bytes(scores: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Scores of tokens without bytes added to that of the next token that has some, or else of the last that has."""
    if widths.all():
        return scores
    owners = np.flatnonzero(widths)
    place = np.minimum(np.searchsorted(owners, np.arange(len(widths))), len(owners) - 1)
    return np.bincount(owners[place], scores, minlength=len(widths))


def transferred(scores: np.ndarray, source: Spelled, target: Spelled) -> np.ndarray:
    """float32 [m]: what the target's tokens are given, where `refusal` has nothing against it.

    Rounded to float32 each token would lose up to half a unit in its last place, and the total all of them. So the token of
    largest magnitude takes what the others' rounding left: then the stored numbers sum to the caption's total to within half
    a unit in the last place of that one token, at most 2^-24 of the total, however long the caption. The token itself moves
    by less than m * 2^-24 of its value. A smaller one could not absorb that: its sign might change.
    """
    exact = spread(scores, source.edges, target.edges)
    stored = exact.astype(np.float32)
    if not np.isfinite(exact).all():
        return stored
    # What is conserved are the source's own numbers; of a cut target, the part of them that it covers.
    whole = target.edges[-1] == source.edges[-1]
    given = scores.tolist() if whole else exact.tolist()
    largest = int(np.argmin(exact))
    others = np.delete(stored, largest)
    stored[largest] = math.fsum([*given, *(-others.astype(np.float64)).tolist()])
    return stored

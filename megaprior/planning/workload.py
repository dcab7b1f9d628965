"""Token counts of a step: the true ones where the shards are there, else from assumptions that are said.

Letters: n samples of a step, pairs first, then the language mix.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np

from megaprior.data.vision import PatchSpec, TowerSpec, VisionSpec
from megaprior.errors import UsageError
from megaprior.planning.described import Described
from megaprior.planning.memory import Row
from megaprior.tokenizer import load_tokenizer
from megaprior.train.assembly import open_loader
from megaprior.train.settings import RunConfig

# The paper's checkpoints, one every 500 steps of 512 pairs, lie at multiples of about 7M caption tokens: 27 a caption.
CAPTION_TOKENS = 27
TEXT_TOKENS = 1000
IMAGE_SIZE = (640, 480)
_SPREAD = {"caption": 0.5, "text": 1.0}  # sigma of the logarithm of lengths


@dataclass(frozen=True)
class Guess:
    """What is assumed of data that is not there; None takes this file's constants."""

    caption_tokens: float | None = None
    text_tokens: float | None = None
    image_size: tuple[int, int] | None = None


def parse_size(text: str) -> tuple[int, int]:
    """`"640x480"` -> (640, 480).

    Raises:
        UsageError: not two whole numbers above 0 with an x between.
    """
    sides = text.split("x")
    if len(sides) != 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise UsageError(f"--image-size {text}: expected WIDTHxHEIGHT in pixels, for example 640x480")
    return int(sides[0]), int(sides[1])


@dataclass(frozen=True)
class Workload:
    """Samples of one step, int64 [n] each.

    Attributes:
        segment: tokens of a sample in its row, BOS and image included.
        loss: loss tokens.
        image: image tokens.
        pairs: how many of the samples are pairs (or captions).
        row, multiple: most tokens of a row, and what row lengths are padded to a multiple of.
        tower: whether images go through a tower.
        notes: where the numbers come from.
    """

    segment: np.ndarray
    loss: np.ndarray
    image: np.ndarray
    pairs: int
    row: int
    multiple: int
    tower: bool
    notes: tuple[str, ...]

    def longest(self) -> list[Row]:
        """The rows that need most memory: one of pairs, and where there is text one document."""
        rows, here = [], slice(0, self.pairs)
        length, image = int(np.ceil(self.segment[here].mean())), int(np.ceil(self.image[here].mean()))
        count = max(self.row // length, 1)
        rest = (self.row - count * length,) if self.row > count * length else ()
        loss = int(np.ceil(self.loss[here].mean() * count))
        rows.append(Row((min(length, self.row),) * count + rest, loss, image * count, count if self.tower else 0))
        if len(self.segment) > self.pairs:
            rows.append(Row((self.row,), self.row - 1))
        return rows


def workload(cfg: RunConfig, model: Described, guess: Guess) -> Workload:
    """Of the first step where the shards are there, of a step of assumed samples elsewhere.

    Raises:
        DataError: shards are there and damaged.
        UsageError: an image leaves no room for a caption.
    """
    spec = _spec(model)
    data = cfg.data
    sources = [*data.train, *data.text]
    missing = [entry.path for entry in sources if not (Path(entry.path) / "tokenizer").exists()]
    if not missing:
        loader = open_loader(cfg, load_tokenizer(Path(sources[0].path) / "tokenizer"), spec)
        try:
            lengths = loader.corpus.lengths(loader.sample_ids(0))
        finally:
            loader.close()
        notes = (f"token counts: those of the first step, {', '.join(entry.path for entry in sources)}",)
        found = (lengths.segment, lengths.loss, lengths.image)
        return Workload(*found, data.batch_size, data.max_tokens, data.pad_to, model.kind == "hlvlm", notes)
    return _assumed(cfg, model, spec, guess, missing)


def _assumed(cfg: RunConfig, model: Described, spec: VisionSpec | None, guess: Guess, missing: list[str]) -> Workload:
    data = cfg.data
    notes = [f"not here: {', '.join(dict.fromkeys(missing))}"]
    size = guess.image_size or IMAGE_SIZE
    image = spec.tokens(size) if spec is not None else 0
    documents = cfg.stage == "textlm"
    mean = guess.text_tokens or TEXT_TOKENS if documents else guess.caption_tokens or CAPTION_TOKENS
    what = (
        f"documents of {mean:g} tokens (--text-tokens)"
        if documents
        else f"captions of {mean:g} tokens (--caption-tokens)"
    )
    if isinstance(spec, PatchSpec):
        what += f", images of {size[0]}x{size[1]} pixels (--image-size), {image} tokens"
    elif spec is not None:
        what += f", {image} tokens an image"
    room = data.max_tokens - 1 - image
    if room < 1:
        raise UsageError(
            f"an image takes {image:,} tokens, data.max_tokens is {data.max_tokens:,}: raise it to {image + 2:,} or more"
        )
    captions = _lengths(data.batch_size, mean, "text" if documents else "caption", room)
    texts = np.empty(0, dtype=np.int64)
    if data.text and data.mix_ratio:
        long = guess.text_tokens or TEXT_TOKENS
        pair = {"loss_tokens": captions.mean(), "tokens": captions.mean() + 1 + image, "samples": 1.0}[data.mix_unit]
        text = {"loss_tokens": long, "tokens": long + 1, "samples": 1.0}[data.mix_unit]
        texts = _lengths(round(data.mix_ratio * data.batch_size * pair / text), long, "text", data.max_tokens - 1)
        what += f", text of {long:g} tokens a document (--text-tokens), {len(texts)} beside {data.batch_size}"
    notes.append("assumed: " + what)
    images = np.concatenate([np.full(len(captions), image), np.zeros(len(texts), dtype=np.int64)]).astype(np.int64)
    loss = np.concatenate([captions, texts])
    tower = model.kind == "hlvlm"
    return Workload(1 + images + loss, loss, images, len(captions), data.max_tokens, data.pad_to, tower, tuple(notes))


def _lengths(count: int, mean: float, kind: str, most: int) -> np.ndarray:
    """int64 [count] of that mean: quantiles of a lognormal distribution, the same every time."""
    sigma = _SPREAD[kind]
    middle = (np.arange(count) + 0.5) / max(count, 1)
    drawn = np.exp(sigma * np.array([NormalDist().inv_cdf(q) for q in middle]))
    if count:
        drawn *= mean / drawn.mean()
    return np.clip(np.rint(drawn), 1, most).astype(np.int64)


def _spec(model: Described) -> VisionSpec | None:
    if model.kind == "ulvlm":
        return PatchSpec(model.patch, model.limit, 0, 1, 2, 3)
    if model.tower is not None:
        side, patch = model.tower.image_size, model.tower.patch_size
        return TowerSpec(int(side), int(patch), "crop", (0, 0, 0), 0)  # type: ignore[arg-type]
    return None

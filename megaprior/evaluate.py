"""`megaprior evaluate`: can a checkpoint see? True statements about held-out images against false ones.

An item is an image and two statements that differ in one attribute. The model is right when the true one, its closing EOS
included, is likelier after the image. The same items with their images shuffled say how much of that comes from seeing;
a text-only model reads the statements alone and shows what they give away by themselves.

A line of results belongs to one checkpoint by the digest of its weights, never by its name.

Letters: I items.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from megaprior import __version__
from megaprior.data.images import decode_rgb, probe_size
from megaprior.data.order import derangement
from megaprior.data.packing import pack_best_fit
from megaprior.data.samples import Batch, Segment, assemble
from megaprior.data.vision import VisionSpec, segment_length
from megaprior.errors import DataError, UsageError
from megaprior.files import digest_bytes, digest_json
from megaprior.models.fingerprint import model_fingerprint
from megaprior.models.load import load_model
from megaprior.telemetry import progress, say
from megaprior.tokenizer import Tokenizer, load_model_tokenizer
from megaprior.train.checkpoint import checkpoint_name, resolve_model

if TYPE_CHECKING:
    from megaprior.models.hlvlm import HLVLM
    from megaprior.models.lm import TextLM

_FORMAT = "megaprior.result"
_Z = 1.959963984540054  # of a two-sided 95% interval


@dataclass(frozen=True)
class Item:
    """One question of a probe."""

    image: Path
    true: str
    false: str
    attribute: str


def evaluate(
    *, model: Path | str, probe: Path | str, output: Path | str, shuffle_seed: int = 0, row_tokens: int = 8192
) -> dict[str, Any]:
    """Probe one checkpoint and append its line to `output`; a line of the same weights, probe and seed is reused.

    Args:
        model: a run folder (its newest checkpoint), a checkpoint, or a Hugging Face folder.
        probe: JSON lines {"image": path relative to the file, "true": ..., "false": ..., "attribute": ...}.
        output: results.jsonl.
        shuffle_seed: of the derangement that gives every item another item's image.

    Returns:
        The line: model, digest, and under "probe" accuracy, interval (Wilson, 95%), by_attribute and, for a model that
        sees, shuffled_accuracy and shuffled_interval. Equal likelihoods count half.

    Raises:
        DataError: the probe or the checkpoint is not what it claims to be, by file and line.
    """
    folder = resolve_model(model)
    items = read_probe(Path(probe))
    key = {
        "digest": model_fingerprint(folder),
        "probe_digest": _probe_digest(items),
        "shuffle_seed": shuffle_seed,
        "megaprior": __version__,
    }
    lines = read_results(Path(output))
    line = next((line for line in lines if all(line.get(field) == value for field, value in key.items())), None)
    if line is not None:
        say(f"{model}: these weights were probed already; their line in {output} stands")
    else:
        found = run_probe(folder, items, shuffle_seed=shuffle_seed, row_tokens=row_tokens)
        line = {
            "format": _FORMAT,
            "version": 1,
            "model": str(model),
            "checkpoint": checkpoint_name(folder),
            **key,
            "probe": {"file": Path(probe).name, **found},
        }
        _append(Path(output), line)
    say(f"{model}: {describe(line['probe'])}")
    return line


def run_probe(folder: Path, items: Sequence[Item], *, shuffle_seed: int, row_tokens: int) -> dict[str, Any]:
    """The "probe" part of a line for the model in a Hugging Face folder."""
    model = load_model(folder, device="cuda" if torch.cuda.is_available() else "cpu")
    spec = VisionSpec.of(model.config)
    statements = _Statements(items, load_model_tokenizer(folder), spec, row_tokens)
    right = _right(statements.log_likelihoods(model, [item.image for item in items]))
    attributes = sorted({item.attribute for item in items})
    chosen = {a: right[[i for i, item in enumerate(items) if item.attribute == a]] for a in attributes}
    result = {
        "items": len(items),
        "sees": spec is not None,
        **_share(right, "accuracy", "interval"),
        "by_attribute": {a: {"items": len(part), **_share(part, "accuracy", "interval")} for a, part in chosen.items()},
    }
    images = _shuffled([item.image for item in items], shuffle_seed)
    if spec is not None and images is not None:
        shuffled = _right(statements.log_likelihoods(model, images))
        result |= _share(shuffled, "shuffled_accuracy", "shuffled_interval")
    return result


def describe(probe: dict[str, Any]) -> str:
    """A probe's result in one line."""
    low, high = probe["interval"]
    text = f"{probe['items']} statements, {probe['accuracy']:.1%} right (95% interval {low:.1%} to {high:.1%})"
    if "shuffled_accuracy" in probe:
        return f"{text}, {probe['shuffled_accuracy']:.1%} with shuffled images"
    return text if probe["sees"] else f"{text}, without seeing the images"


def read_probe(path: Path) -> list[Item]:
    """Read a probe.

    Raises:
        DataError: no such file, a line that is no item, or an image that is missing; by file and line.
    """
    items = []
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable probe: {error}") from None
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        try:
            fields = json.loads(text)
            values = [fields[name] for name in ("image", "true", "false", "attribute")]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} line {number}: {error!r}; an item has image, true, false and attribute") from None
        if not all(isinstance(value, str) and value for value in values):
            raise DataError(f"{path} line {number}: image, true, false and attribute must be text, found {values}")
        image = path.parent / values[0]
        if not image.is_file():
            raise DataError(f"{path} line {number}: image {image} is missing")
        items.append(Item(image, *values[1:]))
    if not items:
        raise DataError(f"{path}: no items; a probe has one JSON object a line")
    return items


def _probe_digest(items: Sequence[Item]) -> str:
    images = {image: digest_bytes(image.read_bytes()) for image in {item.image for item in items}}
    return digest_json([[images[item.image], item.true, item.false, item.attribute] for item in items])


def _shuffled(images: Sequence[Path], seed: int) -> list[Path] | None:
    """Each distinct image replaced by another one (a random cycle through all of them); None when there is only one."""
    distinct = sorted(set(images))
    if len(distinct) < 2:
        return None
    shown = dict(zip(distinct, derangement(len(distinct), seed), strict=True))
    return [distinct[shown[image]] for image in images]


class _Statements:
    """The 2 I statements of a probe as tokens: statement 2 i is item i's true one, 2 i + 1 its false one."""

    def __init__(self, items: Sequence[Item], tokenizer: Tokenizer, spec: VisionSpec | None, row_tokens: int) -> None:
        texts = [text for item in items for text in (item.true, item.false)]
        self.tokens = [np.array([*ids, tokenizer.eos_id]) for ids in tokenizer.encode_batch(texts)]
        self.bos_id, self.spec, self.row_tokens = tokenizer.bos_id, spec, row_tokens

    @torch.inference_mode()
    def log_likelihoods(self, model: TextLM | HLVLM, images: Sequence[Path]) -> np.ndarray:
        """float64 [I, 2]: log p(statement and EOS | image), natural log, of the true and the false one, after `images` [I]."""
        found = np.empty(len(self.tokens))
        with progress(len(self.tokens), "probe", "statements") as shown:
            for batch in self._rows(images):
                batch = batch.to(model.device)
                states = model.states(**batch.inputs)
                assert states.hidden is not None
                values = model.lm_head(states.hidden[batch.loss_index], batch.targets, mode="logprob")
                parts = values.double().cpu().split(batch.loss_cu.diff().tolist())
                found[batch.sample_ids.cpu().numpy()] = [part.sum().item() for part in parts]
                shown.advance(len(parts))
        return found.reshape(-1, 2)

    def _rows(self, images: Sequence[Path]) -> Iterator[Batch]:
        sizes = {image: _read(image, probe_size) for image in set(images)} if self.spec is not None else {}
        lengths = [segment_length(self.spec, sizes.get(images[i // 2]), len(t)) for i, t in enumerate(self.tokens)]
        if max(lengths) > self.row_tokens:
            raise UsageError(
                f"{images[int(np.argmax(lengths)) // 2]}: with its statement {max(lengths):,} tokens, a row holds "
                f"{self.row_tokens:,}; use smaller images or a longer row"
            )
        for row in pack_best_fit(lengths, self.row_tokens):
            segments = [self._segment(i, images[i // 2], sizes) for i in row]
            yield assemble(
                segments, bos_id=self.bos_id, spec=self.spec, denominator=1, max_tokens=self.row_tokens, pad_to=1
            )

    def _segment(self, i: int, image: Path, sizes: dict[Path, tuple[int, int]]) -> Segment:
        weight = np.ones(len(self.tokens[i]), dtype=np.float32)
        if self.spec is None:
            return Segment(i, self.tokens[i], weight)
        grid = self.spec.grid(sizes[image])
        return Segment(i, self.tokens[i], weight, grid=grid, patches=_patches(image, self.spec, grid))


@lru_cache(maxsize=64)
def _patches(image: Path, spec: VisionSpec, grid: tuple[int, int]) -> np.ndarray:
    return spec.patches(_read(image, decode_rgb), grid)


def _read(image: Path, reader: Callable[[bytes], Any]) -> Any:
    try:
        return reader(image.read_bytes())
    except DataError as error:
        raise DataError(f"{image}: {error}") from None


def _right(log_likelihoods: np.ndarray) -> np.ndarray:
    """float64 [I] from [I, 2]: 1 where the true statement is likelier, 0.5 where both are equal."""
    true, false = log_likelihoods.T
    return (true > false) + 0.5 * (true == false)


def _share(right: np.ndarray, name: str, interval: str) -> dict[str, Any]:
    return {name: float(right.mean()), interval: list(wilson(float(right.sum()), len(right)))}


def wilson(successes: float, trials: int) -> tuple[float, float]:
    """Wilson's 95% score interval of a proportion, within [0, 1] (Wilson 1927)."""
    p, z2 = successes / trials, _Z**2
    centre = (p + z2 / (2 * trials)) / (1 + z2 / trials)
    half = _Z / (1 + z2 / trials) * math.sqrt(p * (1 - p) / trials + z2 / (4 * trials**2))
    return max(0.0, centre - half), min(1.0, centre + half)


# ---------------------------------------------------------------- results.jsonl


def read_results(path: Path) -> list[dict[str, Any]]:
    """The lines of a results file; a half-written last line (a killed run's) is passed over with a warning."""
    found = []
    if not path.exists():
        return found
    for number, text in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if isinstance(line, dict) and line.get("format") == _FORMAT:
            found.append(line)
        elif text.strip():
            say(f"warning: {path} line {number} is no result; passed over")
    return found


def _append(path: Path, line: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")  # after a half-written line
        file.write(json.dumps(line, sort_keys=True).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())

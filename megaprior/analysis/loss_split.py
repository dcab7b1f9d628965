"""Held-out NLL of every caption token, with true and with shuffled images, split by what the tokens are.

    model + held-out shards -> nll, nll_shuffled per token -> RUN/analysis/heldout_<shards>.npz + .json -> tables, figures

What is kept is per token, so that a table under another threshold costs nothing. A kept file belongs to one checkpoint and
one shard folder by digest and is measured again for any other.

Letters: S captions, N loss tokens of all S captions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megaprior.analysis.importance import importance, open_scored
from megaprior.analysis.losses import TokenLosses, keep, kept
from megaprior.data.heldout import rows
from megaprior.data.order import derangement, permute
from megaprior.data.shards import ShardSet
from megaprior.data.vision import VisionSpec
from megaprior.errors import DataError, UsageError
from megaprior.telemetry import progress, say


def heldout_losses(
    model: Path | str,
    shards: Path | str,
    *,
    image_shuffle_seed: int = 0,
    scores: str | None = "ref_logprob",
    captions: int = 5000,
    output: Path | str | None = None,
    row_tokens: int = 8192,
) -> dict[str, Any]:
    """Measure a checkpoint on held-out captions, keep the losses of every token, and sum them up.

    Args:
        model: a run folder, a checkpoint, or a Hugging Face folder.
        image_shuffle_seed: of the derangement that gives every image's captions another image.
        scores: the score stream that says w; where the folder has none, tables by w are left out.
        captions: how many at most, the same ones for every model.
        output: folder for the two files; by default `analysis/` in the run's folder.

    Returns:
        What the json holds: the model's and the shards' digests, and `summary` (see `losses.summarize`).

    Raises:
        UsageError: `model` is no run and `output` is not given.
        DataError: model or shards are refused, or they differ in their tokenizer.
    """
    from megaprior.models.fingerprint import model_fingerprint
    from megaprior.train.checkpoint import checkpoint_name, resolve_model

    folder = resolve_model(model)
    place = Path(output) if output is not None else Path(model) / "analysis"
    if output is None and not (Path(model) / "checkpoints").is_dir():
        raise UsageError(f"{model}: not a run's folder, so say with `output` where its losses go")
    opened = open_scored(shards, scores)
    key = {
        "model_digest": model_fingerprint(folder),
        "build_id": opened.build_id,
        "scorer": opened.scorer["fingerprint"] if opened.scorer else None,
        "image_shuffle_seed": image_shuffle_seed,
        "captions": min(captions, len(opened)),
        "row_tokens": row_tokens,
    }
    path = place / f"heldout_{opened.folder.resolve().name}.json"
    before = kept(path, key)
    if before is not None:
        say(f"{model}: held-out losses of these weights are in {path} already")
        return before
    losses = measure(folder, opened, seed=image_shuffle_seed, captions=captions, row_tokens=row_tokens)
    return keep(path, losses, {**key, "checkpoint": checkpoint_name(folder)})


# ---------------------------------------------------------------- measuring


def measure(folder: Path, shards: ShardSet, *, seed: int, captions: int, row_tokens: int) -> TokenLosses:
    """Per-token losses of `captions` evenly drawn captions under the model of a Hugging Face folder."""
    import torch

    from megaprior.models.lm import check_vocabulary
    from megaprior.models.load import load_model

    if not len(shards):
        raise DataError(f"{shards.folder}: has no samples to measure on")
    model = load_model(folder, device="cuda" if torch.cuda.is_available() else "cpu")
    check_vocabulary(model, shards.tokenizer().vocab_size, source=str(folder))
    spec = VisionSpec.of(model.config) if shards.kind == "pairs" else None
    ids = np.sort(permute(np.arange(min(captions, len(shards))), len(shards), 0))
    image = _images(shards, ids)
    nll = _nll(model, shards, ids, spec=spec, image_of=None, row_tokens=row_tokens)
    other = shuffled_images(ids, image, seed) if spec is not None else None
    shuffled = None
    if other is not None:
        found = _nll(model, shards, ids, spec=spec, image_of=other, row_tokens=row_tokens)
        shuffled = np.concatenate([_fitted(part, len(whole)) for part, whole in zip(found, nll, strict=True)])
    places = [_loss_places(shards, int(i), len(part)) for i, part in zip(ids, nll, strict=True)]

    def flat(sequence: Any) -> np.ndarray:
        return np.concatenate([np.asarray(sequence(int(i)))[where] for i, where in zip(ids, places, strict=True)])

    return TokenLosses(
        ids=ids,
        cu=np.concatenate([[0], np.cumsum([len(part) for part in nll])]).astype(np.int64),
        image=image,
        nll=np.concatenate(nll),
        nll_shuffled=shuffled,
        w=importance(flat(shards.scores), shards.score_kind) if shards.score_kind is not None else None,
        word_class=flat(shards.word_class) if shards.has_word_class else None,
    )


def _nll(
    model: Any, shards: ShardSet, ids: np.ndarray, *, spec: VisionSpec | None, image_of: Any, row_tokens: int
) -> list[np.ndarray]:
    """NLL of the loss tokens of each of `ids`, float32 [n] each."""
    import torch

    found: dict[int, np.ndarray] = {}
    with progress(len(ids), "held-out loss", "captions") as shown, torch.inference_mode():
        for batch in rows(shards, ids.tolist(), spec=spec, max_tokens=row_tokens, image_of=image_of):
            batch = batch.to(model.device)
            states = model.states(**batch.inputs)
            values = -model.lm_head(states.hidden[batch.loss_index], batch.targets, mode="logprob")
            parts = values.cpu().split(batch.loss_cu.diff().tolist())
            found |= {i: part.numpy() for i, part in zip(batch.sample_ids.tolist(), parts, strict=True)}
            shown.advance(len(parts))
    return [found[i] for i in ids.tolist()]


def _images(shards: ShardSet, ids: np.ndarray) -> np.ndarray:
    """int64 [S]: a number for each image, equal where captions share one."""
    if shards.kind != "pairs":
        return np.arange(len(ids))
    places = [shards.locate(i) for i in ids.tolist()]
    keys = [(shard.prefix, int(shard.streams["images"].pointers[local])) for shard, local in places]
    numbers: dict[tuple[str, int], int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)


def shuffled_images(ids: np.ndarray, image: np.ndarray, seed: int) -> np.ndarray | None:
    """For each of `ids` [S] a sample that shows another image: images move on along one random cycle. None for a single image."""
    numbers, first = np.unique(image, return_index=True)
    if len(numbers) < 2:
        return None
    return ids[first[derangement(len(numbers), seed)[np.searchsorted(numbers, image)]]]


def _fitted(part: np.ndarray, length: int) -> np.ndarray:
    """`part` cut or filled with NaN to `length`: a larger image may have cut the caption."""
    whole = np.full(length, np.nan, dtype=np.float32)
    whole[: min(length, len(part))] = part[:length]
    return whole


def _loss_places(shards: ShardSet, index: int, count: int) -> np.ndarray:
    """int64 [count]: which tokens of the caption its loss tokens are."""
    spans = shards.loss_spans(index)
    if spans is None:
        return np.arange(count)
    return np.concatenate([np.arange(start, end) for start, end in spans.tolist()])[:count]

"""`megaprior evaluate` of a two-tower model: how often it finds the caption of an image among all held-out ones, and back.

    model + held-out shards -> embeddings -> RUN/analysis/retrieval_<shards>.json

An image counts once, whatever number of captions it has. Found is right when it belongs to the image, or is equal to what
does: the same picture under another caption, the same words below another picture. Of equal products, half are counted before
the right one.

Letters: G distinct images, S captions, E width of an embedding.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megaprior.data.heldout import rows
from megaprior.data.order import permute
from megaprior.data.shards import ShardSet
from megaprior.data.vision import VisionSpec
from megaprior.errors import DataError, UsageError
from megaprior.files import digest_bytes, kept_manifest, write_manifest
from megaprior.telemetry import progress, say

if TYPE_CHECKING:
    from megaprior.models.clip import Clip

FORMAT = "megaprior.retrieval"
FIRST = (1, 5, 10)  # the k of "right among the first k"
_ROW_TOKENS = 4096


def is_clip(model: Path | str) -> bool:
    """Whether a run, checkpoint or folder holds a two-tower model."""
    from megaprior.models.folder import model_type
    from megaprior.train.checkpoint import resolve_model

    return model_type(resolve_model(model)) == "clip"


def retrieval(model: Path | str, shards: Path | str, *, captions: int = 5000) -> dict[str, Any]:
    """Measure a two-tower model on held-out pairs and keep the result in the run; one of the same weights and pairs is reused.

    Args:
        model: a run of stage=clip, a checkpoint of one, or a CLIPModel's folder (the file then goes to its `analysis/`).
        captions: how many at most, the same ones for every model.

    Returns:
        What the file holds: images, captions; under "image_to_text" and "text_to_image" the shares r1, r5, r10 that are right
        among the first 1, 5 and 10, and the median rank of the first right one; under "chance" what random order gives.

    Raises:
        UsageError: the shards hold no pairs.
        DataError: model or shards are refused, or they differ in their tokenizer.
    """
    from megaprior.models.fingerprint import model_fingerprint
    from megaprior.train.checkpoint import checkpoint_name, resolve_model

    folder, opened = resolve_model(model), ShardSet.open(shards)
    if opened.kind != "pairs" or not len(opened):
        raise UsageError(
            f"{shards}: retrieval needs held-out pairs, these are {len(opened):,} samples of {opened.kind}"
        )
    count = min(captions, len(opened))
    key = {"model_digest": model_fingerprint(folder), "build_id": opened.build_id, "captions": count}
    path = Path(model) / "analysis" / f"retrieval_{opened.folder.resolve().name}.json"
    found = kept_manifest(path, key, format=FORMAT)
    if found is not None:
        say(f"{model}: retrieval with these weights is in {path} already")
    else:
        ids = np.sort(permute(np.arange(count), len(opened), 0))
        head = {"format": FORMAT, "version": 1, **key, "checkpoint": checkpoint_name(folder)}
        body = {**head, **measure(folder, opened, ids)}
        path.parent.mkdir(parents=True, exist_ok=True)
        found = write_manifest(path, body)
    say(f"{model}: {describe(found)}")
    return found


def describe(found: dict[str, Any]) -> str:
    """A result in one line."""
    parts = []
    for name, way in (("text to image", "text_to_image"), ("image to text", "image_to_text")):
        share, chance = found[way]["r1"], found["chance"][f"{way}_r1"]
        parts.append(f"{name} R@1 {share:.1%} ({share / chance:.1f}x chance), R@5 {found[way]['r5']:.1%}")
    return f"{found['images']:,} images, {found['captions']:,} captions: {'; '.join(parts)}"


def measure(folder: Path, shards: ShardSet, ids: np.ndarray) -> dict[str, Any]:
    """The result for the captions `ids` [S] and their images, under the model of a Hugging Face folder."""
    import torch

    from megaprior.models.clip import load_clip

    model = load_clip(folder)
    known, vocabulary = model.vocabulary, shards.tokenizer().vocab_size
    if known < vocabulary:
        raise DataError(
            f"{folder}: has {known:,} token embeddings, the tokenizer of {shards.folder} {vocabulary:,} ids"
        )
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    image_of = _numbers([digest_bytes(shards.image(i)) for i in ids.tolist()])
    text_of = _numbers([shards.tokens(i).tobytes() for i in ids.tolist()])
    images, texts = _embeddings(model, shards, ids)
    _, first = np.unique(image_of, return_index=True)
    return scores(images[first] @ texts.T, image_of=image_of, text_of=text_of)


def scores(products: np.ndarray, *, image_of: np.ndarray, text_of: np.ndarray) -> dict[str, Any]:
    """What similarities [G, S] say; `image_of` int64 [S] is each caption's image, `text_of` [S] equal where captions are."""
    right = _right(len(products), image_of, text_of)
    by_text, by_image = first_right(products.T, right.T), first_right(products, right)
    return {
        "images": len(products),
        "captions": len(image_of),
        "text_to_image": _shares(by_text),
        "image_to_text": _shares(by_image),
        "chance": {
            "text_to_image_r1": float(right.mean(axis=0).mean()),
            "image_to_text_r1": float(right.mean(axis=1).mean()),
        },
    }


def first_right(products: np.ndarray, right: np.ndarray) -> np.ndarray:
    """float64 [n]: for each row of `products` [n, m] the rank, from 1, of its best entry that is `right` [n, m].

    Wrong entries that equal it count one half each.
    """
    best = np.where(right, products, -np.inf).max(axis=1, keepdims=True)
    wrong = ~right
    return 1 + (wrong & (products > best)).sum(axis=1) + 0.5 * (wrong & (products == best)).sum(axis=1)


def _right(images: int, image_of: np.ndarray, text_of: np.ndarray) -> np.ndarray:
    """bool [G, S]: the caption, or one of the same words, belongs to the image."""
    own = np.zeros((images, int(text_of.max()) + 1), dtype=bool)
    own[image_of, text_of] = True
    return own[:, text_of]


def _shares(ranks: np.ndarray) -> dict[str, float]:
    return {**{f"r{k}": float((ranks <= k).mean()) for k in FIRST}, "median_rank": float(np.median(ranks))}


def _numbers(keys: list[Any]) -> np.ndarray:
    """int64: 0, 1, ... in the order in which different keys come."""
    numbers: dict[Any, int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)


def _embeddings(model: Clip, shards: ShardSet, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 [S, E] each, of the images and the captions of `ids`."""
    import torch

    found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    spec = VisionSpec.of(model.config)
    with progress(len(ids), "retrieval", "captions") as shown, torch.inference_mode():
        for batch in rows(shards, ids.tolist(), spec=spec, max_tokens=_ROW_TOKENS, pad_to=8):
            states = model.states(**batch.to(model.device).inputs)
            assert states.images is not None
            assert states.captions is not None
            both = zip(states.images.cpu().numpy(), states.captions.cpu().numpy(), strict=True)
            found |= dict(zip(batch.sample_ids.tolist(), both, strict=True))
            shown.advance(len(batch.sample_ids))
    return np.stack([found[i][0] for i in ids.tolist()]), np.stack([found[i][1] for i in ids.tolist()])

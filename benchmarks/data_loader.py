"""The loader's decoded pairs against the decoder alone, on the images of the same global batches."""

from __future__ import annotations

import argparse
import io
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.data_case import Arm, Case, say, take_turns
from megaprior.data.loader import DataConfig, Loader, SourceConfig
from megaprior.data.shards import ScoreWriter, ShardSet
from megaprior.data.vision import PatchSpec
from megaprior.data.weighting import WeightingConfig
from megaprior.tokenizer import load_tokenizer

_ARMS = {
    "ours, Loader.batch": "order, packing, tokens, scores, decoding, patches, token weights, tensors of every row",
    "decode, scale, cut": "Pillow alone on the same images: RGB, bicubic to the same size, the same patches",
    "decode": "Pillow alone: RGB at the size that it has",
}


def add_scores(shards: Path, seed: int) -> None:
    """A made-up score for every token, so that batches are weighted as PRIOR's are."""
    for shard in ShardSet.open(shards).shards:
        if (shard.folder / f"{shard.prefix}.ref_logprob.json").exists():
            continue
        rng = np.random.default_rng(seed)
        record = {"name": "made up", "fingerprint": "0" * 32}
        with ScoreWriter(shard, "ref_logprob", kind="logprob", scorer=record, first_token=None) as writer:
            for length in shard.streams["tokens"].lengths.tolist():
                writer.add(-rng.exponential(3.0, length).astype(np.float32))
            writer.finish()


def loader_case(
    options: argparse.Namespace, name: str, shards: Path, tokenizer: Path, *, batch: int, patch: int, limit: int
) -> Case:
    """One global batch a round."""
    torch.set_num_threads(1)
    add_scores(shards, options.seed)
    words = load_tokenizer(tokenizer)
    spec = PatchSpec(patch, limit, *range(words.vocab_size, words.vocab_size + 4))
    source = SourceConfig(path=str(shards))
    data = DataConfig(train=[source], batch_size=batch, max_tokens=8192, workers=1, cache_mb=0)
    loader = Loader(data, seed=options.seed, weighting=WeightingConfig(kind="prior"), spec=spec, tokenizer=words)
    case = Case(
        name=f"loader, {name}",
        title=f"Loader: {name}",
        unit="pairs",
        text=f"Global batches of {batch} pairs, PRIOR weights, patches of {patch} pixels, long side at most {limit}, rows of "
        "8,192 tokens; one decoding thread, nothing cached or prepared ahead. Pixels are compared bit for bit.",
        arms=[Arm(arm, what, ours=arm.startswith("ours"), base=arm != "decode") for arm, what in _ARMS.items()],
    )
    set_ = ShardSet.open(shards)

    def work(arm: Arm, step: int, images: list[bytes], sizes: list[tuple[int, int]]) -> None:
        if arm.ours:
            loader.batch(step)
        elif arm.name == "decode":
            for image in images:
                _decoded(image)
        else:
            for image, size in zip(images, sizes, strict=True):
                _patches(image, size, patch)

    def measure(arm: Arm, number: int) -> dict[str, float]:
        images, sizes = _pictures(set_, loader.sample_ids(number), spec)
        cpu, wall = time.process_time(), time.perf_counter()
        work(arm, number, images, sizes)
        # A caption's image is decoded once for each batch that holds it, however many of its captions are there.
        return {"amount": batch, "cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}

    say(f"{case.name}: checking")
    case.arms[1].refused = _difference(loader, set_, spec)
    take_turns(case, options.rounds, measure, seed=options.seed)
    loader.close()
    return case


def _pictures(shards: ShardSet, ids: np.ndarray, spec: PatchSpec) -> tuple[list[bytes], list[tuple[int, int]]]:
    """The different images of a batch and the size that each is scaled to."""
    found: dict[bytes, tuple[int, int]] = {}
    for i in ids.tolist():
        assert shards.image_sizes is not None
        columns, rows = spec.grid((int(shards.image_sizes[i, 0]), int(shards.image_sizes[i, 1])))
        found[shards.image(i)] = (columns * spec.patch, rows * spec.patch)
    return list(found), list(found.values())


def _decoded(image: bytes) -> object:
    from PIL import Image

    return Image.open(io.BytesIO(image)).convert("RGB")


def _patches(image: bytes, size: tuple[int, int], patch: int) -> np.ndarray:
    from PIL import Image

    picture = Image.open(io.BytesIO(image)).convert("RGB").resize(size, Image.Resampling.BICUBIC)
    cut = np.asarray(picture).reshape(size[1] // patch, patch, size[0] // patch, patch, 3)
    return cut.transpose(0, 2, 1, 3, 4).reshape(-1, patch * patch * 3)


def _difference(loader: Loader, shards: ShardSet, spec: PatchSpec) -> str:
    """Empty when the bare loop's patches are the loader's, image by image as the rows hold them."""
    batch = loader.batch(0)
    assert not batch.dropped, batch.dropped[0]
    for row in batch.micro:
        at = 0
        for i in row.sample_ids.tolist():
            ((image,), (size,)) = _pictures(shards, np.array([i]), spec)
            expected = _patches(image, size, spec.patch)
            if not np.array_equal(row.patches[at : at + len(expected)].numpy(), expected):
                return f"its pixels of {shards.describe(i)} are not ours"
            at += len(expected)
    return ""

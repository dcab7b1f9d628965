"""Small real shards for the tests of this room: token ids and images are chosen by the test, files are written for real."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from megaprior.data.scores import ScoreWriter
from megaprior.data.shard_writer import ShardWriter, write_build
from megaprior.data.shards import Shard
from megaprior.data.vision import PatchSpec, VisionSpec
from megaprior.tokenizer import Tokenizer, train_sentencepiece


@dataclass
class Content:
    """What goes into a shard folder, sample by sample; `sizes` None makes it text."""

    captions: Sequence[Sequence[int]]
    sizes: Sequence[tuple[int, int]] | None = None
    images: dict[int, bytes] = field(default_factory=dict)  # other bytes than a plain picture of that size
    image_keys: Sequence[str] | None = None
    spans: Sequence[Sequence[tuple[int, int]]] | None = None
    scores: Sequence[Sequence[float]] | None = None
    kind: str = "logprob"
    shards: int = 1


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A byte-fallback tokenizer of 300 ids: 0 <unk>, 1 BOS, 2 EOS, 3 to 6 the vision roles."""
    text = [f"a photo of {n} red squares and one blue circle at dusk" for n in range(64)]
    return train_sentencepiece(text, tmp_path_factory.mktemp("tokenizer"), vocab_size=300)


@pytest.fixture(scope="session")
def spec(tokenizer: Tokenizer) -> VisionSpec:
    """Patches of 4 pixels, long side at most 16: an image takes 3 to 21 tokens."""
    roles = tokenizer.reserved_roles()
    assert roles is not None
    return PatchSpec(
        patch=4, limit=16, patch_id=roles["patch"], start_id=roles["start"], row_id=roles["row"], end_id=roles["end"]
    )


@pytest.fixture(scope="session")
def content() -> type[Content]:
    """The record that `write_shards` takes."""
    return Content


@pytest.fixture(scope="session")
def write_shards(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Callable[[str, Content], Path]:
    """`write_shards(name, content)` writes a complete folder of shards and returns it."""

    def write(name: str, content: Content) -> Path:
        folder = tmp_path_factory.mktemp("shards") / name
        folder.mkdir()
        kind = "text" if content.sizes is None else "pairs"
        manifests = []
        for number, indices in enumerate(np.array_split(np.arange(len(content.captions)), content.shards)):
            writer = ShardWriter(
                folder, f"{number:05}", tokenizer=tokenizer, build_id=name, kind=kind, source={"name": name}, options={}
            )
            with writer:
                for i in indices.tolist():
                    size = None if content.sizes is None else content.sizes[i]
                    writer.add(
                        f"key{i}",
                        np.array(content.captions[i]),
                        image=None if size is None else content.images.get(i, picture(size, i)),
                        image_size=size,
                        image_key=None if content.image_keys is None else content.image_keys[i],
                        loss_spans=None if content.spans is None else np.array(content.spans[i]).reshape(-1, 2),
                    )
                manifests.append(writer.finish())
            if content.scores is not None:
                shard = Shard.open(folder, f"{number:05}")
                with ScoreWriter(shard, "ref_logprob", kind=content.kind, scorer={"fingerprint": "test"}) as scores:
                    for i in indices.tolist():
                        scores.add(np.array(content.scores[i], dtype=np.float32))
                    scores.finish()
        write_build(folder, build_id=name, shard_manifests=manifests, tokenizer=tokenizer, options={}, counts={})
        return folder

    return write


def picture(size: tuple[int, int], seed: int) -> bytes:
    """A PNG of noise, the same for the same seed."""
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()

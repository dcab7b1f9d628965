"""One pair build in a process of its own: ours, or the loop that one would write by hand; prints seconds and digests.

    python -m benchmarks.data_bare '{"arm": "bare", "tars": [...], "few": [...], "tokenizer": FILE, "out": DIR}'

    ours          megaprior.data_tools.building.build with one worker
    ours, header  the same with --check header
    bare          tarfile, the image's header and EXIF orientation, json, SentencePiece, two files and their lengths
    bare, decode  the same, and every image is decoded

Seconds are those of `tars` less those of the few pairs of `few`, which are built first: what a build costs whatever its
size (loading a tokenizer, say) is told apart. The bare loops refuse nothing, check nothing, sync nothing and keep no digests.
"""

from __future__ import annotations

import io
import json
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

CHECKS = {"ours": "whole", "ours, header": "header"}  # our arms, and what of an image they read


def bare(tars: list[str], tokenizer: str, out: Path, *, decode: bool) -> int:
    """Write DIR/tokens.bin, images.bin, sizes.npy and lengths.npy; returns how many pairs there were."""
    from PIL import Image
    from sentencepiece import SentencePieceProcessor

    words = SentencePieceProcessor(model_file=tokenizer)
    eos, lengths, sizes, images = [words.eos_id()], [], [], []
    out.mkdir(parents=True)
    with open(out / "tokens.bin", "wb") as token_file, open(out / "images.bin", "wb") as image_file:
        for tar in tars:
            for image, captions in samples(tar):
                with Image.open(io.BytesIO(image)) as picture:
                    width, height = picture.size
                    if Image.Image.getexif(picture).get(0x0112, 1) >= 5:
                        width, height = height, width
                    if decode:
                        picture.load()
                images.append(len(image))
                image_file.write(image)
                for caption in captions:
                    ids = words.encode(caption.strip()) + eos
                    token_file.write(np.array(ids, np.uint16).tobytes())
                    lengths.append(len(ids))
                    sizes.append((width, height))
    np.save(out / "lengths.npy", np.array(lengths, np.int32))
    np.save(out / "sizes.npy", np.array(sizes, np.int32))
    np.save(out / "images.npy", np.array(images, np.int32))
    return len(lengths)


def samples(path: str) -> Iterator[tuple[bytes, list[str]]]:
    """(image, captions) of each sample of a tar; its json's list of captions, else its text."""
    key, members = None, {}
    with tarfile.open(path, "r|") as tar:
        for member in tar:
            stem, _, suffix = member.name.partition(".")
            if stem != key and key is not None:
                yield _sample(members)
                members = {}
            key = stem
            file = tar.extractfile(member)
            assert file is not None
            members[suffix] = file.read()
    if members:
        yield _sample(members)


def _sample(members: dict[str, bytes]) -> tuple[bytes, list[str]]:
    image = next(data for suffix, data in members.items() if suffix not in ("txt", "json"))
    record = json.loads(members["json"])
    return image, record.get("captions") or [members["txt"].decode()]


def ours(tars: list[str], tokenizer: str, out: Path, *, check: str) -> int:
    """Our build; returns the pairs."""
    from megaprior.data_tools.building.build import build
    from megaprior.data_tools.options import BuildOptions

    options = BuildOptions(check=check)
    body = build([Path(tar) for tar in tars], out, tokenizer=Path(tokenizer), options=options, workers=1)
    assert not body["counts"]["quarantined"], body["counts"]
    return body["counts"]["samples"]


def content_of_bare(out: Path) -> dict[str, str]:
    """Digests of token ids, their lengths, image sizes and image bytes."""
    tokens, images = (np.fromfile(out / f"{name}.bin", np.uint8) for name in ("tokens", "images"))
    return _digests(tokens, np.load(out / "lengths.npy"), np.load(out / "sizes.npy"), images)


def content_of_ours(out: Path) -> dict[str, str]:
    """The same of a shard folder."""
    from megaprior.data.shards import ShardSet

    shards = ShardSet.open(out)
    flat = {
        name: np.concatenate([shard.streams[name].flat().view(np.uint8) for shard in shards.shards])
        for name in ("tokens", "images")
    }
    assert shards.image_sizes is not None
    return _digests(flat["tokens"], shards.token_counts, shards.image_sizes, flat["images"])


def _digests(tokens: np.ndarray, lengths: np.ndarray, sizes: np.ndarray, images: np.ndarray) -> dict[str, str]:
    from megaprior.files import digest_bytes

    parts = {"token ids": tokens, "lengths": lengths, "image sizes": sizes, "image bytes": images}
    return {name: digest_bytes(np.ascontiguousarray(part).tobytes()) for name, part in parts.items()}


def _timed(arm: str, tars: list[str], tokenizer: str, out: Path) -> dict[str, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    if arm in CHECKS:
        pairs = ours(tars, tokenizer, out, check=CHECKS[arm])
    else:
        pairs = bare(tars, tokenizer, out, decode=arm == "bare, decode")
    return {"amount": pairs, "cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}


def main(request: dict[str, Any]) -> dict[str, Any]:
    """Do what `request` asks."""
    tars, tokenizer, out = request["tars"], request["tokenizer"], Path(request["out"])
    if request["arm"] in CHECKS:  # imports are nobody's speed
        import megaprior.data_tools.building.build  # noqa: F401
    else:
        import PIL.Image
        import sentencepiece  # noqa: F401

        PIL.Image.init()
    small = _timed(request["arm"], request["few"], tokenizer, out.with_name(f"{out.name}_few"))
    spent = _timed(request["arm"], tars, tokenizer, out)
    spent = {name: value - small[name] for name, value in spent.items()} | {"start_up_cpu_s": small["cpu_s"]}
    content = content_of_ours(out) if request["arm"] in CHECKS else content_of_bare(out)
    return {**spent, "content": content}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))

"""The project's own sample data: pictures of shapes with captions whose every word is known to be boilerplate, image-related
or noise, text for the language models, and a probe of what a model sees.

    DIR/pairs/00000.tar ...  DIR/heldout/00000.tar   img2dataset-style: KEY.png, KEY.txt, KEY.json
    DIR/tower/00000.tar ...  the same of yet other scenes: what a vision tower learns from
    DIR/reference.txt.gz     captions of other scenes, one a line: the reference model's corpus
    DIR/text.txt.gz          running text about yet other scenes: the text model's corpus
    DIR/probe/probe.jsonl    {"image", "true", "false", "attribute"} a line, with probe/images/
    DIR/scenes.json          the manifest, written last

No picture occurs twice, in one part or across them. Everything is a function of the counts and the seed. `pairs` and then
`tower` are drawn last, so that more of them keep all that was drawn before.
"""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from random import Random
from typing import Any

from megaprior.data_tools.scenes import drawing as scene_drawing
from megaprior.data_tools.scenes.captions import CLASS_NAMES, running_text, statements, web_caption
from megaprior.data_tools.scenes.drawing import SIDE, Scene, content, random_scene, render
from megaprior.errors import UsageError
from megaprior.files import atomic_folder, write_manifest

PAIRS_PER_TAR = 2000
SCENES_PER_LINE = 3  # of running text
MOST_SCENES = 200_000  # of more than a million; they use up three quarters of those with a single shape
PROBED = {  # attribute in the probe -> (field of Scene, its values)
    "colour": ("colour", tuple(scene_drawing.COLOURS)),
    "shape": ("shape", scene_drawing.SHAPES),
    "size": ("size", tuple(scene_drawing.SIZES)),
    "position": ("position", scene_drawing.POSITIONS["single"]),
    "background": ("pattern", scene_drawing.PATTERNS),
}


def make_scenes(
    output: Path | str, *, pairs: int, heldout: int, reference: int, text: int, probe: int, tower: int, seed: int
) -> dict[str, Any]:
    """Writes the folder `output`, whole or not at all, and returns its manifest.

    Args:
        pairs, heldout: image-caption pairs to train on and to keep apart.
        reference, text: lines of captions and of running text.
        probe: items; each scene is shown beside one that differs in a single attribute, with the same two captions, true
            of one and false of the other, so that without the image both are equally likely. An even number.
        tower: image-caption pairs for a vision tower.

    Raises:
        UsageError: a count is negative, `probe` is odd, or there are not that many different scenes.
        DataError: `output` exists, or the disk is full.
    """
    counts = {"pairs": pairs, "heldout": heldout, "reference": reference, "text": text, "probe": probe, "tower": tower}
    for name, count in counts.items():
        if count < 0:
            raise UsageError(f"{name}={count}: a count cannot be negative")
    if probe % 2:
        raise UsageError(f"probe={probe}: probe items come in pairs; give an even number, such as {probe + 1}")
    needed = pairs + heldout + reference + SCENES_PER_LINE * text + probe + tower
    if needed > MOST_SCENES:
        raise UsageError(
            f"{needed:,} scenes asked for ({SCENES_PER_LINE} a line of text); at most {MOST_SCENES:,} can differ"
        )
    with atomic_folder(output) as folder:
        source = _Scenes()
        _write_probe(folder / "probe", source, probe, Random(f"{seed}/probe"))
        _write_tars(folder / "heldout", source, heldout, Random(f"{seed}/heldout"))
        rng = Random(f"{seed}/reference")
        _write_lines(folder / "reference.txt.gz", (web_caption(source.draw(rng), rng).text for _ in range(reference)))
        rng = Random(f"{seed}/text")
        texts = (running_text([source.draw(rng) for _ in range(SCENES_PER_LINE)], rng) for _ in range(text))
        _write_lines(folder / "text.txt.gz", texts)
        words = _write_tars(folder / "pairs", source, pairs, Random(f"{seed}/pairs"))
        _write_tars(folder / "tower", source, tower, Random(f"{seed}/tower"))
        body = {"format": "megaprior.scenes", "version": 1, "seed": seed, "counts": counts, "words_of_pairs": words}
        return write_manifest(folder / "scenes.json", body)


class _Scenes:
    """Random scenes, no picture of them twice."""

    def __init__(self) -> None:
        self._drawn: set[tuple[object, ...]] = set()

    def draw(self, rng: Random) -> Scene:
        return self._new(lambda: (random_scene(rng),))[0]

    def draw_two(self, rng: Random, attribute: str) -> tuple[Scene, Scene]:
        """Two single shapes that differ in `attribute` only."""
        field, values = PROBED[attribute]

        def two() -> tuple[Scene, Scene]:
            scene = random_scene(rng, kind="single")
            others = [value for value in values if value != getattr(scene, field)]
            return scene, replace(scene, **{field: rng.choice(others)})

        first, second = self._new(two)
        return first, second

    def _new(self, draw: Callable[[], tuple[Scene, ...]]) -> tuple[Scene, ...]:
        while True:
            scenes = draw()
            contents = {content(scene) for scene in scenes}
            if self._drawn.isdisjoint(contents):
                self._drawn |= contents
                return scenes


def _write_probe(folder: Path, source: _Scenes, items: int, rng: Random) -> None:
    (folder / "images").mkdir(parents=True)
    with open(folder / "probe.jsonl", "w", encoding="utf-8") as file:
        for number in range(0, items, 2):
            attribute = list(PROBED)[number // 2 % len(PROBED)]
            scenes = source.draw_two(rng, attribute)
            captions = statements(scenes, rng)
            for k, scene in enumerate(scenes):
                name = f"images/{number + k:06d}.png"
                (folder / name).write_bytes(render(scene))
                item = {"image": name, "true": captions[k], "false": captions[1 - k], "attribute": attribute}
                file.write(json.dumps(item, ensure_ascii=False) + "\n")


def _write_tars(folder: Path, source: _Scenes, pairs: int, rng: Random) -> dict[str, int]:
    """Returns how many words of each class the captions have."""
    folder.mkdir()
    classes: Counter[int] = Counter()
    for number, start in enumerate(range(0, pairs, PAIRS_PER_TAR)):
        with tarfile.open(folder / f"{number:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for k in range(min(PAIRS_PER_TAR, pairs - start)):
                scene = source.draw(rng)
                caption = web_caption(scene, rng)
                key = f"{number:05d}{k:04d}"
                record = {"key": key, "caption": caption.text, "width": SIDE, "height": SIDE, "status": "success"}
                record |= {"words": caption.words, "scene": asdict(scene)}
                _add(tar, f"{key}.png", render(scene))
                _add(tar, f"{key}.txt", caption.text.encode())
                _add(tar, f"{key}.json", json.dumps(record, ensure_ascii=False).encode())
                classes.update(word_class for _, _, word_class in caption.words)
    return {name: classes[k] for k, name in enumerate(CLASS_NAMES)}


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # owner 0 and time 0: the same bytes on every machine
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    with open(path, "wb") as raw, gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as file:
        for line in lines:
            file.write(line.encode() + b"\n")

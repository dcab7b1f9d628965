"""The generated sample: captions tell the truth about the pictures and about themselves, and the probe leaks nothing."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import re
import tarfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.stats import chi2_contingency

from megaprior.data_tools.scenes.captions import read_marks
from megaprior.data_tools.scenes.drawing import COLOURS, random_scene
from megaprior.data_tools.scenes.make import make_scenes
from megaprior.errors import DataError, UsageError
from megaprior.files import read_manifest

COUNTS = {"pairs": 2005, "heldout": 40, "reference": 300, "text": 200, "probe": 100, "tower": 60}
FEW = {"pairs": 8, "heldout": 4, "reference": 5, "text": 3, "probe": 10, "tower": 6}

# What a reader would call related to the image, and what nobody could know; all other words are boilerplate.
SEEN = set(
    """
    red orange yellow green blue purple pink brown small large two three four row column left right above below upper lower
    middle circle square triangle cross ring circles squares triangles crosses rings
    plain striped dotted checked white grey black beige background
    """.split()  # noqa: SIM905
)
NOISE = re.compile(
    r"\d+|\d+\.\d\d|[A-Z]\d+|January|March|April|June|August|October|December"
    r"|Anna|Boris|Carla|David|Elena|Felix|Greta|Hugo|Irina|Jonas|Karin|Zoë"
    r"|Adler|Baker|Costa|Dubois|Ferrari|Huang|Ivanova|Keller|Müller|Novak|Silva"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scenes") / "out"
    make_scenes(path, **COUNTS, seed=7)
    return path


@pytest.fixture(scope="module")
def pairs(folder: Path) -> list[dict[str, Any]]:
    return read_tars(folder / "pairs")


def read_tars(folder: Path) -> list[dict[str, Any]]:
    """The records of all tars, each with its `png` and `txt`."""
    records = []
    for path in sorted(folder.iterdir()):
        with tarfile.open(path) as tar:
            members = [(member.name, tar.extractfile(member).read()) for member in tar]
        for (png, image), (txt, text), (name, record) in zip(members[::3], members[1::3], members[2::3], strict=True):
            records.append({**json.loads(record), "png": image, "txt": text.decode()})
            assert (png, txt, name) == tuple(f"{records[-1]['key']}.{kind}" for kind in ("png", "txt", "json"))
    return records


def read_probe(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "probe" / "probe.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def box_of(image: bytes, colour: str) -> tuple[int, int, int, int] | None:
    """(left, top, width, height) of the pixels that have exactly that colour."""
    pixels = np.asarray(Image.open(io.BytesIO(image)))
    rows, columns = np.nonzero((pixels == COLOURS[colour]).all(-1))
    if not len(rows):
        return None
    return columns.min(), rows.min(), columns.max() - columns.min() + 1, rows.max() - rows.min() + 1


def seen_position(image: bytes, colour: str) -> str:
    left, top, width, height = box_of(image, colour)
    x, y = left + width / 2 - 32, top + height / 2 - 32
    if max(abs(x), abs(y)) < 6:
        return "middle"
    return ("left" if x < 0 else "right") if abs(x) > abs(y) else ("upper" if y < 0 else "lower")


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ---------------------------------------------------------------- captions


def test_marks_become_byte_ranges_and_classes() -> None:
    caption = read_marks("photo by ~Zoë ~Müller, a *red *circle - ~56.49 EUR!")
    assert caption.text == "photo by Zoë Müller, a red circle - 56.49 EUR!"
    expected = [
        (0, 5, 0),
        (6, 8, 0),
        (9, 13, 2),
        (14, 21, 2),
        (23, 24, 0),
        (25, 28, 1),
        (29, 35, 1),
        (38, 43, 2),
        (44, 47, 0),
    ]
    assert list(caption.words) == expected


def test_every_word_is_classed_as_a_reader_would(pairs: list[dict[str, Any]]) -> None:
    for pair in pairs:
        raw = pair["caption"].encode()
        words = [(raw[start:end].decode(), word_class) for start, end, word_class in pair["words"]]
        assert [word for word, _ in words] == [word.strip(",") for word in pair["caption"].split()]
        for word, word_class in words:
            assert word_class == (1 if word in SEEN else 2 if NOISE.fullmatch(word) else 0), word


def test_shares_of_the_classes(pairs: list[dict[str, Any]], folder: Path) -> None:
    counts = Counter(word_class for pair in pairs for _, _, word_class in pair["words"])
    assert counts[1] / counts.total() == pytest.approx(0.31, abs=0.03)
    assert counts[2] / counts.total() == pytest.approx(0.035, abs=0.01)
    manifest = read_manifest(folder / "scenes.json", format="megaprior.scenes")
    assert manifest["words_of_pairs"] == {"boilerplate": counts[0], "image-related": counts[1], "noise": counts[2]}


def test_attributes_are_uniform_and_independent() -> None:
    rng = Random(0)
    scenes = [asdict(random_scene(rng, kind="single")) for _ in range(10_000)]
    fields = ("colour", "shape", "size", "position", "pattern", "ground")
    for field in fields:
        counts = Counter(scene[field] for scene in scenes)
        expected = len(scenes) / len(counts)
        assert all(abs(count - expected) < 4 * expected**0.5 for count in counts.values()), field
    for one, two in itertools.combinations(fields, 2):
        values = [sorted({scene[field] for scene in scenes}) for field in (one, two)]
        table = np.zeros([len(value) for value in values])
        for scene in scenes:
            table[values[0].index(scene[one]), values[1].index(scene[two])] += 1
        assert chi2_contingency(table).pvalue > 1e-3, (one, two)


# ---------------------------------------------------------------- pictures


def test_pictures_show_what_captions_say(pairs: list[dict[str, Any]]) -> None:
    for pair in pairs[:400]:
        scene, caption, image = pair["scene"], pair["caption"], pair["png"]
        shown = {colour for colour in COLOURS if box_of(image, colour)}
        assert shown == {colour for colour in COLOURS if re.search(rf"\b{colour}\b", caption)}
        if scene["kind"] == "single":
            assert f"in the {seen_position(image, scene['colour'])} part" in caption
            size = {19: "small", 33: "large"}[box_of(image, scene["colour"])[2]]
            assert size == scene["size"]
            assert ({"small": "large", "large": "small"}[size]) not in caption
        if scene["kind"] == "two" and scene["colour"] != scene["other_colour"]:
            first, second = (box_of(image, scene[field]) for field in ("colour", "other_colour"))
            side = {"left of": first[0] < second[0], "above": first[1] < second[1]}
            side |= {"right of": first[0] > second[0], "below": first[1] > second[1]}
            assert side[scene["position"]]
            assert f"{scene['shape']} {scene['position']} a" in caption
        if scene["kind"] == "several":
            number = ("two", "three", "four")[scene["count"] - 2]
            assert re.search(rf"\b{number} {scene['colour']} {scene['shape']}(e?s) in a {scene['position']}\b", caption)


def test_shapes_fill_their_box_as_geometry_says(pairs: list[dict[str, Any]]) -> None:
    shares = {"circle": np.pi / 4, "square": 1.0, "triangle": 0.5, "cross": 5 / 9, "ring": np.pi / 4 * 5 / 9}
    large = [pair for pair in pairs if pair["scene"]["size"] == "large"]
    assert {pair["scene"]["shape"] for pair in large} == shares.keys()
    for pair in large[:100]:
        scene = pair["scene"]
        _, _, width, height = box_of(pair["png"], scene["colour"])
        pixels = (np.asarray(Image.open(io.BytesIO(pair["png"]))) == COLOURS[scene["colour"]]).all(-1).sum()
        assert pixels / (width * height) == pytest.approx(shares[scene["shape"]], abs=0.06)


def test_backgrounds_differ(pairs: list[dict[str, Any]]) -> None:
    tones = {"plain": 1, "striped": 2, "dotted": 2, "checked": 2}
    shares: dict[str, set[float]] = {}
    for pair in [pair for pair in pairs if pair["scene"]["size"] == "small"][:100]:
        pixels = np.asarray(Image.open(io.BytesIO(pair["png"]))).reshape(-1, 3)
        ground = pixels[~(pixels == COLOURS[pair["scene"]["colour"]]).all(-1)]
        _, counts = np.unique(ground, axis=0, return_counts=True)
        assert len(counts) == tones[pair["scene"]["pattern"]]
        shares.setdefault(pair["scene"]["pattern"], set()).add(round(counts.min() / counts.sum(), 1))
    assert shares == {"plain": {1.0}, "striped": {0.5}, "dotted": {0.1}, "checked": {0.5}}


# ---------------------------------------------------------------- files


def test_tars_hold_at_most_2000_pairs_and_say_the_same_thrice(folder: Path, pairs: list[dict[str, Any]]) -> None:
    assert [path.name for path in sorted((folder / "pairs").iterdir())] == ["00000.tar", "00001.tar"]
    assert [pair["key"] for pair in pairs] == [f"{i // 2000:05d}{i % 2000:04d}" for i in range(2005)]
    assert all(pair["txt"] == pair["caption"] for pair in pairs)
    for pair in pairs[::100]:
        image = Image.open(io.BytesIO(pair["png"]))
        assert (
            (image.format, image.mode, image.size)
            == ("PNG", "RGB", (pair["width"], pair["height"]))
            == ("PNG", "RGB", (64, 64))
        )


def test_text_files_share_the_vocabulary(folder: Path, pairs: list[dict[str, Any]]) -> None:
    lines = {
        name: gzip.decompress((folder / f"{name}.txt.gz").read_bytes()).decode().splitlines()
        for name in ("reference", "text")
    }
    assert {name: len(line) for name, line in lines.items()} == {"reference": 300, "text": 200}
    words = {name: {word.strip(",.;:") for line in part for word in line.split()} for name, part in lines.items()}
    openings = {word for pair in pairs for word in re.findall(r"\w+", pair["caption"]) if not NOISE.fullmatch(word)}
    assert words["text"] >= SEEN
    assert words["text"] >= openings
    assert not set(lines["reference"]) & set(lines["text"])
    assert not any(mark in line for part in lines.values() for line in part for mark in "*~{}")


def test_no_picture_occurs_twice(folder: Path, pairs: list[dict[str, Any]]) -> None:
    probed = [(folder / "probe" / item["image"]).read_bytes() for item in read_probe(folder)]
    others = [*read_tars(folder / "heldout"), *read_tars(folder / "tower")]
    images = [pair["png"] for pair in [*pairs, *others]] + probed
    assert len(images) == 2005 + 40 + 60 + 100
    assert len(set(images)) == len(images)


# ---------------------------------------------------------------- probe


def test_probe_is_balanced_so_that_text_alone_scores_one_half(folder: Path) -> None:
    items = read_probe(folder)
    assert Counter(item["attribute"] for item in items) == dict.fromkeys(
        ("colour", "shape", "size", "position", "background"), 20
    )
    assert Counter(item["true"] for item in items) == Counter(item["false"] for item in items)
    for score in (len, hash, lambda text: text[::-1]):
        right = [score(item["true"]) > score(item["false"]) for item in items]
        ties = [score(item["true"]) == score(item["false"]) for item in items]
        assert (sum(right) + sum(ties) / 2) / len(items) == 0.5


def test_probe_statements_differ_in_one_attribute(folder: Path) -> None:
    vocabularies = {
        "colour": set(COLOURS),
        "shape": {"circle", "square", "triangle", "cross", "ring"},
        "size": {"small", "large"},
        "position": {"left", "right", "upper", "lower", "middle"},
        "background": {"plain", "striped", "dotted", "checked"},
    }
    for item in read_probe(folder):
        pairs = zip(item["true"].split(), item["false"].split(), strict=True)
        changed = [pair for pair in pairs if pair[0] != pair[1] and set(pair) != {"a", "an"}]
        assert len(changed) == 1
        assert set(changed[0]) <= vocabularies[item["attribute"]]


def test_probe_images_show_the_true_statement(folder: Path) -> None:
    for item in read_probe(folder):
        image = (folder / "probe" / item["image"]).read_bytes()
        colour = next(colour for colour in COLOURS if box_of(image, colour))
        assert f" {colour} " in item["true"]
        assert (f" {colour} " in item["false"]) == (item["attribute"] != "colour")
        position = f"in the {seen_position(image, colour)} part"
        assert position in item["true"]
        assert (position in item["false"]) == (item["attribute"] != "position")
        size = {19: " small ", 33: " large "}[box_of(image, colour)[2]]
        assert size in item["true"].replace("a ", " a ")
        assert (size in item["false"].replace("a ", " a ")) == (item["attribute"] != "size")


# ---------------------------------------------------------------- repetition and refusals


def test_the_seed_decides_every_byte(tmp_path: Path) -> None:
    make_scenes(tmp_path / "one", **FEW, seed=1)
    make_scenes(tmp_path / "two", **FEW, seed=1)
    make_scenes(tmp_path / "more", **{**FEW, "pairs": 12}, seed=1)
    make_scenes(tmp_path / "other", **FEW, seed=2)
    one, two, more, other = (files_of(tmp_path / name) for name in ("one", "two", "more", "other"))
    assert one == two
    assert [name for name in one if one[name] == other[name]] == []
    assert [name for name in one if one[name] != more[name]] == ["pairs/00000.tar", "scenes.json"]
    assert read_tars(tmp_path / "more" / "pairs")[:8] == read_tars(tmp_path / "one" / "pairs")


def test_more_for_the_tower_keeps_every_other_byte(tmp_path: Path) -> None:
    for name, count in (("none", 0), ("some", 6), ("more", 9)):
        make_scenes(tmp_path / name, **{**FEW, "tower": count}, seed=1)
    none, some, more = (files_of(tmp_path / name) for name in ("none", "some", "more"))
    new = {"tower/00000.tar", "scenes.json"}
    assert {name for name in some if none.get(name) != some[name]} == new
    assert {name for name in some if more[name] != some[name]} == new
    assert read_tars(tmp_path / "more" / "tower")[:6] == read_tars(tmp_path / "some" / "tower")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heldout": -1}, "heldout=-1: a count cannot be negative"),
        ({"probe": 501}, "probe=501: probe items come in pairs; give an even number, such as 502"),
        ({"pairs": 200_000}, r"200,034 scenes asked for \(3 a line of text\); at most 200,000 can differ"),
    ],
)
def test_impossible_counts_are_refused(change: dict[str, int], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        make_scenes(tmp_path / "out", **{**FEW, **change}, seed=0)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    with pytest.raises(DataError, match="exists already"):
        make_scenes(tmp_path, **FEW, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]

"""What `stats` says, against shards whose every number is known, and against training's own packing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaprior.data.loader import DataConfig, Loader, SourceConfig
from megaprior.data.shard_writer import ShardWriter, write_build
from megaprior.data.shards import Shard
from megaprior.data.vision import PatchSpec
from megaprior.data.weighting import WeightingConfig
from megaprior.data_tools.stats.collect import describe, parse_vision
from megaprior.data_tools.stats.duplicates import Captions, Images
from megaprior.data_tools.stats.histogram import Histogram
from megaprior.data_tools.stats.packing_plan import Plan, predict
from megaprior.data_tools.stats.page import page
from megaprior.errors import DataError, UsageError
from megaprior.tokenizer import Tokenizer

Command = Callable[..., tuple[int, str, str]]
Row = tuple[list[int], bytes, tuple[int, int]]  # ids, image, its size


def write(folder: Path, tokenizer: Tokenizer, shards: list[list[Row]], *, text: bool = False) -> Path:
    """A complete folder of these very samples; equal images of a shard are stored once."""
    manifests, counts = [], Counter[str]()
    for number, rows in enumerate(shards):
        head = {"build_id": "b", "kind": "text" if text else "pairs", "source": {}, "options": {}}
        with ShardWriter(folder, f"{number:05d}", tokenizer=tokenizer, **head) as writer:
            for place, (ids, image, size) in enumerate(rows):
                picture = {} if text else {"image": image, "image_size": size, "image_key": image.hex()}
                writer.add(str(place), ids, truncated=ids[-1] != tokenizer.eos_id, **picture)
            writer.quarantined(2, reason="caption is blank")
            manifests.append(writer.finish())
            counts.update(manifests[-1]["counts"])
    write_build(folder, build_id="b", shard_manifests=manifests, tokenizer=tokenizer, options={}, counts=dict(counts))
    return folder


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return [*tokenizer.encode(text), tokenizer.eos_id]


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    red, blue = ids(tokenizer, "A photo of one red square"), ids(tokenizer, "blue")
    one, two, three = b"one image", b"two image", b"33333"
    return write(
        tmp_path / "pairs",
        tokenizer,
        [
            [(red, one, (64, 32)), (blue, one, (64, 32)), (red, two, (64, 32)), (blue[:-1], three, (32, 320))],
            [(red, one, (64, 32)), (blue, b"four!", (2000, 1000))],
        ],
    )


# ---------------------------------------------------------------- every number


def test_lengths_images_and_reasons_are_those_of_the_samples(folder: Path, tokenizer: Tokenizer) -> None:
    found = describe(folder, vision=parse_vision(["32:1024", "16:64"]))
    red, blue = ids(tokenizer, "A photo of one red square"), ids(tokenizer, "blue")
    lengths = sorted([len(red)] * 3 + [len(blue)] * 2 + [len(blue) - 1])
    assert found["samples"] == found["lengths"]["number"] == 6
    assert (found["lengths"]["min"], found["lengths"]["max"]) == (lengths[0], lengths[-1])
    assert found["lengths"]["mean"] == pytest.approx(np.mean(lengths))
    assert found["lengths"]["median"] == lengths[2]
    assert found["truncated"] == 1
    assert (found["quarantined"], found["quarantine"]) == (4, {"caption is blank": 4})
    images = found["images"]
    assert images["stored"] == 5
    assert (images["width"]["min"], images["width"]["max"]) == (32, 2000)
    assert images["aspect"]["counts"] == [1, 0, 0, 0, 0, 0, 0, 5, 0]  # 0.1, and 2.0 five times
    wide, tall = images["geometries"][0]["tokens"], images["geometries"][1]["tokens"]
    # 32:1024  64x32: 2 columns, 1 row -> 2+1+1; 32x320: 1 column, 10 rows -> 10+10+1; 2000x1000: 32 by 16 -> 512+16+1
    assert (wide["min"], wide["max"], wide["total"]) == (4, 529, 4 * 4 + 21 + 529)
    # 16:64    64x32: 4 by 2 -> 8+3; 32x320 -> 64 by 6.4 -> 1 by 4 -> 4+5; 2000x1000: 64x32 -> 8+3
    assert (tall["min"], tall["max"], tall["total"]) == (9, 11, 5 * 11 + 9)
    assert images["geometries"][0]["patches"]["total"] == 4 * 2 + 10 + 512


def test_vocabulary_counts_every_token(folder: Path, tokenizer: Tokenizer) -> None:
    found = describe(folder)["vocabulary"]
    red, blue = ids(tokenizer, "A photo of one red square"), ids(tokenizer, "blue")
    counts = Counter(red * 3 + blue * 3)
    counts[tokenizer.eos_id] -= 1
    top = found["top"][0]
    assert (top["id"], top["count"]) == (tokenizer.eos_id, 5)
    assert top["text"] == "<eos>"
    assert {each["id"]: each["count"] for each in found["top"]} == dict(counts.most_common(25))
    assert found["used"] == len(counts) - 1
    assert found["spelling"] < found["size"] == 380
    spelled = sum(len(tokenizer.token_bytes(i)) * n for i, n in counts.items())
    assert found["bytes_per_token"] == pytest.approx(spelled / (sum(counts.values()) - 5))
    assert found["unspelled"] == 0
    in_order = np.cumsum(sorted(counts.values(), reverse=True))
    assert found["ids_for_99_percent"] == 1 + np.searchsorted(in_order, 0.99 * in_order[-1])


def test_equals_are_counted_over_all_shards(folder: Path) -> None:
    found = describe(folder)
    assert found["equal_captions"] == {"looked_at": 6, "one_in": 1, "repeated": 3, "share": 0.5, "most": 3}
    # b"one image" is stored in both shards; b"two image" has its length and size, so both files are read
    assert found["images"]["equal"] == {
        "shared": 1, "read": 3, "looked_at": 5, "one_in": 1, "repeated": 1, "share": 0.2, "most": 2,
    }  # fmt: skip


@pytest.mark.parametrize(("other", "repeated"), [(b"same", 1), (b"twin", 0)])
def test_images_of_one_length_and_size_are_read_to_tell(
    tmp_path: Path, tokenizer: Tokenizer, other: bytes, repeated: int
) -> None:
    one, two = ([7], b"same", (9, 8)), ([7], other, (9, 8))
    found = describe(write(tmp_path / "pairs", tokenizer, [[one], [two, ([7], b"flat", (8, 9))]]))["images"]["equal"]
    assert (found["read"], found["looked_at"], found["repeated"]) == (2, 3, repeated)


def test_a_share_chosen_by_content_keeps_equals_together(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """4,000 captions, each three times in different shards: a share of 1 in 16 sees 2 of 3 repeated, exactly."""
    rng = np.random.default_rng(0)
    rows: list[Row] = [([int(i) for i in rng.integers(7, 380, 6)], b"%d" % n, (1 + n % 50, 1)) for n in range(4000)]
    folder = write(tmp_path / "pairs", tokenizer, [rows, rows[::-1], rows])
    captions, images = Captions(12_000, kept=1024), Images(12_000, read=1024)
    for prefix in ("00000", "00001", "00002"):
        shard = Shard.open(folder, prefix)
        captions.add(shard)
        images.add(shard)
    for told in (captions.told(), images.told()):
        assert told["one_in"] == 16
        assert told["share"] == pytest.approx(2 / 3)
        assert told["most"] == 3
    assert 4000 * 3 / 16 * 0.7 < captions.told()["looked_at"] < 4000 * 3 / 16 * 1.3


@given(st.lists(st.integers(0, 3000), min_size=1), st.floats(0.01, 1))
def test_histograms_know_their_values(values: list[int], share: float) -> None:
    histogram = Histogram()
    for part in (values[::2], values[1::2]):
        histogram.add(np.array(part, np.int64))
    assert (histogram.number, histogram.total) == (len(values), sum(values))
    summary = histogram.summary()
    assert (summary["min"], summary["max"]) == (min(values), max(values))
    least = histogram.quantile(share)
    assert sum(value <= least for value in values) >= share * len(values) - 1e-6
    assert sum(value < least for value in values) < share * len(values) + 1e-6
    bins = histogram.bins()
    assert sum(count for _, _, count in bins) == len(values)
    assert bins[0][0] == min(values)
    assert bins[-1][1] >= max(values)


# ---------------------------------------------------------------- packing


@pytest.mark.parametrize(("ranks", "batch_size"), [(1, 20), (3, 20), (3, 4)])
def test_the_prediction_is_what_the_loader_does(
    tmp_path: Path, tokenizer: Tokenizer, ranks: int, batch_size: int, picture: Any
) -> None:
    """A rank with fewer rows than another runs dummies beside them."""
    rng = np.random.default_rng(1)
    jpegs = [(picture(n, width=8 + 9 * n, height=20), (8 + 9 * n, 20)) for n in range(5)]
    rows: list[Row] = [([7] * int(rng.integers(1, 60)), *jpegs[n % 5]) for n in range(70)]
    folder = write(tmp_path / "pairs", tokenizer, [rows])
    spec = PatchSpec(4, 32, 3, 4, 5, 6)
    plan = Plan(max_tokens=100, batch_size=batch_size, ranks=ranks, pad_to=32)
    told = predict(folder, plan, [spec])[0]["training"]
    batches = []
    for rank in range(ranks):
        loader = Loader(
            DataConfig(train=[SourceConfig(path=str(folder))], batch_size=batch_size, max_tokens=100, pad_to=32),
            seed=0, weighting=WeightingConfig(kind="ntp"), spec=spec, tokenizer=tokenizer, rank=rank, world=ranks,
        )  # fmt: skip
        batches.append([loader.batch(step) for step in range(told["steps"])])
        loader.close()
    assert told["steps"] == 70 // batch_size
    assert told["micro_steps"] == np.mean([len(batch.micro) for batch in batches[0]])
    micro = [row for mine in batches for batch in mine for row in batch.micro]
    assert told["rows_per_step"] == sum(len(row.targets) > 0 for row in micro) / told["steps"]
    assert ranks == 1 or any(len(row.targets) == 0 for row in micro)
    real, padded = (
        sum(numbers) for numbers in zip(*((r.num_real_tokens, len(r.input_ids)) for r in micro), strict=True)
    )
    assert told["fill"] == pytest.approx(real / padded, abs=1e-12)


def test_packing_a_whole_by_hand(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Segments of 6, 5, 4, 3 and 3 with BOS in rows of 10: 6+4, 5+3, 3."""
    rows: list[Row] = [([7] * (length - 1), b"", (1, 1)) for length in (3, 6, 5, 4, 3)]
    told = predict(write(tmp_path / "t", tokenizer, [rows], text=True), Plan(max_tokens=10, batch_size=2), [None])[0]
    whole = told["whole"]
    assert (whole["segments"], whole["tokens"], whole["rows"], whole["fewest_rows"]) == (5, 21, 3, 3)
    assert whole["fill"] == pytest.approx(0.7)
    assert whole["fill_but_last"] == pytest.approx(18 / 20)
    assert told["mean_tokens"] == pytest.approx(21 / 5)


@pytest.mark.parametrize(("column", "name"), [("capsfusion", "capsfusion_10k"), (None, "flickr8k_text")])
def test_real_captions_fill_rows_of_8192(
    column: str | None, name: str, tmp_path: Path, shared: Callable[[str], Path], command: Command
) -> None:
    """Best fit fills all rows but the left-over one to 99.9% and more, and no packing could do with fewer rows."""
    source, words = next(shared(name).glob("*.gz")), shared("tokenizers") / "gpt2" / "encoder.json"
    options = ["--caption-column", column] if column else []
    assert (
        command("build", "--input", source, "--text", "--output", tmp_path / "t", "--tokenizer", words, *options)[0]
        == 0
    )
    code, out, _ = command("stats", tmp_path / "t", "--pack", 8192, "--json")
    assert code == 0
    whole = json.loads(out)["folders"][0]["packing"][0]["whole"]
    assert whole["fill_but_last"] >= 0.995  # measured: 0.9999
    assert whole["rows"] == whole["fewest_rows"]


# ---------------------------------------------------------------- what is shown


def test_table_json_and_page_tell_the_same(folder: Path, command: Command, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    code, out, _ = command("stats", folder, "--pack", 600, "--batch", 2, "--output", tmp_path / "s.html")
    assert code == 0
    for text in ("6 pairs, 2 shards", "3 of 6 (50.00%) were there before", "caption is blank", "batches of 2, ranks 1"):
        assert text in out, text
    shown = _Page((tmp_path / "s.html").read_text(encoding="utf-8"))
    assert "6 pairs, 2 shards" in shown.text
    assert shown.figures == 6
    assert not shown.tags & {"script", "link", "img", "iframe"}
    code, out, _ = command("stats", folder, "--json", "--pack", 600, "--batch", 2, "--output", tmp_path / "s.json")
    assert out == (tmp_path / "s.json").read_text(encoding="utf-8")
    packing = json.loads(out)["folders"][0]["packing"]
    assert [plan["vision"] for plan in packing] == [None, {"patch": 32, "limit": 1024}]


def test_a_page_escapes_what_captions_spell(folder: Path) -> None:
    found = describe(folder)
    found["folder"] = "<script>alert(1)</script>"
    found["quarantine"] = {"<b>": 1}
    found["vocabulary"]["top"][0]["text"] = "<script>"
    assert not _Page(page([found])).tags & {"script", "b"}


class _Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.figures, self.text = 0, ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        self.figures += tag == "figure"

    def handle_data(self, data: str) -> None:
        self.text += data


def test_what_cannot_be_is_refused(folder: Path, command: Command, tmp_path: Path, tokenizer: Tokenizer) -> None:
    for texts, told in ((["x"], "PATCH or PATCH:LIMIT"), (["32:100"], "not a multiple"), (["0"], "PATCH")):
        with pytest.raises(UsageError, match=told):
            parse_vision(texts)
    assert [(spec.patch, spec.limit) for spec in parse_vision(["32", "14", "16:512"])] == [
        (32, 1024),
        (14, 1022),
        (16, 512),
    ]
    for arguments, code, told in (
        ([folder, "--output", tmp_path / "x.png"], 2, "expected .html or .json"),
        ([folder, "--pack", 0], 2, "--pack 0"),
        ([tmp_path / "nothing"], 2, "no such folder"),
        ([tmp_path], 65, "no build.json"),
        ([folder, "--pack", 100], 65, "its image with BOS and one caption token takes 531 tokens"),
    ):
        found, _, error = command("stats", *arguments)
        assert (found, told in error) == (code, True), error
    empty = write(tmp_path / "empty", tokenizer, [[]])
    assert describe(empty)["lengths"] == {"number": 0, "bins": []}
    with pytest.raises(DataError, match="0 samples"):
        predict(empty, Plan(max_tokens=100), [None])
    assert command("stats", empty, "--output", tmp_path / "empty.html")[0] == 0


def test_no_image_is_opened_unless_another_has_its_length_and_size(folder: Path) -> None:
    shard, images = Shard.open(folder, "00001"), Images(2)  # files of 9 and 5 bytes
    images.add(shard)
    shard.close()
    (folder / "00001.images.bin").unlink()
    assert images.told()["read"] == 0

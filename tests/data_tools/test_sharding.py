"""What a shard holds, sample by sample, against its source."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from megaprior.data.shards import ShardSet, verify
from megaprior.data_tools.building.build import build
from megaprior.data_tools.building.sharding import in_subset, token_classes
from megaprior.data_tools.options import BuildOptions
from megaprior.data_tools.readers.samples import Caption, Sample
from megaprior.data_tools.sets.quarantining import recorded_options
from megaprior.errors import DataError
from megaprior.tokenizer import Tokenizer

MakeTar = Callable[..., Path]


@pytest.fixture
def built(tmp_path: Path, tokenizer_folder: Path) -> Callable[..., ShardSet]:
    def run(*paths: Path, output: str = "out", **options: Any) -> ShardSet:
        build(paths, tmp_path / output, tokenizer=tokenizer_folder, options=BuildOptions(**options))
        assert verify(tmp_path / output) == []
        return ShardSet.open(tmp_path / output)

    return run


def quarantine(shards: ShardSet) -> list[dict[str, str]]:
    return [json.loads(line) for line in (shards.folder / "quarantine.jsonl").read_text().splitlines()]


def write_lines(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines))
    return path


def test_every_caption_of_a_pair_and_its_image_once(
    built: Callable[..., ShardSet], make_tar: MakeTar, picture: Callable[..., bytes], tokenizer: Tokenizer
) -> None:
    first, second = picture(1), picture(2, width=9, height=31)
    texts = ["A photo of one red square", "<image> and </s> are text", "2 dogs"]
    members = [
        ("0.jpg", first),
        ("0.json", json.dumps({"captions": texts}).encode()),
        ("1.jpg", second),
        ("1.txt", b"grey star\n"),
    ]
    shards = built(make_tar("a.tar", members))
    assert (shards.kind, len(shards)) == ("pairs", 4)
    for index, text in enumerate([*texts, "grey star"]):
        assert shards.tokens(index).tolist() == [*tokenizer.encode(text), tokenizer.eos_id]
    assert tokenizer.decode(shards.tokens(1)[:-1].tolist()) == texts[1]
    assert [shards.image(index) for index in range(4)] == [first, first, first, second]
    assert shards.image_sizes is not None
    assert shards.image_sizes.tolist() == [[20, 10]] * 3 + [[9, 31]]
    assert [shards.key(index) for index in range(4)] == ["0#0", "0#1", "0#2", "1"]
    pointers = shards.shards[0].streams["images"].pointers
    assert pointers[0] == pointers[1] == pointers[2] < pointers[3]
    assert shards.shards[0].manifest["counts"]["images"] == 2
    assert not (shards.folder / "quarantine.jsonl").exists()


def test_lines_that_share_an_image_store_it_once(
    built: Callable[..., ShardSet], tmp_path: Path, picture: Callable[..., bytes]
) -> None:
    (tmp_path / "a.jpg").write_bytes(picture(1))
    (tmp_path / "copy.jpg").write_bytes(picture(1))
    rows = [{"image": name, "caption": f"{i} dogs"} for i, name in enumerate(("a.jpg", "copy.jpg", "a.jpg"))]
    shards = built(write_lines(tmp_path / "a.jsonl", *map(json.dumps, rows)))
    assert len(shards) == 3
    assert shards.shards[0].manifest["counts"]["images"] == 1
    assert shards.shards[0].streams["images"].bin.stat().st_size == len(picture(1))


def test_bad_images_are_quarantined_with_a_reason(
    built: Callable[..., ShardSet], make_tar: MakeTar, picture: Callable[..., bytes]
) -> None:
    bad = {
        "cut": picture(1)[:-300],
        "empty": b"",
        "page": b"<html>404</html>",
        "eps": b"%!PS-Adobe",
        "svg": b"<svg/>",
        "tiff": b"II*\0",
    }
    members = [(f"{name}.jpg", data) for name, data in bad.items()] + [("good.jpg", picture(2))]
    tar = make_tar(
        "a.tar", [pair for name, data in members for pair in ((name, data), (name.replace("jpg", "txt"), b"dogs"))]
    )
    shards = built(tar)
    assert [shards.key(index) for index in range(len(shards))] == ["good"]
    found = quarantine(shards)
    assert [(entry["source"], entry["sample"]) for entry in found] == [("a.tar", name) for name in bad]
    reasons = [entry["reason"].partition(":")[0] for entry in found]
    assert reasons == ["image truncated", "image empty", "image html", "image eps", "image svg", "image tiff"]
    manifest = shards.shards[0].manifest
    assert manifest["quarantine"] == dict.fromkeys(reasons, 1)
    assert manifest["counts"]["quarantined"] == shards.build["counts"]["quarantined"] == 6


def test_a_header_alone_lets_an_image_through_that_breaks_off_and_nothing_else(
    built: Callable[..., ShardSet], make_tar: MakeTar, picture: Callable[..., bytes]
) -> None:
    large = picture(1, width=200, height=100)
    images = {"cut": large[:-300], "page": b"<html>404</html>", "good": large}
    tar = make_tar(
        "a.tar", [pair for n, data in images.items() for pair in ((f"{n}.jpg", data), (f"{n}.txt", b"dogs"))]
    )
    shards = built(tar, check="header")
    assert [shards.key(index) for index in range(len(shards))] == ["cut", "good"]
    assert shards.image_sizes is not None
    assert shards.image_sizes.tolist() == [[200, 100]] * 2
    assert [entry["reason"].partition(":")[0] for entry in quarantine(shards)] == ["image html"]
    manifest = shards.shards[0].manifest
    assert manifest["options"]["check"] == "header"
    assert recorded_options(manifest["options"]).check == "header"


def test_a_long_caption_is_cut_and_loses_its_eos(
    built: Callable[..., ShardSet], tmp_path: Path, tokenizer: Tokenizer
) -> None:
    text = "dog " * 100_000
    fits = "a" + " dogs" * 6
    assert len(tokenizer.encode(fits)) < 16 < len(tokenizer.encode(fits * 3))
    shards = built(write_lines(tmp_path / "a.txt", text, fits), max_sequence=16)
    assert shards.token_counts[0] == 16
    assert shards.tokens(0).tolist() == tokenizer.encode(text.strip())[:16]
    assert shards.tokens(1)[-1] == tokenizer.eos_id
    assert shards.build["counts"]["truncated"] == 1


def test_awkward_captions_are_text_or_told(
    built: Callable[..., ShardSet], tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """With the default limit: empty and blank ones are quarantined, 100,000 tokens cut, control tokens spelled out."""
    spelled = ["<image>", "<|eot_id|>", "</s> <s>", "<vision> </vision> <vrow_sep>", "<eos>", "a <unk> b"]
    endless = "one dog " * 100_000
    captions = ["", "   \t", *spelled, endless]
    path = write_lines(tmp_path / "a.jsonl", *(json.dumps({"caption": caption}) for caption in captions))
    shards = built(path, text=True)
    assert [entry["reason"] for entry in quarantine(shards)] == ["caption is empty", "caption is blank"]
    assert [entry["sample"] for entry in quarantine(shards)] == ["line 1", "line 2"]
    control = {tokenizer.bos_id, tokenizer.eos_id, *tokenizer.reserved_roles().values()}
    for index, text in enumerate(spelled):
        *words, last = shards.tokens(index).tolist()
        assert last == tokenizer.eos_id
        assert not control & set(words), text
        assert tokenizer.decode(words) == text
    whole = tokenizer.encode(endless.strip())
    assert len(whole) > 100_000
    assert shards.tokens(len(spelled)).tolist() == whole[:2048]
    counts = shards.build["counts"]
    assert (counts["samples"], counts["quarantined"], counts["truncated"]) == (len(spelled) + 1, 2, 1)


def test_the_limit_counts_the_eos(built: Callable[..., ShardSet], tmp_path: Path, tokenizer: Tokenizer) -> None:
    text = "A photo of one red square"
    k = len(tokenizer.encode(text)) + 1
    path = write_lines(tmp_path / "a.txt", text)
    assert built(path, output="fits", max_sequence=k).tokens(0)[-1] == tokenizer.eos_id
    cut = built(path, output="cut", max_sequence=k - 1)
    assert cut.tokens(0).tolist() == tokenizer.encode(text)
    assert cut.build["counts"]["truncated"] == 1


def test_documents_become_windows_and_lose_nothing(
    built: Callable[..., ShardSet], tmp_path: Path, tokenizer: Tokenizer
) -> None:
    texts = ["one red square\n\nbeside " * 20, "grey star"]
    path = write_lines(tmp_path / "a.jsonl", *(json.dumps({"text": text}) for text in texts))
    shards = built(path, text=True, documents=True, caption_column="text", max_sequence=32)
    expected = [*tokenizer.encode(texts[0]), tokenizer.eos_id]
    windows = -(-len(expected) // 32)
    assert windows > 3
    assert np.concatenate([shards.tokens(i) for i in range(windows)]).tolist() == expected
    assert shards.token_counts[: windows - 1].tolist() == [32] * (windows - 1)
    assert shards.shards[0].streams["tokens"].documents.tolist() == [0, windows, windows + 1]
    assert [shards.key(i) for i in (0, windows - 1, windows)] == [
        "line 1 part 0",
        f"line 1 part {windows - 1}",
        "line 2",
    ]
    assert shards.build["counts"]["truncated"] == 0


def test_words_become_classes_of_tokens(
    built: Callable[..., ShardSet], make_tar: MakeTar, picture: Callable[..., bytes], tokenizer: Tokenizer
) -> None:
    text = "A photo of één red square 7"  # é is two bytes and, unseen in training, byte tokens
    spot = {
        word: (len(text[: text.index(word)].encode()), len(text[: text.index(word) + len(word)].encode()))
        for word in ("één", "red", "7")
    }
    words = [[*spot["één"], 2], [*spot["red"], 1], [*spot["7"], 2]]
    body = json.dumps({"caption": text, "words": words}).encode()
    members = [("0.jpg", picture(1)), ("0.json", body), ("1.jpg", picture(2)), ("1.txt", b"no truth here")]
    shards = built(make_tar("a.tar", members))
    assert shards.has_word_class
    tokens, classes = shards.tokens(0), shards.word_class(0)
    assert len(tokens) == len(classes)
    said = {
        value: b"".join(tokenizer.token_bytes(int(t)) for t, c in zip(tokens, classes, strict=True) if c == value)
        for value in (1, 2)
    }
    assert said[1].decode().strip() == "red"
    assert said[2].decode().replace(" ", "") == "één7"
    assert classes[-1] == 0  # the EOS
    assert quarantine(shards)[0]["reason"] == "no words annotation: the first caption of its file has one"


def test_the_class_of_a_token_is_that_of_most_of_its_bytes() -> None:
    spans = [(0, 4), (4, 6), (6, 6), (6, 12)]
    assert token_classes(spans, ((0, 1, 2), (1, 4, 1), (5, 6, 2))).tolist() == [1, 2, 0, 0, 0]
    assert token_classes(spans, ((6, 9, 2), (9, 12, 1))).tolist() == [0, 0, 0, 1, 0]  # a tie: the lower class
    assert token_classes([], ()).tolist() == [0]


def test_subsets_are_by_content_and_complementary() -> None:
    def kept(start: float, end: float) -> list[int]:
        options = BuildOptions(subset=(start, end))
        images = [Sample(key=str(i), captions=(), image=bytes([i, 7])) for i in range(200)]
        return [int(sample.key) for sample in images if in_subset(sample, options)]

    quarters = [kept(i / 4, (i + 1) / 4) for i in range(4)]
    assert sorted(index for quarter in quarters for index in quarter) == list(range(200))
    assert kept(0, 0.5) == sorted(quarters[0] + quarters[1])
    assert all(30 < len(quarter) < 70 for quarter in quarters)
    fraction = xxhash.xxh3_64_intdigest(bytes([3, 7])) / 2**64
    assert (3 in kept(0, 0.5)) == (fraction < 0.5)
    text = Sample(key="t", captions=(Caption(key="t", text="dog"), Caption(key="t", text="cat")))
    fraction = xxhash.xxh3_64_intdigest(b"dog\ncat") / 2**64
    assert in_subset(text, BuildOptions(subset=(0, 0.5))) == (fraction < 0.5)


def test_halves_of_real_pairs_share_no_image(built: Callable[..., ShardSet], shared: Callable[[str], Path]) -> None:
    folder = shared("pd_archives")
    text = built(folder, output="text", text=True, subset=(0.0, 0.5))
    pairs = built(folder, output="pairs", subset=(0.5, 1.0))
    keys = [{shards.key(index) for index in range(len(shards))} for shards in (text, pairs)]
    assert not keys[0] & keys[1]
    assert len(keys[0] | keys[1]) == 888
    assert text.build["counts"]["outside_subset"] == len(pairs)


def test_no_sample_at_all_is_refused_and_explained(
    built: Callable[..., ShardSet], make_tar: MakeTar, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"no sample is left; 1 quarantined.*a.tar, 0: image html"):
        built(make_tar("a.tar", [("0.jpg", b"<html>"), ("0.txt", b"dog")]))
    assert not (tmp_path / "out" / "build.json").exists()
    with pytest.raises(DataError, match="the build is not complete"):
        ShardSet.open(tmp_path / "out")

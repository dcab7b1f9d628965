"""Shard folders: written whole or not at all, refused when anything in them does not belong together, verified bit by bit."""

from __future__ import annotations

import gzip
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megaprior.data import manifest as mf
from megaprior.data.indexed_writer import IndexedWriter
from megaprior.data.shards import ScoreWriter, Shard, ShardSet, ShardWriter, verify, write_build
from megaprior.errors import DataError
from megaprior.files import block_digests, digest_json, write_manifest
from megaprior.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece

CAPTIONS = ([10, 11, 12, 2], [20, 2], [10, 30, 31, 2], [40, 41, 42, 43, 2], [20, 50, 2])
STREAMS = ("tokens", "keys", "images", "image_sizes", "word_class", "ref_logprob")


def build(folder: Path, tokenizer: Tokenizer, *, build_id: str = "b1", captions=CAPTIONS, options=None) -> Path:
    """Two shards of pairs with word classes and scores; samples 0 and 2 share an image."""
    manifests = []
    for prefix, part in (("00000", captions[:3]), ("00001", captions[3:])):
        with ShardWriter(
            folder, prefix, tokenizer=tokenizer, build_id=build_id, kind="pairs", source={"file": "a.tar"}, options={}
        ) as writer:
            for i, tokens in enumerate(part):
                image = b"JPEG%d" % (i % 2)
                classes = [0] * len(tokens)
                size = (640 + i % 2, 480)
                writer.add(f"k{i}", tokens, image=image, image_size=size, image_key=str(i % 2), word_class=classes)
            writer.quarantined(2, reason="truncated")
            manifests.append(writer.finish())
        score(Shard.open(folder, prefix))
    options = options or {"max_sequence": 2048}
    write_build(folder, build_id=build_id, shard_manifests=manifests, tokenizer=tokenizer, options=options, counts={})
    return folder


def score(shard: Shard) -> None:
    with ScoreWriter(shard, "ref_logprob", kind="logprob", scorer={"fingerprint": "f"}) as writer:
        for i in range(len(shard)):
            tokens = shard.streams["tokens"][i].astype(np.float32)
            writer.add(-tokens / 8)
        writer.finish()


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """Built once, never changed."""
    return build(tmp_path_factory.mktemp("built") / "pairs", tokenizer)


@pytest.fixture
def folder(tmp_path: Path, built: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(built, tmp_path / "pairs"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ---------------------------------------------------------------- what is written comes back


def test_every_sample_comes_back_under_its_index(tmp_path: Path, tokenizer: Tokenizer) -> None:
    shards = ShardSet.open(build(tmp_path / "pairs", tokenizer), scores="ref_logprob", tokenizer=tokenizer)
    assert (len(shards), shards.kind, shards.build_id, shards.score_kind) == (5, "pairs", "b1", "logprob")
    assert (shards.fingerprint, shards.scorer) == (tokenizer.fingerprint, {"fingerprint": "f"})
    assert (shards.token_counts.dtype, shards.token_counts.tolist()) == (np.int32, [4, 2, 4, 5, 3])
    assert shards.image_sizes is not None
    assert shards.image_sizes.dtype == np.int32
    assert shards.image_sizes.tolist() == [[640, 480], [641, 480], [640, 480], [640, 480], [641, 480]]
    assert shards.has_word_class
    for i, tokens in enumerate(CAPTIONS):
        assert (shards.tokens(i).dtype, shards.tokens(i).tolist()) == (np.uint16, tokens)
        assert (shards.scores(i).dtype, shards.scores(i).tolist()) == (np.float32, [-t / 8 for t in tokens])
        assert shards.word_class(i).tolist() == [0] * len(tokens)
        assert shards.loss_spans(i) is None
    assert [shards.image(i) for i in range(5)] == [b"JPEG0", b"JPEG1", b"JPEG0", b"JPEG0", b"JPEG1"]
    assert [shards.key(i) for i in range(5)] == ["k0", "k1", "k2", "k0", "k1"]
    assert [(shards.locate(i)[0].prefix, shards.locate(i)[1]) for i in (0, 2, 3, 4)] == [
        ("00000", 0),
        ("00000", 2),
        ("00001", 0),
        ("00001", 1),
    ]
    assert shards.describe(4) == "pairs/00001 sample 1 (key k1)"
    assert shards.tokenizer().fingerprint == tokenizer.fingerprint
    for index in (-1, 5):
        with pytest.raises(IndexError, match="of 5"):
            shards.tokens(index)
    assert verify(shards.folder) == []


def test_the_manifest_counts_what_is_there(folder: Path, tokenizer: Tokenizer) -> None:
    manifest = json.loads((folder / "00000.json").read_text())
    assert manifest["counts"] == {
        "samples": 3,
        "documents": 3,
        "tokens": 10,
        "loss_tokens": 10,
        "images": 2,
        "truncated": 0,
        "quarantined": 2,
    }
    assert manifest["quarantine"] == {"truncated": 2}
    assert manifest["streams"]["images"]["aliased"] is True
    assert manifest["streams"]["images"]["bin"]["bytes"] == len(b"JPEG0JPEG1")
    assert manifest["streams"]["tokens"]["dtype"] == "uint16"
    assert manifest["tokenizer"]["identity"] == tokenizer.identity()
    scores = json.loads((folder / "00000.ref_logprob.json").read_text())
    assert scores["tokens_digest"] == digest_json(manifest["streams"]["tokens"])
    assert scores["lengths_digest"] == manifest["lengths_digest"]
    built = json.loads((folder / "build.json").read_text())
    assert built["shards"][0] == {"prefix": "00000", "digest": manifest["digest"], "samples": 3}
    assert sorted(built["files"]) == ["tokenizer/tokenizer.model"]


def test_text_of_several_sequences_a_document_and_loss_spans(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with ShardWriter(
        tmp_path, "00000", tokenizer=tokenizer, build_id="b", kind="text", source={}, options={}
    ) as writer:
        writer.add("long part 0", [7, 8, 9], loss_spans=[[0, 1], [2, 3]], truncated=True, end_document=False)
        writer.add("long part 1", [10, 2], loss_spans=[])
        writer.add("short", [11, 2], loss_spans=[[1, 2]])
        manifest = writer.finish()
    write_build(tmp_path, build_id="b", shard_manifests=[manifest], tokenizer=tokenizer, options={}, counts={})
    shards = ShardSet.open(tmp_path)
    assert [shards.loss_spans(i).tolist() for i in range(3)] == [[[0, 1], [2, 3]], [], [[1, 2]]]
    assert manifest["counts"] | {"documents": 2, "loss_tokens": 3, "truncated": 1} == manifest["counts"]
    assert shards.shards[0].streams["tokens"].documents.tolist() == [0, 2, 3]
    assert shards.image_sizes is None
    assert not shards.has_word_class
    assert verify(tmp_path) == []


def test_lists_and_arrays_of_any_length_give_the_same_bytes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    lengths = [3, 1, 200_000, 2, 131_072, 5, *[700] * 500]  # shorter and longer than what waits to be written
    samples = [np.random.default_rng(k).integers(0, tokenizer.vocab_size, k) for k in lengths]
    for name, given in (("lists", np.ndarray.tolist), ("arrays", np.asarray), ("stored", lambda ids: ids.astype("u2"))):
        with ShardWriter(
            tmp_path / name, "00000", tokenizer=tokenizer, build_id="b", kind="text", source={}, options={}
        ) as writer:
            assert [writer.add(str(i), given(ids)) for i, ids in enumerate(samples)] == list(range(len(samples)))
            writer.finish()
    assert contents(tmp_path / "lists") == contents(tmp_path / "arrays") == contents(tmp_path / "stored")
    shard = Shard.open(tmp_path / "lists", "00000")
    assert [stream.tolist() for stream in map(shard.streams["tokens"].__getitem__, range(len(samples)))] == [
        ids.tolist() for ids in samples
    ]
    assert shard.manifest["streams"]["tokens"]["bin"]["blocks"] == block_digests(tmp_path / "lists/00000.tokens.bin")


@pytest.mark.parametrize("bad", [[-1], [32_000], [3, 70_000], [3, -1], [1.5], [3, 1.5], [True], ["a"], [3, [4]], []])
def test_a_list_of_no_ids_is_refused_at_once_by_name(tmp_path: Path, tokenizer: Tokenizer, bad: list) -> None:
    with ShardWriter(
        tmp_path, "00000", tokenizer=tokenizer, build_id="b", kind="text", source={}, options={}
    ) as writer:
        writer.add("good", [3, 2])
        with pytest.raises((DataError, ValueError), match=r"sample 1 \(key bad\)|inhomogeneous"):
            writer.add("bad", bad)
        writer.add("good too", [4, 2])
        assert writer.finish()["counts"]["samples"] == 2


def test_a_shard_without_samples_takes_no_index(tmp_path: Path, tokenizer: Tokenizer) -> None:
    manifests = []
    for prefix, keys in (("00000", ""), ("00001", "ab"), ("00002", ""), ("00003", "c")):
        with ShardWriter(
            tmp_path, prefix, tokenizer=tokenizer, build_id="b", kind="text", source={}, options={}
        ) as shard:
            for key in keys:
                shard.add(key, [5, 2])
            manifests.append(shard.finish())
    write_build(tmp_path, build_id="b", shard_manifests=manifests, tokenizer=tokenizer, options={}, counts={})
    shards = ShardSet.open(tmp_path)
    assert [(shards.locate(i)[0].prefix, shards.key(i)) for i in range(3)] == [
        ("00001", "a"),
        ("00001", "b"),
        ("00003", "c"),
    ]
    assert verify(tmp_path) == []


def test_two_identical_writes_give_identical_folders(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "elsewhere").mkdir()
    one = contents(build(tmp_path / "pairs", tokenizer))
    other = contents(build(tmp_path / "elsewhere" / "pairs", tokenizer))
    assert one == other
    assert len(one) == 2 + 2 * (2 + 2 * len(STREAMS))  # build.json, the tokenizer; two manifests a shard
    for name, data in one.items():
        if name.endswith(".json"):
            assert socket.gethostname().encode() not in data
            assert str(tmp_path).encode() not in data


def test_more_shards_than_the_process_may_map(tmp_path: Path, tokenizer: Tokenizer) -> None:
    captions = [[3 + i, 2] for i in range(12)]
    manifests = []
    for i, tokens in enumerate(captions):
        with ShardWriter(
            tmp_path, f"{i:05}", tokenizer=tokenizer, build_id="b", kind="text", source={}, options={}
        ) as writer:
            writer.add(str(i), tokens)
            manifests.append(writer.finish())
    write_build(tmp_path, build_id="b", shard_manifests=manifests, tokenizer=tokenizer, options={}, counts={})
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 24, hard))
    try:
        shards = ShardSet.open(tmp_path)
        assert [shards.tokens(i).tolist() for i in range(12)] == captions
        assert [shards.key(i) for i in range(12)] == [str(i) for i in range(12)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# ---------------------------------------------------------------- the boundary of the token dtype


@pytest.mark.parametrize(("size", "dtype"), [(65_499, "uint16"), (65_500, "int32")])
def test_the_last_id_of_a_vocabulary_at_the_boundary(tmp_path: Path, size: int, dtype: str) -> None:
    """A real tokenizer.json of that many tokens."""
    vocabulary = {"<s>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, size)}}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    body = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": content, **flags} for i, content in enumerate(("<s>", "</s>"))],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(body))
    check_last_id(tmp_path / "shards", load_tokenizer(tmp_path), size, dtype)


def test_the_last_id_of_llama_3(tmp_path: Path, shared: Callable[[str], Path]) -> None:
    check_last_id(tmp_path / "shards", load_tokenizer(shared("tokenizers") / "llama3"), 128_256, "int32")


def check_last_id(folder: Path, tokenizer: Tokenizer, size: int, dtype: str) -> None:
    assert tokenizer.vocab_size == size
    with ShardWriter(folder, "00000", tokenizer=tokenizer, build_id="b", kind="text", source={}, options={}) as writer:
        writer.add("a", [size - 1, 0])
        with pytest.raises(DataError, match=f"{size} in a vocabulary of {size:,}"):
            writer.add("b", [0, size])
        writer.finish()
    tokens = Shard.open(folder, "00000").streams["tokens"]
    assert (tokens.dtype.name, [sequence.tolist() for sequence in tokens]) == (dtype, [[size - 1, 0]])


# ---------------------------------------------------------------- bad samples, unfinished work


BAD_SAMPLES = (
    ({"tokens": []}, "0 tokens"),
    ({"tokens": [0.5, 2.0]}, "2 tokens of float64"),
    ({"tokens": [300, 2]}, "token ids 2 to 300 in a vocabulary of 300"),
    ({"tokens": [-1, 2]}, "token ids -1 to 2"),
    ({"image": None}, "no image"),
    ({"image": b""}, "no image"),
    ({"image_size": None}, "image size None"),
    ({"image_size": (0, 5)}, r"image size \(0, 5\)"),
    ({"image_size": (2**31, 5)}, "image size"),
    ({"word_class": [0]}, "1 word classes for 2 tokens"),
    ({"word_class": [0, 3]}, "0, 1 or 2"),
    ({"word_class": None}, "word_class must be given for every sample"),
    ({"loss_spans": [[0, 2]]}, "loss_spans must be given for every sample"),
    ({"loss_spans": [[0, 3]]}, "within 2 tokens"),
    ({"loss_spans": [[1, 0]]}, "ascending"),
)


def test_a_refused_sample_leaves_the_streams_aligned(tmp_path: Path, tokenizer: Tokenizer) -> None:
    good = {"tokens": [5, 2], "image": b"x", "image_size": (4, 3), "word_class": [1, 0]}
    with ShardWriter(
        tmp_path, "00000", tokenizer=tokenizer, build_id="b", kind="pairs", source={}, options={}
    ) as writer:
        writer.add("first", **good)
        for change, words in BAD_SAMPLES:
            with pytest.raises(DataError, match=rf"00000 sample 1 \(key bad\): .*{words}"):
                writer.add("bad", **(good | change))
        writer.add("last", [6, 7, 2], image=b"y", image_size=(5, 4), word_class=[2, 1, 0])
        manifest = writer.finish()
    write_build(tmp_path, build_id="b", shard_manifests=[manifest], tokenizer=tokenizer, options={}, counts={})
    shards = ShardSet.open(tmp_path)
    assert [(shards.key(i), shards.tokens(i).tolist(), shards.image(i)) for i in range(len(shards))] == [
        ("first", [5, 2], b"x"),
        ("last", [6, 7, 2], b"y"),
    ]
    assert verify(tmp_path) == []


def test_captions_added_together_are_captions_added_one_by_one(tmp_path: Path, tokenizer: Tokenizer) -> None:
    random = np.random.default_rng(5)
    samples = [random.integers(0, tokenizer.vocab_size, k).tolist() for k in [3, 1, 90_000, 2, 140_000, *[40] * 900]]
    keys = [f"caption \u00e9 {i}" for i in range(len(samples))]
    for name, block in (("one", 1), ("few", 7), ("all", len(samples))):
        with ShardWriter(
            tmp_path / name, "00000", tokenizer=tokenizer, build_id="b", kind="text", source={}, options={}
        ) as writer:
            for start in range(0, len(samples), block):
                some = slice(start, start + block)
                if name == "one":
                    writer.add(keys[start], samples[start], truncated=start < 4)
                else:
                    truncated = len(range(*some.indices(4)))
                    writer.add_texts(keys[some], samples[some], truncated=truncated)
            writer.finish()
    assert contents(tmp_path / "one") == contents(tmp_path / "few") == contents(tmp_path / "all")


@pytest.mark.parametrize(
    ("ids", "words"), [([], "0 tokens"), ([-1], "ids -1 to"), ([300], "300 in a vocabulary of 300")]
)
def test_of_captions_added_together_the_bad_one_is_named(
    tmp_path: Path, tokenizer: Tokenizer, ids: list[int], words: str
) -> None:
    with (
        ShardWriter(tmp_path, "00000", tokenizer=tokenizer, build_id="b", kind="text", source={}, options={}) as writer,
        pytest.raises(DataError, match=rf"00000 sample 1 \(key bad\): .*{words}"),
    ):
        writer.add_texts(["good", "bad"], [[5, 2], ids])


def test_an_image_has_no_place_in_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with ShardWriter(
        tmp_path, "00000", tokenizer=tokenizer, build_id="b", kind="text", source={}, options={}
    ) as writer:
        with pytest.raises(DataError, match="an image in a shard of kind 'text'"):
            writer.add("a", [5, 2], image=b"x", image_size=(1, 1))


def test_odd_keys_come_back_as_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    keys = ["", "日本/é", "lone \ud83d surrogate", os.fsdecode(b"\xff.jpg")]
    with ShardWriter(
        tmp_path, "00000", tokenizer=tokenizer, build_id="b", kind="text", source={}, options={}
    ) as writer:
        for key in keys:
            writer.add(key, [5, 2])
        writer.finish()
    shard = Shard.open(tmp_path, "00000")
    assert [shard.key(i) for i in range(4)] == ["", "日本/é", "lone \\ud83d surrogate", "\\udcff.jpg"]


def test_a_complete_shard_is_never_written_again(tmp_path: Path, tokenizer: Tokenizer) -> None:
    before = contents(build(tmp_path / "pairs", tokenizer))
    with pytest.raises(DataError, match=r"00000\.json: this shard is complete already"):
        ShardWriter(tmp_path / "pairs", "00000", tokenizer=tokenizer, build_id="b2", kind="text", source={}, options={})
    assert contents(tmp_path / "pairs") == before


_KILLED = """
import os, signal, sys
from megaprior.data.shards import ShardWriter
from megaprior.tokenizer import load_tokenizer
tokenizer = load_tokenizer(sys.argv[2])
writer = ShardWriter(sys.argv[1], "00000", tokenizer=tokenizer, build_id="b", kind="text", source={}, options={})
for i in range(10_000):
    writer.add(str(i), [5, 6, 2])
writer._streams["tokens"].finish()  # killed between two streams
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_writer_leaves_no_shard_and_a_second_run_completes_it(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = tmp_path / "text"
    model = tokenizer.files[0]
    done = subprocess.run([sys.executable, "-c", _KILLED, str(folder), str(model)], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    names = sorted(os.listdir(folder))
    assert names[-2:] == ["00000.tokens.bin", "00000.tokens.idx"]
    assert len(names) == 3  # the half-written keys, under a temporary name
    with pytest.raises(DataError, match="no manifest"):
        Shard.open(folder, "00000")
    with pytest.raises(DataError, match=r"no build\.json, so the build is not complete; repeat"):
        ShardSet.open(folder)
    problems = verify(folder)
    assert len(problems) == 4
    for name in names:
        assert any(f"{folder / name}: in no manifest" in problem for problem in problems)
    with ShardWriter(folder, "00000", tokenizer=tokenizer, build_id="b", kind="text", source={}, options={}) as writer:
        writer.add("only", [5, 2])
        manifest = writer.finish()
    write_build(folder, build_id="b", shard_manifests=[manifest], tokenizer=tokenizer, options={}, counts={})
    assert ShardSet.open(folder).tokens(0).tolist() == [5, 2]
    assert verify(folder) == [
        f"{folder / names[0]}: in no manifest (an interrupted write?); delete it or repeat the command"
    ]


def test_a_full_disk_is_named_and_leaves_complete_shards_alone(
    tmp_path: Path, tokenizer: Tokenizer, small_disk
) -> None:
    def write(prefix: str, samples: int) -> None:
        with ShardWriter(
            tmp_path, prefix, tokenizer=tokenizer, build_id="b", kind="pairs", source={}, options={}
        ) as writer:
            for i in range(samples):
                writer.add(str(i), [5, 2], image=bytes(1000), image_size=(1, 1))
            writer.finish()

    with small_disk(tmp_path, "1m"):
        write("00000", 3)
        with pytest.raises(DataError, match=r"disk full \([\d,]+ bytes needed, [\d,]+ bytes free\)"):
            write("00001", 3000)
        assert len(Shard.open(tmp_path, "00000")) == 3
        assert not [name for name in os.listdir(tmp_path) if "00001" in name]


# ---------------------------------------------------------------- what does not belong together


def test_a_file_of_another_length_anywhere_is_refused(folder: Path) -> None:
    for path in sorted([*folder.glob("*.bin"), *folder.glob("*.idx")]):
        whole = path.read_bytes()
        for kept in (0, 1, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:kept])
            with pytest.raises(DataError, match=f"{path.name}: {kept:,} bytes, the manifest says {len(whole):,}"):
                ShardSet.open(folder, scores="ref_logprob")
        assert any(f"{path}: {kept:,} bytes" in problem for problem in verify(folder))
        path.write_bytes(whole)
    assert verify(folder) == []
    ShardSet.open(folder, scores="ref_logprob")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (gzip.compress(b"{}"), "it looks like gzip data"),
        (b"<html><body>504 Gateway Time-out</body></html>", "it looks like an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "it looks like a Git-LFS pointer"),
        (b"", "it looks like an empty file"),
        (b'{"format": "megaprior.shard"', "not a manifest"),
        (b'{"format": NaN}', "format is nan"),
        (b"\xff\xfe\x00", "not a manifest"),
    ],
)
@pytest.mark.parametrize("name", ["build.json", "00001.json", "00001.ref_logprob.json"])
def test_a_foreign_manifest_is_named_for_what_it_looks_like(
    folder: Path, name: str, content: bytes, words: str
) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}: .*{words}"):
        ShardSet.open(folder, scores="ref_logprob")
    assert any(f"{folder / name}" in problem and "block 0" in problem for problem in verify(folder))


def test_files_of_two_builds_are_told_apart(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = build(tmp_path / "a", tokenizer)
    reversed_captions = [caption[::-1] for caption in CAPTIONS]  # same lengths, same sizes, other tokens
    same_size = [[10, 11, 2], [20, 21, 2], [10, 30, 31, 2], *CAPTIONS[3:]]  # same sizes, other lengths
    others = {
        "manifest": build(tmp_path / "b", tokenizer, build_id="b2", captions=CAPTIONS[::-1]),
        "lengths": build(tmp_path / "c", tokenizer, captions=same_size),
        "content": build(tmp_path / "d", tokenizer, captions=reversed_captions),
    }

    def mixed(name: str, *patterns: str) -> Path:
        target = tmp_path / f"mixed {name} {len(patterns)}"
        shutil.copytree(folder, target)
        for pattern in patterns:
            for path in others[name].glob(pattern):
                shutil.copy(path, target)
        return target

    with pytest.raises(
        DataError, match=r"mixed manifest 1/00001: build_id is b2, the folder's is b1; .* different builds"
    ):
        ShardSet.open(mixed("manifest", "00001.*"))
    with pytest.raises(DataError, match=r"00000\.tokens\.bin: 24 bytes, the manifest says 20"):
        ShardSet.open(mixed("manifest", "00000.tokens.*", "none"))
    with pytest.raises(DataError, match=r"00000\.tokens\.idx: lengths are not those of the manifest"):
        ShardSet.open(mixed("lengths", "00000.tokens.*"))
    with pytest.raises(DataError, match=r"00000\.json: not the manifest that build\.json names"):
        ShardSet.open(mixed("lengths", "00000.*", "none"))
    hidden = mixed("content", "00000.tokens.*")  # nothing but a digest can tell
    assert [p for p in verify(hidden) if "00000.tokens.bin: block 0 (bytes 0 to 19) was changed" in p]


def test_another_tokenizer_is_refused_naming_the_field(folder: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    other = train_sentencepiece(["other words entirely 12 34"] * 3, tmp_path / "other", vocab_size=285)
    with pytest.raises(
        DataError, match="pairs: another tokenizer than that of the model in use: the vocabulary differs"
    ):
        ShardSet.open(folder, tokenizer=other)
    mixed = tmp_path / "mixed"
    shutil.copytree(folder, mixed)
    for path in build(tmp_path / "foreign", other).glob("00001.*"):
        shutil.copy(path, mixed)
    with pytest.raises(DataError, match="mixed/00001: another tokenizer than that of the other shards: the vocabulary"):
        ShardSet.open(mixed)
    with pytest.raises(DataError, match="another tokenizer"):
        write_build(
            tmp_path / "new",
            build_id="b1",
            shard_manifests=[manifest_of(folder)],
            tokenizer=other,
            options={},
            counts={},
        )


def manifest_of(folder: Path, name: str = "00000") -> dict:
    return json.loads((folder / f"{name}.json").read_text())


def test_a_build_takes_shards_of_one_kind_only(tmp_path: Path, tokenizer: Tokenizer) -> None:
    pairs = manifest_of(build(tmp_path / "pairs", tokenizer))
    with ShardWriter(
        tmp_path / "t", "00001", tokenizer=tokenizer, build_id="b1", kind="text", source={}, options={}
    ) as w:
        text = w.finish()
    for shards, words in (([pairs, text], "kind is text, the folder's is pairs"), ([], "at least one shard")):
        with pytest.raises(DataError, match=words):
            write_build(
                tmp_path / "t", build_id="b1", shard_manifests=shards, tokenizer=tokenizer, options={}, counts={}
            )
    assert not (tmp_path / "t" / "build.json").exists()


# ---------------------------------------------------------------- verify


def test_one_changed_bit_anywhere_is_found_and_named(folder: Path) -> None:
    names = list(contents(folder))
    assert {name.split(".")[1] for name in names if name.startswith("00000")} >= set(STREAMS)
    for name in names:
        path = folder / name
        whole = path.read_bytes()
        for step, at in enumerate(sorted({*np.linspace(0, len(whole) - 1, 5).astype(int).tolist()})):
            changed = bytearray(whole)
            changed[at] ^= 1 << (3 * step + 1) % 8
            path.write_bytes(changed)
            found = verify(folder)
            assert any(str(path) in problem and "block 0" in problem for problem in found), (name, at, found)
        path.write_bytes(whole)
    assert verify(folder) == []


def test_a_changed_bit_that_json_does_not_notice_is_found(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = build(tmp_path / "pairs", tokenizer, options={"rate": 1e-07})
    text = (folder / "build.json").read_text()
    assert "1e-07" in text
    (folder / "build.json").write_text(text.replace("1e-07", "1E-07"))
    ShardSet.open(folder)
    assert verify(folder) == [
        f"{folder / 'build.json'}: block 0 is not what was written, though it still reads the same; rebuild it"
    ]


def test_the_block_of_a_changed_bit_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    image = bytes(33 << 20)
    with ShardWriter(
        tmp_path, "00000", tokenizer=tokenizer, build_id="b", kind="pairs", source={}, options={}
    ) as writer:
        for i in range(2):
            writer.add(str(i), [5, 2], image=image, image_size=(1, 1))
        manifest = writer.finish()
    write_build(tmp_path, build_id="b", shard_manifests=[manifest], tokenizer=tokenizer, options={}, counts={})
    with open(tmp_path / "00000.images.bin", "r+b") as file:
        file.seek(65 << 20)
        file.write(b"\x01")
    assert verify(tmp_path) == [
        f"{tmp_path / '00000.images.bin'}: block 1 (bytes 67,108,864 to 69,206,015) was changed; rebuild the shard"
    ]


def test_missing_and_superfluous_files_are_named(folder: Path, tokenizer: Tokenizer) -> None:
    os.unlink(folder / "00001.keys.bin")
    os.unlink(folder / "tokenizer" / "tokenizer.model")
    shutil.copy(folder / "00000.tokens.bin", folder / "00007.tokens.bin")
    (folder / ".score-ref_logprob").mkdir()
    (folder / ".score-ref_logprob" / "ledger.json").write_text("{}")  # of a scorer that can be resumed
    found = verify(folder)
    assert [problem.partition(":")[0] for problem in found] == [
        f"{folder / 'tokenizer' / 'tokenizer.model'}",
        f"{folder / '00001.keys.bin'}",
        f"{folder / '00007.tokens.bin'}",
    ]
    assert "missing" in found[0]
    assert "in no manifest" in found[2]
    os.unlink(folder / "00000.json")
    assert any("00000.json: no manifest" in problem for problem in verify(folder))


def test_further_files_of_a_build_are_vouched_for(folder: Path, tokenizer: Tokenizer) -> None:
    os.unlink(folder / "build.json")
    (folder / "quarantine.jsonl").write_text("{}\n")
    manifests = [manifest_of(folder, prefix) for prefix in ("00000", "00001")]
    write_build(
        folder,
        build_id="b1",
        shard_manifests=manifests,
        tokenizer=tokenizer,
        options={},
        counts={},
        files=["quarantine.jsonl"],
    )
    assert verify(folder) == []
    (folder / "quarantine.jsonl").write_text("[]\n")
    assert verify(folder) == [f"{folder / 'quarantine.jsonl'}: block 0 (bytes 0 to 2) was changed; rebuild the shard"]


@pytest.mark.parametrize(
    ("stream", "sequences", "words"),
    [
        ("keys", [b"k0", b"k1"], "keys has 2 sequences, the manifest counts 3 samples"),
        ("image_sizes", [[1, 1], [1, 1], [1]], "image_sizes is not one width and height"),
        ("image_sizes", [[1, 1], [1, 1], [0, 1]], "image_sizes is not one width and height"),
        ("word_class", [[0] * 4, [0] * 3, [0] * 3], "word_class has 3 entries at sample 1, which has 2 tokens"),
        ("word_class", [[0] * 4, [0] * 2, [9] * 4], "classes above 2"),
        ("tokens", [[10, 11, 12, 2], [20, 2], [10, 300, 31, 2]], "token ids from 2 to 300 in a vocabulary of 300"),
        ("tokens", [[10, 11, 12, 2], [20, 2], [10, 31, 2]], "9 tokens, the manifest counts 10"),
        ("images", [b"a", b"b", b"c"], "3 stored images, the manifest counts 2"),
    ],
)
def test_misaligned_streams_are_found_though_every_digest_is_right(
    folder: Path, stream: str, sequences: list, words: str
) -> None:
    manifest, built = manifest_of(folder), manifest_of(folder, "build")
    dtype = manifest["streams"][stream]["dtype"]
    with IndexedWriter(folder / f"00000.{stream}", dtype) as writer:
        for sequence in sequences:
            writer.add(sequence)
            writer.end_document()
        manifest["streams"][stream] = writer.finish()
    manifest = write_manifest(folder / "00000.json", manifest)
    built["shards"][0]["digest"] = manifest["digest"]
    write_manifest(folder / "build.json", built)
    assert any(problem.startswith("pairs/00000: ") and words in problem for problem in verify(folder))


def test_only_a_complete_build_is_read(folder: Path) -> None:
    os.unlink(folder / mf.BUILD_NAME)
    with pytest.raises(DataError, match=r"no build\.json, so the build is not complete; repeat the"):
        ShardSet.open(folder)
    assert verify(folder)[0] == f"{folder}: no sound build.json: the build is not complete, repeat the command"

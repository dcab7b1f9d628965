"""Scores are bound to their tokens: shifted, short, foreign or impossible ones are refused by shard and sample."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from megaprior.data import manifest as mf
from megaprior.data.indexed_writer import IndexedWriter
from megaprior.data.scores import refuse_bad_scores
from megaprior.data.shards import ScoreWriter, Shard, ShardSet, ShardWriter, verify, write_build
from megaprior.errors import DataError
from megaprior.files import write_manifest
from megaprior.tokenizer import Tokenizer, train_sentencepiece

NAME = "ref_logprob"
FIRST = {token: -1.0 - token / 7 for token in range(3, 40)}  # log p(token | BOS), one value per id


def captions(count: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [[*rng.integers(3, 40, rng.integers(1, 9)).tolist(), 2] for _ in range(count)]


def build(folder: Path, tokenizer: Tokenizer, samples: list[list[int]], *, shards: int = 2) -> Path:
    manifests = []
    for number, part in enumerate(np.array_split(np.arange(len(samples)), shards)):
        with ShardWriter(
            folder, f"{number:05}", tokenizer=tokenizer, build_id="b", kind="text", source={}, options={}
        ) as writer:
            for i in part:
                writer.add(f"{i:03}", samples[i])
            manifests.append(writer.finish())
    write_build(folder, build_id="b", shard_manifests=manifests, tokenizer=tokenizer, options={}, counts={})
    return folder


def plausible(tokens: np.ndarray, seed: int) -> np.ndarray:
    """Scores as of a reference: the first depends on its id alone."""
    rest = -np.random.default_rng(seed).exponential(3, len(tokens) - 1)
    return np.array([FIRST[int(tokens[0])], *rest], np.float32)


def scores_of(shard: Shard) -> list[np.ndarray]:
    return [plausible(shard.streams["tokens"][i], i) for i in range(len(shard))]


def write(shard: Shard, scores: list[np.ndarray], *, kind: str = "logprob", **options) -> dict:
    with ScoreWriter(shard, NAME, kind=kind, scorer={"fingerprint": "f"}, **options) as writer:
        for values in scores:
            writer.add(values)
        return writer.finish()


def forge(shard: Shard, scores: list[np.ndarray]) -> None:
    """A score stream whose files and manifest agree with each other, past the writer's own checks."""
    with IndexedWriter(shard.folder / f"{shard.prefix}.{NAME}", np.float32) as writer:
        for values in scores:
            writer.add(values)
            writer.end_document()
        entry = writer.finish()
    path = shard.folder / f"{shard.prefix}.{NAME}.json"
    flat = np.concatenate(scores)
    forged = {"stream": entry, "lengths_digest": mf.lengths_digest(np.array([len(s) for s in scores]))}
    forged |= {"count": flat.size, "min": float(np.nanmin(flat)), "max": float(np.nanmax(flat))}
    write_manifest(path, json.loads(path.read_text()) | forged)


@pytest.fixture(scope="session")
def scored(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    folder = build(tmp_path_factory.mktemp("scored") / "text", tokenizer, captions(60))
    for prefix in ("00000", "00001"):
        shard = Shard.open(folder, prefix)
        write(shard, scores_of(shard))
    return folder


@pytest.fixture
def folder(tmp_path: Path, scored: Path) -> Path:
    """A copy to spoil: 60 captions in two shards, scored."""
    return Path(shutil.copytree(scored, tmp_path / "text"))


# ---------------------------------------------------------------- the writer


@pytest.fixture
def shard(tmp_path: Path, tokenizer: Tokenizer) -> Shard:
    """Three captions of 3, 1 and 2 tokens."""
    return Shard.open(build(tmp_path / "text", tokenizer, [[5, 6, 2], [2], [7, 2]], shards=1), "00000")


def test_the_manifest_says_what_was_written(shard: Shard) -> None:
    manifest = write(shard, [np.array([-1.5, -np.inf, 5e-7]), np.array([-0.25]), np.array([0.0, -8.0])])
    assert {
        name: manifest[name] for name in ("kind", "first_token", "count", "min", "max", "nan_count", "infinite_count")
    } == {
        "kind": "logprob",
        "first_token": "bos",
        "count": 6,
        "min": -8.0,
        "max": 0.0,
        "nan_count": 0,
        "infinite_count": 1,
    }
    assert manifest["tokens_digest"] == mf.stream_digest(shard.manifest["streams"]["tokens"])
    assert manifest["tokenizer"] == shard.manifest["tokenizer"]
    shards = ShardSet.open(shard.folder, scores=NAME)
    assert [shards.scores(i).tolist() for i in range(3)] == [[-1.5, -np.inf, 0.0], [-0.25], [0.0, -8.0]]
    assert verify(shard.folder) == []


def test_importances_may_be_anything_finite_from_zero(shard: Shard) -> None:
    manifest = write(
        shard, [np.array([0, 3, 1e9]), np.array([2]), np.array([7, 1])], kind="importance", first_token=None
    )
    assert (manifest["min"], manifest["max"], manifest["first_token"]) == (0.0, 1e9, None)
    shards = ShardSet.open(shard.folder, scores=NAME)
    assert (shards.score_kind, shards.scores(2).tolist()) == ("importance", [7.0, 1.0])


@pytest.mark.parametrize(
    ("kind", "bad", "words"),
    [
        ("logprob", [np.nan], "score nan at token 0"),
        ("logprob", [2e-6], r"score 2e-06 at token 0, but log-probabilities are at most 0"),
        ("logprob", [np.inf], "score inf at token 0"),
        ("logprob", [-1, -1], "2 scores for 1 tokens"),
        ("logprob", [], "0 scores for 1 tokens"),
        ("logprob", [[-1]], "1 scores for 1 tokens"),
        ("importance", [-0.5], "score -0.5 at token 0, but importances are finite and at least 0"),
        ("importance", [np.inf], "score inf at token 0"),
        ("importance", [np.nan], "score nan at token 0"),
    ],
)
def test_impossible_scores_are_refused_naming_the_sample(shard: Shard, kind: str, bad: list, words: str) -> None:
    sign = -1 if kind == "logprob" else 1
    with ScoreWriter(shard, NAME, kind=kind, scorer={"fingerprint": "f"}) as writer:
        writer.add(sign * np.ones(3))
        with pytest.raises(DataError, match=rf"text/00000 sample 1 \(key 001\): {words}"):
            writer.add(bad)
    assert not list(shard.folder.glob(f"*{NAME}*"))


def test_the_writer_takes_each_sample_once(shard: Shard) -> None:
    with ScoreWriter(shard, NAME, kind="logprob", scorer={"fingerprint": "f"}) as writer:
        writer.add([-1, -2, -3])
        with pytest.raises(DataError, match="text/00000: scores for 1 of 3 samples"):
            writer.finish()
        writer.add([-1])
        writer.add([-1, -2])
        with pytest.raises(DataError, match="scores for sample 3, but it has 3 samples"):
            writer.add([-1])
        writer.finish()
    assert ShardSet.open(shard.folder, scores=NAME).scores(0).tolist() == [-1, -2, -3]


def test_complete_scores_are_replaced_only_on_request_and_only_when_whole(shard: Shard) -> None:
    one = [np.array([-1.0, -2, -3]), np.array([-1.0]), np.array([-1.0, -2])]
    write(shard, one)
    with pytest.raises(DataError, match="complete already"):
        ScoreWriter(shard, NAME, kind="logprob", scorer={"fingerprint": "f"})
    with ScoreWriter(shard, NAME, kind="logprob", scorer={"fingerprint": "g"}, replace=True) as writer:
        writer.add([-9, -9, -9])  # gives up here
    assert ShardSet.open(shard.folder, scores=NAME).scores(0).tolist() == [-1, -2, -3]
    write(shard, [2 * values for values in one], replace=True)
    assert ShardSet.open(shard.folder, scores=NAME).scores(0).tolist() == [-2, -4, -6]
    assert verify(shard.folder) == []


def test_scores_never_take_the_name_of_a_stream_of_the_shard(shard: Shard) -> None:
    with pytest.raises(DataError, match="'keys' is a stream of the shard itself"):
        ScoreWriter(shard, "keys", kind="logprob", scorer={"fingerprint": "f"})


def test_missing_scores_name_the_command(shard: Shard) -> None:
    with pytest.raises(DataError, match="text/00000: no scores 'clip'; run `megaprior score"):
        ShardSet.open(shard.folder, scores="clip")


# ---------------------------------------------------------------- scores that are not these tokens'


@pytest.mark.parametrize("shift", ["right", "left", "right in each caption", "left in each caption"])
def test_scores_shifted_by_one_are_refused_though_lengths_agree(folder: Path, shift: str) -> None:
    assert len(ShardSet.open(folder, scores=NAME)) == 60
    shard = Shard.open(folder, "00001")
    right = scores_of(shard)
    by = 1 if shift.startswith("right") else -1
    flat = np.roll(np.concatenate(right), by)
    whole = np.split(flat, np.cumsum([len(values) for values in right])[:-1])
    forge(shard, [np.roll(values, by) for values in right] if "each" in shift else whole)
    assert verify(folder) == []  # every digest is right
    with pytest.raises(
        DataError, match=r"text/00001 sample \d+ \(key \d+\): first token \d+ scores .* is shifted, score again"
    ):
        ShardSet.open(folder, scores=NAME)


def test_scores_edited_in_place_are_refused_though_first_tokens_tell_nothing(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    # No two captions begin alike, and a reference that has learnt nothing gives all tokens nearly the same.
    folder = build(tmp_path / "text", tokenizer, [[first, 5, 6, 2] for first in range(10, 20)], shards=2)
    for prefix in ("00000", "00001"):
        write(Shard.open(folder, prefix), [np.full(4, -5.6) - np.arange(4) / 100] * 5)
    ShardSet.open(folder, scores=NAME)
    path = folder / f"00001.{NAME}.bin"
    path.write_bytes(np.roll(np.fromfile(path, np.float32), 1).tobytes())
    with pytest.raises(
        DataError, match=rf"00001\.{NAME}\.bin: block 0, .* samples 0 \(key 005\) to 4, is not what was written"
    ):
        ShardSet.open(folder, scores=NAME)


def test_an_index_that_points_one_score_further_is_refused(folder: Path) -> None:
    path, count = folder / f"00000.{NAME}.idx", 30
    index = bytearray(path.read_bytes())
    pointers = np.frombuffer(index, "<i8", count, offset=34 + 4 * count)
    pointers[: count - 1] += 4
    path.write_bytes(index)
    with pytest.raises(DataError):
        ShardSet.open(folder, scores=NAME)
    for shard in (Shard.open(folder, prefix) for prefix in ("00000", "00001")):
        forge(shard, [np.full(len(values), -3.0) for values in scores_of(shard)])
    ShardSet.open(folder, scores=NAME)
    index = bytearray(path.read_bytes())
    pointers = np.frombuffer(index, "<i8", count, offset=34 + 4 * count)
    pointers[: count - 1] += 4  # now all scores are alike: only the digest can tell
    path.write_bytes(index)
    with pytest.raises(DataError, match=rf"00000\.{NAME}\.idx: is not what was written"):
        ShardSet.open(folder, scores=NAME)


def test_a_float32_scorer_is_held_to_its_own_rounding(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Shifted scores of a reference that has learnt little differ by less than the rounding of bf16 kernels may be."""
    folder = build(tmp_path / "text", tokenizer, [[5, n, 2] for n in range(10, 14)], shards=1)
    shard = Shard.open(folder, "00000")
    for dtype, refused in (("bfloat16", False), ("float32", True)):
        with ScoreWriter(
            shard, NAME, kind="logprob", scorer={"fingerprint": "f", "dtype": dtype}, replace=True
        ) as writer:
            for i in range(4):  # as rolled within each caption: what follows stands first
                writer.add([-5.6 - i / 50, -5.6, -5.6])
            writer.finish()
        if refused:
            with pytest.raises(DataError, match=r"sample 1 .* the stream is shifted"):
                ShardSet.open(folder, scores=NAME)
        else:
            ShardSet.open(folder, scores=NAME)


@pytest.mark.parametrize(("field", "value"), [("min", -1e3), ("max", -1e-3), ("count", 7)])
def test_the_summary_is_compared_with_the_scores_when_they_are_opened(folder: Path, field: str, value: float) -> None:
    path = folder / f"00001.{NAME}.json"
    record = json.loads(path.read_text())
    write_manifest(path, record | {field: value})
    with pytest.raises(DataError, match=rf"text/00001 '{NAME}': {field} is {record[field]}, the manifest says {value}"):
        ShardSet.open(folder, scores=NAME)


def test_scores_short_by_one_are_refused_naming_the_sample(folder: Path) -> None:
    shard = Shard.open(folder, "00001")
    scores = scores_of(shard)
    at = next(i for i in range(5, len(scores)) if len(scores[i]) > 2)
    scores[at] = scores[at][:-1]
    forge(shard, scores)
    tokens = len(scores[at]) + 1
    with pytest.raises(
        DataError, match=rf"text/00001 sample {at} \(key 0\d+\): {tokens - 1} scores '{NAME}' for {tokens} tokens"
    ):
        ShardSet.open(folder, scores=NAME)
    assert any(
        f"{tokens - 1} entries at sample {at}, which has {tokens} tokens" in problem for problem in verify(folder)
    )
    forge(shard, scores_of(shard)[:-1])
    with pytest.raises(DataError, match=f"text/00001: '{NAME}' has 29 samples, the shard has 30"):
        ShardSet.open(folder, scores=NAME)


def test_scores_of_another_or_rebuilt_shard_set_are_refused_by_digest(
    tmp_path: Path, folder: Path, tokenizer: Tokenizer
) -> None:
    swapped = captions(60)
    swapped[40] = [*swapped[40][:-1], 39, 2]
    rebuilt = build(tmp_path / "rebuilt", tokenizer, swapped)
    for path in folder.glob(f"*.{NAME}.*"):
        shutil.copy(path, rebuilt)
    with pytest.raises(
        DataError, match=r"rebuilt/00001.ref_logprob.json: scores of tokens \w+, the shard's tokens are \w+"
    ):
        ShardSet.open(rebuilt, scores=NAME)
    assert any("made for other tokens than this shard's" in problem for problem in verify(rebuilt))
    for suffix in ("bin", "idx", "json"):  # one shard's scores under the name of another
        shutil.copy(folder / f"00001.{NAME}.{suffix}", folder / f"00000.{NAME}.{suffix}")
    with pytest.raises(DataError, match=r"text/00000.ref_logprob.json: scores of tokens"):
        ShardSet.open(folder, scores=NAME)


def test_scores_under_another_tokenizer_are_refused_naming_the_field(tmp_path: Path, folder: Path) -> None:
    other = train_sentencepiece(["other words entirely 12 34"] * 3, tmp_path / "other", vocab_size=285)
    path = folder / f"00001.{NAME}.json"
    write_manifest(path, json.loads(path.read_text()) | {"tokenizer": mf.tokenizer_entry(other)})
    with pytest.raises(
        DataError, match="text/00001 'ref_logprob': another tokenizer than that of the shards: the vocabulary"
    ):
        ShardSet.open(folder, scores=NAME)
    assert any("another tokenizer" in problem for problem in verify(folder))


def test_shards_scored_by_two_scorers_are_refused(folder: Path) -> None:
    path = folder / f"00001.{NAME}.json"
    write_manifest(path, json.loads(path.read_text()) | {"scorer": {"fingerprint": "g"}})
    with pytest.raises(DataError, match="text/00001: the scorer of 'ref_logprob' is g, that of text/00000 is f"):
        ShardSet.open(folder, scores=NAME)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [("nan_count", 3, "3 NaN"), ("max", 0.5, r"score 0\.5 .* at most 0"), ("kind", "surprise", "kind 'surprise'")],
)
def test_a_summary_that_its_kind_forbids_is_refused(folder: Path, field: str, value: object, words: str) -> None:
    path = folder / f"00000.{NAME}.json"
    write_manifest(path, json.loads(path.read_text()) | {field: value})
    with pytest.raises(DataError, match=f"00000.{NAME}.json.*{words}"):
        ShardSet.open(folder, scores=NAME)


def test_verify_recounts_the_summary(folder: Path) -> None:
    path = folder / f"00000.{NAME}.json"
    right = json.loads(path.read_text())
    write_manifest(path, right | {"min": right["min"] - 1, "count": right["count"] + 1})
    assert verify(folder) == [
        f"{path}: min is {right['min']}, the manifest says {right['min'] - 1}",
        f"{path}: count is {right['count']}, the manifest says {right['count'] + 1}",
    ]


def test_first_tokens_may_differ_by_rounding_and_by_nothing_else(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = build(tmp_path / "text", tokenizer, [[5, 2], [6, 2], [5, 2], [6, 2], [5, 2]], shards=1)
    shard = Shard.open(folder, "00000")

    def opened(*first: float, **options) -> ShardSet:
        write(shard, [np.array([value, 0.0]) for value in first], replace=True, **options)
        return ShardSet.open(folder, scores=NAME)

    opened(-1, -4, -1.1, -4, -1.2)
    opened(-1, -np.inf, -1, -np.inf, -1)
    opened(-9, -4, -1.1, -3, -8.2, first_token=None)
    opened(9, 4, 1.1, 3, 8.2, kind="importance")
    with pytest.raises(
        DataError, match=r"sample 4 \(key 004\): first token 5 scores -1.2600 .* from -1.2600 to -1.0000"
    ):
        opened(-1, -4, -1.1, -4, -1.26)
    with pytest.raises(DataError, match="sample 3"):
        opened(-1, -np.inf, -1, -30, -1)


def test_nan_that_the_manifest_hides_is_refused_when_it_is_seen(folder: Path) -> None:
    shard = Shard.open(folder, "00000")
    scores = scores_of(shard)
    scores[7] = np.full_like(scores[7], np.nan)
    forge(shard, scores)
    with pytest.raises(DataError, match=r"text/00000 sample 7 \(key 007\): score nan at token 0"):
        ShardSet.open(folder, scores=NAME)


def test_the_law_of_each_kind() -> None:
    refuse_bad_scores("here", np.array([-np.inf, -3, 0, 1e-6], np.float32), "logprob")
    refuse_bad_scores("here", np.array([0, 3, 1e30], np.float32), "importance")
    refuse_bad_scores("here", np.array([], np.float32), "logprob")
    with pytest.raises(DataError, match="here: score nan at token 1"):
        refuse_bad_scores("here", np.array([-1, np.nan], np.float32), "logprob")

"""`merge`: every sample of every folder, scores still on their tokens, and refusals that name both sides."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from megaprior.data.shards import ShardSet, verify
from megaprior.data_tools.building.build import build
from megaprior.data_tools.building.join import join
from megaprior.data_tools.options import BuildOptions
from megaprior.data_tools.sets import derived
from megaprior.data_tools.sets.merging import Request, merge
from megaprior.errors import DataError, UsageError
from megaprior.tokenizer import train_sentencepiece
from tests.data_tools.sets import add_scores, check_scores, samples_of, tree
from tests.data_tools.test_crashes import in_child

Builds = Callable[..., Path]


@pytest.fixture
def pairs(
    make_tar: Callable[..., Path], picture: Callable[..., bytes], tmp_path: Path, tokenizer_folder: Path
) -> Builds:
    """`pairs("a", [0, 1, 2])`: two shards with these pictures, the second with a broken one; keys are the same in all."""

    def make(name: str, seeds: list[int]) -> Path:
        (tmp_path / f"{name}.in").mkdir()
        for shard in range(2):
            members = []
            for number, seed in enumerate(seeds):
                text = f"{seed} dogs {shard}".encode()
                members += [(f"{number:03d}.jpg", picture(seed)), (f"{number:03d}.txt", text)]
            if shard:
                members += [("broken.jpg", b"<html>"), ("broken.txt", b"gone")]
            make_tar(f"{name}.in/{shard}.tar", members)
        build([tmp_path / f"{name}.in"], tmp_path / name, tokenizer=tokenizer_folder, options=BuildOptions())
        return tmp_path / name

    return make


@pytest.mark.parametrize("link", [False, True])
@pytest.mark.parametrize("prefix_keys", [False, True])
def test_everything_is_there_and_scores_go_along(link: bool, prefix_keys: bool, pairs: Builds, tmp_path: Path) -> None:
    folders = (pairs("a", [0, 1, 2]), pairs("b", [2, 3, 4]))
    for folder in folders:
        add_scores(folder)
        add_scores(folder, "other", scorer=folder.name * 32)
    before = [tree(folder) for folder in folders]
    merged = merge(Request(folders=folders, output=tmp_path / "ab", link=link, prefix_keys=prefix_keys))
    assert [tree(folder) for folder in folders] == before
    assert samples_of(tmp_path / "ab") == samples_of(folders[0]) + samples_of(folders[1])
    check_scores(tmp_path / "ab")
    assert not list((tmp_path / "ab").glob("*.other.*"))  # of two scorers
    assert merged["counts"]["quarantined"] == 2
    assert (tmp_path / "ab" / "quarantine.jsonl").read_text().count("broken") == 2
    shards = ShardSet.open(tmp_path / "ab")
    assert {shards.key(i) for i in (0, 11)} == ({"a/000", "b/002"} if prefix_keys else {"000", "002"})
    one, other = (folder / "00000.images.bin" for folder in (folders[0], tmp_path / "ab"))
    assert one.samefile(other) == (link and not prefix_keys)


def test_the_two_ways_of_copying_give_the_same_bytes(pairs: Builds, tmp_path: Path) -> None:
    folders = (pairs("a", [0, 1, 2]), pairs("b", [3, 4, 5]))
    for name, more in {"copied": {}, "linked": {"link": True}, "written": {"deduplicate": True}}.items():
        merge(Request(folders=folders, output=tmp_path / name, **more))
    copied, linked, written = (tree(tmp_path / name) for name in ("copied", "linked", "written"))
    assert copied == linked
    assert {k: v for k, v in copied.items() if "json" not in k} == {k: v for k, v in written.items() if "json" not in k}
    merge(Request(folders=folders, output=tmp_path / "copied", workers=2))
    assert tree(tmp_path / "copied") == copied


def test_deduplicate_drops_equal_pairs_and_nothing_else(pairs: Builds, tmp_path: Path) -> None:
    a, b = pairs("a", [0, 1, 2, 2]), pairs("b", [2, 3])
    add_scores(a)
    add_scores(b)
    merge(Request(folders=(a, b), output=tmp_path / "ab", deduplicate=True))
    found = samples_of(tmp_path / "ab")
    assert found.keys() == (samples_of(a) + samples_of(b)).keys()
    assert set(found.values()) == {1}
    check_scores(tmp_path / "ab")
    again = merge(Request(folders=(a, tmp_path / "ab"), output=tmp_path / "aab", deduplicate=True))
    assert samples_of(tmp_path / "aab") == found
    assert again["counts"]["samples"] == len(found)


def test_killed_at_any_step_it_goes_on(pairs: Builds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    folders = (pairs("a", [0, 1, 2]), pairs("b", [3, 4, 5]))
    for folder in folders:
        add_scores(folder)
    for link in (False, True):
        straight = tmp_path / f"straight{link}"
        steps = in_child(lambda to=straight, link=link: merge(Request(folders=folders, output=to, link=link)))
        assert isinstance(steps, int)
        draw = random.Random(steps)
        for number in range(5):
            output = tmp_path / f"out{link}{number}"
            work = Request(folders=folders, output=output, link=link)
            assert in_child(lambda work=work: merge(work), die_at=draw.randint(1, steps)) == "killed"
            if (output / "build.json").exists():
                assert all(".building" in problem or ".lock" in problem for problem in verify(output))
            merge(work)
            assert tree(output) == tree(straight), number


def test_join_completes_a_merge_that_lacks_only_its_end(
    pairs: Builds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = (pairs("a", [0, 1]), pairs("b", [2, 3]))
    straight = merge(Request(folders=folders, output=tmp_path / "straight"))

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(derived, "commit", die)
    with pytest.raises(KeyboardInterrupt):
        merge(Request(folders=folders, output=tmp_path / "out"))
    assert join(tmp_path / "out") == straight


def test_what_does_not_belong_together_is_refused_by_both_names(
    pairs: Builds, tmp_path: Path, tokenizer_folder: Path
) -> None:
    a = pairs("a", [0, 1])
    (tmp_path / "text.txt").write_text("one dog\n")
    build([tmp_path / "text.txt"], tmp_path / "text", tokenizer=tokenizer_folder, options=BuildOptions())
    words = [f"{i} red cats and {i + 1} green birds sing" for i in range(300)]
    train_sentencepiece(words, tmp_path / "tokenizer", vocab_size=310)
    build([tmp_path / "a.in"], tmp_path / "other", tokenizer=tmp_path / "tokenizer", options=BuildOptions())
    build([tmp_path / "a.in" / "0.tar"], tmp_path / "part", tokenizer=tokenizer_folder, options=BuildOptions())
    cases = {
        "text": r"text: of kind 'text', .*/a is of kind 'pairs'",
        "other": r"other: another tokenizer than that of .*/a: the vocabulary differs",
        "part": r"part/00000: holds the same bytes as .*/a/00000",
    }
    for name, message in cases.items():
        with pytest.raises(DataError, match=message):
            merge(Request(folders=(a, tmp_path / name), output=tmp_path / "out"))
    for folders, words in (((a,), "at least two"), ((a, tmp_path / "part" / ".." / "a"), "given twice")):
        with pytest.raises(UsageError, match=words):
            merge(Request(folders=folders, output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_damaged_source_is_refused_not_taken_over(pairs: Builds, tmp_path: Path) -> None:
    folders = (pairs("a", [0, 1]), pairs("b", [2, 3]))
    path = folders[1] / "00001.tokens.bin"
    data = bytearray(path.read_bytes())
    data[3] ^= 4
    path.write_bytes(data)
    for more in ({}, {"deduplicate": True}):
        with pytest.raises(DataError, match=r"b/00001\.tokens\.bin: block 0"):
            merge(Request(folders=folders, output=tmp_path / f"out{len(more)}", **more))


def test_a_full_disk_ends_it_with_both_numbers(
    pairs: Builds, tmp_path: Path, small_disk: Callable[..., object]
) -> None:
    folders = (pairs("a", list(range(30))), pairs("b", list(range(30, 60))))
    (tmp_path / "small").mkdir()
    with small_disk(tmp_path / "small", "64k"):  # pyright: ignore[reportGeneralTypeIssues]
        with pytest.raises(DataError, match=r"disk full \([\d,]+ bytes needed, [\d,]+ bytes free\)"):
            merge(Request(folders=folders, output=tmp_path / "small" / "out"))
        assert not (tmp_path / "small" / "out" / "build.json").exists()


def test_the_command_tells_what_it_made(pairs: Builds, tmp_path: Path, command: Callable[..., tuple]) -> None:
    a, b = pairs("a", [0, 1]), pairs("b", [2, 3])
    code, said, _ = command("merge", a, b, "--output", tmp_path / "ab", "--workers", 1)
    assert code == 0
    assert "8 captions of 8 images" in said
    assert "2 quarantined" in said
    assert command("merge", a, a, "--output", tmp_path / "aa")[0] == 2

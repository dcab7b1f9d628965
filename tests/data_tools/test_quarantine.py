"""`quarantine`: what was refused and why, and built once the cause is gone; nothing twice, nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megaprior.data_tools.building.build import build
from megaprior.data_tools.options import BuildOptions
from megaprior.data_tools.sets.merging import Request, merge
from megaprior.data_tools.sets.quarantining import Replay, refusals, replay
from megaprior.errors import DataError, UsageError
from tests.data_tools.sets import samples_of, tree

MakeTar = Callable[..., Path]
Picture = Callable[..., bytes]


def members(picture: Picture, number: int, *, broken: tuple[int, ...] = ()) -> list[tuple[str, bytes]]:
    found = []
    for seed in range(number, number + 5):
        image = b"<html>gone</html>" if seed in broken else picture(seed)
        found += [(f"{seed:03d}.jpg", image), (f"{seed:03d}.txt", f"{seed} dogs".encode())]
    return found


@pytest.fixture
def pairs(make_tar: MakeTar, picture: Picture, tmp_path: Path, tokenizer_folder: Path) -> Path:
    """Three tars of five pairs: the first has two broken images, the second a blank caption, the third none."""
    (tmp_path / "in").mkdir()
    make_tar("in/0.tar", members(picture, 0, broken=(1, 3)))
    second = members(picture, 5)
    make_tar("in/1.tar", [(name, b" \n" if name == "007.txt" else data) for name, data in second])
    make_tar("in/2.tar", members(picture, 10))
    build([tmp_path / "in"], tmp_path / "pairs", tokenizer=tokenizer_folder, options=BuildOptions())
    return tmp_path / "pairs"


def ask(pairs: Path, *inputs: Path, **changes: object) -> Replay:
    return Replay(source=pairs, inputs=inputs, output=pairs.parent / "replayed", changes=changes)


def test_reasons_are_listed_with_examples(pairs: Path, command: Callable[..., tuple[int, str, str]]) -> None:
    code, said, _ = command("quarantine", pairs)
    assert code == 0
    assert "3 refused" in said
    assert "2   66.7%  image html" in said
    assert "1   33.3%  caption is blank" in said
    assert "0.tar, 001: image html: 17 bytes that are html" in said
    code, said, _ = command("quarantine", pairs, pairs, "--json", "--examples", 1)
    one, other = json.loads(said)
    assert one == other
    assert [(row["reason"], row["count"], len(row["examples"])) for row in one["reasons"]] == [
        ("image html", 2, 1),
        ("caption is blank", 1, 1),
    ]


def test_repaired_sources_are_replayed_and_merged_to_the_whole(
    pairs: Path, make_tar: MakeTar, picture: Picture, tmp_path: Path, tokenizer_folder: Path
) -> None:
    make_tar("in/0.tar", members(picture, 0, broken=(3,)))  # one of the two was fetched again
    make_tar("in/1.tar", members(picture, 5))
    before = tree(pairs)
    built = replay(ask(pairs, tmp_path / "in"))
    assert (built["counts"]["samples"], built["counts"]["quarantined"], built["counts"]["shards"]) == (2, 1, 2)
    assert tree(pairs) == before
    merge(Request(folders=(pairs, tmp_path / "replayed"), output=tmp_path / "whole"))
    build([tmp_path / "in"], tmp_path / "anew", tokenizer=tokenizer_folder, options=BuildOptions())
    assert samples_of(tmp_path / "whole") == samples_of(tmp_path / "anew")
    again = tree(tmp_path / "replayed")
    replay(ask(pairs, tmp_path / "in"))
    assert tree(tmp_path / "replayed") == again
    assert refusals(tmp_path / "replayed")["reasons"][0]["examples"][0]["sample"] == "003"


def test_some_of_the_inputs_are_enough_and_they_may_lie_elsewhere(
    pairs: Path, make_tar: MakeTar, picture: Picture, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "moved").mkdir()
    make_tar("moved/1.tar", members(picture, 5))
    assert replay(ask(pairs, tmp_path / "moved" / "1.tar"))["counts"]["samples"] == 1
    assert "not among --input: 1 of the sources, the first 0.tar with 2 refused samples" in capsys.readouterr().err


def test_of_a_damaged_source_everything_the_build_lacks_goes_on(
    make_tar: MakeTar, picture: Picture, tmp_path: Path, tokenizer_folder: Path
) -> None:
    whole = make_tar("pairs.tar", members(picture, 0) + members(picture, 5)).read_bytes()
    (tmp_path / "pairs.tar").write_bytes(whole[: len(whole) // 2])
    build([tmp_path / "pairs.tar"], tmp_path / "pairs", tokenizer=tokenizer_folder, options=BuildOptions())
    held = len(samples_of(tmp_path / "pairs"))
    assert 0 < held < 10
    (tmp_path / "pairs.tar").write_bytes(whole)
    replay(ask(tmp_path / "pairs", tmp_path / "pairs.tar"))
    both = samples_of(tmp_path / "pairs", tmp_path / "replayed")
    assert len(both) == both.total() == 10


def test_an_option_may_be_the_cause(picture: Picture, tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    rows = []
    for seed in range(6):
        (tmp_path / ("old" if seed < 4 else "new") / f"{seed}.jpg").write_bytes(picture(seed))
        rows.append(json.dumps({"image": f"{seed}.jpg", "alt": f"{seed} dogs" if seed else "", "long": "one red star"}))
    source = tmp_path / "rows.jsonl"
    source.write_text("\n".join(rows))
    options = BuildOptions(images=tmp_path / "old", caption_column="alt")
    build([source], tmp_path / "pairs", tokenizer=tokenizer_folder, options=options)
    reasons = {row["reason"]: row["count"] for row in refusals(tmp_path / "pairs")["reasons"]}
    assert sum(reasons.values()) == 3
    for seed in range(4):
        shutil.copy(tmp_path / "old" / f"{seed}.jpg", tmp_path / "new")
    built = replay(ask(tmp_path / "pairs", source, images=tmp_path / "new", caption_column=("long",)))
    assert built["counts"]["samples"] == 3
    assert {caption for caption, _ in samples_of(tmp_path / "replayed")} == {b"one red star"}


def test_what_cannot_be_replayed_is_said(pairs: Path, picture: Picture, make_tar: MakeTar, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no sample is left; 1 quarantined"):
        replay(ask(pairs, tmp_path / "in" / "1.tar"))
    assert not (tmp_path / "replayed").exists()  # another attempt has other options
    other = make_tar("other.tar", members(picture, 0))
    with pytest.raises(DataError, match=r"no --input is a source that samples were refused of, such as 0\.tar"):
        replay(ask(pairs, other))
    (tmp_path / "text.txt").write_text("one dog\n")
    with pytest.raises(UsageError, match=r"of kind 'text', .* is of kind 'pairs'"):
        replay(ask(pairs, tmp_path / "text.txt"))
    (pairs / "quarantine.jsonl").unlink()
    with pytest.raises(DataError, match=r"quarantine\.jsonl: missing, 3 entries are counted"):
        refusals(pairs)


def test_an_unfinished_build_tells_what_it_refused_so_far(
    pairs: Path, tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megaprior.data_tools.building import build as building

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(building, "commit", die)
    with pytest.raises(KeyboardInterrupt):
        build([tmp_path / "in"], tmp_path / "half", tokenizer=tokenizer_folder, options=BuildOptions())
    found = refusals(tmp_path / "half")
    assert (found["complete"], found["quarantined"]) == (False, 3)
    with pytest.raises(DataError, match=r"no build\.json"):
        refusals(tmp_path / "in")

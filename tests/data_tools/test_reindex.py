"""`reindex`: what can be rebuilt comes back bit for bit, what cannot is said, and nothing is blessed unasked."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megaprior.data.indexed_writer import IndexedWriter
from megaprior.data.shards import ShardSet, verify
from megaprior.data_tools.building.build import build
from megaprior.data_tools.options import BuildOptions
from megaprior.data_tools.sets.reindexing import reindex
from megaprior.errors import DataError
from tests.data_tools.sets import add_scores, check_scores, tree

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def pairs(make_tar: Callable[..., Path], picture: Callable[..., bytes], tmp_path: Path, tokenizer_folder: Path) -> Path:
    """Two shards: pictures of four formats with one caption; pictures with two captions each. Both scored."""
    (tmp_path / "in").mkdir()
    first = []
    for seed in range(8):
        file = io.BytesIO()
        Image.open(io.BytesIO(picture(seed))).save(file, ("JPEG", "PNG", "WEBP", "BMP")[seed % 4])
        first += [(f"{seed:05d}.jpg", file.getvalue()), (f"{seed:05d}.txt", b"one dog " * (seed + 1))]
    make_tar("in/0.tar", first)
    second = []
    for seed in range(8, 13):
        texts = json.dumps({"captions": [f"{seed} red stars", "a cat"]}).encode()
        second += [(f"{seed:05d}.jpg", picture(seed)), (f"{seed:05d}.json", texts)]
    make_tar("in/1.tar", second)
    build([tmp_path / "in"], tmp_path / "pairs", tokenizer=tokenizer_folder, options=BuildOptions(max_sequence=20))
    add_scores(tmp_path / "pairs")
    assert ShardSet.open(tmp_path / "pairs").build["counts"]["truncated"]
    return tmp_path / "pairs"


@pytest.mark.parametrize("damage", ["lost", "flipped", "empty", "foreign"])
def test_every_index_of_a_build_is_rebuilt_bit_for_bit(pairs: Path, damage: str) -> None:
    before = tree(pairs)
    indexes = sorted(pairs.glob("*.idx"))
    assert len(indexes) == 10
    for path in indexes:
        data = bytearray(path.read_bytes())
        data[40] ^= 1
        path.unlink() if damage == "lost" else path.write_bytes(
            {"flipped": data, "empty": b"", "foreign": b"<html>"}[damage]
        )
    told = reindex(pairs)
    assert (len(told.rebuilt), told.accepted, told.lost) == (10, [], [])
    assert tree(pairs) == before
    check_scores(pairs)


def test_text_and_its_windows_are_rebuilt(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "captions.txt").write_text("".join(f"{i} dogs\n" for i in range(120)))
    build([tmp_path / "captions.txt"], tmp_path / "text", tokenizer=tokenizer_folder, options=BuildOptions())
    (tmp_path / "long.jsonl").write_text("".join(f'{{"text": "{f"{i} dogs " * 90}"}}\n' for i in range(12)))
    options = BuildOptions(text=True, documents=True, max_sequence=50, caption_column="text")
    build([tmp_path / "long.jsonl"], tmp_path / "long", tokenizer=tokenizer_folder, options=options)
    for folder, lost in (("text", ("tokens", "keys")), ("long", ("tokens",)), ("long", ("keys",))):
        before = tree(tmp_path / folder)
        for name in lost:
            (tmp_path / folder / f"00000.{name}.idx").unlink()
        assert reindex(tmp_path / folder).lost == []
        assert tree(tmp_path / folder) == before


def test_what_is_really_lost_is_said_in_one_line(pairs: Path, tmp_path: Path, command: Command) -> None:
    (pairs / "00000.tokens.bin").unlink()
    (pairs / "00000.tokens.idx").unlink()
    data = bytearray((pairs / "00001.images.bin").read_bytes())
    data[100] ^= 1
    (pairs / "00001.images.bin").write_bytes(data)
    (pairs / "00001.images.idx").unlink()
    before = tree(pairs)
    code, said, _ = command("reindex", pairs, "--accept")
    assert code == 65
    assert tree(pairs) == before
    lines = said.splitlines()
    assert len(lines) == 4
    for words in (
        "00000.tokens.bin: missing; copy it again or rebuild the shard",
        "00001.images.idx: missing; copy it again",
    ):
        assert sum(words in line for line in lines) == 1, lines
    (pairs / "00000.json").write_text("{}")
    assert "it is never guessed" in command("reindex", pairs)[1]
    (pairs / "build.json").unlink()
    code, _, said = command("reindex", pairs)
    assert (code, said.count("\n")) == (65, 1)


def test_keys_that_no_rule_explains_are_lost(
    tmp_path: Path, make_tar: Callable[..., Path], tokenizer_folder: Path
) -> None:
    members = [(f"{'x' * i}y.txt", b"a dog") for i in range(1, 5)]
    make_tar("text.tar", members)
    build([tmp_path / "text.tar"], tmp_path / "out", tokenizer=tokenizer_folder, options=BuildOptions(text=True))
    (tmp_path / "out" / "00000.keys.idx").unlink()
    told = reindex(tmp_path / "out")
    assert len(told.lost) == 1
    assert "00000.keys.idx: missing, and nothing that is left tells where each sequence ends" in told.lost[0]


def test_a_flipped_bit_is_never_blessed_unasked(pairs: Path) -> None:
    path = pairs / "00000.keys.bin"
    data = bytearray(path.read_bytes())
    data[2] ^= 1
    path.write_bytes(data)
    before = tree(pairs)
    told = reindex(pairs)
    assert tree(pairs) == before
    assert told.rebuilt == told.accepted == []
    assert len(told.lost) == 1
    assert "block 0 (from byte 0) is not what was written; if that was meant, add --accept" in told.lost[0]


def test_a_deliberate_change_is_taken_over_and_recorded(pairs: Path, command: Command) -> None:
    shards = ShardSet.open(pairs)
    with IndexedWriter(pairs / "00000.keys", np.uint8) as writer:
        for i in range(8):
            writer.add(f"new name of {shards.key(i)}".encode())
            writer.end_document()
        writer.finish()
    code, said, _ = command("reindex", pairs)
    assert (code, said.count("add --accept")) == (65, 2)
    code, said, _ = command("reindex", pairs, "--accept")
    assert code == 0, said
    assert said.count("accepted") == 3  # two files, and the manifest that build.json names
    assert verify(pairs) == []
    assert ShardSet.open(pairs).key(0) == "new name of 00000"
    check_scores(pairs)
    accepted = json.loads((pairs / "00000.json").read_text())["accepted"]
    assert sorted(accepted) == ["00000.keys.bin", "00000.keys.idx"]
    assert "every index is what was written" in command("reindex", pairs)[1]


def test_changed_tokens_do_not_keep_their_scores(pairs: Path) -> None:
    path = pairs / "00001.tokens.bin"
    tokens = np.fromfile(path, "<u2")
    tokens[0] = 7
    tokens.tofile(path)
    reindex(pairs, accept=True)
    assert all("made for other tokens" in problem for problem in verify(pairs))
    ShardSet.open(pairs)
    with pytest.raises(DataError, match="they belong to another or an earlier shard set"):
        ShardSet.open(pairs, scores="ref_logprob")


def test_changes_that_do_not_fit_are_not_accepted(pairs: Path) -> None:
    path = pairs / "00001.tokens.bin"
    tokens = np.fromfile(path, "<u2")
    tokens[0] = 60_000
    tokens.tofile(path)
    scores = pairs / "00000.ref_logprob.bin"
    data = bytearray(scores.read_bytes())
    data[0] ^= 1
    scores.write_bytes(data)
    before = tree(pairs)
    told = reindex(pairs, accept=True)
    assert tree(pairs) == before
    assert len(told.lost) == 2
    assert any("not accepted: token ids from" in line for line in told.lost)
    assert any("are never accepted; delete 00000.ref_logprob.* and score" in line for line in told.lost)

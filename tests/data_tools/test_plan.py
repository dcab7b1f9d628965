from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megaprior.data_tools.building.plan import Plan, difference, make_plan
from megaprior.data_tools.options import BuildOptions
from megaprior.errors import DataError, UsageError


def plan(*paths: Path, tokenizer: str = "t", **options: object) -> Plan:
    return make_plan(paths, BuildOptions(**options), fingerprint=tokenizer)  # type: ignore[arg-type]


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    path = tmp_path / "in" / "captions.txt"
    path.parent.mkdir()
    path.write_bytes(b"a dog\n" * 100)
    return path


def test_one_shard_for_each_file_and_fixed_cuts_of_plain_text(captions: Path) -> None:
    other = captions.with_name("b.txt")
    other.write_bytes(b"x\n")
    found = plan(captions, other, text_shard_bytes=250)
    assert [(job.prefix, job.source.name, job.start, job.end, job.bytes) for job in found.jobs] == [
        ("00000", "captions.txt", 0, 250, 250),
        ("00001", "captions.txt", 250, 500, 250),
        ("00002", "captions.txt", 500, 750, 100),
        ("00003", "b.txt", 0, None, 2),
    ]
    assert found.kind == "text"


def test_the_build_id_is_of_content_and_options_not_of_place(captions: Path, tmp_path: Path) -> None:
    first = plan(captions)
    shutil.copytree(captions.parent, tmp_path / "else" / "where")
    assert plan(tmp_path / "else" / "where" / "captions.txt").build_id == first.build_id
    assert str(tmp_path) not in json.dumps(first.recorded)
    others = [
        plan(captions, max_sequence=99),
        plan(captions, tokenizer="u"),
        plan(captions, subset=(0.0, 0.5)),
        plan(captions, documents=True),
    ]
    captions.write_bytes(b"a cat\n" + b"a dog\n" * 99)
    others.append(plan(captions))
    captions.rename(captions.with_name("other.txt"))
    others.append(plan(captions.with_name("other.txt")))
    assert len({first.build_id, *(other.build_id for other in others)}) == 7


def test_two_plans_tell_how_they_differ(captions: Path) -> None:
    one, two = plan(captions), plan(captions, tokenizer="u", max_sequence=99)
    assert difference(one.recorded, two.recorded) == "tokenizer; max_sequence 99 there, 2048 now"


def test_pairs_and_text_do_not_mix(captions: Path, make_tar: Callable[..., Path]) -> None:
    tar = make_tar("a.tar", [("0.jpg", b"J"), ("0.txt", b"dog")])
    with pytest.raises(UsageError, match=r"captions.txt: text among inputs of pairs"):
        plan(tar, captions)
    assert plan(tar, captions, text=True).kind == "text"
    assert plan(tar).kind == "pairs"
    with pytest.raises(UsageError, match="--documents cuts text"):
        plan(tar, documents=True)


def test_refusals_name_the_file(tmp_path: Path, captions: Path) -> None:
    with pytest.raises(UsageError, match=r"--images .*gone: no such folder"):
        plan(captions, images=tmp_path / "gone")
    with pytest.raises(UsageError, match=r"--images .*in: no input is a table that names images"):
        plan(captions, images=captions.parent)
    path = tmp_path / "a.jsonl"
    path.write_text('{"alt": "dog"}\n')
    with pytest.raises(DataError, match=r"a.jsonl: no column 'caption' \(columns: 'alt'\)"):
        plan(path, text=True)
    with pytest.raises(DataError, match=r"a.jsonl: no column 'image'"):
        plan(path)

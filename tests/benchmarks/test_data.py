"""The data benchmark runs end to end, refuses what is not the same content, and prints what its samples say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import data
from benchmarks.data_case import Arm, Case, checked, take_turns
from benchmarks.data_child import Failed, run
from benchmarks.data_report import markdown, measured, verdicts

ROOT = Path(__file__).resolve().parents[2]


def case(*arms: Arm) -> Case:
    return Case(name="c", title="C", unit="pairs", text="", target="as fast", least=1.0, arms=list(arms))


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    work, output = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("results")
    data.main(["--quick", "--work", str(work), "--output", str(output)])
    return json.loads((output / "data_quick.json").read_text()), output


def test_a_quick_run_measures_every_section_and_hides_where_it_ran(quick: tuple[dict, Path]) -> None:
    result, output = quick
    assert not result["dropped"]
    assert [found["name"] for found in result["cases"]] == [
        "text build, SentencePiece",
        "pair build, generated",
        "random access, tokens",
        "random access, images",
        "loader, generated",
    ]
    for found in result["cases"]:
        assert measured(found, ours=True), found["name"]
        assert not [arm["refused"] for arm in found["arms"] if arm["refused"]], found["name"]
    assert result["opening"]["rounds"][0]["wall_s"] > 0
    assert set(result["ordering"]["sizes"]) == {"10000", "1000000", "100000000"}
    page = (output / "data_quick.md").read_text()
    assert "--quick: inputs so small that the numbers mean nothing" in page
    assert "not run: Megatron-LM preprocess_data.py: --megatron DIR was not given" in page
    assert str(output.parent) not in page + (output / "data_quick.json").read_text()
    assert (output / "data_quick.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_follows_from_the_raw_samples(quick: tuple[dict, Path]) -> None:
    result = json.loads(json.dumps(quick[0]))
    (found,) = [each for each in result["cases"] if each["name"] == "pair build, generated"]
    ours, header, bare, decoding = found["arms"]
    header["rounds"] = decoding["rounds"] = []
    ours["rounds"] = [{"amount": 100, "cpu_s": s, "wall_s": 2 * s} for s in (1.0, 2.0, 4.0)]
    bare["rounds"] = [{"amount": 100, "cpu_s": s, "wall_s": 2 * s} for s in (0.9, 1.6, 2.0)]
    assert verdicts(found) == [("ours", True, "0.80x of bare (0.65-0.85)")]
    text = markdown({**result, "cases": [found]})
    assert "| **ours** | 50 (38-75) | 25 |" in text
    assert "| bare | 62 (56-87) | 31 | 0.80x (0.65-0.85) |" in text


def test_an_arm_with_other_content_is_refused_and_not_timed() -> None:
    arms = Arm("ours", "", ours=True), Arm("other", ""), Arm("broken", "")

    def content(arm: Arm) -> str:
        if arm.name == "broken":
            raise Failed("no such module")
        return "1" if arm.ours else "2"

    assert [arm.name for arm in checked(arms, content, "1")] == ["ours"]
    found = case(*arms)
    take_turns(found, 3, lambda arm, number: {"amount": 1, "cpu_s": 1.0, "wall_s": 1.0})
    assert [len(arm.rounds) for arm in arms] == [3, 0, 0]
    assert "its content is not ours" in arms[1].refused
    assert arms[2].not_run == "no such module"
    assert verdicts(found.recorded()) == [("", None, "not judged: nothing to compare with")]


def test_arms_that_fail_on_the_way_leave_no_figure() -> None:
    def measure(arm: Arm, number: int) -> dict[str, float]:
        if not arm.ours and number:
            raise Failed("killed")
        return {"amount": 1, "cpu_s": 1.0, "wall_s": 1.0}

    found = case(Arm("ours", "", ours=True), Arm("peer", ""))
    take_turns(found, 3, measure)
    assert found.arms[1].not_run == "killed"
    assert not found.arms[1].rounds


def test_a_process_that_fails_tells_its_last_line() -> None:
    with pytest.raises(Failed, match=r"^ValueError: this is why$"):
        run([sys.executable, "-c", "raise ValueError('this is why')"])


def test_a_dry_run_names_sections_and_peers_and_measures_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.data", "--dry-run", "--only", "order", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert "yes  order" in done.stdout
    assert "no   text build" in done.stdout
    assert "Megatron-LM" in done.stdout
    assert not list(tmp_path.iterdir())

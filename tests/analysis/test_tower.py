from __future__ import annotations

from pathlib import Path

import pytest

from megaprior.analysis.findings import findings
from megaprior.analysis.tower import read_tower, tower_rows
from megaprior.errors import DataError
from megaprior.files import write_manifest

RECORD = {
    "format": "megaprior.retrieval",
    "version": 1,
    "images": 200,
    "captions": 400,
    "image_to_text": {"r1": 0.25, "r5": 0.5, "r10": 0.75},
    "text_to_image": {"r1": 0.2, "r5": 0.4, "r10": 0.6, "median_rank": 7},
    "chance": {"image_to_text_r1": 0.005, "text_to_image_r1": 0.005},
    "model_digest": "m",
    "build_id": "b",
}


def write(folder: Path, name: str, **changed: object) -> None:
    (folder / "analysis").mkdir(exist_ok=True)
    write_manifest(folder / "analysis" / f"retrieval_{name}.json", {**RECORD, **changed})


def test_the_record_of_the_shards_at_hand_is_read(tmp_path: Path) -> None:
    assert read_tower(tmp_path, shards="heldout") is None
    write(tmp_path, "a", images=1)
    write(tmp_path, "heldout")
    found = read_tower(tmp_path, shards="heldout")
    assert found is not None
    assert found == {"shards": "heldout"} | {k: v for k, v in RECORD.items() if k not in ("format", "version")}
    other = read_tower(tmp_path, shards="elsewhere")
    assert other is not None
    assert (other["shards"], other["images"]) == ("a", 1)


def test_the_record_of_an_earlier_checkpoint_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "heldout", checkpoint="step_00000040")
    (tmp_path / "latest").write_text("step_00000080\n")
    assert read_tower(tmp_path, shards="heldout") is None
    assert "is of step_00000040, the run is at step_00000080; run `megaprior evaluate` again" in capsys.readouterr().err
    (tmp_path / "latest").write_text("step_00000040\n")
    assert read_tower(tmp_path, shards="heldout") is not None


def test_recall_as_a_multiple_of_chance() -> None:
    image, text = tower_rows(RECORD)
    assert (image["words"], image["r1"], image["r10"], image["chance"], image["times"]) == (
        "an image's caption",
        0.25,
        0.75,
        0.005,
        pytest.approx(50),
    )
    assert (text["times"], text["median_rank"]) == (pytest.approx(40), 7)
    (said,) = findings({"importance_by_shards": {}, "models": {}, "reference_probe": None, "tower": RECORD})
    assert said == (
        "The vision tower, given a caption, ranks its own image first among 200 in 20.0% of the cases; chance is 0.50%, "
        "40 times as often."
    )


def test_a_changed_or_incomplete_record_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "heldout")
    path = tmp_path / "analysis" / "retrieval_heldout.json"
    path.write_text(path.read_text().replace("0.25", "0.95"))
    with pytest.raises(DataError, match="the file was changed"):
        read_tower(tmp_path, shards=None)
    write_manifest(path, {"format": "megaprior.retrieval", "version": 1, "images": 3})
    with pytest.raises(DataError, match="has no captions, image_to_text"):
        read_tower(tmp_path, shards=None)

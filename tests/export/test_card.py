"""The model card: valid for the Hub, true to the manifest, "unknown" without one, and with the licences of what it stands on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from megaprior.export import export
from megaprior.export.card import Facts, write_card

FACTS = {
    "stage": "ulvlm",
    "trajectory": {"seed": 5, "weighting.kind": "prior", "weighting.alpha": 0.5, "weighting.length_scale": True},
    "data": {"sources": [{"build_id": "b1d", "samples": 120, "weight": 3, "scorer": {"fingerprint": "5c0e"}}]},
    "wall_s": 12.5,
}


def parts(folder: Path) -> tuple[dict, str]:
    text = (folder / "README.md").read_text(encoding="utf-8")
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def test_a_run_tells_its_story(world, as_run, tmp_path) -> None:
    shutil.copytree(world.folders["text"], tmp_path / "my_base")
    (tmp_path / "my_base" / "LICENSE").write_text("be kind\n")
    (tmp_path / "my_base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# base\n")
    facts = {**FACTS, "trajectory": {**FACTS["trajectory"], "model.init": str(tmp_path / "my_base")}}
    run = as_run(world.folders["ulvlm"], tmp_path / "run", **facts)
    export(run, tmp_path / "out")
    head, body = parts(tmp_path / "out")
    assert head["library_name"] == "transformers"
    assert head["pipeline_tag"] == "image-text-to-text"
    assert head["license"] == "apache-2.0"
    assert {"megaprior", "prior", "encoder-free"} <= set(head["tags"])
    for words in (
        "| stage | ulvlm |",
        "| started from | my_base |",
        "| steps | 3 |",
        "| alpha | 0.5 |",
        "`b1d`, 120 samples",
    ):
        assert words in body
    assert "| scaled by caption length | True |" in body
    assert "| fingerprint of the scorer | `5c0e` |" in body
    assert world.tokenizer.fingerprint in body
    assert "licence apache-2.0; notices: [`licenses/0_my_base/LICENSE`]" in body
    assert (tmp_path / "out" / "licenses" / "0_my_base" / "LICENSE").read_text() == "be kind\n"
    assert str(tmp_path) not in body
    assert "12.5" not in body


@pytest.mark.parametrize("trains", ["projector", "projector_and_lm"])
def test_what_was_trained_is_said(world, as_run, tmp_path, trains) -> None:
    run = as_run(world.folders["hlvlm"], tmp_path / "run", trajectory={"model.trains": trains})
    export(run, tmp_path / "out", check=False)
    _, body = parts(tmp_path / "out")
    assert ("Only the MLP was trained" in body) == (trains == "projector")
    assert ("MLP and language model were" in body) == (trains == "projector_and_lm")


def test_licences_are_followed_through_the_stages(world, as_run, tmp_path) -> None:
    shutil.copytree(world.folders["text"], tmp_path / "llama")
    (tmp_path / "llama" / "NOTICE").write_text("Built with Llama\n")
    first = as_run(world.folders["text"], tmp_path / "first", trajectory={"model.init": str(tmp_path / "llama")})
    second = as_run(world.folders["text"], tmp_path / "second", trajectory={"model.init": str(first)})
    export(second, tmp_path / "out")
    head, body = parts(tmp_path / "out")
    assert head["license"] == "other"
    assert head["pipeline_tag"] == "text-generation"
    assert (tmp_path / "out" / "licenses" / "0_llama" / "NOTICE").is_file()
    assert "- llama: licence unknown; notices:" in body


def test_a_bare_folder_says_unknown(exports) -> None:
    head, body = parts(exports("hlvlm"))
    assert head["license"] == "other"
    assert body.count("unknown") > 5
    assert "fingerprint of the vision tower" in body
    assert "name no licence" in body


@pytest.mark.parametrize("weighting", ["ntp", "prior"])
def test_llama_3_is_named(tmp_path, weighting) -> None:
    values = dict.fromkeys(("stage", "steps", "seed", "alpha", "length_scale", "begun_from"), "unknown")
    facts = Facts(**values, weighting=weighting, fingerprints={"model": "0"}, llama3=True)
    write_card(tmp_path, kind="hlvlm", name="m", dtype="bfloat16", facts=facts, notices=[], appended=False)
    head, body = parts(tmp_path)
    assert "Built with Meta Llama 3." in body
    assert ("may amplify biases" in body) == (weighting == "prior")
    assert head["license"] == "other"

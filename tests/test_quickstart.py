"""The README's first command, every stage of it, with a few steps each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXPORTS = ["hlvlm_ntp", "hlvlm_prior", "reference", "ulvlm_ntp", "ulvlm_prior"]
PICTURE = "images/000000.png"
pytestmark = pytest.mark.slow


def environment() -> dict[str, str]:
    """With this environment's programs first on PATH."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def quickstart(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "launch/quickstart.sh", "--fast", "--out", str(out), *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


def test_scenes_from_pairs_to_report_and_again(tmp_path: Path) -> None:
    done = quickstart(tmp_path / "run")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == str(tmp_path / "run" / "report.html")
    assert "killed by SIGKILL" in done.stderr
    assert "repeating the command" in done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert 0 <= results["importance"]["auroc"] <= 1
    assert 0.25 < results["importance"]["related_fraction"] < 0.36
    assert list(results["models"]) == ["ulvlm", "hlvlm"]
    for methods in results["models"].values():
        for method in ("ntp", "prior"):
            (seed,) = methods[method]
            assert seed["seed"] == 0
            assert None not in (seed["loss_related"], seed["loss_unrelated"], seed["probe_accuracy"])
    assert results["tower"]["images"] == 40
    assert sorted(path.name for path in (tmp_path / "run" / "export").iterdir()) == EXPORTS
    caption = ["megaprior", "caption", str(tmp_path / "run/export/hlvlm_prior"), PICTURE, "--max-tokens", "4"]
    pictures = tmp_path / "run" / "scenes" / "probe"
    said = subprocess.run(caption, cwd=pictures, capture_output=True, text=True, env=environment(), check=True)
    assert PICTURE in said.stdout
    assert results["stages"]
    page = (tmp_path / "run" / "report.html").read_bytes()

    again = quickstart(tmp_path / "run")
    assert again.returncode == 0, again.stderr[-2000:]
    assert "train ulvlm" not in again.stderr, "a finished stage is kept"
    assert abs(len((tmp_path / "run" / "report.html").read_bytes()) - len(page)) < 2000


def test_ones_own_pairs(tmp_path: Path, shared) -> None:
    done = quickstart(tmp_path / "run", "--data", str(shared("flickr8k_tars") / "00000.tar"))
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["importance"]["auroc"] is None, "nobody knows the truth about these words"
    assert results["models"]["ulvlm"]["prior"][0]["probe_accuracy"] is None


def test_wrong_options_are_one_line() -> None:
    wrong = subprocess.run(["bash", "launch/quickstart.sh", "--sedes", "2"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 2
    assert wrong.stderr == "quickstart: unknown option --sedes (see --help)\n"

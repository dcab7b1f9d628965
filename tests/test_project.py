"""The project as a newcomer meets it: commands that the pages promise exist, and an installed wheel works from anywhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from megaprior.cli import main

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands() -> list[tuple[str, str]]:
    """(page, command line) of every indented command that starts with one of our programs."""
    found = []
    for page in PAGES:
        for line in page.read_text(encoding="utf-8").splitlines():
            command = line.strip().strip("`").removeprefix("$ ")
            if line.startswith("    ") and re.match(
                r"(bash (launch|\.ci)/|sbatch launch/|megaprior(-data)? [a-z])", command
            ):
                found.append((page.name, command))
    return found


def test_the_readme_gives_the_two_commands() -> None:
    readme = {command.split(" #")[0].strip() for page, command in commands() if page == "README.md"}
    assert {"bash launch/quickstart.sh", "bash launch/test.sh"} <= readme


@pytest.mark.parametrize(("page", "command"), commands())
def test_what_a_command_names_exists(page: str, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = command.split(" #")[0].split()
    for word in words:
        if re.fullmatch(r"(launch|\.ci|docs|benchmarks|tests)/[\w./-]+", word) and "*" not in word:
            assert (ROOT / word).exists(), f"{page}: {word}"
    if words[0] in ("megaprior", "megaprior-data"):
        from megaprior.data_tools.cli import main as data_main

        with pytest.raises(SystemExit) as caught:
            (main if words[0] == "megaprior" else data_main)([words[1], "--help"])
        assert caught.value.code == 0, f"{page}: {command}"
        shown = capsys.readouterr().out
        for flag in re.findall(r"(?<=\s)--[a-z][\w-]*", command):
            assert flag in shown, f"{page}: {flag} is no option of {words[0]} {words[1]}"


@pytest.mark.parametrize("script", sorted((ROOT / "launch").glob("*.sh")), ids=lambda path: path.name)
def test_launch_scripts_parse(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize("path", sorted((ROOT / "launch" / "configs").rglob("*.yaml")), ids=lambda path: path.name)
def test_every_config_is_valid_and_says_what_it_is(path: Path) -> None:
    from megaprior.config import load_config
    from megaprior.train.run import RunConfig

    load_config(RunConfig, path)
    assert path.read_text(encoding="utf-8").startswith("#"), (
        "a header: the command, the hardware and hours, what to expect"
    )


@pytest.mark.slow
def test_a_wheel_works_from_the_root_and_from_elsewhere(tmp_path: Path) -> None:
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("megaprior-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "megaprior/kernels/__init__.py" in names
    assert "megaprior/data_tools/cli.py" in names
    assert "megaprior/analysis/templates/report.html" in names
    assert "megaprior/export/templates/model_card.md" in names
    assert not [
        name for name in names if name.split("/")[0] in ("kernels", "data_tools", "tests", "benchmarks", "launch")
    ]
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(install, check=True)
    script = "import megaprior.kernels, megaprior.data_tools.cli, transformers; megaprior.kernels.token_weights"
    for place in (ROOT, tmp_path):
        subprocess.run(
            [sys.executable, "-c", script], cwd=place, env={**os.environ, "PYTHONPATH": str(target)}, check=True
        )

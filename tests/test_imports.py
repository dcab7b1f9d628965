"""The import rules of CONTRIBUTING.md, read from the sources."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOUNDATION = {"errors", "files", "config", "distributed", "telemetry", "tokenizer", "trackers", "wandb_feed"}
DATA_RECORD = {"data.samples"}

# room -> what it may import of ours (prefixes of dotted names below megaprior)
MAY_IMPORT: dict[str, set[str]] = {
    "kernels": {"kernels"},
    **dict.fromkeys(FOUNDATION, FOUNDATION),
    "data": FOUNDATION | {"kernels", "data"},
    "models": FOUNDATION | {"kernels", "models"},
    "objectives": FOUNDATION | {"kernels", "objectives", "models.outputs"} | DATA_RECORD,
    "train": FOUNDATION | {"data", "models", "objectives", "train", "kernels"},
    "score": FOUNDATION | {"kernels", "data", "models", "score", "train.checkpoint"},
    "evaluate": FOUNDATION | {"kernels", "data", "models", "train.checkpoint"},
    "retrieval": FOUNDATION | {"data", "models", "train.checkpoint"},
    "export": FOUNDATION | {"kernels", "data", "models", "export", "train.checkpoint"},
    "caption": FOUNDATION | {"kernels", "data", "models", "export", "train.checkpoint"},
    "importing": FOUNDATION | {"kernels", "data", "models", "export", "train.checkpoint"},
    "planning": FOUNDATION
    | {"kernels", "data", "models", "planning", "train.settings", "train.assembly", "train.zero3_config"},
    "doctor": FOUNDATION | {"kernels", "data", "models", "train", "planning", "doctor"},
    "analysis": FOUNDATION | {"data", "kernels", "analysis"},
    "analysis.loss_split": FOUNDATION | {"data", "kernels", "analysis", "models", "train.checkpoint"},
    "data_tools": FOUNDATION | {"data", "data_tools", "kernels"},
}
THIRD_PARTY_ONLY_IN = {"deepspeed": "train.zero3"}  # and the files beside it whose names begin so


def sources() -> list[tuple[str, Path]]:
    """(dotted name below megaprior, file) of every module of the product."""
    found = []
    rooms = ((ROOT / "megaprior", ""), (ROOT / "kernels", "kernels."), (ROOT / "data_tools", "data_tools."))
    for folder, prefix in rooms:
        for path in sorted(folder.rglob("*.py")):
            inside = path.relative_to(folder)
            if folder.name == "megaprior" and inside.parts[0] in ("kernels", "data_tools"):
                continue  # links to the folders themselves
            name = prefix + ".".join(inside.with_suffix("").parts)
            found.append((name.removesuffix(".__init__").rstrip("."), path))
    return found


def imports(name: str, path: Path) -> list[str]:
    """Every module that the file imports, at any depth of the code; relative ones made absolute."""
    package = ["megaprior", *name.split(".")]
    if path.name != "__init__.py":
        package = package[:-1]
    modules = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            modules.append(stem)
            if stem in ("megaprior", "megaprior.data", "megaprior.models", "megaprior.train", "megaprior.analysis"):
                modules += [f"{stem}.{alias.name}" for alias in node.names]
    return modules


def allowed(name: str, target: str) -> bool:
    rule = max((room for room in MAY_IMPORT if name == room or name.startswith(room + ".")), key=len, default=None)
    if rule is None or target in ("", "__version__") or target == name:
        return True
    return any(target == room or target.startswith(room + ".") for room in MAY_IMPORT[rule])


@pytest.mark.parametrize(("name", "path"), sources(), ids=lambda value: value if isinstance(value, str) else "")
def test_a_room_imports_only_what_it_may(name: str, path: Path) -> None:
    if name in ("cli", "__init__", ""):
        return
    for module in imports(name, path):
        if module == "megaprior" or module.startswith("megaprior."):
            target = module.removeprefix("megaprior").lstrip(".")
            room_package = target in {"data", "models", "train", "analysis", "score", "objectives"}
            assert room_package or allowed(name, target), f"{path.relative_to(ROOT)} imports {module}"
        top = module.split(".")[0]
        if top in THIRD_PARTY_ONLY_IN:
            assert name.startswith(THIRD_PARTY_ONLY_IN[top]), f"{path.relative_to(ROOT)} imports {top}"
        if name.split(".")[0] == "kernels":
            assert top != "transformers", f"{path.relative_to(ROOT)} imports transformers"


def test_the_rules_catch_a_forbidden_import() -> None:
    assert not allowed("data.loader", "models.lm")
    assert not allowed("models.lm", "data.samples")
    assert not allowed("analysis.report", "models.lm")
    assert allowed("analysis.loss_split", "models.lm")
    assert not allowed("evaluate", "train.loop")
    assert allowed("objectives.base", "data.samples")


def test_no_file_shadows_the_standard_library() -> None:
    for _, path in sources():
        assert path.stem not in {"tokenize", "inspect", "types", "profile", "utils", "common", "misc"}, path


@pytest.mark.parametrize("command", [["-m", "megaprior.cli"], ["-m", "megaprior.data_tools.cli"]])
def test_help_imports_nothing_heavy(command: list[str]) -> None:
    heavy = ("torch", "transformers", "deepspeed", "matplotlib", "pyarrow", "scipy", "numpy", "PIL")
    script = (
        "import runpy, sys\n"
        f"sys.argv = ['x', '--help']\n"
        f"try:\n    runpy.run_module({command[1]!r}, run_name='__main__')\nexcept SystemExit:\n    pass\n"
        f"print([name for name in {heavy!r} if name in sys.modules], file=sys.stderr)"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.strip().splitlines()[-1] == "[]"
    assert "usage:" in done.stdout
    assert time.perf_counter() - start < 5  # a guard against hangs; docs/notebook.md has the measured time

"""A small world of models and exports of them, made once."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from megaprior.files import block_digests, write_manifest

HERE = str(Path(__file__).parent)
if HERE not in sys.path:
    sys.path.insert(0, HERE)  # so that tests find export_world by name

if TYPE_CHECKING:
    from export_world import World


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """See export_world.py."""
    from export_world import make_world

    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return make_world(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def exports(world: World, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`exports("ulvlm")` is that model's export in fp32, made once."""
    from megaprior.export import export

    root = tmp_path_factory.mktemp("exports")

    def made(kind: str) -> Path:
        if not (root / kind).exists():
            export(world.folders[kind], root / kind)
        return root / kind

    return made


@pytest.fixture
def as_run() -> Callable[..., Path]:
    """`as_run(model, run, stage="ulvlm", ...)` puts a model's folder into a run as its checkpoint after step 3."""

    def put(model: Path, run: Path, **facts: object) -> Path:
        step = run / "checkpoints" / "step_00000003"
        shutil.copytree(model, step / "model")
        names = sorted(str(path.relative_to(step)) for path in step.rglob("*") if path.is_file())
        files = {n: {"bytes": os.path.getsize(step / n), "blocks": block_digests(step / n)} for n in names}
        body = {"format": "megaprior.checkpoint", "version": 1, "step": 3, "files": files, **facts}
        write_manifest(step / "manifest.json", body)
        (run / "latest").write_text("step_00000003\n")
        return run

    return put

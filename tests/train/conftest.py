"""A small world of shards, made once, and children that train in it."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = str(Path(__file__).parent)
if HERE not in sys.path:
    sys.path.insert(0, HERE)  # so that a child process finds train_children by name


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the shards `pairs`, `heldout` and `text`, and `tokenizer`."""
    from train_children import make_world

    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    return folder


@pytest.fixture(scope="session")
def spawn() -> Iterator[Callable[..., Any]]:
    """`spawn(values, fault={})` starts a training process from a server that has imported everything once."""
    import train_children

    context = multiprocessing.get_context("forkserver")
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [HERE, before]))
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    context.set_forkserver_preload(["train_children", "deepspeed", "torch.utils.tensorboard"])

    def start(values: dict[str, Any], fault: dict[str, Any] | None = None) -> Any:
        process = context.Process(target=train_children.child, args=(values, fault or {}))
        process.start()
        return process

    yield start
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


@pytest.fixture
def launch(spawn: Callable[..., Any]) -> Callable[..., list[int]]:
    """`launch(values, world=2, fault={}, environment={})` trains under ZeRO-3 on that many ranks; returns their exit codes."""
    import train_children

    def run(
        values: dict[str, Any],
        *,
        world: int = 2,
        fault: dict[str, Any] | None = None,
        environment: dict[str, str] | None = None,
    ) -> list[int]:
        values = {**values, "engine": "zero3", "zero": train_children.PARTITION_ALL}
        port = str(train_children.free_port())
        shared = {**(environment or {}), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks = [{**shared, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(world)]
        processes = [spawn(values, {**(fault or {}), "environment": rank}) for rank in ranks]
        for process in processes:
            process.join(240)
        assert all(process.exitcode is not None for process in processes), "a rank hangs"
        return [process.exitcode for process in processes]

    return run

"""Fixtures every room's tests share."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # read when a kernel is defined, so before anything imports Triton
    os.environ.setdefault("TRITON_INTERPRET", "1")

_THREADS = torch.get_num_threads()
_SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def _threads_as_they_were() -> Iterator[None]:
    """What a test computes bit for bit may not depend on how many threads an earlier one, or its fixtures, asked for."""
    yield
    if torch.get_num_threads() != _THREADS:
        torch.set_num_threads(_THREADS)


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """`shared("flickr8k_tars")` is that folder of real inputs beside the repository; skips, naming it, where it is absent."""

    def folder(name: str) -> Path:
        path = _SHARED / name
        if not path.exists():
            pytest.skip(f"real data folder {name} is not beside this checkout")
        return path

    return folder


@pytest.fixture(scope="session")
def small_disk() -> Callable[[Path, str], AbstractContextManager[None]]:
    """`with small_disk(folder, "64k"):` mounts a file system of that size on the folder; skips where we are not root."""

    @contextmanager
    def mounted(folder: Path, size: str) -> Iterator[None]:
        if os.geteuid() != 0:
            pytest.skip("needs root to mount a small tmpfs")
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
        try:
            yield
        finally:
            subprocess.run(["umount", str(folder)], check=True)

    return mounted

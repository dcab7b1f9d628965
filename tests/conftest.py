"""Fixtures every room's tests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

_SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """`shared("flickr8k_tars")` is that folder of real inputs beside the repository; skips, naming it, where it is absent."""

    def folder(name: str) -> Path:
        path = _SHARED / name
        if not path.exists():
            pytest.skip(f"real data folder {name} is not beside this checkout")
        return path

    return folder

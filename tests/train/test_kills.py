"""Both ranks of a ZeRO-3 run, or one, are killed at random moments of their saves, and the run ends with the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.checkpoint_kills import kill_and_compare


@pytest.mark.slow
def test_killed_in_saves_and_repeated(tmp_path: Path) -> None:
    """`python -m benchmarks.checkpoint --kills N` does more of them; the seed is one that draws every kind of moment."""
    tally = kill_and_compare(tmp_path, kills=5, seed=2)
    assert sum(tally.kills.values()) == 5
    assert len(tally.kills) >= 3
    assert tally.left["a half-written or half-deleted folder"] >= 1

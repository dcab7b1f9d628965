from __future__ import annotations

import pytest

from megaprior.analysis import tables


def test_means_need_every_seed() -> None:
    assert tables.mean([{"loss": 1.0}, {"loss": 2.0}], "loss") == 1.5
    assert tables.mean([{"loss": 1.0}, {"loss": None}], "loss") is None
    assert tables.mean([], "loss") is None


def test_attempts_at_a_stage_add_up() -> None:
    lines = [
        {"stage": "score", "wall_s": 3.0, "peak_memory_mib": 500, "command": "first"},
        {"stage": "build", "wall_s": 1.0},
        {"stage": "score", "wall_s": 4.5, "peak_memory_mib": 400, "command": "again"},
    ]
    stages = tables.stage_times(lines)
    assert list(stages) == ["score", "build"]
    score, build = stages["score"], stages["build"]
    assert (score["wall_s"], score["peak_memory_mib"], score["command"]) == (7.5, 500, "again")
    assert (build["wall_s"], build["peak_memory_mib"]) == (1.0, None)


def test_a_runs_steps_say_how_full_their_rows_were_and_how_long_they_waited() -> None:
    train = [
        {"step_s": 0.5, "data_wait_s": 0.125, "fill": 0.5},
        {"step_s": 1.5, "data_wait_s": 0.0, "fill": 1.0},
        {"step_s": 0.5, "data_wait_s": 0.375, "fill": 0.75},
    ]
    row = tables.stage_row({"wall_s": 9.0, "steps": 3}, train)
    assert (row["fill"], row["data_wait_s"], row["data_wait_share"]) == (0.75, 0.5, 0.2)
    assert (row["wall_s"], row["steps"], row["peak_memory_mib"]) == (9.0, 3, None)
    older = tables.stage_row({}, [{"step_s": 1.0}, {"step_s": 1.0}])
    assert (older["fill"], older["data_wait_s"], older["data_wait_share"]) == (None, None, None)
    assert tables.stage_row({"wall_s": 1.0})["fill"] is None  # no run: building, scoring


def test_the_spread_over_seeds() -> None:
    rows = [{"loss": 1.0}, {"loss": 2.0}, {"loss": 6.0}]
    assert tables.spread(rows, "loss") == {
        "mean": 3.0,
        "low": 1.0,
        "high": 6.0,
        "std": pytest.approx(7**0.5),
        "seeds": 3,
    }
    assert tables.spread(rows[:2], "loss") == {"mean": 1.5, "low": 1.0, "high": 2.0, "std": None, "seeds": 2}
    assert tables.spread(rows[:1], "loss") is None
    assert tables.spread([*rows, {"loss": None}], "loss") is None


def test_threshold_tables_are_averaged_row_by_row() -> None:
    def row(above: float | None) -> list[dict]:
        return [{"threshold": 0.5, "share_above": 0.25, "above": above, "below": 1.0}]

    assert tables.threshold_means([{"thresholds": row(2.0)}, {"thresholds": row(3.0)}])[0]["above"] == 2.5
    assert tables.threshold_means([{"thresholds": row(2.0)}, {"thresholds": row(None)}])[0]["above"] is None
    assert tables.threshold_means([{"thresholds": None}, {}]) == []


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (tables.percent(0.7345), "73.5%"),
        (tables.percent(None), "\u2013"),
        (tables.number(1234.5), "1,234.50"),
        (tables.number(-0.243, 3), "\u22120.243"),
        (tables.signed(0.5), "+0.50"),
        (tables.signed(-0.5), "\u22120.50"),
        (tables.duration(6.94), "6.9 s"),
        (tables.duration(59.6), "1 min 0 s"),
        (tables.duration(78.2), "1 min 18 s"),
        (tables.duration(7_260), "2 h 1 min"),
        (tables.memory(812.4), "812 MiB"),
        (tables.memory(3300), "3.2 GiB"),
        (tables.memory(None), "\u2013"),
        (tables.setting(None), "\u2013"),
        (tables.setting(True), "true"),
        (tables.setting("prior"), "prior"),
        (tables.setting([0.9, 0.95]), "[0.9, 0.95]"),
    ],
)
def test_numbers_as_people_read_them(shown: str, expected: str) -> None:
    assert shown == expected

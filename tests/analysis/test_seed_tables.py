from __future__ import annotations

from megaprior.analysis.names import looks
from megaprior.analysis.seed_tables import HELDOUT, PROBE, known, overview, seed_table
from megaprior.analysis.tables import UNKNOWN


def row(seed: int, loss: float, gap: float, accuracy: float) -> dict:
    half = {"threshold": 0.5, "share_above": 0.4, "above": loss + 1, "below": loss - 1}
    return {
        "seed": seed,
        "loss": loss,
        "shuffle_gap": gap,
        "shuffle_gap_interval": [gap - 0.25, gap + 0.25],
        "thresholds": [half],
        "probe_accuracy": accuracy,
        "probe_interval": [accuracy - 0.1, accuracy + 0.1],
    }


LOOK = looks(["ntp", "prior"])


def test_one_seed_is_a_row_two_have_a_range_and_three_a_deviation() -> None:
    one = seed_table({"ntp": [row(7, 2.0, 0.5, 0.75)]}, LOOK, PROBE[:2])
    assert [(line["kind"], line["label"], line["cells"]) for line in one] == [
        ("seed", "7", ["75.0%", "65.0% to 85.0%"]),
    ]
    two = seed_table({"ntp": [row(0, 2.0, 0.5, 0.75), row(1, 3.0, 0.5, 0.65)]}, LOOK, PROBE[:2])
    assert [(line["kind"], line["label"], line["cells"]) for line in two[2:]] == [
        ("mean", "mean of 2", ["70.0%", UNKNOWN]),
        ("spread", "min to max", ["65.0% to 75.0%", UNKNOWN]),
    ]
    three = seed_table({"prior": [row(i, 2.0 + i, -0.5 - i, 0.5) for i in range(3)]}, LOOK, known(HELDOUT, {}))
    assert [line["cells"] for line in three] == [[]] * 5
    columns = [column for column in HELDOUT if column.field in ("loss", "above", "shuffle_gap")]
    three = seed_table({"prior": [row(i, 2.0 + i, -0.5 - i, 0.5) for i in range(3)]}, LOOK, columns)
    assert [line["cells"] for line in three[3:]] == [
        ["3.000", "4.000", "\u22121.500"],
        ["± 1.000", "± 1.000", "± 1.000"],
    ]
    assert (three[4]["label"], three[4]["name"], three[4]["css"]) == ("std. dev.", "PRIOR", "prior")


def test_columns_without_any_value_are_left_out() -> None:
    heads = [column.field for column in known(HELDOUT, {"ntp": [row(0, 2.0, 0.5, 0.7)]})]
    assert heads == ["loss", "above", "below", "shuffle_gap", "shuffle_gap_interval"]


def test_a_mean_that_lacks_a_seed_is_not_told() -> None:
    rows = [row(0, 2.0, 0.5, 0.7), row(1, 2.0, 0.5, 0.7) | {"loss": None}]
    table = seed_table({"ntp": rows}, LOOK, HELDOUT[:1])
    assert [line["cells"] for line in table] == [["2.000"], [UNKNOWN], [UNKNOWN], [UNKNOWN]]


def test_the_overview_has_a_row_for_each_family_and_method() -> None:
    models = {
        "ulvlm": {"ntp": [row(0, 2.0, 0.5, 0.7), row(1, 3.0, 0.5, 0.8)]},
        "hlvlm": {"prior": [row(0, 1.5, 0.25, 0.9)]},
    }
    heads, rows = overview(models, LOOK)
    assert heads == ["all tokens", "w above 0.5", "w below 0.5", "change with shuffled images", "probe right"]
    assert [(r["family"], r["name"], r["seeds"]) for r in rows] == [("U-LVLM", "NTP", 2), ("H-LVLM", "PRIOR", 1)]
    assert rows[0]["cells"][0] == {"value": "2.500", "range": "2.000 to 3.000"}
    assert rows[1]["cells"][-1] == {"value": "90.0%", "range": ""}

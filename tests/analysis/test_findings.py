from __future__ import annotations

from megaprior.analysis.findings import caveats, findings


def body(ntp: dict, prior: dict, *, seeds: int = 1) -> dict:
    return {
        "importance_by_shards": {
            "pairs": {
                "mean": 0.5,
                "perplexity": 2.0,
                "auroc": 0.85,
                "related_fraction": 0.31,
                "related_token_fraction": 0.27,
            }
        },
        "models": {"ulvlm": {"ntp": [ntp] * seeds, "prior": [prior] * seeds}},
        "reference_probe": {"accuracy": 0.5},
    }


def test_directions_follow_the_numbers() -> None:
    better = " ".join(findings(body({"loss": 1.0, "loss_related": 1.0}, {"loss": 0.9, "loss_related": 0.75})))
    assert "on image-related words PRIOR's loss is lower than NTP's, 0.75 against 1.00 nats (\u22120.25)" in better
    worse = " ".join(findings(body({"loss": 1.0}, {"loss": 1.5})))
    assert "on all tokens PRIOR's loss is higher than NTP's, 1.50 against 1.00 nats (+0.50)" in worse
    same = " ".join(findings(body({"loss": 1.0}, {"loss": 1.001})))
    assert "PRIOR and NTP lose the same, 1.00 nats" in same


def test_both_sides_of_importance_are_told_and_why_easy_words_are_lost() -> None:
    def row(related: float, other: float, above: float, below: float) -> dict:
        half = {"threshold": 0.5, "share_above": 0.42, "above": above, "below": below}
        return {"loss": 1.0, "loss_related": related, "loss_unrelated": other, "thresholds": [half]}

    ntp = row(1.0, 0.5, 1.25, 0.25)
    text = " ".join(findings(body(ntp, row(1.1, 0.8, 1.0, 3.0))))
    assert "on image-related words PRIOR's loss is higher than NTP's, 1.10 against 1.00 nats (+0.10)" in text
    assert (
        "on the 42% of tokens that the reference found hard (w above 0.5) PRIOR's loss is lower than NTP's, 1.00"
        in text
    )
    assert "on the 58% that it found easy PRIOR's loss is higher than NTP's, 3.00 against 0.25 nats (+2.75)" in text
    assert "nothing teaches the model to predict it" in text
    assert "Some image-related words are easy too" in text
    assert "Some image-related" not in " ".join(findings(body(ntp, row(0.9, 0.8, 1.0, 3.0))))
    assert "Why PRIOR is worse" not in " ".join(findings(body(ntp, row(0.9, 0.5, 1.0, 0.2))))


def test_words_and_tokens_are_told_apart() -> None:
    assert any("31.0% of the words relate to the image (27.0% of the tokens)" in s for s in findings(body({}, {})))


def test_an_interval_that_holds_zero_is_said_to() -> None:
    ntp = {"shuffle_gap": 0.1, "shuffle_gap_interval": [-0.1, 0.3]}
    prior = {"shuffle_gap": 0.5, "shuffle_gap_interval": [0.4, 0.6]}
    (text,) = [s for s in findings(body(ntp, prior)) if "another image" in s]
    assert "+0.10 nats for NTP (95% interval \u22120.10 to +0.30, which does not exclude 0)" in text
    assert "+0.50 nats for PRIOR (95% interval +0.40 to +0.60)" in text


def test_the_probe_is_told_with_chance_and_the_blind_reference() -> None:
    rows = {"probe_accuracy": 0.78, "probe_shuffled_accuracy": 0.51}
    (text,) = [s for s in findings(body(rows, {})) if "statements" in s]
    assert (
        "chance is 50%: NTP 78.0% (51.0% with shuffled images); the text-only reference, which cannot see, 50.0%."
        in text
    )


def test_the_probe_says_who_is_ahead_and_whether_by_more_than_the_items_explain() -> None:
    def told(ntp: tuple, prior: tuple) -> str:
        rows = [{"probe_accuracy": mid, "probe_interval": [low, high]} for low, mid, high in (ntp, prior)]
        return next(s for s in findings(body(*rows)) if "statements" in s)

    close = told((0.90, 0.92, 0.94), (0.86, 0.89, 0.91))
    assert "NTP is ahead; the 95% intervals overlap." in close
    far = told((0.4, 0.5, 0.6), (0.7, 0.8, 0.9))
    assert "PRIOR is ahead; the 95% intervals do not overlap." in far
    assert "Neither is ahead." in told((0.4, 0.5, 0.6), (0.4, 0.5, 0.6))


def test_two_families_are_told_apart_and_what_both_share_is_said_once() -> None:
    def half(above: float, below: float) -> dict:
        return {"loss": 1.0, "thresholds": [{"threshold": 0.5, "share_above": 0.4, "above": above, "below": below}]}

    rows = {"ntp": [half(1.0, 0.25)], "prior": [half(0.75, 2.0)]}
    given = body({}, {}) | {"models": {"ulvlm": rows, "hlvlm": rows}}
    said = findings(given)
    for name in ("U-LVLM", "H-LVLM"):
        assert len([s for s in said if s.startswith(f"{name}: The same by importance: on the 40%")]) == 1
    assert len([s for s in said if s.startswith("Why PRIOR is worse")]) == 1
    assert not [s for s in findings(given | {"models": {"ulvlm": rows}}) if s.startswith("U-LVLM: ")]


def test_a_third_method_is_told_and_who_is_ahead_of_whom() -> None:
    rows = {m: [{"probe_accuracy": right}] for m, right in (("ntp", 0.5), ("prior", 0.75), ("rare_words", 0.8))}
    (text,) = [s for s in findings(body({}, {}) | {"models": {"ulvlm": rows}}) if "statements" in s]
    assert "NTP 50.0%, PRIOR 75.0%, rare words 80.0%" in text
    assert text.endswith("PRIOR is ahead of NTP.")


def test_one_seed_is_said_to_be_one() -> None:
    assert any("One seed per method" in s for s in caveats(body({}, {})))
    three = " ".join(caveats(body({}, {}, seeds=3)))
    assert "3 seeds per method" in three
    assert "One seed" not in three
    mixed = body({}, {}, seeds=3)
    mixed["models"]["hlvlm"] = {"ntp": [{}]}
    assert any(s.startswith("1 to 3 seeds per method") for s in caveats(mixed))


def test_nothing_is_claimed_of_nothing() -> None:
    assert findings({"importance_by_shards": {}, "models": {}, "reference_probe": None}) == []

from __future__ import annotations

import pytest

from megaprior.analysis.names import by_family, check_name, compared, joined, looks, method_name, ordered
from megaprior.errors import UsageError


def test_ntp_and_prior_come_first_whatever_else_there_is() -> None:
    assert ordered(["rarity", "prior", "attention", "ntp", "prior"]) == ["ntp", "prior", "rarity", "attention"]
    runs = {"mine": {"prior": 1}, "hlvlm": {"rarity": 2, "ntp": 3}, "ulvlm": {"prior": 4}}
    assert [(f, list(m)) for f, m in by_family(runs).items()] == [
        ("ulvlm", ["prior"]),
        ("hlvlm", ["ntp", "rarity"]),
        ("mine", ["prior"]),
    ]


def test_other_methods_keep_their_typed_name_and_differ_in_colour_and_dash() -> None:
    found = looks(method for method in ("a_b", "c", "prior", "d", "e", "f"))  # an iterator is read once
    assert list(found) == ["prior", "a_b", "c", "d", "e", "f"]
    assert found["prior"].css == "prior"
    assert found["prior"].dash is None
    assert found["a_b"].name == "a b"
    drawn = [(look.css, look.dash) for look in found.values()]
    assert len(set(drawn)) == len(drawn)
    assert method_name("ntp") == "NTP"


def test_the_difference_is_priors_or_that_of_the_first_two() -> None:
    assert compared(["rarity", "prior", "ntp"]) == ("ntp", "prior")
    assert compared(["rarity", "prior"]) == ("prior", "rarity")
    assert compared(["ntp"]) is None


@pytest.mark.parametrize("name", ["Prior", "a-b", "", "x;}</style>", "é"])
def test_a_name_that_no_style_sheet_carries_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="only small letters, digits and _"):
        check_name(name, what="method")
    assert check_name("rare_words2", what="method") == "rare_words2"


def test_joined() -> None:
    assert [joined(words) for words in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a and b", "a, b and c"]

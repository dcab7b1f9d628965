"""How families and methods are called, ordered and drawn: the same everywhere on the page.

NTP and PRIOR come first and have colours of their own; any other method of training follows under the name that was typed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from megaprior.errors import UsageError

FAMILIES = {"ulvlm": "U-LVLM", "hlvlm": "H-LVLM"}
METHODS = {"ntp": "NTP", "prior": "PRIOR"}
_OTHERS = 4  # colours for other methods; a fifth starts over, with another dash
_DASHES = ((1, 1.5), (6, 1.5, 1, 1.5), (8, 3), (3, 1.5, 1, 1.5, 1, 1.5), (2, 3))
_NAME = re.compile(r"[a-z0-9_]+")
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Look:
    """How a method appears: `css` is both a class and a colour variable of the style sheet."""

    name: str
    css: str
    dash: tuple[float, ...] | None  # None: a solid line


def family_name(family: str) -> str:
    """ulvlm -> "U-LVLM"."""
    return FAMILIES.get(family, family.replace("_", " "))


def method_name(method: str) -> str:
    """prior -> "PRIOR"; what has no name of its own is called as it was typed."""
    return METHODS.get(method, method.replace("_", " "))


def check_name(name: str, *, what: str) -> str:
    """`name`, where it can stand in results.json, in a class name and in a colour variable.

    Raises:
        UsageError: it holds anything but small letters, digits and underscores.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(f"{what} {name!r}: only small letters, digits and _ ([a-z0-9_]), for example ulvlm.prior")
    return name


def ordered(methods: Iterable[str]) -> list[str]:
    """NTP, PRIOR, then the others as they came, each once."""
    given = list(dict.fromkeys(methods))
    return [m for m in METHODS if m in given] + [m for m in given if m not in METHODS]


def by_family(runs: Mapping[str, Mapping[str, _Value]]) -> dict[str, dict[str, _Value]]:
    """The families in the order of `FAMILIES`, each one's methods in order."""
    families = [f for f in FAMILIES if f in runs] + [f for f in runs if f not in FAMILIES]
    return {family: {method: runs[family][method] for method in ordered(runs[family])} for family in families}


def compared(methods: Iterable[str]) -> tuple[str, str] | None:
    """The two methods whose difference the page colours: NTP and PRIOR, or the first two; None for fewer."""
    given = ordered(methods)
    return (given[0], given[1]) if len(given) > 1 else None


def looks(methods: Iterable[str]) -> dict[str, Look]:
    """How each method of a page is drawn."""
    given = ordered(methods)
    found = {"ntp": Look("NTP", "ntp", (4, 2)), "prior": Look("PRIOR", "prior", None)}
    for number, method in enumerate(method for method in given if method not in METHODS):
        css = f"other{number % _OTHERS + 1}"
        found[method] = Look(method_name(method), css, _DASHES[number % len(_DASHES)])
    return {method: found[method] for method in given}


def run_label(family: str, method: str, seed: int | None, *, several: bool) -> str:
    """ "U-LVLM PRIOR, seed 1"; the family only where the page has `several`."""
    name = f"{family_name(family)} {method_name(method)}" if several else method_name(method)
    return f"{name}, seed {seed}" if seed is not None else name


def joined(words: Sequence[str]) -> str:
    """["a", "b", "c"] -> "a, b and c"."""
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)

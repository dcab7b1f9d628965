"""One line of the doctor's: what was found, why it matters, what to do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Level = Literal["green", "yellow", "red"]
LEVELS: tuple[Level, ...] = ("green", "yellow", "red")


@dataclass(frozen=True)
class Finding:
    """`level` green: as it should be; yellow: a run works, but not as well or not everywhere; red: a run fails or hangs."""

    level: Level
    check: str
    found: str
    why: str = ""
    remedy: str = ""
    where: str = ""  # the machine or rank it was found on, where they differ


def green(check: str, found: str, why: str = "") -> Finding:
    """As it should be."""
    return Finding("green", check, found, why)


def yellow(check: str, found: str, why: str, remedy: str) -> Finding:
    """A run works, but not as well or not everywhere."""
    return Finding("yellow", check, found, why, remedy)


def red(check: str, found: str, why: str, remedy: str) -> Finding:
    """A run fails or hangs."""
    return Finding("red", check, found, why, remedy)


def worst(findings: Iterable[Finding]) -> Level:
    """The verdict over all of them; green where there are none."""
    levels = {finding.level for finding in findings}
    if "red" in levels:
        return "red"
    return "yellow" if "yellow" in levels else "green"


def together(by_place: Sequence[tuple[str, Sequence[Finding]]]) -> list[Finding]:
    """The findings of several machines as one list.

    What all of them say stands once, without a place; what some say names them. Green lines that differ in their figures
    stand once too, as the first machine has them.
    """
    places: dict[Finding, list[str]] = {}
    sound: dict[str, list[tuple[str, Finding]]] = {}
    for place, findings in by_place:
        for finding in findings:
            if finding.level == "green":
                sound.setdefault(finding.check, []).append((place, finding))
            else:
                places.setdefault(finding, []).append(place)
    merged = []
    for found in sound.values():
        place, first = found[0]
        alike = len(found) == len(by_place) and all(other == first for _, other in found)
        others = f" and {len(found) - 1} more like it" if len(found) > 1 else ""
        merged.append(first if alike else replace(first, where=place + others))
    everywhere = len(by_place)
    troubles = [f if len(names) == everywhere else replace(f, where=_short(names)) for f, names in places.items()]
    return merged + troubles


def amount(size: float) -> str:
    """Bytes for people: 1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1024 or unit == "TiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1024
    raise AssertionError


def _short(names: Sequence[str]) -> str:
    shown = ", ".join(names[:6])
    return shown if len(names) <= 6 else f"{shown} and {len(names) - 6} more"

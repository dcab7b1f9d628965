"""The Markdown of benchmarks.data, computed from the kept raw samples alone."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.data_index import LIMIT_MB, LIMIT_S, SIZES, middle


def quartiles(samples: list[float]) -> tuple[float, float, float]:
    """(lower, median, upper)."""
    if len(samples) < 2:
        return samples[0], samples[0], samples[0]
    low, centre, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, centre, high


def measured(case: dict[str, Any], *, ours: bool | None = None) -> list[dict[str, Any]]:
    """The arms of a case that may be printed, ours first."""
    arms = [arm for arm in case["arms"] if arm["rounds"] and not arm["refused"] and not arm["not_run"]]
    return [arm for arm in arms if ours is None or arm["ours"] == ours]


def rates(arm: dict[str, Any], seconds: str = "cpu_s") -> list[float]:
    """Units a second, round by round."""
    return [found["amount"] / max(found[seconds], 1e-9) for found in arm["rounds"]]


def ratios(ours: dict[str, Any], arm: dict[str, Any], seconds: str = "cpu_s") -> list[float]:
    """Our rate over the arm's, round by round."""
    return [a / b for a, b in zip(rates(ours, seconds), rates(arm, seconds), strict=True)]


def best_peer(case: dict[str, Any]) -> dict[str, Any] | None:
    """The fastest arm that the target is held against."""
    peers = [arm for arm in measured(case, ours=False) if arm["base"]]
    return max(peers, key=lambda arm: statistics.median(rates(arm)), default=None)


def verdicts(case: dict[str, Any]) -> list[tuple[str, bool | None, str]]:
    """Of each of our arms (its name, whether the target held or None where it cannot be judged, in words)."""
    arms, peer = measured(case, ours=True), best_peer(case)
    if not arms or peer is None:
        return [("", None, "not judged: nothing to compare with")]
    found = []
    for arm in arms:
        low, centre, high = quartiles(ratios(arm, peer))
        found.append((arm["name"], centre >= case["least"], f"{centre:.2f}x of {peer['name']} ({low:.2f}-{high:.2f})"))
    return found


def targets(result: dict[str, Any]) -> list[tuple[str, str, bool | None, str]]:
    """(what, wanted, held, found) of every target."""
    lines = [
        (f"{case['title']}: {name}" if name not in ("", "ours") else case["title"], case["target"], held, text)
        for case in result["cases"]
        if case["least"] is not None
        for name, held, text in verdicts(case)
    ]
    if found := result.get("opening"):
        rounds = found["rounds"]
        seconds, memory = middle(rounds, "cpu_s"), middle(rounds, "extra_bytes") / 1e6
        held = seconds < LIMIT_S and memory < LIMIT_MB
        text = f"{seconds:.2f} s of processor time, {middle(rounds, 'wall_s'):.2f} s by the clock, {memory:.0f} MB above the "
        text += f"imports' {middle(rounds, 'base_bytes') / 1e6:.0f} MB"
        title = f"Opening {found['shards']:,} shards"
        lines.append((title, f"under {LIMIT_S:g} s and {LIMIT_MB:g} MB", held, text))
    if found := result.get("ordering"):
        few, many = (middle(found["sizes"][str(size)], "extra_bytes") / 1e6 for size in (SIZES[0], SIZES[-1]))
        text = f"{many:.1f} MB at {SIZES[-1]:,} samples, {few:.1f} MB at {SIZES[0]:,}"
        lines.append(("Order and packing", "memory of a step does not grow with the index", many < few + 2, text))
    return lines


def markdown(result: dict[str, Any], figure: str = "") -> str:
    """The whole report."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    parts = [
        "# The data tools and their peers",
        "\n".join(
            f"- `{run['command']}`, {run['date']}, {run['seconds']:,.0f} s, load {run['load']:.1f} at its start"
            for run in result["runs"]
        ),
        f"{result['machine']}; {versions}; seed {result['seed']}.",
    ]
    if result["quick"]:
        parts.append("**--quick: inputs so small that the numbers mean nothing.**")
    parts += [_LEGEND, _targets(result)]
    if figure:
        parts.append(f"![Our rate over each peer's]({figure})")
    parts += [_case(case) for case in result["cases"]]
    parts += [_opening(result["opening"])] if result.get("opening") else []
    parts += [_ordering(result["ordering"])] if result.get("ordering") else []
    if result["dropped"]:
        lines = "\n".join(f"- {item['name']}: {item['why']}" for item in result["dropped"])
        parts.append(f"## Not measured\n\n{lines}")
    return "\n\n".join(part for part in parts if part) + "\n"


_LEGEND = (
    "Arms take turns, each round in another order. Rates are medians (quartiles) per second of processor time, user and "
    "system, of all processes of an arm: that is what one core does, however busy the machine is; rates by the clock stand "
    "beside them. Ratios are ours over the arm's, round by round, by processor time. Every arm's content was compared with "
    "ours before, or it is not printed."
)


def _targets(result: dict[str, Any]) -> str:
    said = {True: "**held**", False: "**not held**", None: "open"}
    rows = [f"| {name} | {wanted} | {said[held]} | {found} |" for name, wanted, held, found in targets(result)]
    return "\n".join(["## Targets\n", "| what | wanted | | found |", "|---|---|---|---|", *rows]) if rows else ""


def _case(case: dict[str, Any]) -> str:
    lines = [f"## {case['title']}\n", case["text"], ""]
    arms = measured(case)
    ours = next(iter(measured(case, ours=True)), None)
    if ours is not None:
        unit = case["unit"]
        lines.append(f"| arm | {unit}/s per core | {unit}/s by the clock | ours / arm | what it does |")
        lines.append("|---|--:|--:|--:|---|")
        lines += [_row(arm, ours) for arm in arms]
    for arm in case["arms"]:
        if arm["refused"] or arm["not_run"]:
            kind, why = ("refused", arm["refused"]) if arm["refused"] else ("not run", arm["not_run"])
            lines.append(f"\n{kind}: {arm['name']}: {why}")
    return "\n".join(lines)


def _row(arm: dict[str, Any], ours: dict[str, Any]) -> str:
    low, centre, high = quartiles(rates(arm))
    a, b, c = quartiles(ratios(ours, arm))
    cells = [
        f"**{arm['name']}**" if arm["ours"] else arm["name"],
        f"{centre:,.0f} ({low:,.0f}-{high:,.0f})",
        f"{statistics.median(rates(arm, 'wall_s')):,.0f}",
        "" if arm is ours else f"{b:.2f}x ({a:.2f}-{c:.2f})",
        arm["what"],
    ]
    return "| " + " | ".join(cells) + " |"


def _opening(found: dict[str, Any]) -> str:
    rounds = found["rounds"]
    total = found["shards"] * found["samples"]
    rows = []
    for name, prefix in (("ShardSet.open", ""), ("and image sizes, which packing reads", "with_sizes_")):
        low, centre, high = quartiles([one[f"{prefix}wall_s"] for one in rounds])
        memory = middle(rounds, f"{prefix}extra_bytes")
        rows.append(f"| {name} | {centre:.2f} ({low:.2f}-{high:.2f}) | {memory / 1e6:.1f} | {memory / total:.0f} |")
    return "\n".join(
        [
            f"## Opening {found['shards']:,} shards of {found['samples']:,} pairs\n",
            f"Fresh processes, {len(rounds)} of them, files in the page cache; processor time of opening "
            f"{middle(rounds, 'cpu_s'):.2f} s. Memory is the peak less the peak after the imports, "
            f"{middle(rounds, 'base_bytes') / 1e6:.0f} MB.\n",
            "| | s | MB | bytes a sample |",
            "|---|--:|--:|--:|",
            *rows,
        ]
    )


def _ordering(found: dict[str, Any]) -> str:
    rows = []
    for size, rounds in found["sizes"].items():
        order, pack = (quartiles([one[name] for one in rounds]) for name in ("order_us", "pack_us"))
        extra = middle(rounds, "extra_bytes") / 1e6
        spread = [f"{b:.2f} ({a:.2f}-{c:.2f})" for a, b, c in (order, pack)]
        rows.append(f"| {int(size):,} | {spread[0]} | {spread[1]} | {extra:.1f} |")
    return "\n".join(
        [
            "## Order and packing of a large index\n",
            f"{found['steps']:,} global batches of {found['batch']} samples from anywhere in the order, each a plan of rows of "
            f"{found['row']:,} tokens for 8 ranks. Lengths are a function of the id, so that what grows here would be ours.\n",
            "| samples | order, us a sample | packing, us a sample | memory, MB |",
            "|--:|--:|--:|--:|",
            *rows,
        ]
    )

"""What the numbers say, in sentences; and what they cannot say.

Each sentence states a direction only where the numbers have one, and gives the numbers with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megaprior.analysis.tables import mean, number, percent, signed

FAMILIES = {"ulvlm": "U-LVLM", "hlvlm": "H-LVLM"}


def findings(body: Mapping[str, Any]) -> list[str]:
    """Sentences for the top of the page, from what stands in results.json; plain text."""
    parts = body["importance_by_shards"]
    said = [sentence for name, part in parts.items() for sentence in _importance(part, name if len(parts) > 1 else "")]
    for family, methods in body["models"].items():
        said += _losses(family, methods) + _seeing(methods) + _probe(methods, body["reference_probe"])
    return said


def caveats(body: Mapping[str, Any]) -> list[str]:
    """What this run cannot tell."""
    seeds = [len(rows) for methods in body["models"].values() for rows in methods.values()]
    said = [
        "A small model on little data shows that the mechanics work: scores, weights, training, measuring. Its numbers "
        "say nothing about the paper's, which come from 8 billion parameters, 3 million pairs and public benchmarks."
    ]
    if seeds and max(seeds) == 1:
        said.append(
            "One seed per method: both saw the same captions in the same order, but how much of a difference is the luck of that "
            "one seed cannot be told from one. Repeat with --seeds 3 before believing a small one."
        )
    elif seeds:
        said.append(
            f"{min(seeds)} seeds per method: the tables give each seed's numbers. A difference that is smaller than the spread "
            "between seeds of one method is not an effect."
        )
    if body["models"]:
        said.append(
            "Intervals cover the held-out items that were drawn (95%, Wilson for accuracies, bootstrap over images for "
            "gaps), not the luck of training."
        )
    return said


def _importance(importance: Mapping[str, Any], name: str) -> list[str]:
    said, where = [], f"{name}: " if name else ""
    if importance.get("mean") is not None:
        perplexity = importance.get("perplexity")
        at = f", at a perplexity of {number(perplexity, 1)}" if perplexity is not None else ""
        said.append(
            f"{where}The reference reads captions without seeing images. It gives their tokens a mean importance of "
            f"{number(importance['mean'])}{at}. Importance is 1 minus the probability that it gave the token."
        )
    if importance.get("auroc") is not None:
        area, related = importance["auroc"], importance["related_fraction"]
        said.append(
            f"{where}A token of an image-related word gets a higher importance than a token of another word "
            f"{percent(area, 0)} of the time (AUROC {number(area)}; 0.50 is chance). {percent(related, 0)} of the tokens "
            "belong to such words, by the record kept when the captions were written."
        )
    return said


def _losses(family: str, methods: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    if not {"ntp", "prior"} <= methods.keys():
        return []
    ntp, prior = methods["ntp"], methods["prior"]
    name = FAMILIES.get(family, family)
    kinds = [(field, words) for field, words in _KINDS if None not in (mean(ntp, field), mean(prior, field))]
    if kinds[1:]:
        kinds = [kind for kind in kinds if kind[0] != "loss"]
    parts = [_compared(mean(prior, field), mean(ntp, field), words) for field, words in kinds]
    if not parts:
        return []
    text = f"{name}, held-out captions: {'; '.join(parts)}."
    change = [(mean(prior, field) or 0.0) - (mean(ntp, field) or 0.0) for field, _ in kinds]
    if len(change) == 2 and change[0] < 0 < change[1]:
        text += " That is PRIOR's trade: words that the text alone predicts get almost no weight."
    return [text]


_KINDS = (
    ("loss", "all tokens"),
    ("loss_related", "image-related words"),
    ("loss_unrelated", "all other words"),
)


def _compared(prior: float | None, ntp: float | None, words: str) -> str:
    assert prior is not None
    assert ntp is not None
    change = prior - ntp
    if abs(change) < 0.005:
        return f"on {words} PRIOR and NTP lose the same, {number(ntp)} nats"
    verb = "lower" if change < 0 else "higher"
    return (
        f"on {words} PRIOR's loss is {verb} than NTP's, {number(prior)} against {number(ntp)} nats ({signed(change)})"
    )


def _seeing(methods: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    parts = []
    for method, name in (("ntp", "NTP"), ("prior", "PRIOR")):
        row = next((row for row in methods.get(method, []) if row.get("shuffle_gap_interval")), None)
        if row is not None:
            low, high = row["shuffle_gap_interval"]
            verdict = "" if low > 0 else ", which does not exclude 0"
            parts.append(
                f"{signed(row['shuffle_gap'])} nats for {name} (95% interval {signed(low)} to {signed(high)}{verdict})"
            )
    if not parts:
        return []
    return [
        f"Shown another image instead of its own, a caption's loss per token changes by {' and '.join(parts)}. "
        "A model that ignored images would give 0."
    ]


def _probe(methods: Mapping[str, Sequence[Mapping[str, Any]]], reference: Mapping[str, Any] | None) -> list[str]:
    parts = []
    for method, name in (("ntp", "NTP"), ("prior", "PRIOR")):
        rows = [row for row in methods.get(method, []) if row.get("probe_accuracy") is not None]
        if rows:
            text = f"{name} {percent(mean(rows, 'probe_accuracy'))}"
            if mean(rows, "probe_shuffled_accuracy") is not None:
                text += f" ({percent(mean(rows, 'probe_shuffled_accuracy'))} with shuffled images)"
            parts.append(text)
    if not parts:
        return []
    text = f"Asked which of two statements about a held-out image is true, where chance is 50%: {', '.join(parts)}"
    if reference is not None:
        text += f"; the text-only reference, which cannot see, {percent(reference['accuracy'])}"
    return [text + "."]

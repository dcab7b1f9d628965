"""What the numbers say, in sentences; and what they cannot say.

Each sentence states a direction only where the numbers have one, and gives the numbers with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megaprior.analysis.names import FAMILIES, family_name, joined, method_name
from megaprior.analysis.tables import mean, number, percent, signed, threshold_means

__all__ = ["FAMILIES", "caveats", "findings"]


def findings(body: Mapping[str, Any]) -> list[str]:
    """Sentences for the top of the page, from what stands in results.json; plain text."""
    parts = body["importance_by_shards"]
    said = [sentence for name, part in parts.items() for sentence in _importance(part, name if len(parts) > 1 else "")]
    several = len(body["models"]) > 1
    for family, methods in body["models"].items():
        where = f"{family_name(family)}: " if several else ""
        said += (
            _losses(family, methods, where) + _seeing(methods, where) + _probe(methods, body["reference_probe"], where)
        )
    return [*dict.fromkeys(said + _tower(body.get("tower")))]


def caveats(body: Mapping[str, Any]) -> list[str]:
    """What this run cannot tell."""
    seeds = [len(rows) for methods in body["models"].values() for rows in methods.values()]
    said = [
        "A small model on little data shows that the mechanics work: scores, weights, training, measuring. Its numbers "
        "say nothing about the paper's, which come from 8 billion parameters, 3 million pairs and public benchmarks."
    ]
    if seeds and max(seeds) == 1:
        said.append(
            "One seed per method: both saw the same captions in the same order, but how much of a difference is luck cannot be "
            "told from one seed. Repeat with three or more before believing a small difference."
        )
    elif seeds:
        count = f"{min(seeds)}" if min(seeds) == max(seeds) else f"{min(seeds)} to {max(seeds)}"
        said.append(
            f"{count} seeds per method: the tables give each seed's numbers. A difference that is smaller than the spread "
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
        area, words = importance["auroc"], importance["related_fraction"]
        said.append(
            f"{where}By the record kept when the captions were written, {percent(words)} of the words relate to the image "
            f"({percent(importance['related_token_fraction'])} of the tokens); on the paper's corpus human judges found 31.3%. "
            f"An image-related token gets a higher importance than another one {percent(area, 0)} of the time (AUROC "
            f"{number(area)}; 0.50 is chance)."
        )
    return said


def _losses(family: str, methods: Mapping[str, Sequence[Mapping[str, Any]]], where: str) -> list[str]:
    if not {"ntp", "prior"} <= methods.keys():
        return []
    ntp, prior = methods["ntp"], methods["prior"]
    name = family_name(family)
    kinds = [(field, words) for field, words in _KINDS if None not in (mean(ntp, field), mean(prior, field))]
    if kinds[1:]:
        kinds = [kind for kind in kinds if kind[0] != "loss"]
    parts = [_compared(mean(prior, field), mean(ntp, field), words) for field, words in kinds]
    if not parts:
        return []
    said = [f"{name}, held-out captions: {'; '.join(parts)}."]
    change = {field: (mean(prior, field) or 0.0) - (mean(ntp, field) or 0.0) for field, _ in kinds}
    row = {method: _half(rows) for method, rows in (("ntp", ntp), ("prior", prior))}
    if row["ntp"] is not None and row["prior"] is not None:
        said.append(_by_importance(row["ntp"], row["prior"], where))
        change |= {side: row["prior"][side] - row["ntp"][side] for side in ("above", "below")}
    if max(change.get("below", 0.0), change.get("loss_unrelated", 0.0)) >= _SAME:
        said.append(_price(change))
    return said


def _half(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The row of the threshold table for w = 0.5, where tokens lie on both sides of it."""
    cells = (cell for cell in threshold_means(rows) if cell["threshold"] == 0.5 and None not in cell.values())
    return next(cells, None)


def _by_importance(ntp: Mapping[str, Any], prior: Mapping[str, Any], where: str) -> str:
    share = ntp["share_above"]
    above = _compared(
        prior["above"], ntp["above"], f"the {percent(share, 0)} of tokens that the reference found hard (w above 0.5)"
    )
    below = _compared(prior["below"], ntp["below"], f"the {percent(1 - share, 0)} that it found easy")
    return f"{where}The same by importance: {above}; {below}. In the paper's Fig. 9 PRIOR is lower on both sides."


def _price(change: Mapping[str, float]) -> str:
    text = (
        "Why PRIOR is worse at easy words: a token whose importance is near 0 adds almost nothing to PRIOR's training loss, so "
        "nothing teaches the model to predict it, however easy it is. NTP counts every token alike."
    )
    if change.get("loss_related", 0.0) >= _SAME and change.get("above", 0.0) <= -_SAME:
        text += (
            " Some image-related words are easy too, once the words before give them away; those make PRIOR's mean on "
            "image-related words higher although it is lower on the hard tokens."
        )
    return text


_SAME = 0.005  # nats; a difference that two decimals cannot show is none
_KINDS = (
    ("loss", "all tokens"),
    ("loss_related", "image-related words"),
    ("loss_unrelated", "all other words"),
)


def _compared(prior: float | None, ntp: float | None, words: str) -> str:
    assert prior is not None
    assert ntp is not None
    change = round(prior, 2) - round(ntp, 2)  # of the numbers as they are shown, so that it adds up
    if change == 0 or abs(prior - ntp) < _SAME:
        return f"on {words} PRIOR and NTP lose the same, {number(ntp)} nats"
    verb = "lower" if prior < ntp else "higher"
    return (
        f"on {words} PRIOR's loss is {verb} than NTP's, {number(prior)} against {number(ntp)} nats ({signed(change)})"
    )


def _seeing(methods: Mapping[str, Sequence[Mapping[str, Any]]], where: str) -> list[str]:
    parts = []
    for method, rows in methods.items():
        row = next((row for row in rows if row.get("shuffle_gap_interval")), None)
        if row is not None:
            low, high = row["shuffle_gap_interval"]
            verdict = "" if low > 0 else ", which does not exclude 0"
            seed = f", seed {row['seed']}" if len(rows) > 1 else ""
            parts.append(
                f"{signed(row['shuffle_gap'])} nats for {method_name(method)}{seed} (95% interval {signed(low)} to "
                f"{signed(high)}{verdict})"
            )
    if not parts:
        return []
    return [
        f"{where}Shown another image instead of its own, a caption's loss per token changes by {joined(parts)}. "
        "A model that ignored images would give 0."
    ]


def _probe(
    methods: Mapping[str, Sequence[Mapping[str, Any]]], reference: Mapping[str, Any] | None, where: str
) -> list[str]:
    parts = []
    for method, seeds in methods.items():
        rows = [row for row in seeds if row.get("probe_accuracy") is not None]
        if rows:
            text = f"{method_name(method)} {percent(mean(rows, 'probe_accuracy'))}"
            if mean(rows, "probe_shuffled_accuracy") is not None:
                text += f" ({percent(mean(rows, 'probe_shuffled_accuracy'))} with shuffled images)"
            parts.append(text)
    if not parts:
        return []
    text = (
        f"{where}Asked which of two statements about a held-out image is true, where chance is 50%: {', '.join(parts)}"
    )
    if reference is not None:
        text += f"; the text-only reference, which cannot see, {percent(reference['accuracy'])}"
    return [f"{text}.{_ahead(methods)}"]


def _ahead(methods: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Which method is right more often, and whether items alone could explain it (one seed each)."""
    right = {m: mean(methods.get(m, []), "probe_accuracy") for m in ("ntp", "prior")}
    if right["ntp"] is None or right["prior"] is None:
        return ""
    change = right["prior"] - right["ntp"]
    if abs(change) < 0.0005:
        return " Neither is ahead."
    first, second = ("PRIOR", "NTP") if change > 0 else ("NTP", "PRIOR")
    text = f" {first} is ahead{f' of {second}' if len(methods) > 2 else ''}"
    bounds = [row["probe_interval"] for m in right for row in methods[m] if row.get("probe_interval")]
    if len(bounds) == 2:
        (_, high), (low, _) = sorted(bounds)
        text += f"; the 95% intervals {'overlap' if low <= high else 'do not overlap'}"
    return text + "."


def _tower(tower: Mapping[str, Any] | None) -> list[str]:
    if tower is None:
        return []
    recall, chance = tower["text_to_image"], tower["chance"]["text_to_image_r1"]
    times = f", {number(recall['r1'] / chance, 0)} times as often" if chance else ""
    return [
        f"The vision tower, given a caption, ranks its own image first among {tower['images']:,} in "
        f"{percent(recall['r1'])} of the cases; chance is {percent(chance, 2)}{times}."
    ]

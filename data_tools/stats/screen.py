"""Statistics of shard folders as a table for a terminal: a column a folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megaprior.telemetry import printable

Folder = Mapping[str, Any]
_TOP = 10


def print_stats(folders: Sequence[Folder], *, console: Console | None = None) -> None:
    """What `stats.describe` found, with the packing plan where it was asked for."""
    console = console or Console(highlight=False, emoji=False, markup=False)
    table = Table("", *(printable(folder["folder"]) for folder in folders))
    for name, told in rows(folders):
        table.add_row(Text(name, "bold" if not any(told) else ""), *(Text(printable(text)) for text in told))
    console.print(table)


def rows(folders: Sequence[Folder]) -> list[tuple[str, list[str]]]:
    """Name and one text a folder; a row of empty texts is a heading."""
    found: list[tuple[str, list[str]]] = []

    def row(name: str, tell: Callable[[Folder], str | None]) -> None:
        texts = [tell(folder) or "" for folder in folders]
        if any(texts):
            found.append((name, texts))

    row("samples", lambda f: f"{f['samples']:,} {f['kind']}, {f['shards']:,} shards")
    row("tokens", lambda f: f"{f['tokens']:,}" + (f", {f['loss_tokens']:,} in the loss" if _spans(f) else ""))
    row("tokens a caption", lambda f: spread(f["lengths"]))
    row("truncated", lambda f: share(f["truncated"], f["samples"]))
    row("quarantined", lambda f: share(f["quarantined"], f["samples"] + f["quarantined"]))
    for reason in sorted({reason for folder in folders for reason in folder["quarantine"]}):
        row(f"  {reason}", lambda f, reason=reason: f"{f['quarantine'].get(reason, 0):,}")
    row("equal captions", lambda f: _equal(f["equal_captions"], "captions"))
    row("scores", lambda f: ", ".join(f["scores"]) or None)
    _image_rows(folders, row)
    row("vocabulary used", lambda f: share(f["vocabulary"]["used"], f["vocabulary"]["spelling"]))
    row("ids of 99% of tokens", lambda f: f"{f['vocabulary']['ids_for_99_percent']:,}")
    row("bytes a token", lambda f: f"{f['vocabulary']['bytes_per_token']:.2f}")
    row("unspelled tokens", lambda f: f"{f['vocabulary']['unspelled']:,}" if f["vocabulary"]["unspelled"] else None)
    row("most frequent", lambda f: "  ".join(repr(top["text"])[1:-1] for top in f["vocabulary"]["top"][:_TOP]))
    for place in range(max((len(folder.get("packing", ())) for folder in folders), default=0)):
        _packing_rows(place, row)
    return found


def _image_rows(folders: Sequence[Folder], row: Callable[[str, Callable[[Folder], str | None]], None]) -> None:
    def image(tell: Callable[[Mapping[str, Any]], str | None]) -> Callable[[Folder], str | None]:
        return lambda folder: tell(folder["images"]) if folder["images"] else None

    row("images", image(lambda i: f"{i['stored']:,}, {i['bytes'] / max(1, i['stored']) / 1e3:,.1f} kB each"))
    row("width", image(lambda i: spread(i["width"], " px")))
    row("height", image(lambda i: spread(i["height"], " px")))
    row("equal images", image(lambda i: _equal(i["equal"], "images")))
    count = max((len(folder["images"]["geometries"]) for folder in folders if folder["images"]), default=0)
    for place in range(count):
        row(
            f"tokens an image, {place + 1}" if count > 1 else "tokens an image",
            image(lambda i, place=place: _geometry(i["geometries"][place])),
        )


def _packing_rows(place: int, row: Callable[[str, Callable[[Folder], str | None]], None]) -> None:
    def plan(tell: Callable[[Mapping[str, Any]], str]) -> Callable[[Folder], str | None]:
        return lambda folder: tell(folder["packing"][place]) if place < len(folder.get("packing", ())) else None

    row("rows", plan(lambda p: f"of {p['max_tokens']:,} tokens, {geometry(p['vision'])}"))
    row("  packed as a whole", plan(_whole))
    row("  as training packs", plan(_training))
    row("  captions cut to fit", plan(lambda p: f"{p['cut']:,}" if p["cut"] else ""))


def geometry(vision: Mapping[str, Any] | None) -> str:
    """The U-LVLM's geometry in words."""
    return f"patches of {vision['patch']} px, at most {vision['limit']:,} px" if vision else "captions alone"


def spread(summary: Mapping[str, Any], unit: str = "") -> str:
    """Mean, median, middle nine tenths, and extremes of a histogram's summary."""
    if not summary["number"]:
        return "none"
    between = f"{summary['p05']:,} to {summary['p95']:,}"
    return f"mean {summary['mean']:,.1f}{unit}, 90% {between}, {summary['min']:,} to {summary['max']:,}"


def share(part: int, whole: int) -> str:
    """A count, with its percentage where it is not 0."""
    return f"{part:,} of {whole:,} ({part / whole:.2%})" if part and whole else f"{part:,}"


def _spans(folder: Folder) -> bool:
    return folder["loss_tokens"] != folder["tokens"]


def _equal(told: Mapping[str, Any], what: str) -> str:
    seen = f"1 in {told['one_in']:,} looked at, by content" if told["one_in"] > 1 else f"all {what} looked at"
    text = f"{share(told['repeated'], told['looked_at'])} were there before ({seen})"
    return text + (f"; {told['shared']:,} samples share an image stored once" if told.get("shared") else "")


def _geometry(found: Mapping[str, Any]) -> str:
    return f"{geometry(found)}: {spread(found['tokens'])}"


def _whole(plan: Mapping[str, Any]) -> str:
    whole = plan["whole"]
    text = f"{whole['rows_of_all']:,} rows, {whole['fill']:.2%} full, {whole['fill_but_last']:.2%} but for the last"
    return text + f" ({whole['segments']:,} captions packed)"


def _training(plan: Mapping[str, Any]) -> str:
    t = plan["training"]
    return (
        f"batches of {t['batch_size']:,}, ranks {t['ranks']}: {t['rows_per_step']:,.1f} rows, {t['micro_steps']:.1f} "
        f"micro-steps a step, {t['fill']:.2%} full ({t['steps']} steps)"
    )

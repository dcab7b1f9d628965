"""Statistics of shard folders as one self-contained HTML page: no script, nothing loaded, every text escaped.

Figures are histograms as inline SVG, in the page's own colours, with their numbers in words for those who cannot see them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from megaprior.data_tools.stats.screen import geometry, rows, spread

Folder = Mapping[str, Any]
Bin = tuple[str, int]  # what it holds, how often

_STYLE = """\
:root { color-scheme: light dark; --paper: #fdfcf9; --ink: #1d1f23; --soft: #5c6068; --faint: #e3e0d8; --bar: #4a6885; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15171a; --ink: #e9e7e2; --soft: #a2a6ad; --faint: #33373d; --bar: #8fb3d4; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 70rem; padding: 2.5rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.15; letter-spacing: -.02em; margin: 0 0 1.25rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; padding-top: 1rem; border-top: 1px solid var(--faint); overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; min-width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .3rem 1.25rem .3rem 0; border-bottom: 1px solid var(--faint); }
th { font-weight: 600; } tbody th { white-space: pre; font-weight: 400; color: var(--soft); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1.25rem 2rem; }
figure { margin: 0; } svg { width: 100%; height: auto; display: block; }
figcaption { color: var(--soft); font-size: .85rem; margin-top: .25rem; }
svg text { font-size: 11px; fill: var(--soft); } svg .bar { fill: var(--bar); } svg .base { stroke: var(--ink); }
"""

_WIDTH, _HEIGHT, _FOOT, _HEAD = 480, 190, 22, 16  # units of the drawing


def page(folders: Sequence[Folder]) -> str:
    """The page for what `stats.describe` found."""
    title = "Shards: " + ", ".join(folder["folder"] for folder in folders)
    table = "".join(
        f"<tr><th>{escape(name)}</th>{''.join(f'<td>{escape(text)}</td>' for text in told)}</tr>\n"
        for name, told in rows(folders)
    )
    heads = "".join(f"<th>{escape(folder['folder'])}</th>" for folder in folders)
    sections = "".join(
        f'<section><h2>{escape(folder["folder"])}</h2><div class="charts">{"".join(_figures(folder))}</div></section>\n'
        for folder in folders
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>\n{_STYLE}</style></head>\n'
        f'<body><h1>{escape(title)}</h1>\n<div class="scroll"><table><thead><tr><th></th>{heads}</tr></thead>\n'
        f"<tbody>{table}</tbody></table></div>\n{sections}</body></html>\n"
    )


def _figures(folder: Folder) -> Iterator[str]:
    yield _histogram("Tokens a caption, closing EOS included", folder["lengths"])
    images = folder["images"]
    if images:
        yield _histogram("Image width, pixels", images["width"])
        yield _histogram("Image height, pixels", images["height"])
        yield _bars("Width over height", list(_aspects(images["aspect"])))
        for each in images["geometries"]:
            yield _histogram(f"Tokens an image, {geometry(each)}", each["tokens"])
    top = [(repr(each["text"])[1:-1], each["count"]) for each in folder["vocabulary"]["top"]]
    yield _bars("Most frequent tokens", top, slanted=True)


def _aspects(aspect: Mapping[str, Any]) -> Iterator[Bin]:
    edges = [f"{edge:.2g}" for edge in aspect["edges"]]
    names = [f"<{edges[0]}", *edges[:-1], f"≥{edges[-1]}"]
    # a bin is named by its lower edge, so that the axis reads from left to right
    yield from zip(names, aspect["counts"], strict=True)


def _histogram(title: str, summary: Mapping[str, Any]) -> str:
    bins = [
        (f"{first:,}" if first == last else f"{first:,} to {last:,}", count)
        for first, last, count in summary.get("bins", ())
    ]
    return _bars(title, bins, says=spread(summary), every=max(1, len(bins) // 6))


def _bars(title: str, bins: Sequence[Bin], *, says: str = "", every: int = 1, slanted: bool = False) -> str:
    """One figure: a bar for each bin, its count as a tooltip, its name below every `every`-th."""
    foot = 4 * _FOOT if slanted else _FOOT
    top, step, high = max((count for _, count in bins), default=0) or 1, _WIDTH / max(1, len(bins)), _HEIGHT - _HEAD
    drawn = []
    for place, (name, count) in enumerate(bins):
        x, height = place * step, high * count / top
        drawn.append(
            f'<rect class="bar" x="{x:.1f}" y="{_HEIGHT - height:.1f}" width="{max(step - 1, 0.5):.1f}" '
            f'height="{height:.1f}"><title>{escape(name)}: {count:,}</title></rect>'
        )
        if place % every == 0:
            middle, label = x + step / 2, escape(name.partition(" to ")[0] if not slanted else name)
            turn = f' text-anchor="end" transform="rotate(-60 {middle:.1f} {_HEIGHT + 12})"' if slanted else ""
            anchor = turn or (' text-anchor="middle"' if place else "")
            drawn.append(f'<text x="{middle if place or slanted else 0:.1f}" y="{_HEIGHT + 14}"{anchor}>{label}</text>')
    text = says or ", ".join(f"{name}: {count:,}" for name, count in bins[:12])
    return (
        f'<figure><svg viewBox="0 0 {_WIDTH} {_HEIGHT + foot}" role="img"><title>{escape(title)}</title>'
        f'<desc>{escape(text)}</desc><text x="0" y="10">{top:,}</text>'
        f'<line class="base" x1="0" x2="{_WIDTH}" y1="{_HEIGHT}" y2="{_HEIGHT}"/>{"".join(drawn)}</svg>'
        f"<figcaption>{escape(title)}{f'. {escape(says)}' if says else ''}</figcaption></figure>\n"
    )

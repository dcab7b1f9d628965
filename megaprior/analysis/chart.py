"""One axes as SVG that stands inline in a page, takes the page's colours, and says in words what it shows.

matplotlib draws in placeholder colours, which become CSS variables, so that a figure reads in light and dark. Series differ
in dashes and markers too, so that it reads in black and white. The same data give the same bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from html import escape

from megaprior.files import digest_bytes

_NAMES = ("ink", "faint", "ntp", "prior", "other1", "other2", "other3", "other4", "family1", "family2", "paper")
_VARIABLES = {f"#{number + 1:02x}{number + 1:02x}{number + 1:02x}": name for number, name in enumerate(_NAMES)}
COLOURS = {name: colour for colour, name in _VARIABLES.items()}  # CSS variable -> what matplotlib draws in
INK, FAINT = COLOURS["ink"], COLOURS["faint"]


class Chart:
    """One axes on its own; `svg()` gives the finished figure."""

    def __init__(self, *, x: str, y: str, size: tuple[float, float] = (5.0, 3.1)) -> None:
        from matplotlib.figure import Figure

        self.figure = Figure(figsize=size, layout="constrained")
        self.axes = self.figure.add_subplot()
        self.axes.set_xlabel(x, color=INK)
        self.axes.set_ylabel(y, color=INK)
        self.axes.tick_params(colors=INK, length=0)
        self.axes.grid(axis="y", color=FAINT, linewidth=0.7)
        self.axes.set_axisbelow(True)
        for side, spine in self.axes.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_color(INK)

    def limits(self, y: tuple[float, float] | None) -> None:
        """Use a y axis that other figures share."""
        if y is not None:
            self.axes.set_ylim(*y)

    def svg(self, *, title: str, says: Sequence[str] = ()) -> str:
        """The figure as an <svg> element; `title` and what it `says`, with its numbers, for those who cannot see it."""
        import matplotlib

        handles, _ = self.axes.get_legend_handles_labels()
        if handles:  # above the axes: never over a line
            place = {"loc": "lower left", "bbox_to_anchor": (-0.02, 1.0), "ncols": 2}
            self.axes.legend(frameon=False, labelcolor=INK, handlelength=3, **place)
        file = io.StringIO()
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 10.5}):
            metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
            self.figure.savefig(file, format="svg", transparent=True, metadata=metadata)
        return _described(_inlined(file.getvalue()), title, " ".join(says))


def _inlined(svg: str) -> str:
    """Placeholder colours become variables, the page's font is used, and the size is the page's to choose."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for colour, name in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{name})")
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    return re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)


def _described(svg: str, title: str, says: str) -> str:
    """An image with a name and a description, as a screen reader reads them."""
    key = digest_bytes(f"{title} {says}".encode())[:10]
    names = f"t{key} d{key}" if says else f"t{key}"
    texts = f'<title id="t{key}">{escape(title)}</title>'
    if says:
        texts += f'\n <desc id="d{key}">{escape(says)}</desc>'
    head, rest = svg.split(">", 1)
    return f'{head} role="img" aria-labelledby="{names}">\n {texts}{rest}'

"""The page as others meet it: with a screen reader, a keyboard, in black and white, in the dark, on a phone, offline."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import pytest

VOID = {"meta", "img", "input", "br", "use", "path"}


class Node:
    """An element: its tag, attributes, children and all the text in it."""

    def __init__(self, tag: str, attributes: dict[str, str], parent: Node | None) -> None:
        self.tag, self.attributes, self.parent = tag, attributes, parent
        self.children: list[Node] = []
        self.text = ""

    def all(self, *tags: str) -> list[Node]:
        found = [self] if self.tag in tags else []
        return found + [node for child in self.children for node in child.all(*tags)]


class Tree(HTMLParser):
    """The page as nodes; a tag that does not close where it should is an error."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.root = self.here = Node("", {}, None)
        self.feed(html)
        assert self.here is self.root

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        node = Node(tag, {name: value or "" for name, value in attrs}, self.here)
        self.here.children.append(node)
        if tag not in VOID:
            self.here = node

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.here.children.append(Node(tag, {name: value or "" for name, value in attrs}, self.here))

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        assert self.here.tag == tag, f"</{tag}> closes <{self.here.tag}>"
        assert self.here.parent is not None
        self.here = self.here.parent

    def handle_data(self, data: str) -> None:
        node: Node | None = self.here
        while node is not None:
            node.text += data
            node = node.parent


@pytest.fixture
def page(two_families: tuple[Path, dict]) -> Node:
    return Tree(two_families[0].read_text()).root


def words(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def test_both_families_are_told_with_every_method(page: Node, two_families: tuple[Path, dict]) -> None:
    _, body = two_families
    assert {family: list(methods) for family, methods in body["models"].items()} == {
        "ulvlm": ["ntp", "prior"],
        "hlvlm": ["ntp", "prior", "rarity"],
    }
    text = words(page.text)
    for said in (
        "U-LVLM: NTP against PRIOR",
        "H-LVLM: NTP against PRIOR against rarity",
        "U-LVLM, held-out captions: on image-related words PRIOR's loss is lower than NTP's",
        "H-LVLM, held-out captions: on image-related words PRIOR's loss is lower than NTP's",
        "H-LVLM PRIOR, seed 0 against U-LVLM NTP, seed 0",
        "it ranks a caption\u2019s own image first in 50.0% of the cases, where chance is 16.67%; its median rank is 1.5",
    ):
        assert said in text, said
    titles = [words(svg.all("title")[0].text) for svg in page.all("svg")]
    for title in (
        "Training loss by step, all runs",
        "Held-out loss by step, all runs",
        "Held-out loss by step, H-LVLM",
    ):
        assert title in titles


def test_every_figure_and_image_has_a_text_that_stands_for_it(page: Node) -> None:
    assert len(page.all("svg")) >= 10
    for svg in page.all("svg"):
        assert svg.attributes["role"] == "img"
        named = [
            node for node in svg.all("title", "desc") if node.attributes["id"] in svg.attributes["aria-labelledby"]
        ]
        assert [node.tag for node in named] == ["title", "desc"]
        assert re.search(r"\d", named[1].text), "the description gives no number"
    ids = [node.attributes["id"] for node in page.all("svg", "title", "desc") if "id" in node.attributes]
    assert len(ids) == len(set(ids))
    for image in page.all("img"):
        assert image.attributes["alt"].startswith("Picture with the caption: ")
    hidden = [node for node in page.all("span") if node.attributes.get("class") == "ci"]
    assert hidden
    assert all(node.attributes.get("aria-hidden") == "true" for node in hidden)  # the numbers stand in the same row


def test_every_choice_has_a_label_in_a_named_group(page: Node) -> None:
    inputs = page.all("input")
    assert len(inputs) == 2 + 5 + 4  # families; w, three methods, change; orders
    for each in inputs:
        assert each.parent is not None
        assert each.parent.tag == "label"
        assert words(each.parent.text)
        group = each.parent.parent
        assert group is not None
        assert group.tag == "fieldset"
        assert group.all("legend")[0].text in ("Model", "Colour", "Order")
    for name in ("family", "show", "order"):
        assert sum("checked" in each.attributes for each in inputs if each.attributes["name"] == name) == 1


def test_every_rule_of_the_heat_map_has_its_choice(page: Node, two_families: tuple[Path, dict]) -> None:
    style = page.all("style")[0].text
    ids = {node.attributes["id"] for node in page.all("input")}
    assert set(re.findall(r":has\(#([\w-]+):checked\)", style)) == ids - {"order-given"}
    for family in ("ulvlm", "hlvlm"):
        chosen = f"section:has(#order-better:checked):has(#family-of-{family}:checked)"
        assert f"{chosen} .pair {{ order: var(--{family}-better, 0); }}" in style
    orders = [
        node.attributes["style"] for node in page.all("figure") if node.attributes.get("class", "").startswith("pair")
    ]
    for name in ("ulvlm-changed", "ulvlm-better", "ulvlm-worse", "hlvlm-changed"):
        places = [int(re.search(rf"--{name}:(\d+)", style)[1]) for style in orders]  # type: ignore[index]
        assert sorted(places) == list(range(6)), name


def test_tables_have_captions_and_heads(page: Node) -> None:
    assert len(page.all("table")) > 20
    for table in page.all("table"):
        assert len(table.all("caption")) == 1
        assert words(table.all("caption")[0].text)
        assert table.all("th")
        assert all(head.attributes.get("scope") in ("col", "row") for head in table.all("th"))
        for row in table.all("tbody")[0].all("tr"):
            assert row.children[0].attributes.get("scope") == "row"
        width = {len(row.all("th", "td")) for row in table.all("tr")}
        assert len(width) == 1, (words(table.all("caption")[0].text), width)


def test_each_caption_has_its_numbers_as_a_table(page: Node) -> None:
    tables = [table for table in page.all("table") if "token by token" in table.all("caption")[0].text]
    assert len(tables) == 6
    heads = [words(head.text) for head in tables[0].all("thead")[0].all("th")]
    assert heads == [
        *("token", "w", "pref", "g", "U-LVLM NTP loss", "U-LVLM PRIOR loss", "change"),
        *("H-LVLM NTP loss", "H-LVLM PRIOR loss", "H-LVLM rarity loss", "change", "kind"),
    ]
    second = [words(cell.text) for cell in tables[1].all("tbody")[0].all("tr")[1].all("td")]
    assert second[:2] == ["0.86", "0.14"]
    assert second[3:6] == ["2.00", "1.50", "\u22120.50"]
    assert second[-1] == "image-related word"
    # a token takes a tap or a click, but is no stop on the way through the page
    tokens = [node for node in page.all("span") if node.attributes.get("class", "").split(" ")[0] == "t"]
    assert {node.attributes["tabindex"] for node in tokens} == {"-1"}


def test_headings_go_down_one_level_at_a_time_and_sections_have_names(page: Node) -> None:
    levels = [int(node.tag[1]) for node in page.all("h1", "h2", "h3", "h4")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    ids = [
        node.attributes["id"] for node in page.all("h2", "h3", "section", "figure", "input") if "id" in node.attributes
    ]
    assert len(ids) == len(set(ids))
    for section in page.all("section"):
        assert section.attributes["aria-labelledby"] in ids
    for link in page.all("a"):
        assert link.attributes["href"].removeprefix("#") in ids
    assert [len(page.all(tag)) for tag in ("main", "header", "nav", "footer")] == [1, 1, 1, 1]
    assert page.all("html")[0].attributes["lang"] == "en"


def test_the_page_is_small_and_names_no_address(two_families: tuple[Path, dict]) -> None:
    html = two_families[0].read_text()
    assert len(html.encode()) < 5_000_000
    found = set(re.findall(r"""https?://[^\s"'<]+""", html))
    assert found <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }  # names of languages: nothing is fetched
    assert "None" not in words(Tree(html).root.text)


# ---------------------------------------------------------------- colours


def luminance(colour: str) -> float:
    """WCAG's relative luminance of "#rrggbb"."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def themes() -> list[dict[str, str]]:
    """The variables of the style sheet, light and dark."""
    css = (files("megaprior.analysis") / "templates" / "report.css").read_text(encoding="utf-8")
    light, dark = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    return [dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block)) for block in (light, dark)]


@pytest.mark.parametrize("theme", themes(), ids=["light", "dark"])
def test_text_stands_out_from_what_it_is_written_on(theme: dict[str, str]) -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    names = ["ink", "soft", "ntp", "prior", *(f"other{i}" for i in range(1, 5)), "family1", "family2", "good", "bad"]
    for name in names:
        for ground in ("paper", "card"):
            assert contrast(theme[name], theme[ground]) >= 4.5, (name, ground)
    # a token's text on the strongest shade of its colour
    for hue in ("prior", "ntp", "good", "bad", "other1", "other2", "other3", "other4"):
        mixed = "#" + "".join(
            f"{round(0.28 * int(theme[hue][i : i + 2], 16) + 0.72 * int(theme['card'][i : i + 2], 16)):02x}"
            for i in (1, 3, 5)
        )
        assert contrast(theme["ink"], mixed) >= 4.5, hue


def test_motion_print_and_phones_are_thought_of(page: Node) -> None:
    style = page.all("style")[0].text
    for query in ("prefers-color-scheme: dark", "prefers-reduced-motion", "max-width: 34rem", "@media print"):
        assert query in style
    assert "scroll-behavior" not in style.split("prefers-reduced-motion: no-preference")[0]

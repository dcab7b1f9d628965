from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megaprior.analysis.report import report
from megaprior.data.shards import ShardSet
from megaprior.errors import DataError, UsageError

PROBE = {
    "items": 40,
    "sees": True,
    "accuracy": 0.75,
    "interval": [0.6, 0.86],
    "shuffled_accuracy": 0.5,
    "shuffled_interval": [0.35, 0.65],
    "by_attribute": {"colour": {"items": 40, "accuracy": 0.75, "interval": [0.6, 0.86]}},
}


class Page(HTMLParser):
    """Tags, attributes and visible text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def pairs(tmp_path: Path, write_pairs: Callable[..., Path], captions: list[str]) -> Path:
    return write_pairs(tmp_path / "pairs", captions, images=list(range(6)))


@pytest.fixture
def full(tmp_path: Path, pairs: Path, write_run: Callable[..., Path]) -> tuple[Page, str, dict]:
    """A report with everything in it: page, its source, results."""
    heldout = ShardSet.open(pairs, scores="ref_logprob")
    runs = {
        kind: [write_run(tmp_path / f"{kind}{seed}", kind=kind, seed=seed, heldout=heldout) for seed in (0, 1)]
        for kind in ("ntp", "prior")
    }
    lines = [
        {"format": "megaprior.result", "model": "m", "checkpoint": None, "digest": f"digest-{kind}", "probe": PROBE}
        for kind in ("ntp", "prior")
    ]
    reference = write_run(tmp_path / "reference")
    blind = {"items": 40, "sees": False, "accuracy": 0.5, "interval": [0.35, 0.65], "by_attribute": {}}
    lines.append(lines[0] | {"model": str(reference), "checkpoint": "step_00000040", "digest": "r", "probe": blind})
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "times.jsonl").write_text('{"stage": "score", "wall_s": 6.9, "command": "megaprior score"}\n')
    returned = report(
        tmp_path / "report.html",
        results=tmp_path / "results.json",
        shards=[pairs],
        heldout=pairs,
        runs={"ulvlm": runs},
        stages={"reference": reference},
        probe=tmp_path / "results.jsonl",
        times=tmp_path / "times.jsonl",
    )
    html = (tmp_path / "report.html").read_text()
    body = json.loads((tmp_path / "results.json").read_text())
    assert body == json.loads(json.dumps(returned))
    return Page(html), html, body


def test_results_hold_what_was_measured(full: tuple[Page, str, dict]) -> None:
    _, _, body = full
    assert 0.9 < body["importance"]["auroc"] <= 1  # related tokens score lowest in these shards
    assert body["importance"]["related_token_fraction"] == pytest.approx(1 / 3, abs=0.05)
    assert body["importance"]["related_fraction"] > 0.5  # every third token, so every word of three tokens
    assert [row["seed"] for row in body["models"]["ulvlm"]["ntp"]] == [0, 1]
    ntp, prior = body["models"]["ulvlm"]["ntp"][0], body["models"]["ulvlm"]["prior"][0]
    assert (ntp["loss_related"], ntp["loss_unrelated"]) == (2.0, 1.0)
    assert (prior["loss_related"], prior["loss_unrelated"]) == (1.5, 1.25)
    assert ntp["probe_accuracy"] == 0.75
    assert ntp["shuffle_gap"] == 1.0
    assert body["stages"]["score"]["wall_s"] == 6.9
    stage = body["stages"]["ulvlm prior seed 1"]
    assert stage["wall_s"] == 78.2
    assert (stage["fill"], stage["data_wait_s"], stage["data_wait_share"]) == (0.75, 5.0, 0.25)  # 40 steps of 0.5 s
    assert body["stages"]["score"]["fill"] is None
    assert body["tower"] is None
    assert body["comparisons"]["runs"] == ["NTP, seed 0", "PRIOR, seed 0", "NTP, seed 1", "PRIOR, seed 1"]
    pair = body["comparisons"]["pairs"][0]
    assert pair["heldout"]["related"]["difference"] == -0.5
    assert pair["heldout"]["related"]["interval"] == [-0.5, -0.5]
    assert pair["differs"] == [{"key": "weighting.kind", "a": "ntp", "b": "prior"}]
    assert pair["probe"] == {"a": 0.75, "b": 0.75, "difference": 0.0, "overlap": True}
    assert body["reference_probe"]["accuracy"] == 0.5


def test_a_script_in_a_caption_is_text(full: tuple[Page, str, dict]) -> None:
    page, html, _ = full
    assert "script" not in page.tags
    assert "<script" not in html.lower()
    assert "<script>alert('owned')</script>" in re.sub(r"\s+", " ", page.text)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]


def test_the_page_needs_nothing_else_and_stays_small(full: tuple[Page, str, dict]) -> None:
    page, html, _ = full
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(page.tags)
    for tag, name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "action", "srcset", "data"):
            assert value.startswith(("data:image/", "#")), (tag, name, value)
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)
    assert style is not None
    assert "url(" not in style[1]
    assert "@import" not in style[1]
    assert ("meta", "content", "default-src 'none'; img-src data:; style-src 'unsafe-inline'") in page.attributes
    assert len(html) < 5_000_000


def test_everything_is_shown(full: tuple[Page, str, dict]) -> None:
    page, html, _ = full
    assert (
        html.count("<svg") == 6
    )  # two curves, the threshold figure, the probe, histogram, length (too few captions for positions)
    assert page.tags.count("img") == 7  # six captions, one of them at the top too
    for words in (
        "What this cannot tell.",
        "Its numbers say nothing about the paper's",
        "1 min 18 s",
        "812 MiB",
        "megaprior train ulvlm.yaml weighting.kind=prior",
        "model-prior-0",
        "reference, text only",
        "60.0% to 86.0%",
        "on image-related words PRIOR's loss is lower than NTP's, 1.50 against 2.00 nats",
        "on all other words PRIOR's loss is higher than NTP's, 1.25 against 1.00 nats",
        "nothing teaches the model to predict it",
    ):
        assert words in re.sub(r"\s+", " ", page.text), words
    tips = [value for _, name, value in page.attributes if name == "data-tip"]
    assert any("NTP loss 2.00 · PRIOR loss 1.50 · image-related word" in tip for tip in tips)


def test_ids_are_told_apart_between_figures(full: tuple[Page, str, dict]) -> None:
    page, html, _ = full
    ids = [value for _, name, value in page.attributes if name == "id"]
    used = set(re.findall(r"url\(#([^)]+)\)", html)) | {v[1:] for _, n, v in page.attributes if n == "xlink:href"}
    assert used <= set(ids)
    for shared in {i for i in ids if ids.count(i) > 1} & used:
        # the same id stands in two figures only where both mean the same drawing
        drawings = set(
            re.findall(rf'<(?:path|clipPath|pattern) id="{shared}".*?</(?:defs|clipPath|pattern)>', html, re.DOTALL)
        )
        assert len(drawings) <= 1, shared


def test_ones_own_data_without_truth_probe_or_second_method(
    tmp_path: Path, write_pairs: Callable[..., Path], write_run: Callable[..., Path], captions: list[str]
) -> None:
    own = write_pairs(tmp_path / "own", captions, images=list(range(6)), truth=False)
    run = write_run(tmp_path / "run", kind="prior", heldout=ShardSet.open(own, scores="ref_logprob"))
    body = report(tmp_path / "report.html", shards=[own], heldout=own, runs={"ulvlm": {"prior": [run]}})
    page = Page((tmp_path / "report.html").read_text())
    assert body["importance"]["auroc"] is None
    assert body["models"]["ulvlm"]["prior"][0]["loss_related"] is None
    text = re.sub(r"\s+", " ", page.text)
    assert "Which words relate to the image is not recorded for this data" in text
    assert "there is no probe for this data" in text
    assert "None" not in text


def test_an_empty_report_and_one_without_scores_say_so(
    tmp_path: Path, write_pairs: Callable[..., Path], write_run: Callable[..., Path], captions: list[str]
) -> None:
    report(tmp_path / "empty.html")
    assert "Nothing was measured yet" in Page((tmp_path / "empty.html").read_text()).text
    plain = write_pairs(tmp_path / "plain", captions, images=list(range(6)), scored=False)
    run = write_run(tmp_path / "run", heldout=ShardSet.open(plain))
    report(tmp_path / "plain.html", heldout=plain, runs={"ulvlm": {"ntp": [run]}})
    page = Page((tmp_path / "plain.html").read_text())
    checked = [value for _, name, value in page.attributes if name == "id" and value.startswith("show-")]
    assert checked == ["show-ntp"]
    with pytest.raises(DataError, match="megaprior score"):
        report(tmp_path / "report.html", shards=[plain])


def test_any_method_name_works_and_a_bad_one_is_refused(
    tmp_path: Path, write_pairs: Callable[..., Path], write_run: Callable[..., Path], captions: list[str]
) -> None:
    pairs = write_pairs(tmp_path / "pairs", captions, images=list(range(6)))
    heldout = ShardSet.open(pairs, scores="ref_logprob")
    runs = {
        name: [write_run(tmp_path / name, kind=kind, heldout=heldout)]
        for name, kind in (("rare_2", "ntp"), ("x", "prior"))
    }
    body = report(tmp_path / "report.html", heldout=pairs, runs={"ulvlm": runs})
    assert list(body["models"]["ulvlm"]) == ["rare_2", "x"]
    page = Page((tmp_path / "report.html").read_text())
    text = re.sub(r"\s+", " ", page.text)
    assert "U-LVLM: rare 2 against x" in text
    assert "x \u2212 rare 2" in text  # what the colour of a change means
    assert body["comparisons"]["pairs"][0]["heldout"]["related"]["difference"] == -0.5
    with pytest.raises(UsageError, match="method 'a-b': only small letters"):
        report(tmp_path / "report.html", runs={"ulvlm": {"a-b": []}})
    with pytest.raises(UsageError, match="family 'U'"):
        report(tmp_path / "report.html", runs={"U": {"ntp": []}})


def test_every_figure_says_how_to_make_it_again(full: tuple[Page, str, dict], tmp_path: Path) -> None:
    page, html, body = full
    summaries = re.findall(r"<summary>(Repeat this [a-z ]+)</summary>", html)
    assert summaries.count("Repeat this figure") == html.count("<svg")
    assert {"Repeat this table", "Repeat this heat map", "Repeat this comparison"} <= set(summaries)
    own = body["report_command"]
    assert own.startswith(
        f"megaprior report --output {tmp_path}/report.html --results {tmp_path}/results.json --heldout "
    )
    assert own.count("--run ulvlm.prior=") == 2
    text = re.sub(r"\s+", " ", page.text)
    assert text.count(own) == len(summaries) + 1
    assert f"megaprior evaluate --model {tmp_path}/prior1 --shards {tmp_path}/pairs" in text
    assert f"megaprior score --model {tmp_path}/reference --shards {tmp_path}/pairs" in text

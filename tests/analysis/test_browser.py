"""The page in a real browser: nothing on its console, nothing fetched, and the choices do what they say."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next((found for name in BROWSERS if (found := shutil.which(name))), None)
QUIET = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--hide-scrollbars", "--enable-logging=stderr", "--v=0"),
]

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")]


def browse(page: Path, *options: str) -> tuple[str, str, list[str]]:
    """(what the browser printed, its log, the addresses that the page asked the network for)."""
    assert CHROMIUM is not None
    net, profile = page.with_suffix(".net.json"), page.with_suffix(".profile")
    command = [CHROMIUM, *QUIET, f"--user-data-dir={profile}", f"--log-net-log={net}", *options, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    log = json.loads(net.read_text())
    kind = log["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    started = [event["params"] for event in log["events"] if event["type"] == kind and "url" in event.get("params", {})]
    # The browser asks for the time and for updates by itself; those requests come from no page.
    return done.stdout, done.stderr, [each["url"] for each in started if each["initiator"] != "not an origin"]


def visible(page: Path, name: str, *, width: int = 1280, height: int = 3000) -> np.ndarray:
    """A screenshot, uint8 [height, width, 3]."""
    picture = page.with_name(f"{name}.png")
    browse(page, f"--window-size={width},{height}", f"--screenshot={picture}")
    return np.asarray(Image.open(picture).convert("RGB"))


def choosing(page: Path, *ids: str) -> Path:
    """A copy of the page with other choices checked."""
    html = page.read_text()
    for chosen in ids:
        group = re.search(rf'name="(\w+)" id="{chosen}"', html)
        assert group is not None
        html = re.sub(rf'(name="{group[1]}" id="[\w-]+") checked', r"\1", html)
        html = html.replace(f'id="{chosen}"', f'id="{chosen}" checked')
    copy = page.with_name(f"{'_'.join(ids)}.html")
    copy.write_text(html)
    return copy


def test_nothing_on_the_console_and_nothing_fetched(two_families: tuple[Path, dict]) -> None:
    page, _ = two_families
    dom, log, asked = browse(page, "--dump-dom")
    assert "All runs at a glance" in dom
    assert "</main>" in dom
    assert "CONSOLE" not in log, log
    assert asked == []


def test_a_page_that_fetches_or_runs_would_be_caught(two_families: tuple[Path, dict]) -> None:
    page, _ = two_families
    loud = page.with_name("loud.html")
    foreign = '<main><script>document.title = "ran"</script><img src="https://example.org/a.png">'
    loud.write_text(page.read_text().replace("<main>", foreign))
    _, log, asked = browse(loud, "--dump-dom")
    assert log.count("CONSOLE") >= 2  # the page's own policy refuses both, aloud
    assert asked == []
    loud.write_text(re.sub(r"<meta http-equiv[^>]*>", "", loud.read_text()))
    _, _, asked = browse(loud, "--dump-dom")
    assert asked == ["https://example.org/a.png"]


def test_choices_change_what_is_seen_and_no_page_is_wider_than_a_phone(two_families: tuple[Path, dict]) -> None:
    page, _ = two_families
    plain = visible(page, "plain")
    for ids in (("colour-change",), ("order-worse",), ("family-of-hlvlm", "show-rarity")):
        assert (visible(choosing(page, *ids), "_".join(ids)) != plain).any(), ids
    # What sticks out on the right would make room for itself: 390 pixels of page in a window of 390 leave the last column bare.
    phone = visible(page, "phone", width=390, height=9000)
    assert (phone[:, -8:] == phone[0, -1]).all()

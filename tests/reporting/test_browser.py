"""The page in a real browser: it opens from the disk, asks for nothing, runs nothing, and can be read."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from quietstar.reporting.train_report import write_report
from tests.reporting.browser import CHROMEDRIVER, CHROMIUM, Browser
from tests.reporting.run_files import write_full_run

pytestmark = pytest.mark.skipif(
    CHROMIUM is None or CHROMEDRIVER is None, reason="needs chromium and chromedriver (Debian: chromium-driver)"
)
SIZES = ((1280, "light"), (1280, "dark"), (420, "light"), (420, "dark"))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(write_full_run(tmp_path_factory.mktemp("runs") / "run"))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def pixels(png: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")) / 255


def test_it_asks_for_itself_alone_and_runs_nothing(browser: Browser, page: Path) -> None:
    browser.requests(), browser.console()
    browser.open(page, 1280)
    assert browser.requests() == [page.as_uri()]
    assert browser.console() == []
    assert browser.value_of("typeof hacked") == "undefined"
    assert browser.value_of("document.scripts.length") == 0
    assert browser.value_of("document.querySelectorAll('svg.chart').length") == 18


def test_the_browser_would_see_a_request(browser: Browser, tmp_path: Path) -> None:
    """So that the test above can fail."""
    page = tmp_path / "page.html"
    page.write_text('<img src="http://127.0.0.1:9/x"><script>hacked=1</script>')
    browser.requests(), browser.console()
    browser.open(page, 1280)
    assert "http://127.0.0.1:9/x" in browser.requests()
    assert browser.console() and browser.value_of("hacked") == 1


def test_the_policy_stops_what_escaping_would_have_missed(browser: Browser, page: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    more = '<body><script>hacked=1</script><img src="http://127.0.0.1:9/x" onerror="hacked=1">'
    broken.write_text(page.read_text().replace("<body>", more))
    browser.requests()
    browser.open(broken, 1280)
    assert browser.value_of("typeof hacked") == "undefined"
    assert browser.requests() == [broken.as_uri()]


@pytest.mark.parametrize(("width", "colours"), SIZES)
def test_it_can_be_read(browser: Browser, page: Path, width: int, colours: str) -> None:
    browser.open(page, width, colours=colours)
    assert browser.value_of("document.documentElement.scrollWidth") <= width
    image = pixels(browser.screenshot())
    assert image.shape[:2] == (1000, width)
    assert (image.mean() > 0.85) if colours == "light" else (image.mean() < 0.25)
    colour_numbers = (image[::2, ::2] * 15).astype(int) @ np.array([1, 16, 256])
    assert len(np.unique(colour_numbers)) > 30  # text and coloured curves
    smallest = "Math.min(...[...document.querySelectorAll('.tick')].map(t => t.getBoundingClientRect().height))"
    assert browser.value_of(smallest) > 9


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_words_stand_out_from_their_ground(browser: Browser, page: Path, colours: str) -> None:
    """WCAG's contrast of 4.5 for text, on the colours that the browser has computed."""
    browser.open(page, 1280, colours=colours)
    for words, ground in (("body", "body"), (".note", "body"), (".legend", ".panel"), (".inner", ".inner")):
        colour = browser.value_of(f"getComputedStyle(document.querySelector('{words}')).color")
        behind = browser.value_of(f"getComputedStyle(document.querySelector('{ground}')).backgroundColor")
        assert contrast(colour, behind) >= 4.5, words
    for number in range(1, 8):
        colour = browser.value_of(f"getComputedStyle(document.body).getPropertyValue('--c{number}')")
        behind = browser.value_of("getComputedStyle(document.querySelector('.panel')).backgroundColor")
        assert contrast(colour, behind) >= 1.9, number


def contrast(one: str, other: str) -> float:
    """Ratio of the luminances of two CSS colours, 1 to 21."""
    dark, light = sorted(map(luminance, (one, other)))
    return (light + 0.05) / (dark + 0.05)


def luminance(colour: str) -> float:
    colour = colour.strip()
    if colour.startswith("#"):
        parts = [int(colour[place : place + 2], 16) for place in (1, 3, 5)]
    else:
        parts = [int(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [part / 3294.6 if part <= 10 else ((part / 255 + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_it_prints(browser: Browser, page: Path) -> None:
    browser.open(page, 1280, colours="dark")
    browser.devtools("Emulation.setEmulatedMedia", media="print")
    assert browser.value_of("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    pdf = browser.devtools("Page.printToPDF")["data"]
    assert len(pdf) > 20_000
    browser.devtools("Emulation.setEmulatedMedia", media="")

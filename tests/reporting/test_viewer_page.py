"""The thought viewer's page as a file, and in a real browser."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quietstar.inference.viewed_thoughts import thoughts_of, write_view
from quietstar.reporting.viewer import ViewOptions, write_page
from tests.reporting.browser import CHROMEDRIVER, CHROMIUM, Browser
from tests.reporting.test_browser import contrast, pixels
from tests.reporting.view_models import HOSTILE, WORDS, of_characters, of_words

needs_browser = pytest.mark.skipif(
    CHROMIUM is None or CHROMEDRIVER is None, reason="needs chromium and chromedriver (Debian: chromium-driver)"
)
LARGEST = 5_000_000
SELECTED = "Number(document.querySelector('.t.selected').id.slice(1))"
COLOURS = [*(f"g{level}" for level in range(1, 6)), *(f"l{level}" for level in range(1, 6))]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Words, and everything that a page could stumble over."""
    model, tokenizer = of_words()
    out = tmp_path_factory.mktemp("page") / "thoughts.html"
    name = "<img src=x onerror=hacked=1>\u202e.txt"
    return write_view(model, tokenizer, WORDS[:250] + HOSTILE + WORDS[:80], out, text_name=name)


@pytest.fixture(scope="module")
def content(page: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(page.with_suffix(".json").read_bytes())
    return found


@pytest.fixture(scope="module")
def long_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2,000 tokens with 4 thoughts of 8 tokens each, in ids of five digits as large vocabularies have them.

    The thoughts of a short text over and over, each time with other ids: what counts here is their number.
    """
    model, tokenizer = of_words(thought_length=8, lookahead=4, thoughts_per_position=4)
    content = thoughts_of(model, tokenizer, WORDS, ViewOptions(tokens=101))
    ids, texts, records = content["text"]["tokens"], content["vocabulary"], content["positions"]
    assert len(ids) == 101 and len(records) == 100

    def moved(entries: list[list[Any]], by: int) -> list[list[Any]]:
        return [[token + by, share] for token, share in entries]

    content["text"]["tokens"], content["vocabulary"], content["positions"] = [ids[0] + 30_000], {}, []
    for copy in range(20):
        by = 30_000 + copy * len(texts)
        content["text"]["tokens"] += [token + by for token in ids[1:]]
        content["vocabulary"] |= {token + by: text for token, text in texts.items()}
        for record in records:
            thoughts = [
                one | {"tokens": [token + by for token in one["tokens"]], "after": moved(one["after"], by)}
                for one in record["thoughts"]
            ]
            listed = {name: moved(record[name], by) for name in ("before", "mean")}
            content["positions"].append(record | listed | {"token": record["token"] + 100 * copy, "thoughts": thoughts})
    content["text"]["tokens"].pop()
    content["positions"].pop()
    content["vocabulary"] |= {ids[0] + 30_000: texts[ids[0]]}
    return write_page(content, tmp_path_factory.mktemp("long") / "thoughts.html")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def inline(page: str, tag: str) -> list[str]:
    return re.findall(rf"<{tag}>(.*?)</{tag}>", page, flags=re.DOTALL)


def policy(page: str) -> dict[str, str]:
    found = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert found is not None
    return dict(rule.split(" ", 1) for rule in found[1].split("; "))


def hash_of(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


# -- the file --------------------------------------------------------------------------------------------------------


def test_its_policy_allows_its_own_script_and_style_alone(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    (script,), (style,) = inline(text, "script"), inline(text, "style")
    assert policy(text) == {
        "default-src": "'none'",
        "style-src": hash_of(style),
        "script-src": hash_of(script),
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    assert "innerHTML" not in script and "eval(" not in script and "</" not in script


def test_its_data_is_inert_and_whole(page: Path, content: dict[str, Any]) -> None:
    text = page.read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="data">([^<]*)</script>', text)
    assert found is not None and found[1].isascii() and not set("<>&") & set(found[1])
    assert json.loads(found[1]) == content
    assert text.count("<script") == text.count("</script>") == 2 and "<img" not in text and "<!--" not in text


def test_it_has_no_address(page: Path) -> None:
    text = page.read_text(encoding="utf-8").replace('"http://www.w3.org/2000/svg"', "")  # a name, not an address
    head, _, rest = re.sub("<title>[^<]*</title>", "", text).partition('id="data">')
    asking = r"(?i)https?:|//[a-z0-9]+\.|src=|href=|url\(|@import|fetch\(|XMLHttpRequest|import\(|WebSocket"
    assert re.findall(asking, head + inline(rest, "script")[0]) == []
    assert '<html lang="en">' in text


def test_2000_tokens_are_less_than_5_mb(long_page: Path) -> None:
    assert 2_000_000 < long_page.stat().st_size < LARGEST


# -- in a browser ----------------------------------------------------------------------------------------------------


def press(browser: Browser, *keys: str) -> None:
    for key in keys:
        for kind in ("keyDown", "keyUp"):
            browser.devtools("Input.dispatchKeyEvent", type=kind, key=key, text=key if len(key) == 1 else "")


def opened(browser: Browser, page: Path, address: str = "", width: int = 1280, colours: str = "light") -> None:
    """Loads the page; without the first step an address that differs after the # would only move in the page."""
    nothing = page.with_name("nothing.html")
    nothing.write_text("")
    browser.open(nothing, width, colours=colours)
    browser._post("/url", {"url": page.as_uri() + address})


@needs_browser
def test_it_asks_for_itself_alone_and_runs_nothing_else(browser: Browser, page: Path, content: dict[str, Any]) -> None:
    browser.requests(), browser.console()
    browser.open(page, 1280)
    assert browser.requests() == [page.as_uri()]
    assert browser.console() == []
    assert browser.value_of("typeof hacked") == "undefined"
    assert browser.value_of("document.querySelectorAll('img, iframe, object, link, base, form').length") == 0
    assert browser.value_of("document.scripts.length") == 2
    assert browser.value_of("document.querySelectorAll('.t').length") == len(content["text"]["tokens"])
    shown = browser.value_of("document.getElementById('text').textContent").replace("·", " ")
    assert "</script><img src=x onerror=hacked=1> <!--<script>hacked=1</script> --> &lt;b&gt;" in shown
    assert "⟨U+202E⟩evil" in shown and "⟨U+2028⟩" in shown and "↵" in shown and "⇥" in shown
    assert not set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200b\u2028\x07") & set(
        browser.value_of("document.body.innerText")
    )


@needs_browser
def test_the_policy_stops_what_escaping_would_have_missed(browser: Browser, page: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    more = '<body><script>hacked=1</script><img src="http://127.0.0.1:9/x" onerror="hacked=1">'
    broken.write_text(page.read_text(encoding="utf-8").replace("<body>", more), encoding="utf-8")
    browser.requests()
    browser.open(broken, 1280)
    assert browser.value_of("typeof hacked") == "undefined"
    assert browser.requests() == [broken.as_uri()]
    assert len(browser.console()) >= 2


@needs_browser
def test_keys_move_and_the_panel_follows(browser: Browser, page: Path, content: dict[str, Any]) -> None:
    opened(browser, page, "#pos=7")
    assert browser.value_of(SELECTED) == 7
    record = content["positions"][6]
    panel = browser.value_of("document.getElementById('panel').innerText").replace("\N{MINUS SIGN}", "-")
    assert "token 7 of" in panel and panel.count("START") == panel.count("END") == len(record["thoughts"]) == 2
    for thought in record["thoughts"]:
        assert f"{thought['reward']:+.2f}" in panel and f"w {thought['weight']:.2f}" in panel
        assert f"vs mean {thought['advantage']:+.2f}" in panel and f"{thought['talk'][1]:.2f}" in panel
    assert f"{record['base'][0]:.2f}" in panel and f"{record['base'][1]:.2f}" in panel
    assert browser.value_of("document.querySelectorAll('.list li').length") >= 16
    press(browser, "ArrowRight", "ArrowRight", "ArrowLeft")
    assert browser.value_of(SELECTED) == 8
    assert "token 8 of" in browser.value_of("document.getElementById('panel').innerText")
    press(browser, "ArrowDown")
    below = browser.value_of(SELECTED)
    assert below > 9
    press(browser, "ArrowUp")
    assert browser.value_of(SELECTED) == 8
    press(browser, "End")
    assert browser.value_of(SELECTED) == len(content["text"]["tokens"]) - 1
    press(browser, "Home")
    assert "Nothing stands before the first token" in browser.value_of("document.getElementById('panel').innerText")
    press(browser, "ArrowLeft")
    assert browser.value_of(SELECTED) == 0
    assert browser.console() == []


@needs_browser
def test_addresses_lead_to_tokens(browser: Browser, page: Path) -> None:
    opened(browser, page, "#pos=12")
    assert browser.value_of(SELECTED) == 12
    press(browser, "ArrowRight")
    time.sleep(0.3)
    assert browser.value_of("location.hash") == "#pos=13"
    browser.value_of("void (location.hash = '#pos=20')")
    time.sleep(0.1)
    assert browser.value_of(SELECTED) == 20
    for odd in ("#pos=999999", "#pos=-1"):
        opened(browser, page, odd)
        assert 0 <= browser.value_of(SELECTED) < browser.value_of("document.querySelectorAll('.t').length")
    assert browser.console() == []


@needs_browser
def test_filters_and_matches(browser: Browser, page: Path, content: dict[str, Any]) -> None:
    gains = {
        record["token"]: float(np.mean([thought["talk"][0] - record["base"][0] for thought in record["thoughts"]]))
        for record in content["positions"]
    }
    weights = {
        record["token"]: float(np.mean([thought["weight"] for thought in record["thoughts"]]))
        for record in content["positions"]
    }
    opened(browser, page, "#pos=0")

    def marked(kind: str, amount: str) -> list[int]:
        browser.value_of(
            f"(filter.value = '{kind}', filter.dispatchEvent(new Event('change')), amount.value = '{amount}', "
            "amount.dispatchEvent(new Event('input')), 0)"
        )
        found: list[int] = browser.value_of("[...document.querySelectorAll('.match')].map(t => Number(t.id.slice(1)))")
        return found

    best = sorted(gains, key=lambda token: -gains[token])
    assert marked("gain", "5") == sorted(best[:5])
    assert marked("weight", "0.5") == [token for token, weight in weights.items() if weight > 0.5]
    assert marked("loss", "4") == sorted(best[-4:])
    first, second = sorted(best[-4:])[:2]
    press(browser, "Home", "n")
    assert browser.value_of(SELECTED) == first
    press(browser, "n")
    assert browser.value_of(SELECTED) == second
    assert browser.value_of("matches.textContent") == "2 of 4"
    press(browser, "p", "p")
    assert browser.value_of(SELECTED) == sorted(best[-4:])[-1]  # around the end
    colours = browser.value_of("[...document.querySelectorAll('.t')].map(t => t.className)")
    assert " l" in colours[best[-1]] and " g" in colours[best[0]]


@needs_browser
def test_hover_and_click(browser: Browser, page: Path) -> None:
    opened(browser, page, "#pos=3")

    def mouse(kind: str, token: int, **more: Any) -> None:
        box = browser.value_of(f"document.getElementById('t{token}').getClientRects()[0]")
        place = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        browser.devtools("Input.dispatchMouseEvent", type=kind, **place, **more)

    heading = "document.querySelector('.panel h2').innerText"
    mouse("mouseMoved", 9)
    assert "token 9 of" in browser.value_of(heading) and browser.value_of(SELECTED) == 3
    browser.devtools("Input.dispatchMouseEvent", type="mouseMoved", x=2, y=2)
    assert "token 3 of" in browser.value_of(heading)
    for kind in ("mousePressed", "mouseReleased"):
        mouse(kind, 11, button="left", clickCount=1)
    assert browser.value_of(SELECTED) == 11
    after = "[...document.querySelectorAll('.list')][1].innerText"
    mean = browser.value_of(after)
    press(browser, "2")
    assert browser.value_of("document.querySelector('[aria-pressed=true]').dataset.thought") == "1"
    assert "after thought 2" in browser.value_of("panel.innerText") and browser.value_of(after) != mean
    press(browser, "0")
    assert browser.value_of(after) == mean


@needs_browser
@pytest.mark.parametrize(("width", "colours"), [(1280, "light"), (1280, "dark"), (480, "light"), (480, "dark")])
def test_it_can_be_read(browser: Browser, page: Path, width: int, colours: str) -> None:
    opened(browser, page, "#pos=30", width, colours)
    assert browser.value_of("document.documentElement.scrollWidth") <= width
    image = pixels(browser.screenshot())
    assert image.shape[:2] == (1000, width)
    assert (image.mean() > 0.7) if colours == "light" else (image.mean() < 0.3)
    numbers = (image[::2, ::2] * 15).astype(int) @ np.array([1, 16, 256])
    assert len(np.unique(numbers)) > 30
    style = "getComputedStyle(document.querySelector('{}')).{}"
    pairs = [("body", "body"), (".lede", "body"), (".panel .hint", ".panel"), (".better", ".panel"), (".chip", ".chip")]
    found = [name for name in COLOURS if browser.value_of(f"document.querySelector('.text .{name}') !== null")]
    assert len(found) >= 6
    for words, ground in [*pairs, *((f".text .{name}", f".text .{name}") for name in found)]:
        behind = browser.value_of(style.format(ground, "backgroundColor"))
        assert contrast(browser.value_of(style.format(words, "color")), behind) >= 4.5, words


@needs_browser
def test_the_button_sets_the_theme(browser: Browser, page: Path) -> None:
    opened(browser, page)
    grounds = []
    for _ in range(4):
        grounds.append(browser.value_of("getComputedStyle(document.body).backgroundColor"))
        browser.value_of("theme.click()")
    auto, light, dark, again = grounds
    assert auto == light == again != dark


@needs_browser
def test_it_prints_light(browser: Browser, page: Path) -> None:
    opened(browser, page, colours="dark")
    browser.devtools("Emulation.setEmulatedMedia", media="print")
    assert browser.value_of("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert len(browser.devtools("Page.printToPDF", printBackground=True)["data"]) > 20_000
    browser.devtools("Emulation.setEmulatedMedia", media="")


@needs_browser
def test_2000_tokens_open_and_move(browser: Browser, long_page: Path) -> None:
    browser.console()
    opened(browser, long_page, "#pos=1000")
    assert browser.value_of("document.querySelectorAll('.t').length") == 2000
    assert browser.value_of(SELECTED) == 1000
    browser.devtools("Performance.enable", timeDomain="threadTicks")

    def seconds() -> dict[str, float]:
        return {one["name"]: one["value"] for one in browser.devtools("Performance.getMetrics")["metrics"]}

    before = seconds()
    browser.value_of(
        "(() => { for (let i = 0; i < 60; i++) { document.body.dispatchEvent(new KeyboardEvent('keydown', "
        "{bubbles: true, key: i % 5 ? 'ArrowRight' : 'ArrowDown'})); document.body.getBoundingClientRect(); } })()"
    )
    after = seconds()
    # printed, not tested: it depends on the machine
    spent = {name: 1000 * (after[name] - before[name]) / 60 for name in ("ScriptDuration", "TaskDuration")}
    print(f"a move among 2,000 tokens: script {spent['ScriptDuration']:.1f} ms, in all {spent['TaskDuration']:.1f} ms")
    assert browser.value_of(SELECTED) > 1048
    assert browser.console() == []


@needs_browser
def test_many_short_lines_stand_side_by_side(browser: Browser, tmp_path: Path) -> None:
    model, tokenizer = of_characters()
    page = write_view(model, tokenizer, "2+6+4+3=1\n" * 30, tmp_path / "thoughts.html", positions="every:50")
    opened(browser, page, "#pos=51")
    assert browser.value_of("document.querySelectorAll('.text.short div').length") == 30
    assert browser.value_of("new Set([...document.querySelectorAll('.text div')].map(d => d.offsetTop)).size") < 12
    press(browser, "ArrowRight")
    assert "There is no thought before this token (positions: every:50)" in browser.value_of("panel.innerText")
    press(browser, "n")
    assert browser.value_of(SELECTED) == 101

"""The page of a run: what it shows, from whatever a run has left behind."""

from __future__ import annotations

import errno
import html
import json
import os
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from quietstar.errors import DataError
from quietstar.report import main as report_main
from quietstar.reporting.train_report import write_report
from quietstar.runs.files import write_whole
from tests.reporting.run_files import HOSTILE, lines, measurements, samples, write_full_run, write_lines, write_run

PANELS = (
    *("With and without thought", "Gain", "Gain by lookahead", "Gain by difficulty of the token", "Text", "Loss"),
    *("First token after the thought", "Second token after the thought"),
    *("Reward", "Size of reward and advantage", "Mixing weight", "Entropy of thoughts", "Log-probability of thoughts"),
    *("Policy loss", "Gradients of the two losses", "Gradient norms", "Learning rate", "Speed"),
)
TAGS = """
    html head meta title style body header section footer h1 h2 h3 p dl div dt dd small
    figure figcaption ul li svg path rect text article span bdi b
    table thead tbody tr th td details summary
"""
ATTRIBUTES = """
    lang charset http-equiv content name class title role aria-label aria-hidden viewbox
    d x y width height
"""


class Markup(HTMLParser):
    """Names of all elements and attributes of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes.update(name for name, _ in attrs)


def page_of(directory: Path) -> str:
    return write_report(directory).read_text(encoding="utf-8")


def headings(page: str, level: str) -> list[str]:
    return [html.unescape(found) for found in re.findall(rf"<{level}>(.*?)</{level}>", page)]


def words(page: str) -> str:
    """The page as text."""
    return html.unescape(re.sub(r"<[^>]*>", " ", page.partition("<body>")[2]))


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> str:
    return page_of(write_full_run(tmp_path_factory.mktemp("runs") / "my run"))


def test_every_measurement_has_its_panel(full: str) -> None:
    assert tuple(headings(full, "h3")) == PANELS
    wanted = ["What happened", "Prediction", "By lookahead position", "Thoughts", "Sampled thoughts", "Optimisation"]
    assert headings(full, "h2") == [*wanted, "Configuration", "Environment"]
    assert headings(full, "h1") == ["my run"]


def test_it_begins_with_what_a_reader_wants_to_know(full: str) -> None:
    figures = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", full))
    last = measurements(40)
    assert figures["Steps"] == "40<small>of 40</small>"
    assert figures["Held-out NLL with thought"] == f"{last['talk_nll']:.4g}<small>at step 0: 2.65</small>"
    assert figures["Gain of thoughts in nats"] == f"{last['gain']:.3g}<small>at step 0: 0</small>"
    assert figures["Smallest held-out loss"].endswith("<small>at step 40</small>")
    assert figures["Time"] == "1 min 20 s"


def test_no_text_can_become_markup_and_no_address_is_asked(full: str) -> None:
    parser = Markup()
    parser.feed(full)
    assert parser.tags <= set(TAGS.split())
    assert parser.attributes <= set(ATTRIBUTES.split())
    style = full.partition("<style>")[2].partition("</style>")[0]
    assert not re.search(r"@import|url\(|https?:|//", style)
    assert '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'' in full
    body = full.partition("<body>")[2]
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u200b\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]", body)
    assert "&lt;/script&gt;&lt;script&gt;hacked=1" in body and "⟨U+202E⟩" in body and "⟨U+0000⟩" in body


def test_events_are_listed_and_marked(full: str) -> None:
    section = full.partition("What happened</h2>")[2].partition("</section>")[0]
    assert "out of memory: 1, resumed: 1, skipped: 1" in section
    assert [("marked" in row) for row in section.split("<tr")[2:]] == [False, True, True]
    assert "<title>step 10: skipped</title>" in full and "step 5: resumed" not in full


def test_a_run_to_which_nothing_happened_says_nothing_of_it(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run", lines(3))
    events = [{"step": 0, "event": "started", "message": "3 steps"}, {"step": 3, "event": "finished", "message": "3"}]
    write_lines(directory / "events.jsonl", events)
    page = page_of(directory)
    assert "What happened" not in page and 'class="mark"' not in page
    write_lines(directory / "events.jsonl", [*events, {"step": 2, "event": "rollback", "message": "to 1"}])
    page = page_of(directory)
    assert "What happened" in page and 'class="mark"' in page


def test_thoughts_are_shown_with_what_was_thought_there_first(full: str) -> None:
    cards = [words(f"<body>{card}") for card in full.split("<article")[1:]]
    kinds = [next(kind for kind in ("most", "least", "random") if kind in card) for card in cards]
    assert kinds == ["most"] * 4 + ["least"] * 4 + ["random"] * 4
    assert "hacked" in cards[0] and "+5" in cards[0]
    last = next(card for card in cards if "place 13 " in card)
    assert "thought 13 of step 40" in last and "At step 0: thought 13 of step 0" in " ".join(last.split())


def test_options_that_differ_come_first(full: str) -> None:
    section = full.partition("Configuration</h2>")[2]
    first, _, rest = section.partition("<details>")
    rows = re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td></tr>", first)
    assert ("training.learning_rate", "3e-05", "1e-06") in rows and ("data.path", "text.txt", "null") in rows
    assert {name for name, _, _ in rows} == {
        *("output_dir", "model.path", "data.path", "training.learning_rate", "training.steps")
    }
    assert "training.adam_beta2" in rest and "training.adam_beta2" not in first


def test_the_environment_of_the_last_start_comes_first(full: str) -> None:
    section = full.partition("Environment</h2>")[2]
    first, _, earlier = section.partition("<details>")
    assert "Another CPU" in first and "abc123, with changes that are not committed" in first and "torch 2.13.0" in first
    assert "A CPU, 2 cores" in earlier and "started 2 times" in section
    assert "&lt;b&gt;.txt" in first


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    directory = write_full_run(tmp_path / "run")
    assert page_of(directory) == page_of(directory)
    assert not [path for path in directory.iterdir() if path.name.endswith(".new")]


def test_language_modelling_has_fewer_panels(tmp_path: Path) -> None:
    metrics = [
        {"step": step, "split": split, "loss": 2.0, "text_nll": 2.0}
        for step in range(1, 4)
        for split in ("train", "eval")
    ]
    page = page_of(write_run(tmp_path / "run", metrics, **{"training.method": "language_modeling"}))
    assert headings(page, "h3") == ["Text", "Loss"]
    assert headings(page, "h2") == ["Prediction", "Configuration"]
    assert "language modelling" in page


def test_measurements_that_it_does_not_know_are_shown_too(tmp_path: Path) -> None:
    metrics = [{"step": step, "split": "eval", "loss": 2.0, "answer_accuracy": 0.1 * step} for step in range(4)]
    page = page_of(write_run(tmp_path / "run", metrics))
    assert headings(page, "h3") == ["Loss", "answer accuracy"]


def test_skipped_steps_are_drawn_where_there_are_any(tmp_path: Path) -> None:
    for skipped in (0, 2):
        metrics = [{"step": 1, "split": "train", "loss": 2.0, "skipped_steps": skipped}]
        page = page_of(write_run(tmp_path / "run", metrics))
        assert ("Skipped steps" in headings(page, "h3")) == (skipped > 0)


@pytest.mark.parametrize(
    ("meaning", "found", "shown"),
    [
        ("parse", None, None),
        ("parse", 0.0, None),
        ("parse", 3.0, ("3", "read as these tokens")),
        ("text", None, ("0", "read as characters")),
        ("text", 1234.0, ("1234", "read as characters")),
        (None, 2.0, ("2", "read as these tokens")),
        ("parse", "many", None),
    ],
)
def test_special_tokens_are_a_figure_where_there_is_something_to_say(
    meaning: Any, found: Any, shown: tuple[str, str] | None, tmp_path: Path
) -> None:
    metrics: list[dict[str, Any]] = [{"step": 1, "split": "train", "loss": 2.0}]
    metrics[0] |= {} if found is None else {"special_tokens": found}
    page = page_of(
        write_run(tmp_path / "run", metrics, **({} if meaning is None else {"data.special_tokens": meaning}))
    )
    figure = page.partition("Texts of special tokens")[2][:300].replace("\N{THIN SPACE}", "").replace(",", "")
    assert bool(figure) == (shown is not None)
    if shown is not None:
        assert shown[0] in figure and f"{shown[1]} (data.special_tokens)" in figure


CONFIGS: dict[str, str | bytes] = {
    "alias bomb": "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40)),
    "merge bomb": "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 40)),
    "deep": "[" * 5000 + "]" * 5000,
    "deep mapping": "".join(f"{' ' * level}a:\n" for level in range(300)) + " " * 300 + "b: 1\n",
    "inside itself": "data: &d {path: *d}\n",
    "a list": "- preset: plain\n- data\n",
    "a text": "just a text",
    "nothing": "",
    "a tag": "!!python/object/apply:os.system ['touch hacked']\n",
    "not UTF-8": b"preset: \xff\xfe",
    "NUL": b"preset: a\x00b",
    "long": "preset: " + "x" * 400_000,
    "groups are texts": "preset: 3\noutput_dir: [1]\nmodel: x\ndata: [1, 2]\ntraining: null\ntextbook: 1.5\n",
    "values of wrong types": (
        "preset: {a: b}\ndata: {path: {a: [1]}, special_tokens: [text], length: x}\n"
        "model: {path: [a]}\ntraining: {steps: many, method: [x], eval_every: {a: 1}}\n"
    ),
    "keys of wrong types": "1: 2\nnull: 3\ntrue: {2: 3}\n",
    "large numbers": f"training: {{steps: {'9' * 90}, method: 1.0e+400}}\n",
    "markup": f"preset: {json.dumps(HOSTILE[:30])}\nmodel: {{path: '<script>hacked=1</script>'}}\n",
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_hostile_configuration(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An alias bomb in the config.yaml of a run that somebody sent took all memory where its report was made."""
    directory = write_run(tmp_path / "run", lines(3))
    content = CONFIGS[kind]
    (directory / "config.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    began = time.monotonic()
    assert report_main([str(directory)]) == 0, capsys.readouterr().err
    assert time.monotonic() - began < 10
    page = (directory / "report.html").read_text(encoding="utf-8")
    assert "Prediction" in headings(page, "h2") and "<script>hacked" not in page
    assert len(page) < 3_000_000 and not (tmp_path / "hacked").exists() and not Path("hacked").exists()


def test_null_leaves_a_gap_and_is_counted(tmp_path: Path) -> None:
    metrics: list[dict[str, Any]] = [{"step": step, "split": "train", "loss": 2.0 + step} for step in range(1, 9)]
    metrics[3]["loss"] = None
    page = page_of(write_run(tmp_path / "run", metrics))
    assert "1 value is not finite" in page
    [path] = re.findall(r'<path class="line s1" d="(M[^"]*)"/>', page.partition("</ul>")[2])
    assert path.count("M") == 2


def test_a_run_that_died_in_the_middle_of_a_line(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run", lines(20))
    before = page_of(directory)
    for name in ("metrics.jsonl", "events.jsonl"):
        with (directory / name).open("ab") as file:
            file.write(b'{"step": 21, "split": "train", "loss": 2.1, "te\xff')
    assert page_of(directory) == before


def test_files_that_are_damaged_or_of_another_kind_are_left_out(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run", lines(3))
    (directory / "metrics.jsonl").open("a").write('[1]\n{"step": "x", "split": 1}\nnull\n{"step":4,"split":"train"}\n')
    write_lines(directory / "events.jsonl", [{"step": None}, {"event": "x"}])
    (directory / "environment.json").write_text('{"not": "a list"}')
    (directory / "samples").mkdir()
    (directory / "samples" / "step-00000002.json").write_text('{"samples": [{}, 3, {"thought": 5, "reward": "x"}]}')
    (directory / "samples" / "step-00000001.json").write_text("{")
    (directory / "samples" / "notes.txt").write_text("x")
    (directory / "config.yaml").write_text("a: [")
    page = page_of(directory)
    assert "Sampled thoughts" in headings(page, "h2") and "Configuration" not in headings(page, "h2")


def test_samples_of_a_part_that_is_done_again_are_not_shown(tmp_path: Path) -> None:
    directory = write_full_run(tmp_path / "run", steps=20)
    (directory / "samples" / "step-00000030.json").write_text(json.dumps({"step": 30, "samples": samples(30)}))
    page = page_of(directory)
    assert "of step 20" in page and "of step 30" not in page


@pytest.mark.parametrize("metrics", [[], [{"step": 0, "split": "eval", "loss": 3.0}]])
def test_a_run_that_has_just_begun(tmp_path: Path, metrics: list[dict[str, Any]]) -> None:
    page = page_of(write_run(tmp_path / "run", metrics))
    assert headings(page, "h3") == ["Loss"] * len(metrics)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has neither config\.yaml nor metrics\.jsonl"):
        write_report(tmp_path)


def test_a_long_run_stays_small_and_keeps_its_spikes(tmp_path: Path) -> None:
    metrics = lines(8000, evaluate_every=20)
    spike = next(line for line in metrics if line["step"] == 5555)
    spike["loss"] = 77.7
    directory = write_run(tmp_path / "run", metrics)
    started = time.process_time()
    page = page_of(directory)
    assert time.process_time() - started < 5  # 0.6 s where this was written
    assert len(page) < 1_500_000
    loss = page.partition("<h3>Loss</h3>")[2].partition("</figure>")[0]
    assert re.search(r'class="tick end"[^>]*>80<', loss)


def test_a_usual_run_takes_little_time(tmp_path: Path) -> None:
    directory = write_full_run(tmp_path / "run", steps=400)
    write_report(directory)
    started = time.process_time()
    write_report(directory)
    assert time.process_time() - started < 0.3
    assert (directory / "report.html").stat().st_size < 600_000


def _no_room(old: Path, new: Path) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_page_that_cannot_be_written_leaves_the_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    write_whole(path, "earlier")
    monkeypatch.setattr(os, "replace", _no_room)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, "later")
    assert path.read_text() == "earlier"
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_a_hostile_name_everywhere(tmp_path: Path) -> None:
    """Names of metrics, events and directories end up on the page too."""
    name = "<b onclick=1>&\u202e"
    directory = write_run(tmp_path / name, [{"step": 1, "split": "train", name: 1.0, "loss": 2.0}])
    write_lines(directory / "events.jsonl", [{"step": 1, "event": name, "message": HOSTILE}])
    page = page_of(directory)
    assert "<b " not in page and "\u202e" not in page


def test_lines_that_no_run_writes_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "split": "train", "loss": 2.5}\n')
    (tmp_path / "events.jsonl").write_text('{"step": 1, "event": ["odd"]}\n{"step": 1, "event": {"a": 1}}\n')
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "step-00000001.json").write_text('{"samples": [{"text": [1]}, 7]}')
    assert "2.5" in write_report(tmp_path).read_text(encoding="utf-8")

"""The table and the page of a loop: what they show, from whatever a run has left behind."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from quietstar.errors import DataError
from quietstar.report import main
from quietstar.reporting.loop_files import natural, text_table
from quietstar.reporting.loop_report import print_table, write_loop_report
from quietstar.statistics.ranking import calibration
from tests.outer_loop.loop_files import GROUPS, SFT, VERIFIER, WARNING, candidates, write_loop_run
from tests.outer_loop.pages import cells, headings, legend, part

COLUMNS = (
    *("iteration", "held-out accuracy", "sampled right", "solved", "newly solved", "lost", "rationalised", "kept"),
    *("hinted", "right inside", "distinct", "steps", "cut off"),
)


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables take the width of the terminal, which the processes of a parallel test run may have one of."""
    monkeypatch.setenv("COLUMNS", "10000")


@pytest.fixture(scope="module")
def choosing() -> dict[str, Any]:
    return candidates()


@pytest.fixture(scope="module")
def star(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_loop_run(tmp_path_factory.mktemp("runs") / "star")


@pytest.fixture(scope="module")
def star_page(star: Path) -> str:
    return write_loop_report(star).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def vstar_page(tmp_path_factory: pytest.TempPathFactory, choosing: dict[str, Any]) -> str:
    out = tmp_path_factory.mktemp("runs") / "vstar"
    return write_loop_report(write_loop_run(out, rationalize=False, samples=4, choosing=choosing)).read_text("utf-8")


def summary_of(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "summary.json").read_text())
    return found


def test_the_terminal_has_a_line_for_each_iteration(star: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_table(summary_of(star))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[0] == "iteration"
    assert lines[2].split() == ["0", "10.0", "[7.0,", "12.0]"]
    row = "3 60.0 [57.0, 62.0] 40.0 160 30 4 120 200 20.0 90.0 | 25.0 1.50 64 1.0"
    assert lines[5].split() == row.split()
    assert lines[-1] == f"warning: {WARNING}"


def test_columns_without_content_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_table(summary_of(write_loop_run(tmp_path / "run", rationalize=False)))
    out = capsys.readouterr().out
    assert "rationalised:" not in out and "hinted" not in out and "90.0 | -" in out
    assert "pass@k" not in out


def test_a_table_wider_than_the_terminal_goes_on_below() -> None:
    head, rows = ["name", "first", "second one", "third"], [["a", "1", "22", "333"], ["b\x1b[2J", "4", "5", "6"]]
    assert text_table(head, rows, 100).splitlines() == [
        "              second",
        "name   first     one  third",
        "a          1      22    333",
        "b\N{REPLACEMENT CHARACTER}[2J      4       5      6",
    ]
    narrow = text_table(head, rows, 16)
    assert max(map(len, narrow.splitlines())) <= 16
    assert [block.splitlines()[-2].split() for block in narrow.split("\n\n")] == [["a", "1"], ["a", "22"], ["a", "333"]]


def test_candidates_in_the_terminal(choosing: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    print_table({"iterations": [{"iteration": 0}], "candidates": choosing})
    values, sure, areas = capsys.readouterr().out.split("\n\n")[1:]
    assert re.findall(r"k = \d+", values) == [f"k = {k}" for k in (1, 2, 4, 8, 16)]
    names = [re.split(r"  +", line)[0] for line in values.splitlines()[2:]]
    assert names == [
        *("any of k right (pass@k)", f"best by {VERIFIER}", f"best by {SFT}"),
        *("majority vote (maj@k)", f"vote weighted by {SFT}"),
    ]
    verifier = next(row for row in choosing["rows"] if (row["score"], row["k"]) == (VERIFIER, 4))["value"]
    shown = f"{100 * verifier['mean']:.1f} [{100 * verifier['low']:.1f}, {100 * verifier['high']:.1f}]"
    assert shown in values.splitlines()[3]
    assert "k = 1 " not in sure and re.search(r"majority vote \(maj@k\) +\+\d", sure)  # one candidate leaves no choice
    assert f"{choosing['discrimination'][VERIFIER]['within']:.3f}" in areas


def test_calibration_is_shown_where_it_was_measured(
    choosing: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    name = "reward <model>"
    found = asdict(calibration([0.25, 0.25, 0.75, 0.75], [False, False, True, False]))
    print_table({"iterations": [{"iteration": 0}], "candidates": {**choosing, "calibration": {name: found}}})
    out = capsys.readouterr().out
    assert "Brier" in out and re.search(rf"^{name} +0\.188 +0\.250$", out, re.MULTILINE)
    shown = {**choosing, "calibration": {name: found}}
    page = write_loop_report(write_loop_run(tmp_path / "run", 1, choosing=shown)).read_text("utf-8")
    section = part(page, "Calibration")
    assert [name, "0.188", "0.250"] in cells(section)
    assert cells(section)[-2:] == [["0.2 to 0.3", "0.250", "0.000", "2"], ["0.7 to 0.8", "0.750", "0.500", "2"]]
    assert "reward <model>" not in section
    for without in ({}, {"calibration": {}}):
        print_table({"iterations": [{"iteration": 0}], "candidates": {**choosing, **without}})
        assert "Brier" not in capsys.readouterr().out


def test_differences_that_may_be_chance_are_not_claimed(
    choosing: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    unsure = [{**one, "value": {**one["value"], "low": -0.1, "high": 0.1}} for one in choosing["differences"]]
    print_table({"iterations": [{"iteration": 0}], "candidates": {**choosing, "differences": unsure}})
    assert "no difference to another way" in capsys.readouterr().out


def test_the_page_has_all_its_parts(star_page: str) -> None:
    assert headings(star_page, "h1") == ["star"]
    parts = ("Warnings", "Accuracy", "Iterations", "What was kept", "Completions", "Completions to read", "Time")
    assert headings(star_page, "h2") == [*parts, "Configuration", "Environment"]
    assert headings(star_page, "h3") == [
        *("Held-out accuracy by group", "Held-out and training problems"),
        *("Kept for training", "Right inside", "Solved training problems", "Distinct solutions"),
        *("Length", "Cut off", "Without an answer", "Steps of model and human", "Fine-tuning"),
    ]
    assert WARNING in part(star_page, "Warnings")
    assert "with rationalisation" in star_page.partition("</header>")[0]
    for svg in re.findall(r'<svg class="chart".*?</svg>', star_page):
        assert "nan" not in re.sub("<title>.*?</title>", "", ElementTree.tostring(ElementTree.fromstring(svg)).decode())


def test_it_begins_with_what_a_reader_wants_to_know(star_page: str) -> None:
    figures = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", star_page))
    assert figures["Held-out accuracy"] == "60.0 %<small>95 %: 57.0 to 62.0; before: 10.0</small>"
    assert figures["Right inside"] == "90.0 %<small>of those sampled; rationalised: 25.0 %</small>"
    assert figures["Time"].startswith("1 min 32 s")


def test_the_figure_of_the_paper(star_page: str) -> None:
    assert legend(star_page, "Held-out accuracy by group") == list(GROUPS)
    figure = star_page.partition("<h3>Held-out accuracy by group</h3>")[2].partition("</figure>")[0]
    assert "<title>iteration 0\n1 digit: 10\n2 digits: 10\n" in figure
    head = re.findall("<th>(.*?)</th>", part(star_page, "Accuracy"))
    assert head == ["iteration", *GROUPS]
    assert cells(part(star_page, "Accuracy"))[-1] == ["3", "60.0", "60.0", "60.0", "60.0"]
    assert re.findall("<th>(.*?)</th>", part(star_page, "Iterations")) == list(COLUMNS)


def test_training_accuracy_stands_at_the_model_that_it_belongs_to(star_page: str) -> None:
    """The samples of iteration 1 are those of the model before it."""
    panel = star_page.partition("<h3>Held-out and training problems</h3>")[2].partition("</figure>")[0]
    titles = re.findall("<title>(.*?)</title>", panel, re.DOTALL)
    assert [title.splitlines()[0] for title in titles] == [f"iteration {number}" for number in range(4)]
    assert "samples of training problems: 6.667" in titles[0] and "(iteration 2)" in titles[3]


def test_of_many_groups_a_chart_shows_those_that_can_be_told_apart_and_the_table_all(tmp_path: Path) -> None:
    groups = [f"group {place}" for place in range(15)]
    page = write_loop_report(write_loop_run(tmp_path / "run", 2, groups=groups)).read_text()
    panel = page.partition("<h3>Held-out accuracy by group</h3>")[2].partition("</ul>")[0]
    colours, markers = (re.findall(rf'<path class="{kind} .(\d)" d="M\d+ \d(.*?)"', panel) for kind in ("line", "dots"))
    assert len(colours) == len({colour for colour, _ in colours}) == len({shape for _, shape in markers}) == 6
    assert "The first 6 of 15 groups" in panel
    assert re.findall("<th>(.*?)</th>", part(page, "Accuracy"))[1:] == groups


def test_candidates_on_the_page(vstar_page: str, choosing: dict[str, Any]) -> None:
    assert "V-STaR" in vstar_page.partition("</header>")[0]
    names = ["any right (pass@k)", VERIFIER, SFT, "majority vote (maj@k)"]
    assert legend(vstar_page, "Best of k candidates") == names
    figure = vstar_page.partition("<h3>Best of k candidates</h3>")[2].partition("</figure>")[0]
    ticks = [float(x) for x in re.findall(r'class="tick middle" x="([\d.]+)" y="311"', figure)]
    gaps = [after - before for before, after in pairwise(ticks)]
    assert len(ticks) == 5 and gaps == pytest.approx([gaps[0]] * 4, abs=0.2)  # each k is twice the one before
    assert f"<b>best by {VERIFIER}</b>" in part(vstar_page, "Choosing among candidates")
    gained = next(one["value"] for one in choosing["differences"] if (one["measure"], one["k"]) == ("maj", 16))
    assert f"<b>+{100 * gained['mean']:.1f} [" in part(vstar_page, "Differences")
    assert cells(part(vstar_page, "Telling right from wrong"))[1][0] == VERIFIER
    assert "surely above the vote at 4 of 4 k" in vstar_page


def test_one_score_of_each_model_is_shown_and_the_rest_folded(tmp_path: Path, choosing: dict[str, Any]) -> None:
    """The page of a run with baselines had thirteen curves in a chart, and a table of 22 rows."""
    models = ("verifier", "right completions alone", "outcome reward model", "SFT generator", "final generator")
    hows = {"outcome reward model": ("last token", "mean"), "verifier": ("mean", "sum", "log-ratio")}
    scores = [f"{model} ({how})" for model in models for how in hows.get(model, ("mean", "sum"))]
    value = {"mean": 0.5, "low": 0.4, "high": 0.6, "problems": 9}
    ways = [("pass", None), ("maj", None), *((way, score) for score in scores for way in ("best-of", "weighted-vote"))]
    rows = [{"measure": way, "score": score, "k": k, "value": value} for way, score in ways for k in (1, 2)]
    gaps = [
        {"measure": way, "other": score, "score": "verifier (sum)", "k": 2, "value": value}
        for way, score in ways
        if way != "pass" and score != "verifier (sum)"
    ]
    table = {**choosing, "rows": rows, "differences": gaps, "compared": "verifier (sum)", "discrimination": {}}
    page = write_loop_report(write_loop_run(tmp_path / "run", 1, choosing=table)).read_text()
    main = [
        "any right (pass@k)",
        "verifier (sum)",
        "right completions alone (sum)",
        "outcome reward model (last token)",
    ]
    assert legend(page, "Best of k candidates") == [*main, "SFT generator (sum)", "majority vote (maj@k)"]
    section = part(page, "Choosing among candidates")
    first, _, folded = section.partition("<details>")
    assert "All 24 ways to choose" in folded and "final generator (mean)" in folded and "vote weighted" not in first
    assert len(cells(first)) - 1 == 6 and len(cells(folded)) - 1 == len(ways) == 24
    (card,) = re.findall(r'<figure class="(.*?)">', section)
    assert card == "wide panel"
    looks = re.findall(r'<path class="line (s\d)', section.partition("</ul>")[0])
    assert len(set(looks)) == 6


def test_completions_to_read(star_page: str) -> None:
    section = part(star_page, "Completions to read")
    kinds = re.findall(r"<details><summary>(.*?)</summary>(.*?)</details>", section, re.DOTALL)
    problems = {kind: re.findall(r"problem (\d\+\d)<", content) for kind, content in kinds}
    assert problems == {
        "Right": ["1+1"],
        "Right answer, but a wrong step inside": ["3+3"],
        "Wrong": ["2+2"],
        "Rationalised: right with the answer as a hint": ["2+2"],
    }
    assert "What is 2+2?" in dict(kinds)["Wrong"] and "no answer found" in dict(kinds)["Wrong"]
    assert "earlier iteration" not in section


def test_what_a_model_writes_is_text(star_page: str) -> None:
    assert "&lt;script&gt;hacked=1" in star_page and "<script" not in star_page and "<img" not in star_page
    assert "\u202e" not in star_page and "⟨U+202E⟩" in star_page
    assert "content=\"default-src 'none'" in star_page


def test_hostile_names_everywhere(tmp_path: Path) -> None:
    bad = "<b onclick=1>&\u202e"
    directory = write_loop_run(tmp_path / "run", 2, groups=[bad, "other"])
    summary = summary_of(directory)
    summary |= {"task": bad, "warnings": [bad]}
    (directory / "summary.json").write_text(json.dumps(summary))
    page = write_loop_report(directory).read_text()
    assert "<b onclick" not in page and "\u202e" not in page and "&lt;b onclick" in page


def test_the_same_files_give_the_same_page(star: Path) -> None:
    assert write_loop_report(star).read_bytes() == write_loop_report(star).read_bytes()


def test_a_run_that_was_only_fine_tuned(tmp_path: Path) -> None:
    page = write_loop_report(write_loop_run(tmp_path / "run", 0)).read_text()
    assert headings(page, "h3") == []
    assert cells(part(page, "Accuracy"))[-1] == ["0", "10.0", "10.0", "10.0", "10.0"]


def test_what_was_not_measured_is_left_out(tmp_path: Path) -> None:
    directory = write_loop_run(tmp_path / "run")
    rows = [
        {key: row[key] for key in ("iteration", "trained") if key in row} for row in summary_of(directory)["iterations"]
    ]
    (directory / "summary.json").write_text(json.dumps({"task": "own", "iterations": rows, "warnings": []}))
    for name in ("environment.json", "events.jsonl", "samples.jsonl"):
        (directory / name).unlink()
    page = write_loop_report(directory).read_text()
    assert headings(page, "h2") == ["Iterations", "Completions", "Configuration"]
    assert headings(page, "h3") == ["Fine-tuning"]


def test_a_torn_store_and_a_missing_manifest_do_no_harm(tmp_path: Path) -> None:
    directory = write_loop_run(tmp_path / "run")
    with (directory / "samples.jsonl").open("ab") as file:
        file.write(b'{"kind": "sample", "key": "sample-3", "te\xff')
    assert "Completions to read" in write_loop_report(directory).read_text()
    for manifest in directory.glob("iteration-*/*.json"):
        manifest.unlink()
    assert "Completions to read" not in write_loop_report(directory).read_text()


@pytest.mark.parametrize("content", [None, "{", "[]", '{"iterations": []}', '{"iterations": [1]}'])
def test_a_run_without_a_summary_is_refused(
    star: Path, tmp_path: Path, content: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "samples.jsonl").write_text((star / "samples.jsonl").read_text())
    if content is not None:
        (tmp_path / "summary.json").write_text(content)
    with pytest.raises(DataError, match=r"summary\.json"):
        write_loop_report(tmp_path)
    assert main([str(tmp_path)]) == 2
    assert "summary.json" in capsys.readouterr().err


def test_the_report_command_knows_a_loop(star: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = write_loop_report(star).read_bytes()
    (star / "report.html").unlink()
    assert main([str(star)]) == 0
    assert capsys.readouterr().out.strip() == str(star / "report.html")
    assert (star / "report.html").read_bytes() == before


def test_groups_are_sorted_as_people_do() -> None:
    assert sorted(["10 digits", "2 digits", "a", "1 digit"], key=natural) == ["1 digit", "2 digits", "10 digits", "a"]

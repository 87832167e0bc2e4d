"""The numbers in README.md and docs/ are those of committed results, and what they name is there."""

from __future__ import annotations

import re
from importlib import import_module
from itertools import pairwise

import pytest

import quietstar
import quietstar.tasks
import quietstar_kernels
from tests.docs.pages import PAGES, RESULTS, ROOT, in_one_line, links, page, result, rows

README = PAGES["README.md"]


@pytest.mark.parametrize("path", ["README.md", "docs/training.md"])
def test_the_table_is_that_of_the_committed_result(path: str) -> None:
    measured = rows(result("textbook"))
    columns, arms = measured[0], {row[0]: row for row in measured[1:]}
    shown = [row for row in rows(PAGES[path]) if row[0] in arms]
    assert len(shown) == 5
    names = next(row for row in rows(PAGES[path]) if "answer NLL, with thought" in row)
    for row in shown:
        for name, cell in zip(names[1:], row[1:], strict=True):
            assert cell == arms[row[0]][columns.index(name)], (row[0], name)


def test_the_step_table_is_that_of_the_committed_result() -> None:
    cells = {cell for row in rows(result("train_step")) for cell in row}
    names = next(row for row in rows(page("training")) if row[0] == "text length")
    table = [row for row in rows(page("training")) if row[0] in ("64", "128", "256", "512")]
    assert len(table) == 4 and len(names) == len(table[0])
    for row in table:
        for cell in row[1:]:
            for number in re.findall(r"[\d.]+", cell):
                assert number in cells, (row, number)


def test_the_table_of_replay_is_that_of_the_committed_result() -> None:
    found = [dict(zip(*pair, strict=True)) for pair in pairwise(rows(result("replay"))) if pair[0][0] == "L"]
    seconds, mebibytes = found
    shown = {row[0].split(",")[0].strip("`"): row for row in rows(page("training"))}
    sides = {"layers": "engine", "two plain passes": "engine_two_pass", "the authors' way": "naive"}
    for name in ("layers", "down", "mlp", "linears", "all", "two plain passes", "the authors' way"):
        side = sides.get(name, f"engine_{name}")
        assert shown[name][2] in (seconds.get(f"{side} / engine", "1" if side == "engine" else "-"))
        assert shown[name][3:] == [seconds[side], mebibytes[side]]


def test_the_plan_is_that_of_the_committed_result() -> None:
    measured = rows(result("plan_mistral_7b"))
    columns, settings = measured[0], {row[0]: row for row in measured[1:]}
    names = next(row for row in rows(page("planning")) if row[0] == "setting")
    shown = [row for row in rows(page("planning")) if row[0] in settings and len(row) == len(names)]
    assert len(shown) == 8
    for row in shown:
        assert row == [settings[row[0]][columns.index(name)] for name in names]


def test_the_claim_about_a_real_model_is_that_of_the_committed_result() -> None:
    table = rows(result("real_model_cpu"))
    thinking = {row[0]: dict(zip(table[0], row, strict=True)) for row in table}["Quiet-STaR"]
    high = float(re.findall(r"[-+][\d.]+", thinking["own - foreign"])[2])
    assert "**A short run**" in result("real_model_cpu") and high < 0
    assert "its own thoughts were worse than foreign ones" in in_one_line(README)


def test_claims_about_the_plan_and_the_trainer_are_those_of_committed_results() -> None:
    assert "largest error of 32 configurations is 0.4%" in result("plan_accuracy")
    assert "within 0.4 % of [32 measured runs]" in page("planning")
    overhead = result("trainer_overhead")
    found = re.search(r"([\d.]+)% of the CPU time is spent outside the steps", overhead)
    assert found and float(found[1]) < 5
    assert f"takes {float(found[1]):.1f} % of the CPU time" in in_one_line(page("training"))
    startup = re.search(r"`quietstar --help` takes ([\d.]+) s of CPU time", overhead)
    assert startup and float(startup[1]) < 1.5
    assert not any(re.search(r"\b[A-Z]{4,}_TABLE\b", text) for text in PAGES.values())


def test_the_tables_of_the_loops_are_those_of_committed_results() -> None:
    for heading, name in (("| held-out accuracy, % |", "star"), ("| best of k candidates, % |", "vstar")):
        table = page("star")[page("star").index(heading) :].split("\n\n")[0].splitlines()[2:]
        cells = [cell.strip() for row in table for cell in row.strip("|").split("|")[1:]]
        assert len(cells) > 20 and all(cell in result(name) for cell in cells)


def test_the_table_of_generating_is_that_of_the_committed_result() -> None:
    measured, text = result("generation_cpu"), page("generation")
    table = text[text.index("| tokens of a thought |") :].split("\n\n")[0].splitlines()[2:]
    assert len(table) == 3
    for row in table:
        length, limit, tiny, small, sixteen = (cell.strip() for cell in row.strip("|").split("|"))
        assert int(limit) == int(length) + 3
        for name, times in (("tiny", tiny), ("small", small)):
            claim = (
                f"{name}, context 256, T = {length}: {times} times the base's time for a token, at most {limit}: holds"
            )
            assert claim in measured
        assert f"small, context 256, T = {length}: a step of 16 texts takes {sixteen} times that of one" in measured


def test_what_is_said_of_the_gate_is_in_the_committed_result() -> None:
    gate, text = result("gate"), page("generation")
    kept = re.search(r"keeps ([\d.]+) % of the gain\s+with thoughts at ([\d.]+) % of the tokens", text)
    row = next(cells for cells in rows(gate) if cells[0] == "learned>0.1")
    assert kept and row[1].startswith(f"{kept[2]}%") and row[3].startswith(f"{kept[1]}%")
    alone = {cells[0]: cells for cells in rows(gate[gate.index("one at a time") :])}
    said = re.search(
        r"\(([\d.]+) %; without, ([\d.]+) %\), at ([\d.]+) of the base's\s+speed instead of ([\d.]+)", text
    )
    few, always, never = (alone[way] for way in ("learned>0.1", "always", "never"))
    assert said and said.groups() == (few[3][:-1], never[3][:-1], few[6], always[6]) and few[3] == always[3]


SENTENCES = {
    "README.md: chance is 1.946": ("textbook", "chance is ln 7 = 1.946"),
    "README.md: (2.8 % correct before)": ("textbook", "0.292, 0.285, 0.292, 0.320, 0.028"),
    "README.md: Four seeds end at 0.05 to 0.12. The fifth": ("textbook", "0.078, 0.118, 0.084, 0.052, 1.952"),
    "README.md: gains 0.007 nats a token": ("wikitext", "| 200 | 5.934 | 5.927 | 0.00655 |"),
    "docs/training.md: (2.8 % correct before)": ("textbook", "0.292, 0.285, 0.292, 0.320, 0.028"),
    "docs/training.md: Four seeds end at 0.05 to 0.12; the fifth": ("textbook", "0.078, 0.118, 0.084, 0.052, 1.952"),
    "docs/training.md: gains 0.007 nats a token": ("wikitext", "| 200 | 5.934 | 5.927 | 0.00655 |"),
    "docs/training.md: with 14 tokens in each stream": ("train_step", "| 512 | 14 |"),
    "docs/generation.md: is 36.4 launches, where": (
        "generation_operators",
        "| thoughts | a2aef0a | 1 | 8 | 36.4 | 2.0 | 1.0",
    ),
    "docs/generation.md: has 36.0": ("generation_operators", "| base | a2aef0a | 1 | - | 36.0"),
    "docs/generation.md: of a token's 1,493 are": (
        "generation_operators",
        "| thoughts | a2aef0a | 1 | 8 | 2905.0 | 1493.0 |",
    ),
    "docs/star.md: On [32 problems of GSM8K]": ("gsm8k_loops", "32 training problems"),
    "docs/star.md: on 300 held-out problems": ("vstar", "on 300 held-out problems with 32 candidates"),
    "docs/star.md: it makes 3.6 to 5.3 times": ("rationale_sampling", "5.28 | few-shot | 3.62"),
    "docs/star.md: 1,171 MiB above a model with 32,000 tokens": ("dpo_step", "V 32000 | 23.66 | 1171 |"),
    "docs/star.md: where TRL's takes 5,090 and plain logits 2,536": ("dpo_step", "5090 | 2536 |"),
}
"""What a page says, and what its result says: pieces in their order, between bars."""


@pytest.mark.parametrize("said", SENTENCES)
def test_numbers_in_sentences_are_those_of_committed_results(said: str) -> None:
    path, _, sentence = said.partition(": ")
    assert sentence in in_one_line(PAGES[path])
    name, pieces = SENTENCES[said]
    text, place = in_one_line(result(name)), 0
    for piece in filter(None, (one.strip() for one in pieces.split("|"))):
        place = text.find(piece, place)
        assert place >= 0, piece


def test_the_readme_is_short() -> None:
    assert len(README.split()) <= 900


@pytest.mark.parametrize("path", PAGES)
def test_linked_files_exist(path: str) -> None:
    for link in links(PAGES[path]):
        target = (ROOT / path).parent / link
        assert target.exists(), link
        assert path == "README.md" or target.is_file(), f"{link}: the site has files only"


def test_every_result_is_listed() -> None:
    listed = {link.rpartition("/")[2] for link in links(page("results"))}
    assert listed == {file.name for file in RESULTS.glob("*.md")}


def test_every_public_name_is_in_the_reference() -> None:
    shown = set(re.findall(r"^::: (\S+)$", page("api"), re.MULTILINE))
    packages = (quietstar, quietstar.tasks, quietstar_kernels)
    assert shown == {f"{package.__name__}.{name}" for package in packages for name in package.__all__}


def test_every_name_in_the_pages_is_there() -> None:
    """Of packages, of what they export and of commands; modules below them may move."""
    for path, text in PAGES.items():
        for name in set(re.findall(r"\bquietstar(?:_kernels)?(?:\.[A-Za-z_]\w*)+", text)):
            package, *attributes = name.split(".")
            found = import_module(package)
            for attribute in attributes:
                assert hasattr(found, attribute), f"{path}: {name}"
                found = getattr(found, attribute)

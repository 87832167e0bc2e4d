"""NLL with and without thoughts: by hand, by difficulty, by kind of token, and its intervals."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from quietstar.errors import DataError
from quietstar.evaluation.held_out_text import bits_comparison, deciles, nll_comparison, text_windows
from quietstar.evaluation.token_texts import token_class, token_classes
from quietstar.statistics.intervals import block_intervals
from tests.evaluation.evaluated import constant_model, evaluate, items, random_model, result, save, tokenizer


def test_nll_and_bits_by_hand(tmp_path: Path) -> None:
    """`abab...` under a half and a quarter: of each window of 9 characters 8 are predicted, 4 of each letter. 36
    characters give 4 windows: the mean NLL of 32 is (ln 2 + ln 4) / 2 = 1.5 ln 2, and a byte has 1.5 bits."""
    checkpoint = save(constant_model({"a": 0.5, "b": 0.25, "c": 0.25}), tmp_path / "model")
    (tmp_path / "text.txt").write_text("ab" * 18)
    report = evaluate(checkpoint, tmp_path / "out", text=tmp_path / "text.txt", length=9)
    nll, bits = (result(report, name, "text.txt") for name in ("NLL", "bits per byte"))
    assert (nll["n"], bits["n"], nll["off"]["problems"]) == (32, 32, 4)
    assert nll["off"]["mean"] == pytest.approx(1.5 * math.log(2), abs=1e-4)
    assert bits["on"]["mean"] == pytest.approx(1.5, abs=1e-4)
    entropies = [group["n"] for group in nll["groups"]["uncertainty"]]
    assert sum(entropies) == 32 and len(entropies) == 10
    (window, *_) = items(tmp_path / "out")
    assert window["entropy"] == pytest.approx([1.5 * math.log(2)] * 8, abs=1e-4)  # of a half and two quarters
    (kind,) = nll["groups"]["kind of token"]
    assert (kind["name"], kind["n"]) == ("continuation", 32)
    assert "thoughts.html" in (tmp_path / "out" / "evaluation.html").read_text()
    assert (tmp_path / "out" / "thoughts.html").is_file()


def test_nll_is_that_of_one_call_per_window(tmp_path: Path) -> None:
    checkpoint = save(random_model(), tmp_path / "model")
    text = "The cat sat on 12 mats,\nthen left. " * 4
    (tmp_path / "text.txt").write_text(text)
    report = evaluate(checkpoint, tmp_path / "out", text=tmp_path / "text.txt", length=48, batch_size=3)
    model = random_model()
    ids = tokenizer()(text, return_tensors="pt")["input_ids"][0]
    sums, count = [0.0, 0.0], 0
    for window in ids.split(48):
        for side, called in enumerate((model.base, model)):
            with torch.no_grad():
                logits = called(window[None]).logits[0, :-1].double()
            sums[side] += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
        count += len(window) - 1
    found = result(report, "NLL", "text.txt")
    assert found["n"] == count
    assert [found["off"]["mean"], found["on"]["mean"]] == pytest.approx([one / count for one in sums], rel=1e-4)
    assert abs(found["difference"]["mean"]) > 0.01
    assert found["difference"]["mean"] == pytest.approx(found["on"]["mean"] - found["off"]["mean"])
    with torch.no_grad():
        probability = model.base(ids[None, :48]).logits[0, :-1].double().softmax(-1)
    entropy = -(probability * probability.log()).sum(-1)  # of the prediction without thought
    assert items(tmp_path / "out")[0]["entropy"] == pytest.approx(entropy.tolist(), abs=1e-4)


def test_difficulty_and_kinds_by_hand() -> None:
    """Twenty tokens in two windows. Base NLLs 0 to 19 put two tokens into each tenth; a thought takes 0.5 nats from
    every odd one (digits) and adds 0.1 to every even one (words): each tenth has one of each, a mean of -0.2."""
    base = np.arange(20.0)
    talk = base + np.where(np.arange(20) % 2 == 1, -0.5, 0.1)
    kinds = ["digit" if place % 2 else "word" for place in range(20)]
    entropies = 20 - base  # the hardest tokens are those that the base is surest of
    found = nll_comparison(
        [(base[:12], talk[:12]), (base[12:], talk[12:])],
        [kinds[:12], kinds[12:]],
        seed=0,
        entropies=[entropies[:12], entropies[12:]],
    )
    assert found.off.mean == pytest.approx(9.5)
    assert found.difference.mean == pytest.approx(-0.2)
    difficulty, by_kind = found.groups["difficulty"], found.groups["kind of token"]
    assert [group.n for group in difficulty] == [2] * 10
    assert [group.difference.mean for group in difficulty] == pytest.approx([-0.2] * 10)
    assert [group.off.mean for group in difficulty] == pytest.approx([2 * place + 0.5 for place in range(10)])
    assert {group.name: group.difference.mean for group in by_kind} == pytest.approx({"digit": -0.5, "word": 0.1})
    assert [group.off.mean for group in found.groups["uncertainty"]] == pytest.approx([18.5 - 2 * n for n in range(10)])
    assert list(found.caveats) == ["difficulty"]
    assert difficulty[0].difference.low is None  # all of its tokens are in one window
    bits = bits_comparison([(base[:12], talk[:12]), (base[12:], talk[12:])], [24, 16], seed=0)
    assert bits.off.mean == pytest.approx(190 / math.log(2) / 40)


def test_tenths_are_of_the_predictions_without_thoughts() -> None:
    """A thought turns the order around: the hardest token without it is the easiest with it."""
    base = np.arange(20.0)
    found = nll_comparison([(base[:12], 19 - base[:12]), (base[12:], 19 - base[12:])], [["word"] * 12, ["word"] * 8], 0)
    difficulty = found.groups["difficulty"]
    assert [group.off.mean for group in difficulty] == pytest.approx([2 * place + 0.5 for place in range(10)])
    assert [group.on.mean for group in difficulty] == pytest.approx([18.5 - 2 * place for place in range(10)])
    assert [group.difference.mean for group in difficulty] == pytest.approx([18 - 4 * place for place in range(10)])


def test_tenths_of_any_number_of_tokens() -> None:
    assert deciles(np.array([3.0, 1.0, 2.0])).tolist() == [6, 0, 3]
    assert np.bincount(deciles(np.random.default_rng(0).random(25))).tolist() == [3, 2, 3, 2, 3, 2, 3, 2, 3, 2]


def test_windows_are_resampled_whole() -> None:
    """Two kinds of windows with equal numbers throughout: single tokens would promise an interval ten times narrower.
    With 40 windows of 100 tokens, half at 0 and half at 1, the mean's standard error is 0.5 / sqrt(40) = 0.079."""
    counts = np.full((40, 1), 100.0)
    totals = np.where(np.arange(40) % 2 == 0, 100.0, 0.0)[:, None]
    (interval,) = block_intervals(totals, counts, resamples=2000)
    assert interval is not None and interval.low is not None and interval.high is not None
    assert interval.mean == 0.5
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(40), rel=0.1)


def test_a_draw_of_windows_has_its_own_number_of_tokens() -> None:
    """A mean over the tokens of drawn windows: where all tokens are alike it has no spread, however unequal the windows
    are. Else it is the mean of the drawn tokens, put together one by one here."""
    rng = np.random.default_rng(0)
    windows = [rng.normal(place % 3, 1.0, size) for place, size in enumerate([1, 2, 40, 5, 30, 3, 8, 60])]
    counts = np.array([[len(own)] for own in windows], dtype=np.float64)
    (alike,) = block_intervals(2 * counts, counts)
    assert alike is not None and (alike.low, alike.mean, alike.high) == pytest.approx((2, 2, 2))
    (interval,) = block_intervals(np.array([[own.sum()] for own in windows]), counts, resamples=4000)
    assert interval is not None and interval.mean == pytest.approx(np.concatenate(windows).mean())
    means = [np.concatenate([windows[one] for one in rng.integers(8, size=8)]).mean() for _ in range(4000)]
    assert [interval.low, interval.high] == pytest.approx(list(np.quantile(means, [0.025, 0.975])), abs=0.06)


def test_measures_without_things_have_no_interval() -> None:
    found = block_intervals(np.array([[1.0, 0.0], [2.0, 0.0]]), np.array([[1.0, 0.0], [1.0, 0.0]]))
    assert found[1] is None and found[0] is not None


@pytest.mark.parametrize(
    ("before", "text", "kind"),
    [
        ("at", " 12", "digit"),
        ("at", " cat", "word"),
        ("\n", "cat", "word"),
        ("ca", "t", "continuation"),
        ("cat", ".", "punctuation"),
        ("cat", " (", "punctuation"),
        (".", "\n", "line end"),
        (".", " \n\n", "line end"),
        (".", "  ", "space"),
        ("a", "\N{REPLACEMENT CHARACTER}", "other"),
        ("a", "", "other"),
        ("a", "1st", "other"),
        (" ", "é", "word"),
    ],
)
def test_kinds_of_tokens(before: str, text: str, kind: str) -> None:
    assert token_class(text, before) == kind


def test_kinds_of_a_text() -> None:
    texts = {0: "The", 1: " c", 2: "at", 3: " 9", 4: "!"}
    assert token_classes([0, 1, 2, 3, 4], texts) == ["word", "continuation", "digit", "punctuation"]


def test_windows_of_a_text() -> None:
    plain = list(text_windows(list(range(5)), [], 2))
    assert [(window.ids, window.given) for window in plain] == [([0, 1], 1), ([2, 3], 1)]
    begun = list(text_windows(list(range(5)), [9], 3))
    assert [(window.ids, window.given) for window in begun] == [([9, 0, 1], 1), ([9, 2, 3], 1), ([9, 4], 1)]
    with pytest.raises(DataError, match="needs at least two"):
        list(text_windows([1], [], 8))

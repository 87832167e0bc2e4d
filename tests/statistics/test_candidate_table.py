"""The table holds what each measure says by itself, problem by problem."""

from __future__ import annotations

import json
from math import inf, nan

import numpy as np
import pytest

from quietstar.errors import ConfigError, DataError
from quietstar.statistics.candidate_table import CandidateTable, measure_candidates
from quietstar.statistics.candidates import Candidates, maj_at_k, pass_at_k, weighted_vote_at_k
from quietstar.statistics.intervals import bootstrap_interval, paired_difference
from quietstar.statistics.ranking import auroc, best_of_k

KS = (1, 2, 6)


def make_problem(index: int) -> Candidates:
    """Six candidates; the verifier's score is right with noise, the likelihood is noise."""
    random = np.random.default_rng(index)
    answers = [str(answer) for answer in random.integers(4, size=6)]
    correct = [answer == "1" for answer in answers]
    verifier = np.clip(0.6 * np.array(correct) + 0.4 * random.random(6), 0, 1)
    scores = {"verifier": verifier.tolist(), "likelihood": (-50 * random.random(6)).tolist()}
    return Candidates(f"problem-{index}", answers, correct, scores)


@pytest.fixture(scope="module")
def problems() -> list[Candidates]:
    return [make_problem(index) for index in range(40)]


@pytest.fixture(scope="module")
def table(problems: list[Candidates]) -> CandidateTable:
    return measure_candidates(problems, [*KS, 7, 64], compare="verifier", logarithmic=["likelihood"], seed=3)


def test_each_row_is_the_mean_of_its_measure(table: CandidateTable, problems: list[Candidates]) -> None:
    for k in KS:
        passed = [pass_at_k(6, sum(problem.correct), k) for problem in problems]
        voted = [maj_at_k(problem.answers, problem.correct, k) for problem in problems]
        assert table.value("pass", k).mean == pytest.approx(np.mean(passed))
        assert table.value("maj", k).mean == pytest.approx(np.mean(voted))
        for name in ("verifier", "likelihood"):
            best = [best_of_k(problem.scores[name], problem.correct, k) for problem in problems]
            assert table.value("best-of", k, name).mean == pytest.approx(np.mean(best))
            weighted = [
                weighted_vote_at_k(p.answers, p.scores[name], p.correct, k, logarithmic=name == "likelihood")
                for p in problems
            ]
            assert table.value("weighted-vote", k, name).mean == pytest.approx(np.mean(weighted))
    assert len(table.rows) == 3 * (2 + 2 + 2)
    assert (table.problems, table.fewest) == (40, 6)


def test_intervals_are_those_of_the_bootstrap(table: CandidateTable, problems: list[Candidates]) -> None:
    voted = bootstrap_interval([maj_at_k(p.answers, p.correct, 2) for p in problems], seed=3)
    assert (table.value("maj", 2).low, table.value("maj", 2).high) == pytest.approx((voted.low, voted.high))


def test_differences_are_paired_and_against_every_other_choice(
    table: CandidateTable, problems: list[Candidates]
) -> None:
    others = {(row.measure, row.other) for row in table.differences}
    assert others == {
        ("maj", None),
        ("best-of", "likelihood"),
        ("weighted-vote", "verifier"),
        ("weighted-vote", "likelihood"),
    }
    best = {name: [best_of_k(p.scores[name], p.correct, 2) for p in problems] for name in ("verifier", "likelihood")}
    expected = paired_difference(best["verifier"], best["likelihood"], seed=3)
    (found,) = [row for row in table.differences if (row.measure, row.other, row.k) == ("best-of", "likelihood", 2)]
    assert (found.value.mean, found.value.low) == pytest.approx((expected.mean, expected.low))
    assert found.score == "verifier" and found.value.above_zero


def test_discrimination_is_within_each_problem(table: CandidateTable, problems: list[Candidates]) -> None:
    areas = [auroc(problem.scores["likelihood"], problem.correct) for problem in problems]
    told = [area for area in areas if area is not None]
    assert table.discrimination["likelihood"].within == pytest.approx(np.mean(told))
    assert table.discrimination["likelihood"].problems == len(told) < 40
    assert table.discrimination["verifier"].within == 1.0


def test_the_table_is_json(table: CandidateTable) -> None:
    read = json.loads(json.dumps(table.to_json(), allow_nan=False))
    assert read["rows"][0] == {
        "measure": "pass",
        "k": 1,
        "score": None,
        "value": {
            "mean": table.value("pass", 1).mean,
            "low": table.value("pass", 1).low,
            "high": table.value("pass", 1).high,
            "problems": 40,
        },
    }
    with pytest.raises(KeyError):
        table.value("maj", 7)


def test_a_score_below_zero_that_is_no_logarithm_has_no_weighted_vote(problems: list[Candidates]) -> None:
    found = measure_candidates(problems[:3], [2])
    assert {row.score for row in found.rows if row.measure == "weighted-vote"} == {"verifier"}
    assert found.differences == ()


def test_without_scores_pass_and_majority_remain() -> None:
    found = measure_candidates([Candidates("only", ["1", "2", None], [True, False, False])], [1, 3])
    assert [(row.measure, row.k, row.value.mean) for row in found.rows] == [
        ("pass", 1, pytest.approx(1 / 3)),
        ("pass", 3, 1.0),
        ("maj", 1, pytest.approx(1 / 3)),
        ("maj", 3, 0.5),
    ]
    assert found.rows[0].value.low is None


def test_impossible_candidates_are_named() -> None:
    def scored(name: str, scores: dict[str, list[float]]) -> Candidates:
        return Candidates(name, ["1", "2"], [True, False], scores)

    good = scored("p", {"s": [0.0, 1.0]})
    for problems, options, error, words in [
        ([], {}, DataError, "^problems: is empty"),
        ([good, good], {}, DataError, "^problem p: has 2 entries"),
        ([good, scored("q", {})], {}, DataError, "^problem q: its scores are none; needs the first problem's, s"),
        ([scored("q", {"s": [nan, 1.0]})], {}, DataError, r"^problem q: scores\[s\]: NaN at index 0"),
        ([scored("q", {"s": [1.0]})], {}, DataError, r"^problem q: answers has 2, correct has 2, scores\[s\] has 1"),
        ([Candidates("q", [], [])], {}, DataError, "^problem q: correct: has the shape"),
        ([scored("q", {"s": [inf, 1.0]})], {"logarithmic": ["s"]}, DataError, "^weights: are 1 to inf"),
        ([good], {"ks": [3]}, ConfigError, r"^ks: are \[3\]; needs one from 1 to the number of candidates, 2"),
        ([good], {"ks": [0, 1]}, ConfigError, "^ks: are"),
        ([good], {"compare": "t"}, ConfigError, "^t: is not a score; there are s"),
        ([good], {"logarithmic": ["t"]}, ConfigError, "^t: is not a score"),
    ]:
        with pytest.raises(error, match=words):
            measure_candidates(problems, **{"ks": [1], **options})

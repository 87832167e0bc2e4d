"""The plan's memory against that of real training steps."""

from __future__ import annotations

import csv
from dataclasses import replace

import pytest

from benchmarks import plan_accuracy
from benchmarks.environment import ROOT
from benchmarks.plan_accuracy import LIMIT, QUANTITIES, Case, compare, estimate, measure, mistral, table, worst

SHALLOW = mistral(num_hidden_layers=2)
SHORT = {"thought_length": 1, "lookahead": 2}
CASES = [
    Case("thinking", SHALLOW, model=SHORT, length=24, training={"batch_size": 1}),
    Case(
        "bfloat16 in micro-batches",
        SHALLOW,
        model={**SHORT, "dtype": "bfloat16"},
        length=16,
        training={"batch_size": 2, "micro_batch_size": 1},
    ),
    Case("language modelling", mistral(), length=64, training={"method": "language_modeling"}),
]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_the_plan_is_within_ten_percent_of_a_run(case: Case) -> None:
    row = compare(case)
    for name, meaning in QUANTITIES.items():
        assert abs(row[f"{name}_ratio"] - 1) <= LIMIT, (meaning, row)
    assert case.name in table([row])


def test_the_plan_of_another_run_is_not() -> None:
    """What the comparison is worth: one thought token or one layer more is seen."""
    case = CASES[2]
    measured, shallow = measure(case), estimate(replace(case, base=mistral(num_hidden_layers=3)))
    for name in ("standing", "kept", "total"):
        assert abs(shallow[name] / measured[name] - 1) > LIMIT, name


def test_the_committed_table_holds() -> None:
    with (ROOT / "benchmarks/results/plan_accuracy.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    assert {row["case"] for row in rows} == {case.name for case in plan_accuracy.cases()}
    numbers = [{name: float(value) for name, value in row.items() if name != "case"} for row in rows]
    assert max(map(worst, numbers)) <= LIMIT

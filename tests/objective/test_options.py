"""Presets and options of the objective."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

import pytest

from quietstar.config.objective import OBJECTIVE_PRESETS, Objective, ObjectiveOptions, resolve_objective
from quietstar.errors import ConfigError


def test_presets() -> None:
    assert set(OBJECTIVE_PRESETS) == {"default", "paper", "authors"}
    for name, preset in OBJECTIVE_PRESETS.items():
        assert resolve_objective(name) is not None
        assert resolve_objective(name) == preset == resolve_objective(preset)
    assert resolve_objective("default") == Objective()


def test_what_the_presets_say() -> None:
    authors = resolve_objective("authors")
    assert (authors.base_weight, authors.talk_weight, authors.policy_weight) == (0.5, 0.5, 1e6)
    assert authors.policy_temperature == 3.0 and authors.clamp_negative_advantage and authors.baseline == "mean"
    default = resolve_objective("default")
    assert default.policy_temperature is None and not default.clamp_negative_advantage
    assert (default.baseline, default.token_reduction, default.reward_precision) == ("leave_one_out", "sum", "float32")
    differences = {name for name, value in asdict(authors).items() if getattr(default, name) != value}
    assert differences == {
        "policy_weight",
        "baseline",
        "clamp_negative_advantage",
        "policy_temperature",
        "token_reduction",
        "reward_precision",
        "policy_positions",
        "loss_mean",
    }


def test_overrides_replace_single_options() -> None:
    changed = resolve_objective("authors", policy_weight=2.0, baseline="none")
    assert (changed.policy_weight, changed.baseline) == (2.0, "none")
    assert changed.policy_temperature == 3.0
    assert OBJECTIVE_PRESETS["authors"].policy_weight == 1e6


def test_the_configuration_tree_has_every_option() -> None:
    assert {entry.name for entry in fields(ObjectiveOptions)} == {
        "preset",
        *(entry.name for entry in fields(Objective)),
    }


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("autors", {}, "objective: got 'autors', needs one of default, paper, authors"),
        ("default", {"policy_wieght": 1.0}, "objective.policy_wieght: unknown, the options are .*policy_weight"),
        ("default", {"baseline": "median"}, "objective.baseline: got 'median', needs one of leave_one_out, mean, none"),
        ("default", {"token_reduction": "max"}, "objective.token_reduction: got 'max'"),
        ("default", {"reward_precision": "float16"}, "objective.reward_precision: got 'float16'"),
        ("default", {"policy_positions": "all"}, "objective.policy_positions: got 'all'"),
        ("default", {"loss_mean": "sum"}, "objective.loss_mean: got 'sum'"),
        (
            "default",
            {"policy_temperature": 0.0},
            "objective.policy_temperature: got 0.0, needs a finite number above 0",
        ),
        ("default", {"policy_weight": -1.0}, "objective.policy_weight: got -1.0, needs a finite number of at least 0"),
        ("default", {"talk_weight": float("nan")}, "objective.talk_weight: got nan"),
    ],
)
def test_unknown_names_and_values(name: str, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_objective(name, **overrides)

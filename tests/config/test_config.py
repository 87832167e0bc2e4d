"""Every value that `validate` refuses, by its dotted key, and the ones that it must not refuse."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, get_args, get_type_hints

import pytest

from quietstar.config.objective import OBJECTIVE_PRESETS, Objective, ObjectiveOptions
from quietstar.config.presets import TRAIN_DESCRIPTIONS, TRAIN_PRESETS
from quietstar.config.training import TrainConfig, validate
from quietstar.errors import ConfigError


def config(**values: Any) -> TrainConfig:
    """A valid configuration with some values replaced; `model__lookahead=3` sets model.lookahead."""
    made = TrainConfig(preset="plain")
    made.model.path, made.data.path = "some/model", "some.txt"
    for name, value in values.items():
        *groups, field = name.split("__")
        target: Any = made
        for group in groups:
            target = getattr(target, group)
        assert field in {entry.name for entry in dataclasses.fields(target)}
        setattr(target, field, value)
    return made


def test_the_defaults_are_valid() -> None:
    assert validate(TrainConfig()) == TrainConfig()
    validate(config())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model__thought_length": 0}, "model.thought_length: got 0, needs at least 1"),
        ({"model__lookahead": 0}, "model.lookahead: got 0, needs at least 1"),
        ({"model__lookahead": -3}, "model.lookahead: got -3, needs at least 1"),
        ({"model__thoughts_per_position": 0}, "model.thoughts_per_position: got 0, needs at least 1"),
        ({"model__temperature": 0.0}, "model.temperature: got 0.0, needs a finite number above 0"),
        ({"model__embedding_scale": math.inf}, "model.embedding_scale: got inf, needs a finite number above 0"),
        ({"model__start_text": ""}, "model.start_text: got an empty text"),
        ({"model__end_text": ""}, "model.end_text: got an empty text"),
        ({"model__initial_mixing_weight": math.nan}, "model.initial_mixing_weight: got nan, needs a finite number"),
        ({"data__length": 1}, "data.length: got 1, needs at least 2"),
        ({"data__validation_fraction": 1.0}, "data.validation_fraction: got 1.0, needs at least 0 and less than 1"),
        ({"data__field": ""}, "data.field: got an empty text"),
        ({"objective__policy_weight": -1.0}, "objective.policy_weight: got -1.0, needs a finite number of at least 0"),
        ({"objective__policy_temperature": 0.0}, "objective.policy_temperature: got 0.0"),
        ({"training__steps": 0}, "training.steps: got 0, needs at least 1"),
        ({"training__batch_size": 0}, "training.batch_size: got 0, needs at least 1"),
        ({"training__micro_batch_size": 0}, "training.micro_batch_size: got 0, needs at least 1"),
        ({"training__micro_batch_size": 3}, "training.micro_batch_size: got 3, which does not divide"),
        ({"training__learning_rate": math.nan}, "training.learning_rate: got nan"),
        ({"training__learning_rate": 0.0}, "training.learning_rate: got 0.0, needs a finite number above 0"),
        ({"training__adam_beta2": 1.0}, "training.adam_beta2: got 1.0, needs at least 0 and less than 1"),
        ({"training__final_learning_rate_fraction": 1.1}, "training.final_learning_rate_fraction: got 1.1"),
        ({"training__weight_decay": -0.1}, "training.weight_decay: got -0.1"),
        ({"training__keep_checkpoints": 0}, "training.keep_checkpoints: got 0, needs at least 1"),
        ({"training__seed": -1}, "training.seed: got -1, needs 0 to 4294967295"),
        ({"training__threads": 0}, "training.threads: got 0, needs 1 to 1024"),
        ({"textbook__seeds": 0}, "textbook.seeds: got 0, needs at least 1"),
        ({"textbook__pretraining_steps": 0}, "textbook.pretraining_steps: got 0, needs at least 1"),
        ({"textbook__useful_asides": -0.1}, "textbook.useful_asides: got -0.1, needs 0 to 1"),
        ({"textbook__useful_asides": 1.5}, "textbook.useful_asides: got 1.5, needs 0 to 1"),
        ({"textbook__useful_asides": math.nan}, "textbook.useful_asides: got nan, needs 0 to 1"),
        ({"textbook__operands": "one"}, "textbook.operands: got 'one', needs a count such as 4 or a range"),
        ({"training__device": "gpu"}, "training.device: got 'gpu', needs auto, cpu, cuda or cuda:N"),
        ({"output_dir": ""}, "output_dir: got an empty text"),
        ({"preset": "mine"}, "preset: got 'mine', needs one of textbook, plain, mistral-7b"),
        ({"model__path": None}, "model.path: missing; preset plain needs a causal language model"),
        ({"data__path": None}, "data.path: missing; preset plain needs a text to train on"),
        ({"preset": "textbook"}, "model.path: got 'some/model', but preset textbook makes its own"),
    ],
)
def test_a_bad_value_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(config(**values))
    assert str(caught.value).startswith(message)


def test_a_text_holds_a_thought_and_its_lookahead() -> None:
    validate(config(model__thought_length=8, model__lookahead=4, data__length=12))
    with pytest.raises(ConfigError) as caught:
        validate(config(model__thought_length=8, model__lookahead=4, data__length=11))
    assert str(caught.value) == ("data.length: got 11, needs at least model.thought_length + model.lookahead = 8 + 4")


@pytest.mark.parametrize("values", [{}, {"objective__preset": "paper", "objective__baseline": "leave_one_out"}])
def test_one_thought_has_no_others_to_be_compared_with(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"model\.thoughts_per_position: got 1.*objective\.baseline leave_one_out"):
        validate(config(model__thoughts_per_position=1, **values))


@pytest.mark.parametrize(
    "values",
    [
        {"objective__baseline": "none"},
        {"objective__preset": "authors"},
        {"objective__preset": "paper"},
        {"objective__policy_weight": 0.0},
        {"model__thinking": "pause"},
        {"training__method": "language_modeling"},
    ],
)
def test_one_thought_is_enough_without_that_baseline(values: dict[str, Any]) -> None:
    validate(config(model__thoughts_per_position=1, **values))


@pytest.mark.parametrize("positions", ["some", "entropy:2.0"])
def test_other_rules_for_positions_are_refused(positions: str) -> None:
    with pytest.raises(ConfigError, match=rf"model\.positions: got '{positions}', needs all, every:N"):
        validate(config(model__positions=positions))


@pytest.mark.parametrize(("activation", "weight", "valid"), [
    ("identity", 0.0, True), ("identity", -2.0, True), ("identity", None, True),
    ("sigmoid", 0.3, True), ("sigmoid", None, True), ("sigmoid", 0.0, False), ("sigmoid", 1.0, False),
])  # fmt: skip
def test_the_first_mixing_weight_must_be_one_that_the_activation_can_give(
    activation: str, weight: float | None, valid: bool
) -> None:
    made = config(model__mixing_activation=activation, model__initial_mixing_weight=weight)
    if valid:
        validate(made)
    else:
        with pytest.raises(ConfigError, match=r"model\.initial_mixing_weight: got .* strictly between 0 and 1"):
            validate(made)


def test_the_objective_options_are_those_of_the_objective() -> None:
    """`validate` knows, without importing the model, which presets use the leave-one-out baseline."""
    names = [entry.name for entry in dataclasses.fields(ObjectiveOptions)]
    assert names == ["preset", *(entry.name for entry in dataclasses.fields(Objective))]
    assert set(get_args(get_type_hints(ObjectiveOptions)["preset"])) == set(OBJECTIVE_PRESETS)
    for name, objective in OBJECTIVE_PRESETS.items():
        made = config(model__thoughts_per_position=1, objective__preset=name)
        if objective.baseline == "leave_one_out":
            with pytest.raises(ConfigError, match="leave_one_out"):
                validate(made)
        else:
            validate(made)


def test_every_preset_is_described() -> None:
    assert list(TRAIN_PRESETS) == list(TRAIN_DESCRIPTIONS)

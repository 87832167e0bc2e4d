"""What is suggested fits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers import MistralConfig

from quietstar.config.training import TrainConfig
from quietstar.errors import ConfigError
from quietstar.planning.plan import Suggestion, choose_replay, suggest, with_changes
from quietstar.planning.trace import trace_model

Run = Callable[..., TrainConfig]


def bytes_of(config: TrainConfig) -> int:
    """A run whose weights take 100, each text of a micro-batch 10 a token of length, the moments 200 or 50."""
    moments = 200 if config.training.optimizer == "adamw" else 50
    if config.finetuning.lora_rank:
        moments = 2
    texts = config.training.micro_batch_size or config.training.batch_size
    share = 0.25 if config.model.positions.startswith("entropy") else 1.0
    return round(100 + moments + 10 * texts * config.data.length * share)


def changes_of(found: list[Suggestion]) -> list[dict[str, object]]:
    return [one.changes for one in found]


def test_the_largest_micro_batch_that_fits_is_found(run: Run) -> None:
    config = run(training__batch_size=12)
    asked: list[int | None] = []

    def peak(config: TrainConfig) -> int:
        asked.append(config.training.micro_batch_size)
        return bytes_of(config)

    found = suggest(config, 300 + 10 * 8 * 5, peak)
    assert found[0].changes == {"training.micro_batch_size": 4}
    assert found[0].total == 300 + 10 * 8 * 4
    assert str(found[0]) == "--training.micro_batch_size 4"
    assert {1, 4, 6} <= set(asked)  # the next larger one was tried


def test_single_changes_that_fit_are_all_named(run: Run) -> None:
    found = suggest(run(training__batch_size=4), 400, bytes_of)
    assert changes_of(found) == [
        {"training.micro_batch_size": 1},
        {"model.positions": "entropy:0.25"},
    ]


def test_changes_are_joined_where_no_single_one_is_enough(run: Run) -> None:
    (found,) = suggest(run(training__batch_size=4, model__dtype="bfloat16"), 145, bytes_of)
    assert found.changes == {
        "training.micro_batch_size": 2,  # the largest that fits with the others
        "training.optimizer": "adamw_8bit",
        "model.positions": "entropy:0.25",
        "finetuning.lora_rank": 16,
    }
    assert found.total == 100 + 2 + 10 * 2 * 8 // 4


def test_narrower_weights_are_the_first_suggestion(run: Run) -> None:
    """float32 is the default, and a 7B model in it the commonest reason that a run does not fit."""

    def peak(config: TrainConfig) -> int:
        return bytes_of(config) * (2 if config.model.dtype == "float32" else 1)

    first = suggest(run(training__batch_size=1), 500, peak)[0]
    assert (first.changes, first.total) == ({"model.dtype": "bfloat16"}, 380)


def test_nothing_is_suggested_where_nothing_helps(run: Run) -> None:
    assert suggest(run(training__batch_size=4), 101, bytes_of) == []


@pytest.mark.slow
def test_a_plan_that_does_not_fit_suggests_what_does(run: Run, small: Callable[..., MistralConfig]) -> None:
    config = run(
        model__path="in memory",
        model__dtype="bfloat16",
        training__method="language_modeling",
        training__batch_size=4,
        training__optimizer="adamw_8bit",
        finetuning__gradient_checkpointing=True,
        finetuning__freeze="base.model.embed_tokens.*",
        data__length=64,
    )

    def peak(config: TrainConfig) -> int:
        return trace_model(config, small(num_hidden_layers=1), "cuda").peak.total()

    found = suggest(config, peak(config) - 1, peak)
    assert changes_of(found) == [{"training.micro_batch_size": 2}, {"data.length": 32}]
    assert [peak(with_changes(config, one.changes)) for one in found] == [one.total for one in found]


def test_changes_are_checked(run: Run) -> None:
    with pytest.raises(ConfigError, match=r"training\.micro_batch_size"):
        with_changes(run(training__batch_size=4), {"training.micro_batch_size": 3})


STAGES = {"layers": 10, "down": 10, "mlp": 30, "linears": 50, "all": 70}
"""Bytes at the peak of a run by its stage of `training.replay`."""


@pytest.mark.parametrize(
    ("limit", "stage"),
    [(1000, "all"), (70, "all"), (69, "linears"), (50, "linears"), (30, "mlp"), (29, "down"), (9, "layers")],
)
def test_auto_is_the_last_stage_that_fits(limit: int, stage: str, run: Run) -> None:
    asked: list[str] = []

    def peak(config: TrainConfig) -> int:
        asked.append(config.training.replay)
        return STAGES[config.training.replay]

    chosen = choose_replay(run(training__replay="auto", training__batch_size=3), limit, peak)
    assert chosen == run(training__replay=stage, training__batch_size=3)
    assert "auto" not in asked


def test_auto_passes_over_a_stage_that_a_model_does_not_have(run: Run) -> None:
    def peak(config: TrainConfig) -> int:
        if config.training.replay == "down":
            raise ConfigError("training.replay: got down, but gemma2 has no such product")
        return STAGES[config.training.replay]

    assert choose_replay(run(training__replay="auto"), 20, peak).training.replay == "layers"


@pytest.mark.parametrize(
    "changes", [{"training__method": "language_modeling"}, {"training__reuse_sampling_pass": False}]
)
def test_auto_is_layers_where_nothing_is_recorded(changes: dict[str, object], run: Run) -> None:
    chosen = choose_replay(run(training__replay="auto", **changes), 0, bytes_of)
    assert chosen.training.replay == "layers"


def test_a_run_that_records_too_much_is_told_to_record_less(run: Run) -> None:
    found = suggest(run(training__replay="all"), 20, lambda config: STAGES[config.training.replay])
    assert {"training.replay": "layers"} in changes_of(found)

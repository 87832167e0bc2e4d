"""What was finished is used with the options that it comes from, and refused with others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from quietstar.config.training import ModelOptions, TextbookOptions, TrainConfig, TrainingOptions
from quietstar.demos.options import arm_options, base_options, read_finished, write_finished
from quietstar.errors import CheckpointError


def test_finished_values_come_back_with_the_same_options_only(tmp_path: Path) -> None:
    file = tmp_path / "measures.json"
    assert read_finished(file, {"a": 1}) is None
    write_finished(file, {"nll": 0.5}, {"a": 1, "b": None})
    assert list(tmp_path.iterdir()) == [file]
    assert read_finished(file, {"a": 1}) == {"nll": 0.5}
    with pytest.raises(CheckpointError) as caught:
        read_finished(file, {"a": 2, "b": "x"})
    assert str(caught.value).startswith(f"{tmp_path}: was made with other options: a was 1 and is 2; b was None and is")


@pytest.mark.parametrize("content", ['{"nll": 0.5}', "", "[1]", '{"options": 3}', "{"])
def test_a_file_that_does_not_say_which_options_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "measures.json"
    file.write_text(content)
    with pytest.raises(CheckpointError, match=r"measures\.json does not say which options it comes from\. Set it back"):
        read_finished(file, {})


@pytest.mark.parametrize(
    ("changed", "base", "arm"),
    [
        (TrainConfig(textbook=TextbookOptions(useful_asides=0.5)), True, True),
        (TrainConfig(textbook=TextbookOptions(seeds=5, controls=False)), False, False),
        (TrainConfig(training=TrainingOptions(seed=1)), True, True),
        (TrainConfig(training=TrainingOptions(steps=7)), False, True),
        (TrainConfig(training=TrainingOptions(threads=7, eval_every=3, device="cpu")), False, False),
        (TrainConfig(model=ModelOptions(thought_length=3)), False, True),
        (TrainConfig(model=ModelOptions(path="elsewhere", backend="torch")), False, False),
        (replace(TrainConfig(), output_dir="elsewhere", preset="plain"), False, False),
    ],
)
def test_options_that_decide(changed: TrainConfig, base: bool, arm: bool) -> None:
    plain = TrainConfig()
    assert (base_options(changed) != base_options(plain)) == base
    assert (arm_options(changed) != arm_options(plain)) == arm

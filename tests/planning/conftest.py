"""A small model's configuration, and runs of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from transformers import MistralConfig

from quietstar.config.training import DataOptions, FinetuningOptions, ModelOptions, TrainConfig, TrainingOptions


@pytest.fixture(scope="session")
def small() -> Callable[..., MistralConfig]:
    """Makes configurations of small models."""

    def make(**changes: Any) -> MistralConfig:
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 100}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": None}
        return MistralConfig(**{**sizes, **heads, "bos_token_id": None, "eos_token_id": None, **changes})

    return make


@pytest.fixture(scope="session")
def run() -> Callable[..., TrainConfig]:
    """Makes configurations of runs, options by their dotted keys."""

    def make(**options: Any) -> TrainConfig:
        def of(group: str) -> dict[str, Any]:
            return {key.partition("__")[2]: value for key, value in options.items() if key.startswith(f"{group}__")}

        return TrainConfig(
            preset="plain",
            model=ModelOptions(**{"path": "in memory", "thought_length": 2, "lookahead": 2, **of("model")}),
            finetuning=FinetuningOptions(**of("finetuning")),
            data=DataOptions(**{"path": "in memory", "length": 8, **of("data")}),
            training=TrainingOptions(**{"batch_size": 1, "device": "cpu", **of("training")}),
        )

    return make

"""Where a model's configuration comes from, and how many parameters it has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import MistralConfig

from quietstar.config.training import TrainConfig
from quietstar.errors import ConfigError
from quietstar.planning.gpus import GPUS, find_gpu
from quietstar.planning.model import KNOWN, base_configuration
from quietstar.planning.plan import parameters_of

PUBLISHED = {
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
}
"""Parameters that the model cards give."""


@pytest.mark.parametrize("name", KNOWN)
def test_well_known_models_have_the_parameters_that_they_are_known_for(
    name: str, run: Callable[..., TrainConfig]
) -> None:
    config = run(model__path=name, model__dtype="bfloat16")
    base, source = base_configuration(config)
    assert source == f"{name}, from the built-in table"
    assert parameters_of(config, base).base == PUBLISHED[name]


def test_a_directory_says_itself(
    tmp_path: Path, small: Callable[..., MistralConfig], run: Callable[..., TrainConfig]
) -> None:
    small(num_hidden_layers=3).save_pretrained(tmp_path)
    base, source = base_configuration(run(model__path=str(tmp_path)))
    assert (base.num_hidden_layers, source) == (3, str(tmp_path))


def test_the_embedded_default_needs_no_path() -> None:
    base, _ = base_configuration(TrainConfig())
    assert base.model_type == "llama"


def test_adapters_freeze_the_base(small: Callable[..., MistralConfig], run: Callable[..., TrainConfig]) -> None:
    found = parameters_of(run(finetuning__lora_rank=4), small())
    assert found.adapters > 0
    assert found.trained == found.adapters + found.thought_embedding + found.mixing_head
    assert found.total == found.trained + found.base


@pytest.mark.parametrize("path", [None, "no-such-directory"])
def test_a_model_without_a_configuration_is_refused(path: str | None, run: Callable[..., TrainConfig]) -> None:
    config = run()
    config = replace(config, model=replace(config.model, path=path))
    with pytest.raises(ConfigError, match=r"model\.path: missing" if path is None else path):
        base_configuration(config)


def test_gpus_are_found_however_they_are_written() -> None:
    assert find_gpu("a100 80gb") is GPUS["A100-80GB"]
    assert find_gpu("RTX 4090") is GPUS["RTX-4090"]
    assert find_gpu("CPU") is None
    with pytest.raises(ConfigError, match=r"gpu: got 'Z80', needs one of H200"):
        find_gpu("Z80")


def test_every_gpu_names_its_source() -> None:
    for gpu in GPUS.values():
        assert "NVIDIA" in gpu.source
        assert gpu.bf16_tflops > gpu.float32_tflops > 0
        assert gpu.memory > 2**34 and gpu.bandwidth > 1e11

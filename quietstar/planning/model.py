"""The model and the optimizer of a run, made without weights within `MetaTensors`.

`base_configuration` finds the base model's configuration in a directory, on the hub, or in the table of a few
well-known models, which need neither.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config

from quietstar.config.training import TrainConfig, TrainingOptions
from quietstar.demos.textbook import character_model
from quietstar.errors import ConfigError
from quietstar.model.configuration import QuietStarConfig
from quietstar.model.loading import load_configuration
from quietstar.model.modeling import QuietStarForCausalLM
from quietstar.planning.meta_tensors import replaced
from quietstar.training.finetuning import apply_finetuning
from quietstar.training.optimizer import (
    THOUGHT_EMBEDDING_GRADIENT_NORM,
    MasterAdamW,
    build_optimizer,
    build_parameter_groups,
)
from quietstar.training.run import KEPT_OF_A_THINKING_MODEL, thinking_options

KNOWN: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "mistralai/Mistral-7B-v0.1": (
        MistralConfig,
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
            "tie_word_embeddings": False,
        },
    ),
    "meta-llama/Llama-3.1-8B": (
        LlamaConfig,
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": False,
        },
    ),
    "Qwen/Qwen2.5-0.5B": (
        Qwen2Config,
        {
            "vocab_size": 151936,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": True,
        },
    ),
    "Qwen/Qwen2.5-7B": (
        Qwen2Config,
        {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": False,
        },
    ),
}
"""Sizes from the public config.json of well-known models on the hub."""


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters.

    Args:
        base: Number of the base model's parameters.
        adapters: Number of the LoRA adapters' parameters.
        thought_embedding: Number of parameters of START and END.
        mixing_head: Number of the mixing head's parameters.
        trained: Number of all parameters that get a gradient.
    """

    base: int
    adapters: int
    thought_embedding: int
    mixing_head: int
    trained: int

    @property
    def total(self) -> int:
        """Number of all parameters."""
        return self.base + self.adapters + self.thought_embedding + self.mixing_head


def count_parameters(model: QuietStarForCausalLM) -> Parameters:
    """Counts the parameters of a model; shared ones count once."""
    counts = {"thought_embedding": 0, "mixing_head": 0, "adapters": 0, "base": 0}
    trained = 0
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        group = "adapters" if any(part.startswith("lora_") for part in parts) else parts[0]
        counts[group] += parameter.numel()
        trained += parameter.numel() if parameter.requires_grad else 0
    return Parameters(**counts, trained=trained)


def import_libraries(config: TrainConfig) -> None:
    """Imports what a run would import, outside of `MetaTensors`: tables made on import stay, so they must be real."""
    if config.finetuning.lora_rank and find_spec("peft") is not None:
        import_module("peft")


def meta_model(config: TrainConfig, base: PreTrainedConfig) -> QuietStarForCausalLM:
    """Returns the model that `quietstar.training.run.load_model` would load, without weights.

    Args:
        config: Configuration of the run.
        base: Configuration of the base model, or of a thinking one.
    """
    thinking = {name: value for name, value in thinking_options(config.model).items() if not name.endswith("_text")}
    if isinstance(base, QuietStarConfig):
        thinking |= {name: getattr(base, name) for name in KEPT_OF_A_THINKING_MODEL if name in thinking}
        assert isinstance(base.text_config, PreTrainedConfig)
        base = base.text_config
    dtype = getattr(torch, config.model.dtype)
    base = copy.deepcopy(base)
    with _default_dtype(dtype):
        model = QuietStarForCausalLM(
            QuietStarConfig(text_config=base, **thinking), AutoModelForCausalLM.from_config(base, dtype=dtype)
        )
        with replaced(nn.Module, "to", lambda module, *device_and_dtype, **options: module):  # meta tensors can't move
            apply_finetuning(model, config.finetuning)
    # meta tensors have no values for the probe and no addresses for the fingerprint
    vars(model).update(probed=True, _fingerprint=lambda: ())
    model.train()
    return model


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def meta_optimizer(model: nn.Module, options: TrainingOptions) -> MasterAdamW:
    """Returns the optimizer of a run; for a run with thoughts, with the moments that it has after the first step."""
    if options.optimizer == "adamw_8bit":
        return _MetaAdamW8bit(build_parameter_groups(model, options), master_weights=options.master_weights)
    optimizer = build_optimizer(model, options)
    if options.method == "quietstar":
        optimizer.load_state_tensors(optimizer.state_tensors())
    return optimizer


class _MetaAdamW8bit(MasterAdamW):
    """The memory of `MasterAdamW8bit`; its library has no meta tensors and need not be installed for a plan."""

    BLOCK = 256
    """Number of moments that share a scale."""
    LEAST = 4096
    """Parameters with fewer elements have float32 moments."""

    def _build_adam(self, groups: list[dict[str, Any]], betas: tuple[float, float], epsilon: float) -> Any:
        adam = torch.optim.SGD(groups, lr=0.0)
        for group, options in zip(self.groups, adam.param_groups, strict=True):
            for tensor in options["params"]:
                exact = group.norm == THOUGHT_EMBEDDING_GRADIENT_NORM or tensor.numel() < self.LEAST
                # float8 in place of uint8, because integer tensors are real
                adam.state[tensor] = {"moments": [_moment(tensor, exact, self.BLOCK) for _ in range(2)]}
        return adam

    def _state_of(self, trained: Tensor) -> dict[str, Tensor]:
        return {}

    def _set_state(self, trained: Tensor, tensors: Mapping[str, Tensor]) -> None:
        pass


def _moment(tensor: Tensor, exact: bool, block: int) -> list[Tensor]:
    if exact:
        return [torch.empty_like(tensor, dtype=torch.float32)]
    codes = torch.empty_like(tensor, dtype=torch.float8_e4m3fn)
    return [codes, torch.empty(-(-tensor.numel() // block), dtype=torch.float32)]


def base_configuration(config: TrainConfig) -> tuple[PreTrainedConfig, str]:
    """Returns the configuration of the model that a run trains, and where it comes from.

    Raises:
        ConfigError: `model.path` is missing, or has no readable configuration.
    """
    if config.preset == "textbook":
        made: PreTrainedConfig = character_model(config.training.seed).config
        return made, "the embedded character model"
    path = config.model.path
    if path is None:
        raise ConfigError("model.path: missing; a plan needs a directory with a config.json, or a hub name")
    if path in KNOWN and not Path(path).exists():
        kind, sizes = KNOWN[path]
        return kind(**sizes), f"{path}, from the built-in table"
    return load_configuration(path), path

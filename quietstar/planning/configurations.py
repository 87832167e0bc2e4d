"""Configurations of base models: a directory's, the hub's, or those of a few well-known models, which need neither."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config

from quietstar.config import TrainConfig
from quietstar.errors import ConfigError
from quietstar.model.loading import load_configuration
from quietstar.textbook.character_model import character_model

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
"""The sizes in the public config.json of models on the hub."""


def base_configuration(config: TrainConfig) -> tuple[PreTrainedConfig, str]:
    """The configuration of the model that a run trains, and where it comes from.

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

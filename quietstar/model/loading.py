"""Reading models from disk or hub: weights as safetensors, no code of theirs, nothing missing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from quietstar.errors import CheckpointError, ConfigError, QuietStarError
from quietstar.model.upstream import tied_weights

# What transformers raises for files that are missing, torn, of another kind, or that ask for code or packages.
LOADING_ERRORS = (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError, TypeError, SafetensorError)


def load_configuration(path: str | os.PathLike[str]) -> PreTrainedConfig:
    """A model's configuration.

    Raises:
        ConfigError: There is none, or it is not readable.
    """
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise ConfigError(f"{path}: not a model directory, it has no config.json")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except LOADING_ERRORS as error:
        raise ConfigError(f"{path}: can't be loaded as a causal language model: {error}") from error
    return config


def load_causal_lm(path: str | os.PathLike[str], dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A causal language model, thinking or not, with every one of its weights.

    Weights are read from safetensors alone, and code of the directory or hub repository is never run.

    Args:
        path: Directory or hub name.
        dtype: Of the weights; by default that of the checkpoint.

    Raises:
        ConfigError: It can't be loaded as a causal language model.
        CheckpointError: Weights are missing.
    """
    load_configuration(path)
    options: dict[str, Any] = {"dtype": dtype or "auto", "use_safetensors": True, "trust_remote_code": False}
    try:
        # Attention is replaced after loading; naming it keeps a config.json from asking for a kernel off the hub.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, attn_implementation="eager", output_loading_info=True, **options
        )
    except QuietStarError:
        raise
    except LOADING_ERRORS as error:
        raise ConfigError(f"{path}: can't be loaded as a causal language model (from safetensors): {error}") from error
    model, report = loaded
    assert isinstance(model, PreTrainedModel)
    missing = sorted(set(report["missing_keys"]) - tied_weights(model))
    if missing:
        raise CheckpointError(f"{path}: {len(missing)} weights are missing, first {missing[0]}")
    return model

"""A model with adapters on disk: everything that was trained, and the name of the base, but not its weights.

`config.json`, `generation_config.json`; `thoughts.safetensors`: START, END, the mixing head and the thinking gate where
there is one; `adapter/`: the adapters as peft writes them, so that peft too can put them on the plain base.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from quietstar.errors import CheckpointError, ConfigError
from quietstar.model.adapters import (
    ADAPTER,
    absolute,
    adapter_options,
    base_fingerprint,
    inject,
    load_trained_state,
    merge_adapters,
    trained_state,
)
from quietstar.model.configuration import QuietStarConfig
from quietstar.model.loading import LOADING_ERRORS, load_causal_lm, load_configuration
from quietstar.model.modeling import QuietStarForCausalLM

THOUGHTS = "thoughts.safetensors"
OPTIONS = "adapter/adapter_config.json"
WEIGHTS = "adapter/adapter_model.safetensors"

_OURS, _PEFTS = "base.", "base_model.model."  # what a parameter of the base begins with
_FINGERPRINT = "base_fingerprint"


def is_adapter_checkpoint(directory: str | os.PathLike[str]) -> bool:
    """Whether `save_finetuned` wrote this directory."""
    return (Path(directory) / OPTIONS).is_file() and (Path(directory) / "config.json").is_file()


def save_finetuned(
    model: QuietStarForCausalLM, directory: str | os.PathLike[str], tensors: Mapping[str, Tensor] | None = None
) -> None:
    """Write a model with adapters, without the weights of its base.

    Args:
        model: Has adapters.
        directory: Made where it does not exist.
        tensors: Copies of what `trained_state` gives, to be written instead of the model's present ones.
    """
    directory = Path(directory)
    (directory / OPTIONS).parent.mkdir(parents=True, exist_ok=True)
    tensors = trained_state(model) if tensors is None else tensors
    adapters = {_pefts_name(name): tensor for name, tensor in tensors.items() if name.startswith(_OURS)}
    thoughts = {name: tensor for name, tensor in tensors.items() if not name.startswith(_OURS)}
    save_file(_contiguous(adapters), directory / WEIGHTS, metadata={"format": "pt"})
    save_file(_contiguous(thoughts), directory / THOUGHTS, metadata={_FINGERPRINT: base_fingerprint(model)})
    options = {key: sorted(value) if isinstance(value, set) else value for key, value in _plain_options(model).items()}
    (directory / OPTIONS).write_text(json.dumps(options, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(directory)


def read_adapters(directory: str | os.PathLike[str]) -> dict[str, Tensor]:
    """What `load_trained_state` takes, from a directory that `save_finetuned` wrote.

    Raises:
        CheckpointError: A file is missing or damaged.
    """
    directory = Path(directory)
    adapters = {_our_name(name): tensor for name, tensor in _load(directory / WEIGHTS).items()}
    return adapters | _load(directory / THOUGHTS)


def check_base(model: QuietStarForCausalLM, directory: str | os.PathLike[str]) -> None:
    """Compare the base with the one that the adapters of a directory were trained on.

    Raises:
        CheckpointError: Its weights are other ones.
    """
    file = Path(directory) / THOUGHTS
    try:
        with safe_open(file, framework="pt") as content:
            wanted = (content.metadata() or {}).get(_FINGERPRINT)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: cannot be read as safetensors ({error})") from None
    if wanted != base_fingerprint(model):
        raise CheckpointError(
            f"{directory}: its adapters were trained on a base with other weights, or of another type, than "
            f"{model.base.config.name_or_path or 'the one given'}"
        )


def load_finetuned(
    directory: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | PreTrainedModel | None = None,
    merge: bool = False,
) -> QuietStarForCausalLM:
    """Load a model with adapters: its base, the adapters on it, START, END and the mixing head.

    Args:
        directory: Where `save_finetuned`, or a training run with `finetuning.lora_rank`, wrote it.
        base: The base model (a path, or a plain or thinking model), by default from where it was when it was trained.
            A model is changed in place.
        merge: Add the adapters to the base's weights. The result has none, and `save_pretrained` writes all of it.

    Returns:
        In evaluation mode. Without `merge` the base is frozen, so that training goes on where it was.

    Raises:
        CheckpointError: A file is missing or damaged, or the base is not there or another one.
        ConfigError: peft is not installed.
    """
    directory = Path(directory)
    options = _read_options(directory)
    try:
        config = load_configuration(directory)
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(config, QuietStarConfig):
        raise CheckpointError(f"{directory}: its config.json is of a {config.model_type}, not of a thinking model")
    path = options["base_model_name_or_path"]
    loaded = base if isinstance(base, PreTrainedModel) else _load_base(directory, base or path, config)
    plain = loaded.base if isinstance(loaded, QuietStarForCausalLM) else loaded
    config.text_config = plain.config
    model = QuietStarForCausalLM(config, base=plain)
    for part in model.thinking_parts:
        part.to(device=plain.device, dtype=_dtype(config))
    model._probe_once()  # the family is what it checks, and adapters would only add their rounding
    path = path if base is None or isinstance(base, PreTrainedModel) else absolute(base)
    inject(model, options["r"], options["lora_alpha"], options["target_modules"], base_path=path)
    try:
        load_trained_state(model, read_adapters(directory))
    except CheckpointError as error:
        raise CheckpointError(f"{directory}: {error}") from None
    check_base(model, directory)
    if (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    if merge:
        merge_adapters(model)
    model.train(False)
    return model


def _load_base(directory: Path, path: str | os.PathLike[str] | None, config: QuietStarConfig) -> PreTrainedModel:
    if path is None:
        raise CheckpointError(
            f"{directory}: does not name the base of its adapters; load_finetuned(..., base=...) does"
        )
    try:
        return load_causal_lm(path, _dtype(config))
    except ConfigError as error:
        raise CheckpointError(
            f"{directory}: the base of its adapters can't be loaded ({error}); "
            "load_finetuned(..., base=...) takes it from elsewhere"
        ) from error


def _dtype(config: QuietStarConfig) -> torch.dtype | None:
    dtype = config.dtype
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def _plain_options(model: QuietStarForCausalLM) -> dict[str, Any]:
    options: dict[str, Any] = adapter_options(model).to_dict()
    return {**options, "inference_mode": True}  # as peft writes it: who loads it there does not want to train it


def _read_options(directory: Path) -> dict[str, Any]:
    file = directory / OPTIONS
    try:
        options = json.loads(file.read_bytes())
        found = {
            "r": int(options["r"]),
            "lora_alpha": float(options["lora_alpha"]),
            "target_modules": [str(name) for name in options["target_modules"]],
            "base_model_name_or_path": options["base_model_name_or_path"],
        }
    except LOADING_ERRORS as error:
        raise CheckpointError(f"{file}: cannot be read as options of adapters ({error!r})") from None
    return found


def _pefts_name(name: str) -> str:
    return _PEFTS + name.removeprefix(_OURS).replace(f".{ADAPTER}.", ".")


def _our_name(name: str) -> str:
    layer, _, leaf = name.removeprefix(_PEFTS).rpartition(".")
    return f"{_OURS}{layer}.{ADAPTER}.{leaf}"


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _load(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: cannot be read as safetensors ({error})") from None

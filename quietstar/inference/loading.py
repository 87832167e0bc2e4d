"""Loads a thinking model and its tokenizer from a model, a training run, adapters, or a checkpoint of the paper's
authors.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quietstar.data.tokenizer import check_vocabulary, load_tokenizer
from quietstar.errors import ConfigError
from quietstar.model.adapters import assemble, is_adapter_checkpoint
from quietstar.model.authors_checkpoint import VECTORS, is_authors_checkpoint, load_authors_checkpoint
from quietstar.model.loading import ending_tokens, load_causal_lm, load_configuration
from quietstar.model.modeling import QuietStarForCausalLM
from quietstar.runs.checkpoints import checkpoint_directory, read_json
from quietstar.runs.machine import resolve_device

WEIGHTS_INDEX = "model.safetensors.index.json"
AUTHORS_TOKENS = ("<|startthought|>", "<|endthought|>")
"""Names of START and END in the tokenizer of the paper's authors: there they have token ids, here they are vectors
without ids."""


def load_thinking(
    path: str | os.PathLike[str],
    *,
    device: str = "auto",
    dtype: torch.dtype | str | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
) -> tuple[QuietStarForCausalLM, PreTrainedTokenizerBase]:
    """Returns a thinking model in evaluation mode, and its tokenizer.

    In a model of the paper's authors, START and END are not allowed as tokens of texts or thoughts
    (`banned_token_ids`).

    Args:
        path: Model directory or hub name; the directory of a training run, whose newest complete checkpoint is taken; a
            checkpoint with adapters; or a checkpoint written by the code of the paper's authors.
        device: Device of the model: `auto`, `cpu`, `cuda` or `cuda:N`.
        dtype: Type of the weights, such as `torch.bfloat16` or its name; None: the type they are saved in.
        tokenizer: Directory or hub name of the tokenizer, for a model that is saved without one.

    Raises:
        ConfigError: The model or tokenizer does not exist, or the model is a plain one, which cannot think.
        CheckpointError: Files of the model are damaged.
    """
    place = resolve_device(device, "device")
    weights: torch.dtype | None = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    directory = _authors_snapshot(checkpoint_directory(path))
    loaded = None
    if is_adapter_checkpoint(directory):
        model: Any = load_finetuned(directory, merge=True)
    elif is_authors_checkpoint(directory):
        loaded = _load_tokenizer(directory, tokenizer)
        vocabulary_size = load_configuration(directory).get_text_config().vocab_size
        model = load_authors_checkpoint(directory, banned_token_ids=_authors_ids(loaded, vocabulary_size))
    else:
        model = load_causal_lm(directory, weights)
    if not isinstance(model, QuietStarForCausalLM):
        raise ConfigError(
            f"{path}: a plain {model.config.model_type} model without START, END and a mixing head, so it can't think; "
            "AutoModelForCausalLM.from_pretrained(...).generate(...) continues texts with it, and "
            f"`python -m quietstar.train --model.path {path} --data.path ...` teaches it to think"
        )
    if loaded is None:
        loaded = _load_tokenizer(directory, tokenizer)
    check_vocabulary(loaded, model.head.weight.shape[0])
    ends = ending_tokens(loaded, model.head.weight.shape[0], model.generation_config, model.base.config)
    for owner in (model, model.base):  # a call of `generate` has no tokenizer
        owner.generation_config.eos_token_id = ends or None
    if weights is not None:
        for parameter in model.parameters():  # not the buffers: rotary frequencies stay float32
            parameter.data = parameter.data.to(weights)
    module: nn.Module = model
    module.to(place).eval()
    return model, loaded


def _authors_snapshot(name: str) -> str:
    """Returns the local copy of a hub repository of the paper's authors; every other directory or name unchanged.

    The weights there have names that transformers does not know: it would load the base alone.
    """
    if Path(name).exists():
        return name
    try:
        index = Path(hf_hub_download(name, WEIGHTS_INDEX))
        tensors = read_json(index).get("weight_map")
        if isinstance(tensors, dict) and set(VECTORS) <= set(tensors):
            return snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "tokenizer.model"])
    except (OSError, ValueError, HfHubHTTPError):
        pass  # loading it as a plain model reports what is wrong
    return name


def _load_tokenizer(directory: str, tokenizer: str | os.PathLike[str] | None) -> PreTrainedTokenizerBase:
    try:
        return load_tokenizer(directory if tokenizer is None else tokenizer)
    except ConfigError as error:
        if not str(error).startswith("model.path: "):  # it names a file
            raise
        advice = "; or name a tokenizer's directory with the argument tokenizer" if tokenizer is None else ""
        raise ConfigError(f"tokenizer: {str(error).removeprefix('model.path: ')}{advice}") from error


def _authors_ids(tokenizer: PreTrainedTokenizerBase, vocabulary_size: int) -> list[int] | None:
    """Returns the ids of START and END; with the base's own tokenizer, which lacks them, all ids without text."""
    vocabulary = tokenizer.get_vocab()
    named = [vocabulary[name] for name in AUTHORS_TOKENS if name in vocabulary]
    return named or list(range(max(vocabulary.values()) + 1, vocabulary_size)) or None


def load_finetuned(
    directory: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | PreTrainedModel | None = None,
    merge: bool = False,
) -> QuietStarForCausalLM:
    """Loads a model with adapters: its base, the adapters on it, START, END and the mixing head.

    Args:
        directory: Directory that `save_finetuned`, or a training run with `finetuning.lora_rank`, wrote.
        base: Base model: a path, or a plain or thinking model, which is changed in place. None loads the base that the
            training used, from its recorded path.
        merge: Whether to add the adapters to the base's weights. The result has no adapters, and `save_pretrained`
            writes all weights.

    Returns:
        The model in evaluation mode. Without `merge` the base is frozen, so that training can continue.

    Raises:
        CheckpointError: A file is missing or damaged, or the base cannot be found or has other weights.
        ConfigError: peft is not installed.
    """
    return assemble(QuietStarForCausalLM, directory, base, merge)

"""A model that thinks, and its tokenizer, from whatever a user has of it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from torch import nn
from transformers import PreTrainedTokenizerBase

from quietstar.config.values import resolve_device
from quietstar.data.tokenizer import check_vocabulary, load_tokenizer
from quietstar.errors import ConfigError
from quietstar.model.adapters import is_adapter_checkpoint
from quietstar.model.authors_checkpoint import VECTORS, is_authors_checkpoint, load_authors_checkpoint
from quietstar.model.loading import load_causal_lm, load_configuration
from quietstar.model.modeling import QuietStarForCausalLM, load_finetuned
from quietstar.runs.checkpoints import checkpoint_directory

WEIGHTS_INDEX = "model.safetensors.index.json"
AUTHORS_TOKENS = ("<|startthought|>", "<|endthought|>")
"""What the paper's authors' tokenizer calls START and END: there they have ids, here they are vectors without."""


def load_thinking(
    path: str | os.PathLike[str],
    *,
    device: str = "auto",
    dtype: torch.dtype | str | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
) -> tuple[QuietStarForCausalLM, PreTrainedTokenizerBase]:
    """A thinking model in evaluation mode, and its tokenizer.

    Args:
        path: A model directory or hub name; the directory of a training run, whose newest whole checkpoint is taken; a
            checkpoint with adapters; or one that the paper's authors' code has written.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        dtype: Of the weights, such as `torch.bfloat16` or its name; by default as saved.
        tokenizer: A directory or hub name where the model has no tokenizer beside it.

    Of the authors' model START and END are no tokens of texts or thoughts (`banned_token_ids`).

    Raises:
        ConfigError: There is no such model or tokenizer, or it is a plain model, which has nothing to think with.
        CheckpointError: Its files are damaged.
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
    if weights is not None:
        for parameter in model.parameters():  # not the buffers: rotary frequencies stay float32
            parameter.data = parameter.data.to(weights)
    module: nn.Module = model
    module.to(place).eval()
    return model, loaded


def _authors_snapshot(name: str) -> str:
    """The local copy of a repository of theirs on the hub; every other directory or name as it is.

    Their weights have names that transformers does not know: it would load the base alone.
    """
    if Path(name).exists():
        return name
    try:
        index = Path(hf_hub_download(name, WEIGHTS_INDEX))
        tensors = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if set(VECTORS) <= set(tensors):
            return snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "tokenizer.model"])
    except (OSError, ValueError, KeyError, HfHubHTTPError):
        pass  # whoever loads it as a plain model says what is wrong
    return name


def _load_tokenizer(directory: str, tokenizer: str | os.PathLike[str] | None) -> PreTrainedTokenizerBase:
    try:
        return load_tokenizer(directory if tokenizer is None else tokenizer)
    except ConfigError as error:
        advice = "; or name a tokenizer's directory with the argument tokenizer" if tokenizer is None else ""
        raise ConfigError(f"tokenizer: {str(error).removeprefix('model.path: ')}{advice}") from error


def _authors_ids(tokenizer: PreTrainedTokenizerBase, vocabulary_size: int) -> list[int] | None:
    """Ids of START and END; with the base's own tokenizer, which does not know them, those that it has no text for."""
    vocabulary = tokenizer.get_vocab()
    named = [vocabulary[name] for name in AUTHORS_TOKENS if name in vocabulary]
    return named or list(range(max(vocabulary.values()) + 1, vocabulary_size)) or None

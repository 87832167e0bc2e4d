"""Loading checkpoints of the paper's authors, in the names of their code (github.com/ezelikman/quiet-star)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from quietstar.config.options import path_kind
from quietstar.config.parsing import shown
from quietstar.errors import CheckpointError, ConfigError
from quietstar.model.configuration import QuietStarConfig
from quietstar.model.loading import compare_with_weights, load_configuration, not_finite, read_headers
from quietstar.model.modeling import QuietStarForCausalLM
from quietstar.model.thinking_model import END, START
from quietstar.model.upstream import tied_weights

# [2, E] each in a checkpoint: row 0 is the vector, row 1 an unused log-std
VECTORS = {"start_embedding": START, "end_embedding": END}
# the linear layers of the mixing head are talk_head.0.{0,2,4} in a checkpoint
HEAD_PREFIX = "talk_head.0."


def is_authors_checkpoint(directory: str | os.PathLike[str]) -> bool:
    """Return whether the files of a directory hold the learned START and END of the authors' code."""
    files = sorted(Path(directory).glob("*.safetensors")) if path_kind(directory, "checkpoint") == "directory" else []
    names: set[str] = set()
    for file in files:
        try:
            with safe_open(file, framework="pt") as content:
                names.update(content.keys())
        except (OSError, SafetensorError):
            continue  # loading says what is wrong
    return set(VECTORS) <= names


def load_authors_checkpoint(
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    config: PreTrainedConfig | None = None,
    *,
    embedding_scale: float = 100.0,
    **options: Any,
) -> QuietStarForCausalLM:
    """Load a model that the authors' code trained, with the learned START, END and mixing head.

    The authors' code overwrites START and END with the embedding of "---" at the first forward after loading; here the
    learned ones are kept.

    Args:
        source: Directory with `*.safetensors` in the names of the authors' code, or a state dict.
        config: Configuration of the base; None takes `config.json` of the directory. Its `n_ahead` (which counts the
            text pass, START and END) and `n_ahead_talk` give `thought_length` and `lookahead`, unless `options` do.
        embedding_scale: Factor that the vectors of START and END are multiplied with; 100 in the authors' code.
        options: Fields of `QuietStarConfig`. `banned_token_ids` should name the ids of START and END in the authors'
            tokenizer (32000 and 32001 in the released checkpoint), which their thoughts never contain.

    Raises:
        CheckpointError: A tensor is missing, unknown or of a wrong shape, or there is no configuration.
    """
    if isinstance(source, Mapping):
        state = dict(source)
        if config is None:
            raise CheckpointError("config: missing; a state dict needs the base's configuration beside it")
    else:
        if not any(Path(source).glob("*.safetensors")):
            raise CheckpointError(f"{source}: no *.safetensors in it")
        try:
            config = config or load_configuration(source)
        except ConfigError as error:
            raise CheckpointError(str(error)) from error
        saved = read_headers(sorted(Path(source).glob("*.safetensors")))
        own = {name: one for name, one in saved.items() if name not in VECTORS and not name.startswith(HEAD_PREFIX)}
        if own:
            compare_with_weights(source, config, own)
        state = _read_directory(Path(source))
    for theirs, option, surplus in (("n_ahead", "thought_length", 3), ("n_ahead_talk", "lookahead", 0)):
        value = getattr(config, theirs, None)
        if value and option not in options:
            if type(value) is not int or value <= surplus:
                raise CheckpointError(f"config.json: {theirs}: got {shown(value)}, needs at least {surplus + 1}")
            options[option] = value - surplus
    settings: dict[str, Any] = {
        "initial_mixing_weight": None,
        "mixing_activation": "identity",
        "interpolation": "logits",
        "embedding_scale": embedding_scale,
        **options,
    }
    dtype = _dtype(state)
    base = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model = QuietStarForCausalLM(QuietStarConfig(text_config=base.config, **settings), base=base)

    ours: dict[str, Tensor] = {}
    vectors = torch.empty_like(model.thought_embedding.weight)
    for name, row in VECTORS.items():
        if name not in state:
            raise CheckpointError(f"{name}: missing; this is not a checkpoint of the authors' Quiet-STaR code")
        learned = state.pop(name)
        if learned.shape != vectors.shape:
            raise CheckpointError(f"{name}: got shape {list(learned.shape)}, needs {list(vectors.shape)}")
        vectors[row] = learned[0]
    ours["thought_embedding.weight"] = vectors
    for name, tensor in state.items():
        if name.startswith(HEAD_PREFIX):
            ours["mixing_head.layers." + name.removeprefix(HEAD_PREFIX)] = tensor
        else:
            ours["base." + name] = tensor
    expected = model.state_dict()
    tied = tied_weights(model)
    missing = [name for name in expected if name not in ours and name not in tied]
    unknown = [name for name in ours if name not in expected]
    wrong = [name for name in ours if name in expected and ours[name].shape != expected[name].shape]
    for what, names in (("missing", missing), ("unknown", unknown), ("of a wrong shape", wrong)):
        if names:
            raise CheckpointError(f"{len(names)} tensors {what}, first {names[0]} (in this project's names)")
    for module in (
        model.thought_embedding,
        model.mixing_head,
    ):  # the base has its dtype; its rotary buffers stay float32
        module.to(dtype)
    model.config.dtype = dtype
    model.load_state_dict(ours, strict=False)
    if (bad := not_finite(model)) is not None:
        raise CheckpointError(f"{bad} has values that are NaN or infinite; a file of the checkpoint is damaged")
    return model


def _dtype(state: Mapping[str, Tensor]) -> torch.dtype:
    """Return the dtype of the first tensor of the base in the checkpoint."""
    return next((x.dtype for name, x in state.items() if name not in VECTORS), torch.get_default_dtype())


def _read_directory(directory: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        try:
            state.update(load_file(file))
        except SafetensorError as error:
            raise CheckpointError(f"{file}: not readable as safetensors ({error})") from error
    return state

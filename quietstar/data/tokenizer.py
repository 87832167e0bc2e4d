"""Loading a tokenizer, and making sure that it belongs to the model."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quietstar.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Without any of these transformers makes an empty tokenizer, silently, from a model's config.json alone.
_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab*", "*.model", "*.tiktoken")


def load_tokenizer(path: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a model directory or hub name. Code from the directory or the hub is never run.

    Raises:
        ConfigError: where there is no tokenizer, or it cannot be loaded.
    """
    check_tokenizer(path)
    from transformers import AutoTokenizer, PreTrainedTokenizerBase  # what can be said without them has been

    name = os.fspath(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise many kinds, plain Exception among them
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        kind = "" if Path(name).is_dir() else " (no directory of that name; taken as a hub name)"
        raise ConfigError(f"model.path: the tokenizer of {name}{kind} cannot be loaded: {reason}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ConfigError(f"model.path: {name} has a {type(tokenizer).__name__} where a tokenizer is needed")
    return tokenizer


def check_tokenizer(path: str | os.PathLike[str]) -> None:
    """Whether there could be a tokenizer at a path; a hub is not asked.

    Raises:
        ConfigError: It is no directory and cannot be a hub name, or a directory without the files of a tokenizer.
    """
    check_model_path(path)
    directory = Path(path)
    if directory.is_dir() and not any(any(directory.glob(pattern)) for pattern in _VOCABULARY_FILES):
        raise ConfigError(
            f"model.path: {os.fspath(path)} has no tokenizer (none of {', '.join(_VOCABULARY_FILES)}); "
            "put the files of the model's own tokenizer there"
        )


def check_model_path(path: str | os.PathLike[str], option: str = "model.path") -> None:
    """Whether there could be a model at a path; a hub is not asked.

    Args:
        path: What should be a directory or a hub name.
        option: For the message.

    Raises:
        ConfigError: It is no directory and cannot be a hub name.
    """
    name = os.fspath(path)
    local = name.startswith((".", "~", os.sep)) or name.count("/") > 1
    if not Path(name).is_dir() and (local or Path(name).exists()):
        raise ConfigError(f"{option}: {name} is not a directory; a model is a directory or a hub name")


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Makes sure that the model has an embedding for each token. A larger vocabulary of the model is common and fine.

    Raises:
        ConfigError: naming the highest token id and the vocabulary size.
    """
    vocabulary = tokenizer.get_vocab()
    token = max(vocabulary, key=vocabulary.__getitem__)
    if vocabulary[token] >= vocab_size:
        raise ConfigError(
            f"model.path: the tokenizer has token ids up to {vocabulary[token]} ({token!r}), "
            f"but the model's vocabulary has {vocab_size} entries; tokenizer and model do not belong together"
        )


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What makes two tokenizers the same, as plain JSON values.

    Returns:
        `sha256` of everything that decides how a text is encoded, as far as it can be had (of a tokenizer written in
        Python the vocabulary alone), and `vocabulary_size`.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = json.loads(backend.to_str()) if backend is not None else {"vocabulary": tokenizer.get_vocab()}
    for setting in ("truncation", "padding"):  # of the last call that asked for them
        parts.pop(setting, None)
    parts["eos"] = tokenizer.eos_token_id
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    return {"sha256": digest.hexdigest(), "vocabulary_size": len(tokenizer)}

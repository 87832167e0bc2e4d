"""Loading models from disk or hub: weights only from safetensors, no remote code, no missing weights.

The last two functions make small models over single characters, for experiments that need no files.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from quietstar.errors import CheckpointError, ConfigError, QuietStarError
from quietstar.model.upstream import tied_weights
from quietstar.runs.checkpoints import check_model_directory

# what transformers raises for files that are missing, damaged, of another kind, or that need remote code or packages
LOADING_ERRORS = (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError, TypeError, SafetensorError)


def load_configuration(path: str | os.PathLike[str], *, local: bool = False) -> PreTrainedConfig:
    """Load the configuration of a model.

    Args:
        path: Directory or hub name of the model.
        local: Whether a hub name is looked up in the local cache alone, without the network.

    Raises:
        ConfigError: There is no configuration, or it cannot be read.
    """
    check_model_directory(path)
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise ConfigError(f"{path}: not a model directory, it has no config.json")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=local)
    except LOADING_ERRORS as error:
        raise ConfigError(f"{path}: can't be loaded as a causal language model: {error}") from error
    return config


def load_causal_lm(
    path: str | os.PathLike[str], dtype: torch.dtype | None = None, *, local: bool = False
) -> PreTrainedModel:
    """Load a causal language model, thinking or not, with all of its weights.

    Weights are read only from safetensors, and code of the directory or hub repository is never run.

    Args:
        path: Directory or hub name of the model.
        dtype: Dtype of the weights; None takes that of the checkpoint.
        local: Whether a hub name is looked up in the local cache alone, without the network.

    Raises:
        ConfigError: It can't be loaded as a causal language model.
        CheckpointError: Weights are missing, or not finite.
    """
    load_configuration(path, local=local)
    options: dict[str, Any] = {"dtype": dtype or "auto", "use_safetensors": True, "trust_remote_code": False}
    options["local_files_only"] = local
    try:
        # attention is replaced after loading; naming one keeps a config.json from asking for a kernel of the hub
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
    if (bad := not_finite(model)) is not None:
        raise CheckpointError(f"{path}: {bad} has values that are NaN or infinite; the file of the weights is damaged")
    return model


@torch.no_grad()
def not_finite(model: nn.Module) -> str | None:
    """Return the name of the first parameter that has NaN or infinite values, or None."""
    usual = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    for name, parameter in model.named_parameters():
        readable = parameter.dtype in usual and parameter.numel() and not parameter.is_meta
        if readable and not bool(torch.stack(parameter.aminmax()).isfinite().all()):  # both are NaN where one is
            return name
    return None


def weights_sha256(model: nn.Module) -> str:
    """Returns the SHA-256 of all saved parameters and buffers with their names, dtypes and shapes; tied ones count
    once.

    It is the same after saving and loading.
    """
    digest, seen = hashlib.sha256(), set()
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.data_ptr() in seen and tensor.numel():
            continue
        seen.add(tensor.data_ptr())
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def text_token_ids(name: str, text: str | Sequence[int], tokenizer: Any, vocabulary: int) -> list[int]:
    """Return the token ids of a text that may be given as token ids already.

    Args:
        name: Name of the argument, for error messages.
        text: Text to encode, or token ids to check.
        tokenizer: Tokenizer of the base model; None where `text` is token ids.
        vocabulary: Number of tokens that the base model knows.

    Raises:
        ConfigError: There is no tokenizer, it cannot encode the text, or there are no token ids or unknown ones.
    """
    if not isinstance(text, str):
        ids = list(text)
    elif tokenizer is None:
        raise ConfigError(f"{name}: got the text {text!r} without a tokenizer; pass tokenizer= or token ids")
    else:
        try:
            ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        except Exception as error:  # tokenizers raises plain Exception, e.g. for a character that has no token
            raise ConfigError(f"{name}: the tokenizer can't encode {text!r}: {error}") from error
    if not ids:
        raise ConfigError(f"{name}: {text!r} has no tokens, needs at least one")
    if not all(0 <= token < vocabulary for token in ids):
        raise ConfigError(f"{name}: {text!r} has the token ids {ids}, the base has {vocabulary} tokens")
    return ids


def ending_tokens(tokenizer: Any, vocabulary: int, *configurations: object) -> list[int]:
    """Return the ids of the tokens that end a text, by the one rule of all commands; the tokenizer's own comes first.

    These are the tokenizer's end-of-sequence token, with which every training text ends, and the tokens that a
    configuration names, unless they are ordinary ones: many chat models end a turn with another token, but a
    configuration that was never told an ending token holds the default of its family, which may be a word here.

    Args:
        tokenizer: Tokenizer of the model.
        vocabulary: Number of tokens that the model knows; it never writes an id beyond.
        configurations: Configurations that may name ending tokens, such as the model's and its generation
            configuration; None counts as one that names nothing.
    """
    own = tokenizer.eos_token_id
    named: list[Any] = [own]
    for configuration in configurations:
        ids = getattr(configuration, "eos_token_id", None)
        named += ids if isinstance(ids, (list, tuple, set)) else [ids]
    special = set(tokenizer.all_special_ids)
    special |= {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    ordinary = set(tokenizer.get_vocab().values()) - special - {own}
    known = [token for token in named if type(token) is int and 0 <= token < vocabulary]
    return list(dict.fromkeys(token for token in known if token not in ordinary))


def character_tokenizer(symbols: str, end: str | None = None) -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token per character.

    Args:
        symbols: Characters that have a token; the id of the token is the place in this string.
        end: Text of an end-of-sequence token, whose id comes after those of the characters; None: no such token.
    """
    vocabulary = {symbol: index for index, symbol in enumerate(symbols)}
    if end is not None:
        vocabulary[end] = len(vocabulary)
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **({} if end is None else {"eos_token": end}))


def small_llama(
    seed: int,
    vocabulary: int,
    *,
    layers: int,
    hidden_size: int = 128,
    intermediate_size: int = 344,
    heads: int = 4,
    context: int = 256,
    end: int | None = None,
) -> LlamaForCausalLM:
    """Make a small Llama with random weights.

    Args:
        seed: Seed of the random weights.
        vocabulary: Number of tokens in the vocabulary.
        layers: Number of decoder layers.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the feed-forward layers.
        heads: Number of attention heads, a divisor of `hidden_size`.
        context: Length of the longest text, in tokens.
        end: Id of the end-of-sequence token; None: there is none.
    """
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=context,
        # lines are short: with the usual 10,000 most of a head's frequencies hardly change over a line, and whether
        # the running sums are learned at all then depends on the seed
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=None,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.5)
            elif name == "lm_head":
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, nn.Linear):
                # layers that write to the residual stream start smaller, so that its size does not grow with depth
                writes = name.endswith(("o_proj", "down_proj"))
                scale = math.sqrt(2 * layers) if writes else 1.0
                nn.init.normal_(module.weight, std=1 / math.sqrt(module.in_features) / scale)
    return model

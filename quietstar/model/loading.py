"""Loading models from disk or hub: weights only from safetensors, no remote code, no missing weights.

The last two functions make small models over single characters, for experiments that need no files.
"""

from __future__ import annotations

import copy
import hashlib
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from quietstar.config.options import check_weights_format
from quietstar.config.parsing import parse_json, shown
from quietstar.errors import CheckpointError, ConfigError, DataError, QuietStarError
from quietstar.model.upstream import ignored_weights, tied_weights
from quietstar.runs.checkpoints import read_json
from quietstar.runs.directory import ADAPTERS, INDEX, check_model_directory, culprit

# what transformers raises for files that are missing, damaged, of another kind, or that need remote code or packages
LOADING_ERRORS = (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError, TypeError, SafetensorError)

WEIGHTS = "model.safetensors"
MOST_BUFFER = 1 << 30
"""Most elements of the tables that a model makes itself, such as masks and positions."""
MOST_HEADER = 100_000_000
"""Longest header of a safetensors file, in bytes; the library has the same limit."""


@dataclass(frozen=True)
class SavedTensor:
    """A tensor in a safetensors file, as the file's header describes it.

    Args:
        file: File that holds the tensor.
        dtype: Type in the names of safetensors, such as `BF16`.
        shape: Shape of the tensor.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]


def load_configuration(path: str | os.PathLike[str]) -> PreTrainedConfig:
    """Load the configuration of a model.

    Args:
        path: Directory or hub name of the model.

    Raises:
        ConfigError: There is no configuration, or it cannot be read; the message names the field, where one is wrong.
    """
    check_model_directory(path)
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        check_weights_format(path, "model")
        raise ConfigError(f"{path}: not a model directory, it has no config.json")
    try:
        config = _read_configuration(path)
    except Exception as error:  # strict dataclasses and the families' own code raise many kinds
        raise _refusal(path, error, _read_configuration) from error
    dtype = config.dtype
    if isinstance(dtype, torch.dtype) and not dtype.is_floating_point:
        where = Path(path) / "config.json" if Path(path).is_dir() else path
        raise ConfigError(f"{where}: dtype: got {dtype}, needs a type of floating-point numbers")
    return config


def _read_configuration(path: str | os.PathLike[str]) -> PreTrainedConfig:
    config: PreTrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=False)
    return config


def _refusal(path: str | os.PathLike[str], error: Exception, load: Callable[[Path], object]) -> QuietStarError:
    """Return the error for what a library, or this project, has refused in the configuration of a model."""
    reason = " ".join(str(error).split())[:300]
    if isinstance(error, QuietStarError):
        if isinstance(error, ConfigError) and Path(path).is_dir():
            return ConfigError(f"{Path(path) / 'config.json'}: {error}")
        return error
    found = culprit(Path(path), ("config.json",), error, load) if Path(path).is_dir() else None
    if found is None:
        return ConfigError(f"{path}: can't be loaded as a causal language model: {reason or type(error).__name__}")
    return ConfigError(f"{found}, which its family can't use ({type(error).__name__}: {reason}); needs a value it can")


def load_generation_config(path: str | os.PathLike[str]) -> GenerationConfig | None:
    """Load how a model generates texts, from its `generation_config.json`; None where it has none.

    Raises:
        ConfigError: The file of a local directory cannot be used; the message names the field.
    """
    local = Path(path).is_dir()
    if local and not (Path(path) / "generation_config.json").is_file():
        return None
    try:
        config: GenerationConfig = GenerationConfig.from_pretrained(path)
    except Exception as error:  # its checks raise many kinds
        if not local:
            return None
        reason = " ".join(str(error).split())[:300]
        name = "generation_config.json"
        found = culprit(Path(path), (name,), error, GenerationConfig.from_pretrained) or Path(path) / name
        raise ConfigError(f"{found}: can't be used: {reason}; without this field the default is taken") from error
    return config


def load_causal_lm(path: str | os.PathLike[str], dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Load a causal language model, thinking or not, with all of its weights.

    Weights are read only from safetensors, and code of the directory or hub repository is never run.

    Args:
        path: Directory or hub name of the model.
        dtype: Dtype of the weights; None takes that of the checkpoint.

    Raises:
        ConfigError: It can't be loaded as a causal language model.
        CheckpointError: Weights are missing, of other shapes than the configuration makes them, or not finite.
    """
    check_weights(path, load_configuration(path))
    if Path(path).is_dir():
        load_generation_config(path)
    options: dict[str, Any] = {"dtype": dtype or "auto", "use_safetensors": True, "trust_remote_code": False}
    try:
        # attention is replaced after loading; naming one keeps a config.json from asking for a kernel of the hub
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, attn_implementation="eager", output_loading_info=True, **options
        )
    except QuietStarError:
        raise
    except LOADING_ERRORS as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError(f"{path}: can't be loaded as a causal language model (from safetensors): {reason}") from error
    model, report = loaded
    assert isinstance(model, PreTrainedModel)
    missing = sorted(set(report["missing_keys"]) - tied_weights(model))
    if missing:
        raise CheckpointError(f"{path}: {len(missing)} weights are missing, first {missing[0]}")
    if (bad := not_finite(model)) is not None:
        raise CheckpointError(f"{path}: {bad} has values that are NaN or infinite; the file of the weights is damaged")
    return model


def read_header(file: Path) -> dict[str, SavedTensor]:
    """Read which tensors are in a safetensors file, and no tensor.

    Raises:
        CheckpointError: The file cannot be read as safetensors.
    """
    try:
        with safe_open(file, framework="pt"):  # checks lengths, types, shapes and offsets, but takes names twice
            pass
        with file.open("rb") as content:
            length = int.from_bytes(content.read(8), "little")
            header = parse_json(content.read(length), limit=MOST_HEADER)
    except (OSError, SafetensorError, DataError) as error:
        raise CheckpointError(f"{file}: cannot be read as safetensors ({error})") from None
    header.pop("__metadata__", None)
    return {name: SavedTensor(file, own["dtype"], tuple(own["shape"])) for name, own in header.items()}


def check_weights(path: str | os.PathLike[str], config: PreTrainedConfig) -> None:
    """Compare what a configuration makes with the headers of the weights of a local directory; no weight is loaded.

    Args:
        path: Directory of a model; a hub name passes, as does a directory of adapters, whose base lies elsewhere.
        config: Configuration of the model.

    Raises:
        ConfigError: There are no weights that can be read, or the configuration's family can't make a model of it.
        CheckpointError: A tensor is missing, has another shape, or is not of this model.
    """
    directory = Path(path)
    if not directory.is_dir() or (config.model_type == "quietstar" and (directory / ADAPTERS).is_file()):
        return
    index = directory / INDEX
    named = read_json(index)["weight_map"] if index.exists() else {}  # `check_model_directory` has looked at its names
    if (directory / WEIGHTS).is_file():
        if named and WEIGHTS not in named.values():
            raise CheckpointError(f"{directory}: has both {WEIGHTS} and {INDEX} of other files; remove one of them")
        files = [directory / WEIGHTS]
    elif not named:
        check_weights_format(path, "model")
        raise ConfigError(
            f"{path}: can't be loaded as a causal language model: it has no weights; needs {WEIGHTS}, or its parts "
            f"with {INDEX}"
        )
    else:
        files = [directory / name for name in sorted(set(named.values()))]
    try:
        tensors = read_headers(files)
    except CheckpointError as error:
        raise ConfigError(f"{path}: can't be loaded as a causal language model: {error}") from None
    for name, file in named.items():
        if name not in tensors or (tensors[name].file != directory / file):
            raise CheckpointError(f"{index}: weight_map: {file} has no {shown(name)}")
    if named and (unnamed := sorted(tensors.keys() - named.keys())):
        raise CheckpointError(
            f"{index}: weight_map: lacks {shown(unnamed[0])}, which {tensors[unnamed[0]].file.name} has"
        )
    compare_with_weights(path, config, tensors)


def read_headers(files: Sequence[Path]) -> dict[str, SavedTensor]:
    """Read which tensors are in the files of one model.

    Raises:
        CheckpointError: A file cannot be read as safetensors, or two files have the same tensor.
    """
    tensors: dict[str, SavedTensor] = {}
    for file in files:
        for name, tensor in read_header(file).items():
            if name in tensors:
                raise CheckpointError(f"{file}: has {shown(name)}, which {tensors[name].file.name} has too")
            tensors[name] = tensor
    return tensors


def compare_with_weights(
    path: str | os.PathLike[str], config: PreTrainedConfig, tensors: Mapping[str, SavedTensor]
) -> None:
    """Compare the model that a configuration makes with saved tensors, as `check_weights` does."""
    directory = Path(path)
    text = config.get_text_config()
    if (layers := getattr(text, "num_hidden_layers", 0)) > len(tensors):
        field = "num_hidden_layers" if text is config else "text_config.num_hidden_layers"
        raise CheckpointError(
            f"{directory / 'config.json'}: {field}: got {layers}, but {len(tensors)} tensors are saved"
        )
    most = 4 * len(tensors) + 100  # a family may split a saved tensor into several, but not into any number
    try:
        model = _skeleton(config, most)
    except Exception as error:
        raise _refusal(path, error, lambda place: _skeleton(_read_configuration(place), most)) from error
    own = model.state_dict(keep_vars=True)
    made = f"{directory / 'config.json'} makes"
    for name, buffer in model.named_buffers():
        if name not in own and buffer.numel() > MOST_BUFFER:
            raise ConfigError(f"{made} {name} of shape {list(buffer.shape)}; needs smaller sizes")
    parameters = dict(model.named_parameters())  # tied ones once
    size = sum(parameter.numel() for parameter in parameters.values())
    if getattr(config.get_text_config(), "quantization_config", None) or getattr(config, "quantization_config", None):
        held = 8 * sum(file.stat().st_size for file in {tensor.file for tensor in tensors.values()})
        if size > held:  # packed weights have other shapes, but no fewer than one bit for each
            raise CheckpointError(f"{made} {size:,} weights, its files have room for {held:,} at the most")
        return
    prefix = f"{model.base_model_prefix}."
    kinds = {re.sub(r"\d+", "0", name) for name in own}
    ignored = [re.compile(pattern) for pattern in ignored_weights(model)]
    found, unknown = set(), []
    for name, tensor in tensors.items():
        names = (name, prefix + name, name.removeprefix(prefix))
        known = next((one for one in names if one in own), None)
        if known is None:
            if not any(pattern.search(name) for pattern in ignored):
                unknown.append(tensor)
                if any(re.sub(r"\d+", "0", one) in kinds for one in names):
                    raise CheckpointError(
                        f"{tensor.file}: has {shown(name)}, a layer beyond those that {directory / 'config.json'} makes"
                    )
            continue
        shape = tuple(own[known].shape)
        if tensor.shape != shape:
            raise CheckpointError(
                f"{tensor.file}: {shown(name)} has the shape {list(tensor.shape)}, {made} it {list(shape)}"
            )
        if own[known].is_floating_point() and tensor.dtype.startswith(("I", "U", "C", "BOOL")):
            raise CheckpointError(f"{tensor.file}: {shown(name)} is {tensor.dtype}, needs floating-point numbers")
        found.add(id(own[known]))
    tied = tied_weights(model)
    missing = [name for name, one in parameters.items() if id(one) not in found and name not in tied]
    # what a family makes of several saved tensors has another name, and as many elements
    if sum(parameters[name].numel() for name in missing) > sum(math.prod(one.shape) for one in unknown):
        raise CheckpointError(
            f"{path}: {len(missing)} weights are missing, first {missing[0]}, which {made} of shape "
            f"{list(parameters[missing[0]].shape)}; none is made up"
        )


def _skeleton(config: PreTrainedConfig, most: int) -> PreTrainedModel:
    """Return the model of a configuration without memory for its weights; more than `most` of them are refused."""
    count = 0

    def register(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal count
        count += 1
        if count > most:
            raise ConfigError(
                f"its counts of layers and parts make more than {most} weights, several times those saved"
            )

    handle = register_module_parameter_registration_hook(register)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), trust_remote_code=False, attn_implementation="eager"
            )
    finally:
        handle.remove()
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

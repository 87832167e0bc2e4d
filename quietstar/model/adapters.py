"""Low-rank adapters (LoRA, arXiv 2106.09685) on the base model, through peft, and their checkpoints.

Adapters are put into the base's own layers: the class of the thinking model stays the same, and for recording and
replaying an adapted layer is a layer with a few more parameters. Trained are the adapters, START, END and the mixing
head.

A checkpoint holds everything that was trained and the name of the base, but not the base's weights: `config.json` and
`generation_config.json`; `thoughts.safetensors` with START, END, the mixing head and, if there is one, the thinking
gate; and `adapter/` with the adapters as peft writes them, so that peft too can put them on the plain base.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # it is documented there
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import TypeIs

from quietstar.config.options import Count, Positive, Text, path_kind
from quietstar.config.parsing import shown
from quietstar.errors import CheckpointError, ConfigError
from quietstar.imports import without_bitsandbytes_warnings
from quietstar.model.backbone import probe_once
from quietstar.model.configuration import QuietStarConfig
from quietstar.model.layers import decoder_layers
from quietstar.model.loading import (
    load_causal_lm,
    load_configuration,
    load_generation_config,
    not_finite,
    read_header,
)
from quietstar.model.sharding import copy_rows, gathered_dtype
from quietstar.model.thinking_model import ThinkingModel
from quietstar.model.upstream import Conv1D
from quietstar.runs.directory import ADAPTERS, check_fields

ModelT = TypeVar("ModelT", bound=ThinkingModel)
ALL_LINEAR = "all-linear"
ADAPTER = "default"
"""Name of the adapter in peft, which is a part of the names of the adapter's parameters."""
THOUGHT_PARTS = ("thought_embedding.", "mixing_head.", "thinking_gate.")
"""Beginnings of the names of the parameters that a thinking model adds to its base."""

THOUGHTS = "thoughts.safetensors"
OPTIONS = ADAPTERS
WEIGHTS = "adapter/adapter_model.safetensors"


@dataclass(frozen=True)
class _Options:
    """What is read of the options of adapters, in peft's names."""

    r: Count
    lora_alpha: Positive
    target_modules: list[Text]
    base_model_name_or_path: str | None
    peft_type: Literal["LORA"] = "LORA"


_OURS, _PEFTS = "base.", "base_model.model."  # beginnings of the names of the base's parameters
_FINGERPRINT = "base_fingerprint"
_FINGERPRINT_VALUES = 256  # of each tensor: enough to tell two models apart, and quickly read
_SEED = 0


def has_adapters(model: nn.Module) -> TypeIs[ThinkingModel]:
    """Return whether the base of a thinking model has adapters."""
    return bool(getattr(getattr(model, "base", None), "peft_config", None))


def adapter_options(model: ThinkingModel) -> Any:
    """Return the `peft.LoraConfig` of a model that has adapters."""
    options: Any = model.base.peft_config
    return options[ADAPTER]


def linear_layers(model: ThinkingModel) -> dict[str, nn.Module]:
    """Return the linear layers of the decoder layers, which can have adapters, by their name in the base."""
    inside = {id(module) for layer in decoder_layers(model.decoder) for module in layer.modules()}
    found: dict[str, nn.Module] = {}
    for name, module in model.base.named_modules():
        if id(module) in inside and isinstance(module, (nn.Linear, Conv1D)) and ".lora_" not in name:
            found[name.removesuffix(".base_layer")] = module
    return found


def adapter_targets(model: ThinkingModel, names: str) -> list[str]:
    """Return the names in the base of the layers that `finetuning.lora_targets` selects.

    Args:
        model: Thinking model whose base has the layers.
        names: Value of the option: `all-linear`, or ends of layer names such as `q_proj` or `layers.3.mlp.up_proj`,
            separated by commas.

    Raises:
        ConfigError: No layer has such a name.
    """
    layers = linear_layers(model)
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted or ALL_LINEAR in wanted:
        if wanted != [ALL_LINEAR]:
            raise ConfigError(f"finetuning.lora_targets: got {names!r}, needs {ALL_LINEAR} or names of layers")
        return list(layers)
    chosen = []
    for name in wanted:
        matching = [layer for layer in layers if f".{layer}".endswith(f".{name}")]
        if not matching:
            known = sorted({layer.rpartition(".")[2] for layer in layers})
            close = difflib.get_close_matches(name, known, 1)
            raise ConfigError(
                f"finetuning.lora_targets: {model.base.config.model_type} has no linear layer {name!r}"
                + (f" (did you mean {close[0]}?)" if close else "")
                + f"; those in its decoder layers are {', '.join(known)}"
            )
        chosen += matching
    return [layer for layer in layers if layer in set(chosen)]


def add_adapters(model: ThinkingModel, rank: int, alpha: float, targets: str = ALL_LINEAR) -> None:
    """Freeze the base and put untrained adapters into its layers. They do not change the output yet.

    The adapters have the dtype of the base. Their random half is the same for every call.

    Args:
        model: Thinking model, which is changed in place.
        rank: Rank of each adapter, above 0.
        alpha: Numerator of the factor alpha / rank that scales the adapters.
        targets: Layers that get adapters: `all-linear`, or ends of layer names separated by commas.

    Raises:
        ConfigError: peft is not installed, a target is unknown, or the model has adapters already.
    """
    if has_adapters(model):
        raise ConfigError("finetuning.lora_rank: the model has adapters already; merge_adapters(model) ends them")
    inject(model, rank, alpha, adapter_targets(model, targets), base_path=_base_path(model))


def inject(model: ThinkingModel, rank: int, alpha: float, layers: list[str], base_path: str | None) -> None:
    """Do what `add_adapters` does, for layers that are known to exist.

    Args:
        model: Thinking model, which is changed in place.
        rank, alpha: Rank of the adapters, and numerator of the factor alpha / rank that scales them.
        layers: Names, or ends of names, of layers in the base.
        base_path: Path or hub name of the base's weights, to be saved with the adapters; None if there is none.

    Raises:
        ConfigError: peft is not installed.
    """
    try:
        with without_bitsandbytes_warnings():
            from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError(
            f"finetuning.lora_rank: adapters need peft ({error}); pip install 'quietstar[peft]'"
        ) from error
    options = LoraConfig(
        r=rank,
        lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,  # type: ignore[arg-type]  # any number works
        target_modules=layers,
        lora_dropout=0.0,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in linear_layers(model).values()),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_path,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        with without_bitsandbytes_warnings():
            inject_adapter_in_model(options, model.base, ADAPTER)
    for part in model.thinking_parts:
        part.requires_grad_(True)


def merge_adapters(model: ThinkingModel) -> None:
    """Add the adapters to the base's weights and remove them: a plain thinking model again, all of it trainable.

    In bfloat16 the sum is rounded, so predictions change in their last digits.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = [(name, module) for name, module in model.base.named_modules() if isinstance(module, BaseTunerLayer)]
    for name, layer in adapted:
        layer.merge(safe_merge=False, adapter_names=None)
        parent, _, attribute = name.rpartition(".")
        setattr(model.base.get_submodule(parent), attribute, layer.get_base_layer())
    if adapted:
        del model.base.peft_config
    model.config.name_or_path = model.base.config.name_or_path = ""  # no file holds the merged weights
    model.requires_grad_(True)


def trained_state(model: ThinkingModel) -> dict[str, Tensor]:
    """Return the tensors that a checkpoint of a model with adapters holds, by name, not copied: all but the base's."""
    return {
        name: tensor.detach()
        for name, tensor in (*model.named_parameters(), *model.named_buffers())  # the gate's are buffers
        if ".lora_" in name or name.startswith(THOUGHT_PARTS)
    }


@torch.no_grad()
def load_trained_state(model: ThinkingModel, tensors: Mapping[str, Tensor]) -> None:
    """Copy what `trained_state` returned into a model with the same adapters.

    Args:
        model: Thinking model with adapters; its device and its base's weights stay as they are.
        tensors: Tensors of `trained_state` by name, all of them and no others.

    Raises:
        CheckpointError: A tensor is missing, unknown, or has another shape or type. The model is unchanged then.
    """
    own = trained_state(model)
    if missing := sorted(own.keys() - tensors.keys()):
        raise CheckpointError(f"the model needs {missing[0]}, which the checkpoint does not have")
    if unknown := sorted(tensors.keys() - own.keys()):
        raise CheckpointError(f"the model has no {unknown[0]}")
    for name, tensor in tensors.items():
        wanted = gathered_dtype(model, own[name])
        if tensor.shape != own[name].shape or tensor.dtype != wanted:
            raise CheckpointError(
                f"{name} is {tensor.dtype} {list(tensor.shape)}, the model needs {wanted} {list(own[name].shape)}"
            )
    for name, tensor in tensors.items():
        copy_rows(own[name], tensor)


def base_fingerprint(model: ThinkingModel) -> str:
    """Return a hash of names, shapes and some values of the base's own weights, the same with and without adapters."""
    if (known := getattr(model, "known_fingerprint", None)) is not None:  # of before the weights were cut
        return str(known)
    digest = hashlib.sha256()
    for name, parameter in model.base.named_parameters():
        if ".lora_" in name:
            continue
        own_name = name.replace(".base_layer.", ".")
        digest.update(f"{own_name} {list(parameter.shape)} {parameter.dtype}".encode())
        values = parameter.detach().flatten()[:: max(1, parameter.numel() // _FINGERPRINT_VALUES)]
        digest.update(values.to("cpu", torch.float64).numpy().tobytes())
    return digest.hexdigest()


def absolute(path: str | os.PathLike[str]) -> str:
    """Return the absolute path of a directory; a hub name as it is."""
    return str(Path(path).resolve()) if path_kind(path, "base") == "directory" else str(path)


def _base_path(model: ThinkingModel) -> str | None:
    """Return where the base's weights were loaded from: an absolute path, a hub name, or None where this is unknown."""
    path = model.config.name_or_path or model.base.config.name_or_path
    return absolute(path) if path else None


def is_adapter_checkpoint(directory: str | os.PathLike[str]) -> bool:
    """Return whether `save_finetuned` wrote this directory."""
    return all(path_kind(Path(directory) / name, "checkpoint") == "file" for name in (OPTIONS, "config.json"))


def save_finetuned(
    model: ThinkingModel, directory: str | os.PathLike[str], tensors: Mapping[str, Tensor] | None = None
) -> None:
    """Write a model with adapters, without the weights of its base.

    Args:
        model: Thinking model with adapters.
        directory: Directory to write to; made if it does not exist.
        tensors: Copies of what `trained_state` returns, written instead of the model's present tensors.
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
    model.config.architectures = [type(model).__name__.removeprefix("FSDP")]
    model.config.save_pretrained(directory)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(directory)


def read_adapters(directory: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the tensors for `load_trained_state` from a directory that `save_finetuned` wrote.

    Raises:
        CheckpointError: A file is missing or damaged.
    """
    directory = Path(directory)
    adapters = {_our_name(name): tensor for name, tensor in _load(directory / WEIGHTS).items()}
    return adapters | _load(directory / THOUGHTS)


def check_base(model: ThinkingModel, directory: str | os.PathLike[str]) -> None:
    """Compare the base with the one that the adapters of a directory were trained on.

    Raises:
        CheckpointError: The base has other weights.
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


def assemble(
    model_class: type[ModelT],
    directory: str | os.PathLike[str],
    base: str | os.PathLike[str] | PreTrainedModel | None,
    merge: bool,
) -> ModelT:
    """Load a model with adapters as an instance of `model_class`.

    The other arguments and the errors are those of `quietstar.inference.loading.load_finetuned`.
    """
    directory = Path(directory)
    options = read_adapter_options(directory)
    try:
        config = load_configuration(directory)
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(config, QuietStarConfig):
        raise CheckpointError(f"{directory}: its config.json is of a {config.model_type}, not of a thinking model")
    path = options.base_model_name_or_path
    for name, tensor in read_header(directory / WEIGHTS).items():
        if name.endswith("lora_A.weight") and tensor.shape[:1] != (options.r,):
            raise CheckpointError(
                f"{directory / OPTIONS}: r: got {options.r}, but {tensor.file}: {name} has the shape "
                f"{list(tensor.shape)}"
            )
    loaded = base if isinstance(base, PreTrainedModel) else _load_base(directory, base or path, config, base is None)
    plain = loaded.base if isinstance(loaded, ThinkingModel) else loaded
    config.text_config = plain.config
    model = model_class(config, base=plain)
    for part in model.thinking_parts:
        part.to(device=plain.device, dtype=_dtype(config))
    probe_once(model)  # before the adapters: the probe checks the family, and adapters would only add rounding
    path = path if base is None or isinstance(base, PreTrainedModel) else absolute(base)
    if not options.target_modules:
        raise CheckpointError(f"{directory / OPTIONS}: target_modules: got an empty list, needs names of layers")
    for name in options.target_modules:
        if not any(f".{layer}".endswith(f".{name}") for layer in linear_layers(model)):
            raise CheckpointError(
                f"{directory / OPTIONS}: target_modules: got {shown(name)}, no linear layer of the base"
            )
    inject(model, options.r, options.lora_alpha, options.target_modules, base_path=path)
    try:
        load_trained_state(model, read_adapters(directory))
    except CheckpointError as error:
        raise CheckpointError(f"{directory}: {error}") from None
    check_base(model, directory)
    model.generation_config = load_generation_config(directory) or model.generation_config
    if merge:
        merge_adapters(model)
    if (bad := not_finite(model)) is not None:
        raise CheckpointError(f"{directory}: {bad} has values that are NaN or infinite; a file of it is damaged")
    model.train(False)
    return model


def _load_base(
    directory: Path, path: str | os.PathLike[str] | None, config: QuietStarConfig, local: bool
) -> PreTrainedModel:
    if path is None:
        raise CheckpointError(
            f"{directory}: does not name the base of its adapters; load_finetuned(..., base=...) does"
        )
    if local:
        path = _local_base(directory / OPTIONS, os.fspath(path))
    if is_adapter_checkpoint(path):
        raise CheckpointError(
            f"{directory}: the base of its adapters, {path}, has adapters itself; needs a whole model"
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


def _plain_options(model: ThinkingModel) -> dict[str, Any]:
    options: dict[str, Any] = adapter_options(model).to_dict()
    return {**options, "inference_mode": True}  # as peft writes it: a model that peft loads is not to be trained


def _local_base(file: Path, path: str) -> str:
    """Return the directory of a base that a file of adapters names, for a hub name the one in the hub's cache.

    The network is not used, which every library would do that gets the hub name: only a user names what is asked for.
    """
    if os.path.isabs(path) and path_kind(path, f"{file}: base_model_name_or_path") == "directory":
        return path
    try:
        validate_repo_id(path)
        found = try_to_load_from_cache(path, "config.json")
        if not isinstance(found, str):
            raise CheckpointError(
                f"{file}: base_model_name_or_path: the base of its adapters can't be loaded: {path} is not in the "
                f"cache of the hub; load_finetuned(..., base={path!r}) asks the hub for it"
            )
        return os.path.dirname(found)
    except HFValidationError:
        raise CheckpointError(
            f"{file}: base_model_name_or_path: the base of its adapters can't be loaded: got {shown(path)}, needs the "
            "absolute path of a directory, or a hub name; load_finetuned(..., base=...) takes it from elsewhere"
        ) from None


def read_adapter_options(directory: Path) -> _Options:
    """Read the rank, scale, layers and base of the adapters in a directory that `save_finetuned` wrote.

    Raises:
        CheckpointError: The file is missing or damaged, or asks for what plain LoRA does not have.
    """
    file = directory / OPTIONS
    try:
        content = check_fields(file, _Options)
    except ConfigError as error:
        reason = str(error).removeprefix(f"{file}: ")
        raise CheckpointError(f"{file}: cannot be read as options of adapters: {reason}") from None
    options = _Options(**{field.name: content[field.name] for field in fields(_Options) if field.name in content})
    for name in ("use_dora", "use_rslora", "lora_bias", "rank_pattern", "alpha_pattern", "modules_to_save"):
        if content.get(name):
            raise CheckpointError(
                f"{file}: {name}: got {shown(content[name])}, needs no such field: adapters here are plain LoRA"
            )
    return options


def _pefts_name(name: str) -> str:
    return _PEFTS + name.removeprefix(_OURS).replace(f".{ADAPTER}.", ".")


def _our_name(name: str) -> str:
    layer, _, leaf = name.removeprefix(_PEFTS).rpartition(".")
    return f"{_OURS}{layer}.{ADAPTER}.{leaf}"


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _load(file: Path) -> dict[str, Tensor]:
    read_header(file)
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: cannot be read as safetensors ({error})") from None

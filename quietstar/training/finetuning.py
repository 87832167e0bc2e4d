"""Applies the fine-tuning options: adapters, frozen parameters, and gradient checkpointing of the layers."""

from __future__ import annotations

import difflib
import fnmatch
from functools import partial

from torch.utils.checkpoint import checkpoint

from quietstar.config.training import FinetuningOptions
from quietstar.errors import ConfigError
from quietstar.model.adapters import THOUGHT_PARTS, adapter_options, adapter_targets, add_adapters, has_adapters
from quietstar.model.layers import decoder_layers
from quietstar.model.modeling import QuietStarForCausalLM
from quietstar.model.upstream import set_checkpointing


def apply_finetuning(
    model: QuietStarForCausalLM, options: FinetuningOptions, method: str = "quietstar"
) -> QuietStarForCausalLM:
    """Prepare a model to be trained as the options say, before an optimizer is made for it.

    A model that comes with adapters, from the checkpoint of a run with adapters, keeps them: the options must then be
    the same.

    Args:
        model: Thinking model, which is changed in place.
        options: Fine-tuning options; with rank 0 and no patterns the whole model is trained.
        method: Value of `training.method`, for which some weights must be left to train.

    Returns:
        The same model.

    Raises:
        ConfigError: An option names something that does not exist, excludes another option, or differs from the model's
            own adapters; or peft is not installed.
    """
    if options.lora_rank and options.freeze.strip():
        raise ConfigError(
            f"finetuning.freeze: got {options.freeze!r} together with finetuning.lora_rank {options.lora_rank}, which "
            "freezes the whole base already; finetuning.lora_targets chooses the layers that get adapters"
        )
    if has_adapters(model):
        _check_own_adapters(model, options)
    elif options.lora_rank:
        add_adapters(model, options.lora_rank, _alpha(options), options.lora_targets)
    freeze_parameters(model, options.freeze)
    if method == "language_modeling" and not any(parameter.requires_grad for parameter in model.base.parameters()):
        raise ConfigError(
            f"finetuning.freeze: got {options.freeze!r}, which freezes the whole base; training.method "
            "language_modeling trains nothing else"
        )
    set_gradient_checkpointing(model, options.gradient_checkpointing)
    return model


def freeze_parameters(model: QuietStarForCausalLM, patterns: str) -> list[str]:
    """Exclude parameters from training. Tied parameters are frozen by any of their names.

    Args:
        model: Thinking model, which is changed in place.
        patterns: Shell patterns of parameter names, separated by commas; `*` also matches dots.

    Returns:
        The names of the frozen parameters.

    Raises:
        ConfigError: A pattern matches nothing, or matches START, END or the mixing head. Nothing has been frozen then.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    frozen: list[str] = []
    for pattern in (part.strip() for part in patterns.split(",")):
        if not pattern:
            continue
        names = [name for name in parameters if fnmatch.fnmatchcase(name, pattern)]
        if not names:
            close = difflib.get_close_matches(pattern, parameters, 3, cutoff=0.4) or list(parameters)[:3]
            raise ConfigError(
                f"finetuning.freeze: {pattern!r} matches no parameter; there are, for example, {', '.join(close)}"
            )
        if thinking := [name for name in names if name.startswith(THOUGHT_PARTS)]:
            raise ConfigError(
                f"finetuning.freeze: {pattern!r} matches {thinking[0]}, but START, END and the mixing head are always "
                "trained; base.* is all of the base"
            )
        frozen += names
    for name in frozen:
        parameters[name].requires_grad_(False)
    return frozen


def set_gradient_checkpointing(model: QuietStarForCausalLM, on: bool) -> None:
    """Keep only each layer's input in differentiable passes, and recompute the layer in the backward pass.

    This applies in training mode. A step that reuses its sampling pass recomputes the layers in any case.

    Args:
        model: Thinking model, which is changed in place.
        on: Whether layers are checkpointed; False switches checkpointing off.
    """
    # set on the layers, not by the base's own method, which would also ask for gradients of the embeddings, and so for
    # those of every frozen layer; nothing in a layer is random, so no generator's state is kept for its second run
    function = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    for layer in decoder_layers(model.decoder):
        set_checkpointing(layer, on, function)


def _alpha(options: FinetuningOptions) -> float:
    return 2.0 * options.lora_rank if options.lora_alpha is None else options.lora_alpha


def _check_own_adapters(model: QuietStarForCausalLM, options: FinetuningOptions) -> None:
    own = adapter_options(model)
    if not options.lora_rank:
        raise ConfigError(
            f"finetuning.lora_rank: the model has adapters of rank {own.r} already. Set it to {own.r} to train them "
            "further; to train everything, merge them first: "
            "load_finetuned(PATH, merge=True).save_pretrained(OTHER_PATH)"
        )
    adapted = {name.partition(".lora_A.")[0] for name, _ in model.base.named_parameters() if ".lora_A." in name}
    differences = []
    if own.r != options.lora_rank:
        differences.append(f"lora_rank {own.r}, not {options.lora_rank}")
    if own.lora_alpha != _alpha(options):
        differences.append(f"lora_alpha {own.lora_alpha}, not {_alpha(options):g}")
    if adapted != set(adapter_targets(model, options.lora_targets)):
        names = sorted({name.rpartition(".")[2] for name in adapted})
        differences.append(f"lora_targets {','.join(names)}, not {options.lora_targets}")
    if differences:
        raise ConfigError(
            f"finetuning: the model has adapters already, with {'; '.join(differences)}. Give the same options to "
            "train them further, or merge them into the base first: "
            "load_finetuned(PATH, merge=True).save_pretrained(OTHER_PATH)"
        )

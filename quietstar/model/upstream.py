"""What the engine relies on inside transformers, in one place.

Whatever lies below transformers' top level (but for its logging) comes through this module, and each part says what is
relied on; `tests/model/test_upstream.py` holds every one of them and says in words which has changed. Two more places
know of its insides: the classes that it calls back (`QuietStarForCausalLM`, whose attributes loading reads, and
`ThinkingGeneration`, three methods of which `generate` calls), and `quietstar.imports`, which knows where
`AutoConfig` is defined.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from packaging.version import Version
from torch import nn

NEWEST_TESTED = {"torch": "2.14.1", "transformers": "5.24.0", "triton": "3.9.0"}
"""The newest releases under which the tests have passed."""


def untested_versions() -> list[str]:
    """A sentence for each installed release that is newer than any tested one."""
    found = []
    for name, tested in NEWEST_TESTED.items():
        try:
            installed = version(name)
        except PackageNotFoundError:  # Triton is on Linux alone
            continue
        if Version(Version(installed).public) > Version(tested):
            found.append(f"{name} {installed} is newer than {tested}, the newest that was tested")
    return found


def with_advice(problem: object) -> str:
    """`problem`, and where a library is newer than tested its name and what to install."""
    newer = untested_versions()
    if not newer:
        return str(problem)
    return (
        f"{problem}. Perhaps a library has changed: {'; '.join(newer)}. 'pip install -c constraints.txt .' in a "
        "checkout installs the tested releases"
    )


try:
    from transformers import AttentionInterface, GenerationMixin, PreTrainedConfig, PreTrainedModel

    # Its functions leave alone what was loaded, which carries `_is_hf_initialized`.
    from transformers import initialization as initialization

    # DynamicLayer keeps `keys` and `values` [B, Hkv, L, D] and calls `update(keys, values)`; `lazy_initialization` sets
    # dtype, device and `is_initialized`. DynamicSlidingWindowLayer has its window as `sliding_window`. A Cache makes
    # layers of `layer_class_to_replicate`, and DynamicCache(config=) those that a configuration asks for, in `layers`.
    from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

    # Sets the scores of tokens to minus infinity.
    from transformers.generation.logits_process import SuppressTokensLogitsProcessor

    # `put` gets the prompt and then each token, `end` comes last.
    from transformers.generation.streamers import BaseStreamer

    # What `generate` returns: a dataclass that can be extended.
    from transformers.generation.utils import GenerateDecoderOnlyOutput

    # PyTorch's attention in the signature of an attention function: [B, H, N, D] -> ([B, N, H, D], None), and the mask
    # that it wants in a plain call.
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    # Every decoder layer is one: it takes its hidden states in the first place and gives hidden states back.
    from transformers.modeling_layers import GradientCheckpointingLayer

    # `loss`, `logits`, and the cache under the name of `CACHE`.
    from transformers.modeling_outputs import CausalLMOutputWithPast

    # The linear layer of GPT-2, with its weight transposed.
    from transformers.pytorch_utils import Conv1D
except ImportError as error:
    raise ImportError(with_advice(error)) from error

__all__ = [
    "CACHE",
    "NEWEST_TESTED",
    "BaseStreamer",
    "Cache",
    "CausalLMOutputWithPast",
    "Conv1D",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "GenerateDecoderOnlyOutput",
    "GradientCheckpointingLayer",
    "SuppressTokensLogitsProcessor",
    "attention_implementation",
    "cache_argument",
    "checkpointing",
    "initialization",
    "register_attention",
    "sdpa_attention_forward",
    "set_checkpointing",
    "supports_sdpa",
    "tied_weights",
    "untested_versions",
    "with_advice",
    "without_checkpointing",
]

# -- attention ---------------------------------------------------------------------------------------------------------


def register_attention(name: str, function: Callable[..., Any]) -> None:
    """Make `set_attn_implementation(name)` call `function` in every layer, with the model's keyword arguments.

    A plain call of the model under that name gets the masks of PyTorch's attention.
    """
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)


def attention_implementation(config: PreTrainedConfig) -> str | None:
    """The name under which a model's attention runs now."""
    name: str | None = config._attn_implementation
    return name


def supports_sdpa(model: Any) -> bool:
    """Whether PyTorch's attention can be asked for."""
    return bool(model._supports_sdpa)


# -- weights -----------------------------------------------------------------------------------------------------------


def tied_weights(model: PreTrainedModel) -> set[str]:
    """Names of the weights that are others', and so need not be in a checkpoint."""
    return set(model.all_tied_weights_keys)


# -- caches ------------------------------------------------------------------------------------------------------------


def cache_argument(function: Callable[..., Any]) -> str | None:
    """The name under which a function takes a cache of keys and values: `cache` since 5.24, `past_key_values` before.

    None where it takes none.
    """
    accepted = inspect.signature(function).parameters
    return next((name for name in ("cache", "past_key_values") if name in accepted), None)


CACHE: str = cache_argument(GenerationMixin.prepare_inputs_for_generation) or "cache"
"""The name under which `generate` hands the cache to a model, and the field of its outputs."""


# -- checkpointing of a layer ------------------------------------------------------------------------------------------


def set_checkpointing(layer: nn.Module, on: bool, function: Callable[..., Any]) -> None:
    """In training mode, with gradients, let a layer's forward be `function(forward, *arguments)`."""
    layer.__dict__.update(gradient_checkpointing=on, _gradient_checkpointing_func=function)


def checkpointing(layer: nn.Module) -> tuple[Callable[..., Any] | None, bool]:
    """The function that `set_checkpointing`, or transformers, has set, None where none is; and whether it is on."""
    return layer.__dict__.get("_gradient_checkpointing_func"), layer.__dict__.get("gradient_checkpointing", False)


@contextmanager
def without_checkpointing(layer: nn.Module) -> Iterator[None]:
    """Within this context the layer's forward is its own, whatever a user has switched on."""
    flag = "gradient_checkpointing"
    has_own, before = flag in layer.__dict__, layer.__dict__.get(flag)
    layer.__dict__[flag] = False
    try:
        yield
    finally:
        if has_own:
            layer.__dict__[flag] = before
        else:
            layer.__dict__.pop(flag, None)

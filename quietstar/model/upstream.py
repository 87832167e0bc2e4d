"""What the engine relies on inside transformers, in one place.

Everything below transformers' top level (except its logging) is imported through this module, and each part says what
is relied on; `tests/model/test_upstream.py` tests every one of them and says in words which has changed. Two more
places know transformers' internals: the classes that it calls back (`QuietStarForCausalLM`, whose attributes are read
when weights are loaded, and `ThinkingGeneration`, three methods of which `generate` calls), and `quietstar.imports`,
which knows where `AutoConfig` is defined.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import CodeType, FunctionType
from typing import Any, Literal

from packaging.version import Version
from torch import nn

NEWEST_TESTED = {"torch": "2.14.1", "transformers": "5.24.0", "triton": "3.9.0"}
"""The newest releases with which the tests have passed."""


def untested_versions() -> list[str]:
    """Return a sentence for each installed release that is newer than any tested one."""
    found = []
    for name, tested in NEWEST_TESTED.items():
        try:
            installed = version(name)
        except PackageNotFoundError:  # Triton exists only on Linux
            continue
        if Version(Version(installed).public) > Version(tested):
            found.append(f"{name} {installed} is newer than {tested}, the newest that was tested")
    return found


def with_advice(problem: object) -> str:
    """Return `problem` as text; where a library is newer than tested, followed by its name and what to install."""
    newer = untested_versions()
    if not newer:
        return str(problem)
    return (
        f"{problem}. Perhaps a library has changed: {'; '.join(newer)}. 'pip install -c constraints.txt .' in a "
        "checkout installs the tested releases"
    )


try:
    from transformers import AttentionInterface, GenerationMixin, PreTrainedConfig, PreTrainedModel

    # Its functions do not touch loaded parameters, which carry `_is_hf_initialized`.
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
    # that it needs in a plain call.
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    # Every decoder layer is one: it takes its hidden states as the first positional argument and returns hidden states.
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
    "LlamaPart",
    "SuppressTokensLogitsProcessor",
    "attention_implementation",
    "cache_argument",
    "checkpointing",
    "ignored_weights",
    "initialization",
    "part_of_llama",
    "register_attention",
    "sdpa_attention_forward",
    "set_checkpointing",
    "supports_sdpa",
    "tied_weights",
    "untested_versions",
    "with_advice",
    "with_rotary_embedding",
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
    """Return the name of the attention that a model runs with now."""
    name: str | None = config._attn_implementation
    return name


def supports_sdpa(model: Any) -> bool:
    """Return whether a model can run with PyTorch's attention."""
    return bool(model._supports_sdpa)


# -- weights -----------------------------------------------------------------------------------------------------------


def tied_weights(model: PreTrainedModel) -> set[str]:
    """Return the names of the weights that are tied to others, and so need not be in a checkpoint."""
    return set(model.all_tied_weights_keys)


def ignored_weights(model: PreTrainedModel) -> list[str]:
    """Return patterns of the names in a checkpoint that the model's family leaves out, such as layers for drafts."""
    return list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())


# -- caches ------------------------------------------------------------------------------------------------------------


def cache_argument(function: Callable[..., Any]) -> str | None:
    """Return the name of a function's argument for a KV cache: `cache` since 5.24, `past_key_values` before.

    None where the function takes no cache.
    """
    accepted = inspect.signature(function).parameters
    return next((name for name in ("cache", "past_key_values") if name in accepted), None)


CACHE: str = cache_argument(GenerationMixin.prepare_inputs_for_generation) or "cache"
"""The argument in which `generate` passes the cache to a model, and the field of the model's outputs."""


# -- checkpointing of a layer ------------------------------------------------------------------------------------------


def set_checkpointing(layer: nn.Module, on: bool, function: Callable[..., Any]) -> None:
    """Make a layer run as `function(forward, *arguments)` in training mode with gradients, or stop doing so."""
    layer.__dict__.update(gradient_checkpointing=on, _gradient_checkpointing_func=function)


def checkpointing(layer: nn.Module) -> tuple[Callable[..., Any] | None, bool]:
    """Return the function that `set_checkpointing` or transformers has set, or None, and whether it is switched on."""
    return layer.__dict__.get("_gradient_checkpointing_func"), layer.__dict__.get("gradient_checkpointing", False)


@contextmanager
def without_checkpointing(layer: nn.Module) -> Iterator[None]:
    """Run the layer's own forward within this context, even where a user has switched checkpointing on."""
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


# -- layers that compute what Llama's do -------------------------------------------------------------------------------

ROTARY_EMBEDDING = "apply_rotary_pos_emb"
"""The function `(query, key, cos, sin) -> (query, key)` that attention finds in the module of its family."""
LlamaPart = Literal["RMSNorm", "rotary embedding", "MLP"]


def _llama(name: str) -> Any:
    return getattr(import_module("transformers.models.llama.modeling_llama"), name)


def _has_code_of(function: Callable[..., Any], other: Callable[..., Any]) -> bool:
    """Return whether two functions are the same text but for their documentation: families copy what they share."""

    def text(function: Callable[..., Any]) -> tuple[object, ...]:
        code: CodeType = inspect.unwrap(function).__code__
        values = [None if isinstance(value, str) else value for value in code.co_consts]  # without one, None is there
        return code.co_code, values, code.co_names, code.co_varnames

    return text(function) == text(other)


def part_of_llama(module: nn.Module) -> LlamaPart | None:
    """Return which part of a Llama a module computes, by the code of its class; None: none, or a forward of its own.

    A norm has `weight` and `variance_epsilon`; an MLP is `down_proj(silu(gate_proj(x)) * up_proj(x))`; attention
    rotates queries and keys by Llama's function, and may do anything else.
    """
    forward = inspect.unwrap(type(module).forward)
    if "forward" in vars(module) or not hasattr(forward, "__code__"):
        return None
    if _has_code_of(forward, _llama("LlamaRMSNorm").forward):
        return "RMSNorm"
    if _has_code_of(forward, _llama("LlamaMLP").forward):
        silus = (nn.SiLU, type(import_module("transformers.activations").ACT2FN["silu"]))
        return "MLP" if type(module.act_fn) in silus else None
    used = (ROTARY_EMBEDDING, "rotate_half")
    if ROTARY_EMBEDDING in forward.__code__.co_names and all(name in forward.__globals__ for name in used):
        same = all(_has_code_of(forward.__globals__[name], _llama(name)) for name in used)
        return "rotary embedding" if same else None
    return None


def with_rotary_embedding(module: nn.Module, rotate: Callable[..., Any]) -> Callable[..., Any]:
    """Return the forward of an attention, unbound, with another function in place of its rotary embedding.

    Other models of the family keep theirs: the forward is a copy, and so is where it looks names up.
    """
    forward = inspect.unwrap(type(module).forward)
    names = {**forward.__globals__, ROTARY_EMBEDDING: rotate}
    copy = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy

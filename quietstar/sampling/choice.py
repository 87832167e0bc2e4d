"""Chooses and loads the sampler that fits the options, the model and the device."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from quietstar.config.loops import SamplingOptions
from quietstar.data.tokenizer import check_vocabulary, load_tokenizer
from quietstar.errors import ConfigError
from quietstar.model.loading import load_causal_lm
from quietstar.model.modeling import QuietStarForCausalLM
from quietstar.model.upstream import supports_sdpa
from quietstar.runs.machine import resolve_device
from quietstar.sampling.requests import Sampler
from quietstar.sampling.transformers_sampler import TransformersSampler
from quietstar.sampling.vllm_sampler import VllmSampler, has_vllm


def make_sampler(
    path: str | os.PathLike[str],
    options: SamplingOptions,
    *,
    dtype: str = "float32",
    device: str = "auto",
    stop: Sequence[str] = (),
) -> Sampler:
    """Loads a model to sample from.

    Args:
        path: Directory or hub name of a causal language model and its tokenizer.
        options: Sampling options, such as the engine, the temperature and the batch size.
        dtype: Dtype of the weights, such as `bfloat16`.
        device: Name of the device: `auto`, `cpu`, `cuda` or `cuda:N`.
        stop: Strings that end a completion, besides the end-of-sequence token.

    Raises:
        ConfigError: The model cannot be loaded or has no end-of-sequence token, or the engine or device is missing.
    """
    place = resolve_device(device)
    if options.engine == "vllm" or (options.engine == "auto" and place.type == "cuda" and has_vllm()):
        return VllmSampler(path, options, dtype=dtype, stop=stop)
    tokenizer = load_tokenizer(path)
    model: Any = load_causal_lm(path, getattr(torch, dtype))
    if isinstance(model, QuietStarForCausalLM):
        raise ConfigError(
            f"model.path: {os.fspath(path)} thinks before each token and has no KV cache to sample with; "
            "save its base alone (model.base.save_pretrained) and give that"
        )
    check_vocabulary(tokenizer, model.get_input_embeddings().weight.shape[0])
    if supports_sdpa(model):
        model.set_attn_implementation("sdpa")
    return TransformersSampler(model.to(place).eval(), tokenizer, options, stop)

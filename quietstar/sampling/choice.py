"""Chooses and loads the sampler that fits the options, the model and the device."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from quietstar.config.sampling import SamplingOptions
from quietstar.data.tokenizer import check_vocabulary, load_tokenizer
from quietstar.errors import ConfigError
from quietstar.model.loading import load_causal_lm, load_configuration
from quietstar.model.upstream import supports_sdpa
from quietstar.runs.machine import resolve_device
from quietstar.sampling.http_sampler import HttpSampler
from quietstar.sampling.requests import Sampler
from quietstar.sampling.transformers_sampler import TransformersSampler
from quietstar.sampling.vllm_server import VllmServer, has_vllm


def chosen_engine(options: SamplingOptions, device: str) -> Literal["transformers", "vllm", "http"]:
    """Returns the engine that samples: `auto` takes vLLM where this Python has it and the device is a GPU.

    Args:
        options: Sampling options.
        device: Name of the device: `auto`, `cpu`, `cuda` or `cuda:N`.
    """
    if options.engine != "auto":
        return options.engine
    return "vllm" if resolve_device(device).type == "cuda" and has_vllm() else "transformers"


def make_sampler(
    path: str | os.PathLike[str],
    options: SamplingOptions,
    *,
    dtype: str = "float32",
    device: str = "auto",
    stop: Sequence[str] = (),
    log: Path | None = None,
) -> Sampler:
    """Loads a model to sample from, or finds the servers that have it.

    Args:
        path: Directory or hub name of a causal language model and its tokenizer.
        options: Sampling options, such as the engine, the temperature and the batch size.
        dtype: Dtype of the weights, such as `bfloat16`.
        device: Name of the device: `auto`, `cpu`, `cuda` or `cuda:N`.
        stop: Strings that end a completion, besides the end-of-sequence token.
        log: File that the output of a server of this run is appended to; None: a temporary one.

    Raises:
        ConfigError: The model cannot be loaded or has no end-of-sequence token, or the engine or device is missing.
        OutOfMemoryError: A server of this run has too little memory for the model.
        ServerError: A server of this run does not start in time.
    """
    place, engine = resolve_device(device), chosen_engine(options, device)
    if load_configuration(path).model_type == "quietstar":
        raise ConfigError(
            f"model.path: {os.fspath(path)} thinks before each token and has no KV cache to sample with; "
            "save its base alone (model.base.save_pretrained) and give that"
        )
    if engine == "http":
        return HttpSampler(path, options, options.urls, dtype=dtype, device=place, stop=stop)
    if engine == "vllm":
        server = VllmServer(path, options, dtype=dtype, device=device, log=log)
        try:  # the own model is on the CPU: the server has the device's memory
            return HttpSampler(
                path, options, [server.url], dtype=dtype, device=torch.device("cpu"), stop=stop, server=server
            )
        except BaseException:
            server.close()
            raise
    tokenizer = load_tokenizer(path)
    model: Any = load_causal_lm(path, getattr(torch, dtype))
    check_vocabulary(tokenizer, model.get_input_embeddings().weight.shape[0])
    if supports_sdpa(model):
        model.set_attn_implementation("sdpa")
    return TransformersSampler(model.to(place).eval(), tokenizer, options, stop)

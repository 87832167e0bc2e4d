"""Chooses the engine that samples, starts its server, and makes the sampler."""

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
from quietstar.sampling.vllm_server import VllmServer, has_vllm, reload


def chosen_engine(options: SamplingOptions, device: str) -> Literal["transformers", "vllm", "http"]:
    """Returns the engine that samples: `auto` takes vLLM where this Python has it and the device is a GPU.

    Args:
        options: Sampling options.
        device: Name of the device: `auto`, `cpu`, `cuda` or `cuda:N`.
    """
    if options.engine != "auto":
        return options.engine
    return "vllm" if resolve_device(device).type == "cuda" and has_vllm() else "transformers"


def start_server(
    path: str | os.PathLike[str],
    options: SamplingOptions,
    *,
    dtype: str = "float32",
    device: str = "auto",
    log: Path | None = None,
) -> VllmServer | None:
    """Starts the server that samples from a model, with engine vllm, or gives the model to those that run already.

    Args:
        path: Directory or hub name of a causal language model and its tokenizer.
        options: Sampling options, such as the engine and the arguments of the server.
        dtype: Dtype of the weights, such as `bfloat16`.
        device: Name of the device: `auto`, `cpu`, `cuda` or `cuda:N`.
        log: File that the output of the server is appended to; None: a temporary one.

    Returns:
        The server, which samples until it is closed; None with another engine.

    Raises:
        ConfigError: The model thinks, or vLLM is missing or cannot serve it.
        OutOfMemoryError: The server has too little memory for the model.
        ServerError: The server does not start in time, or the reload command fails.
    """
    resolve_device(device)
    engine = chosen_engine(options, device)
    if engine in ("vllm", "http"):
        _check_model(path)
    if engine == "http" and options.reload_command is not None:
        reload(options.reload_command, path)
    return VllmServer(path, options, dtype=dtype, device=device, log=log) if engine == "vllm" else None


def make_sampler(
    path: str | os.PathLike[str],
    options: SamplingOptions,
    *,
    dtype: str = "float32",
    device: str = "auto",
    stop: Sequence[str] = (),
    server: VllmServer | None = None,
) -> Sampler:
    """Loads a model to sample from, or takes the servers that have it.

    Args:
        path: Directory or hub name of a causal language model and its tokenizer.
        options: Sampling options, such as the engine, the temperature and the batch size.
        dtype: Dtype of the weights, such as `bfloat16`.
        device: Name of the device: `auto`, `cpu`, `cuda` or `cuda:N`.
        stop: Strings that end a completion, besides the end-of-sequence token.
        server: Server that samples in place of the engine of the options; see `start_server`.

    Raises:
        ConfigError: The model cannot be loaded or has no end-of-sequence token, or the engine or device is missing.
    """
    place = resolve_device(device)
    _check_model(path)
    if server is not None:  # it has the memory of the device, so the own model is on the CPU
        cpu = torch.device("cpu")
        return HttpSampler(path, options, [server.url], dtype=dtype, device=cpu, stop=stop, server=server)
    engine = chosen_engine(options, device)
    if engine == "http":
        return HttpSampler(path, options, options.urls, dtype=dtype, device=place, stop=stop)
    if engine == "vllm":
        raise ConfigError("sampling.engine: vllm samples through a server, and none is given; see start_server")
    tokenizer = load_tokenizer(path)
    model: Any = load_causal_lm(path, getattr(torch, dtype))
    check_vocabulary(tokenizer, model.get_input_embeddings().weight.shape[0])
    if supports_sdpa(model):
        model.set_attn_implementation("sdpa")
    return TransformersSampler(model.to(place).eval(), tokenizer, options, stop)


def _check_model(path: str | os.PathLike[str]) -> None:
    if load_configuration(path).model_type == "quietstar":
        raise ConfigError(
            f"model.path: {os.fspath(path)} thinks before each token and has no KV cache to sample with; "
            "save its base alone (model.base.save_pretrained) and give that"
        )

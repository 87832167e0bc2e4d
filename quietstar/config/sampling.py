"""How completions are sampled: the options, and the checks of those that name an engine and its servers."""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import asdict, dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

from quietstar.config.options import Count, Names, Natural, Positive, ShareAbove0, TemperatureOr0, Text, path_kind
from quietstar.config.parsing import shown
from quietstar.errors import ConfigError


@dataclass
class SamplingOptions:
    """How completions are sampled.

    Args:
        engine: Engine that samples: `transformers`, in this process; `vllm`, a vLLM server that the run starts and ends
            on this machine; `http`, the servers of `urls`; `auto`: vllm if this Python has it and the device is a GPU,
            else transformers.
        samples: Number of completions per problem and iteration.
        temperature: Sampling temperature; 0 takes the most probable token.
        top_p: Nucleus sampling: sample from the smallest set of tokens with at least this total probability; 1: all
            tokens.
        top_k: Number of most probable tokens to sample from; 0: all tokens.
        max_new_tokens: Longest completion, in tokens; a completion that needs more ends with finish reason `length`.
        batch_size: Completions sampled at once, by each server where several sample; if memory runs out, transformers
            continues with half as many.
        few_shot: Whether the task's solved examples stand before each prompt.
        urls: Engine http: servers with an OpenAI-compatible completions endpoint, such as
            `http://a:8000,http://b:8000`; `/v1/completions` is added. The completions of a problem do not depend on
            which one samples them.
        served_model: Engine http: name under which the servers know the model. Null: the only name that a server lists.
        api_key_variable: Engine http: environment variable that holds the key that the servers ask for. Null: none.
        reload_command: Engine http: command that gives the servers new weights, each time before another model samples,
            with the model's directory in place of `{model}`; it ends when they serve it, and is run without a shell.
            Null: the servers get new weights in another way.
        request_timeout: Engines http and vllm: time limit for one completion, in seconds.
        attempts: Engines http and vllm: failures of one completion at each server after which the run stops. A server
            that fails rests, up to a minute, while the others go on.
        server_python: Engine vllm: Python of an environment that has vLLM. Null: the running Python.
        server_arguments: Engine vllm: further arguments of `vllm serve`, as one text, such as
            `--gpu-memory-utilization 0.8 --tensor-parallel-size 2`.
        server_timeout: Engine vllm: time limit for the server's start, in seconds.
    """

    engine: Literal["auto", "transformers", "vllm", "http"] = "auto"
    samples: Count = 1
    temperature: TemperatureOr0 = 0.0
    top_p: ShareAbove0 = 1.0
    top_k: Natural = 0
    max_new_tokens: Count = 256
    batch_size: Count = 64
    few_shot: bool = True
    urls: Names = ()
    served_model: Text | None = None
    api_key_variable: Text | None = None
    reload_command: Text | None = None
    request_timeout: Positive = 600.0
    attempts: Count = 8
    server_python: Text | None = None
    server_arguments: str = ""
    server_timeout: Positive = 1800.0


HTTP_OPTIONS = ("urls", "served_model", "api_key_variable", "reload_command")
SERVER_OPTIONS = ("server_python", "server_arguments")
"""Options of `SamplingOptions` that only the engine http, or only the engine vllm, takes."""


def check_engine(options: SamplingOptions) -> None:
    """Checks the options of the servers that sample.

    Raises:
        ConfigError: An option belongs to another engine, is missing, or cannot be read.
    """
    default = SamplingOptions()
    for engine, names in (("http", HTTP_OPTIONS), ("vllm", SERVER_OPTIONS)):
        for name in names:
            if options.engine != engine and getattr(options, name) != getattr(default, name):
                raise ConfigError(
                    f"sampling.{name}: got {shown(getattr(options, name))}, but sampling.engine is {options.engine}; "
                    f"needs sampling.engine {engine}"
                )
    if options.engine == "http" and not options.urls:
        raise ConfigError("sampling.urls: missing; sampling.engine http needs servers, such as http://127.0.0.1:8000")
    urls = [server_url(url) for url in options.urls]
    if len(set(urls)) < len(urls):
        raise ConfigError(f"sampling.urls: got {','.join(options.urls)}, needs each server once")
    if (variable := options.api_key_variable) is not None and not os.environ.get(variable):
        raise ConfigError(f"sampling.api_key_variable: the environment has no {variable}; needs a variable with a key")
    if options.reload_command is not None and not any(
        "{model}" in word for word in split_command("sampling.reload_command", options.reload_command)
    ):
        raise ConfigError(
            f"sampling.reload_command: got {shown(options.reload_command)}, needs a command with {{model}} where the "
            "directory of the model belongs"
        )
    for word in split_command("sampling.server_arguments", options.server_arguments):
        if word.startswith("--trust"):  # an argument may be shortened
            raise ConfigError(f"sampling.server_arguments: got {word}, but code of a model is never run; leave it out")
    if (python := options.server_python) is not None and (
        path_kind(python, "sampling.server_python") != "file" or not os.access(python, os.X_OK)
    ):
        raise ConfigError(f"sampling.server_python: {python} is no program; needs a Python, such as env/bin/python")


def server_url(url: str) -> str:
    """Returns the URL of a server without what is added to it, such as a `/v1` at its end.

    Raises:
        ConfigError: It is not the URL of a server.
    """
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of a port or an address
        usable = False
    if not usable or parts.query or parts.fragment or parts.username or not re.fullmatch(r"[!-~]+", url):
        raise ConfigError(
            f"sampling.urls: got {shown(url)}, needs http:// or https:// and a host, such as http://127.0.0.1:8000"
        )
    return url.rstrip("/").removesuffix("/completions").removesuffix("/v1").rstrip("/")


def split_command(name: str, command: str) -> list[str]:
    """Returns the words of a command line, in the quoting of a shell.

    Args:
        name: Name of the option in the error message.
        command: Text to split.

    Raises:
        ConfigError: A quotation has no end.
    """
    try:
        return shlex.split(command)
    except ValueError as error:
        raise ConfigError(f"{name}: got {shown(command)}: {str(error).lower()}; needs words as in a shell") from None


def sampling_inputs(options: SamplingOptions) -> dict[str, Any]:
    """Returns the sampling options that decide which samples come out, by dotted key: not where and how fast."""
    elsewhere = {*HTTP_OPTIONS, *SERVER_OPTIONS, "request_timeout", "attempts", "server_timeout"}
    return {f"sampling.{name}": value for name, value in asdict(options).items() if name not in elsewhere}

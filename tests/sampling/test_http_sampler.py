"""Sampling through servers: a small server computes real completions, and fails in the ways of real ones."""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
import torch

from quietstar.config.sampling import SamplingOptions
from quietstar.errors import DataError, NonFiniteError, QuietStarError, ServerError
from quietstar.sampling import endpoint, http_sampler
from quietstar.sampling.choice import make_sampler
from quietstar.sampling.requests import Completion, Request, sample_seed
from quietstar.sampling.transformers_sampler import TransformersSampler
from tests.model.tiny import make_base
from tests.sampling.conftest import CHARACTERS
from tests.sampling.stub_server import Fault, StubServer

OPTIONS = SamplingOptions(
    engine="http", temperature=3.0, max_new_tokens=8, batch_size=3, attempts=20, request_timeout=60.0
)
STOP = tuple(CHARACTERS[::6])
ASKED = [
    Request(prompt, sample_seed(0, prompt, index), f"problem {prompt} {index}")
    for prompt in ("ABCDE", "C", "BADC")
    for index in range(5)
]


@pytest.fixture(scope="module")
def directory(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tokenizer, tmp_path_factory.mktemp("model"), 0)


@pytest.fixture(scope="module")
def other(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other weights."""
    return save(tokenizer, tmp_path_factory.mktemp("other"), 1)


def save(tokenizer: Any, path: Path, seed: int) -> Path:
    make_base("llama", seed=seed).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def expected(tokenizer: Any) -> list[Completion]:
    """By the sampler of this process."""
    return TransformersSampler(make_base("llama"), tokenizer, OPTIONS, STOP).sample(ASKED)


@pytest.fixture
def serve(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., StubServer]]:
    """Starts servers; rests are short."""
    monkeypatch.setattr(http_sampler, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(http_sampler, "WATCHED", 0.1)
    started: list[StubServer] = []

    def start(*arguments: Any, path: Path = directory, **options: Any) -> StubServer:
        started.append(StubServer(path, *arguments, **options))
        return started[-1]

    yield start
    for server in started:
        server.end()


def sample(
    directory: Path, urls: Sequence[str], asked: Sequence[Request] = ASKED, dtype: str = "float32", **changes: Any
) -> list[Completion]:
    """All completions, each of which comes once."""
    options = dataclasses.replace(OPTIONS, urls=tuple(urls), **changes)
    sampler = make_sampler(directory, options, dtype=dtype, device="cpu", stop=STOP)
    found: dict[int, Completion] = {}
    try:
        for part in sampler.complete(asked):
            assert part and not part.keys() & found.keys()
            found |= part
    finally:
        sampler.close()
    return [found[index] for index in range(len(asked))]


def assert_same(found: Sequence[Completion], expected: Sequence[Completion]) -> None:
    for one, wanted in zip(found, expected, strict=True):
        assert dataclasses.replace(one, logprob=0.0, endpoint=None) == dataclasses.replace(wanted, logprob=0.0)
        assert one.logprob == pytest.approx(wanted.logprob, abs=1e-4)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_of_servers_gives_the_same_completions(
    count: int, directory: Path, serve: Callable[..., StubServer], expected: list[Completion]
) -> None:
    servers = [serve() for _ in range(count)]
    found = sample(directory, [server.url for server in servers])
    assert_same(found, expected)
    assert {one.finish_reason for one in expected} == {"stop", "length"} and len({one.tokens for one in expected}) > 3
    by_server = Counter(one.endpoint for one in found)
    assert by_server == {server.url: len(server.asked) for server in servers}
    assert sum((server.answered for server in servers), Counter()) == Counter(one.seed for one in ASKED)
    assert all(server.most_at_once <= OPTIONS.batch_size for server in servers)


def test_what_a_server_is_asked(directory: Path, serve: Callable[..., StubServer]) -> None:
    server = serve(key="secret")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("KEY", "secret")
        sample(directory, [f"{server.url}/v1/"], ASKED[:2], top_k=5, top_p=0.9, api_key_variable="KEY")
    first = min(server.asked, key=lambda body: ASKED[0].seed != body["seed"])
    assert first == {
        "model": "served",
        "prompt": [3, 4, 5, 6, 7],
        "seed": ASKED[0].seed,
        "max_tokens": 8,
        "temperature": 3.0,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "stop": list(STOP),
        "stop_token_ids": [2],
        "logprobs": 1,
        "return_token_ids": True,
    }


def test_what_is_there_already_is_not_asked_for(directory: Path, serve: Callable[..., StubServer]) -> None:
    server = serve()
    options = dataclasses.replace(OPTIONS, urls=(server.url,))
    sampler = make_sampler(directory, options, device="cpu", stop=STOP)
    found = {index: one for part in sampler.complete(ASKED, {0, 3, 4, 14}) for index, one in part.items()}
    assert sorted(found) == [index for index in range(15) if index not in (0, 3, 4, 14)]
    assert server.answered == Counter(ASKED[index].seed for index in found)
    assert list(sampler.complete(ASKED, range(15))) == []


TRANSIENT = {
    "500": Fault(500),
    "502": Fault(502, content=b"\xff<html>"),
    "429 that says when": Fault(429, {"Retry-After": "0"}),
    "429 with a date": Fault(429, {"Retry-After": formatdate(0, usegmt=True)}),
    "429 with what is no time": Fault(429, {"Retry-After": "soon"}),
    "408": Fault(408),
    "dropped": Fault(how="drop"),
    "torn": Fault(how="torn"),
    "aborted": Fault(change=lambda answer: changed(answer, finish_reason="abort")),
    "without a reason": Fault(change=lambda answer: changed(answer, finish_reason=None)),
}


def changed(answer: dict[str, Any], **fields: Any) -> dict[str, Any]:
    answer["choices"][0] |= fields
    return answer


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", TRANSIENT)
def test_a_request_that_fails_is_tried_again(
    name: str, count: int, directory: Path, serve: Callable[..., StubServer], expected: list[Completion]
) -> None:
    servers = [serve(lambda number: TRANSIENT[name] if number in (0, 3, 4, 5) else None)]
    servers += [serve() for _ in range(count - 1)]
    assert_same(sample(directory, [server.url for server in servers]), expected)
    assert len(servers[0].asked) > 1
    assert sum((server.answered for server in servers), Counter()) == Counter(one.seed for one in ASKED)


def test_a_request_that_has_failed_goes_elsewhere_first(
    directory: Path, serve: Callable[..., StubServer], expected: list[Completion]
) -> None:
    def wait_for_failures(_: int) -> None:
        end = time.monotonic() + 60
        while len(bad.asked) < 4 and time.monotonic() < end:
            time.sleep(0.01)

    bad, slow = serve(lambda number: Fault(500)), serve(wait_for_failures)
    assert_same(sample(directory, [bad.url, slow.url]), expected)
    tried = Counter(body["seed"] for body in bad.asked)
    assert len(tried) >= 4 and set(tried.values()) == {1}


@pytest.mark.parametrize("status", [429, 503])
def test_a_server_is_left_alone_for_as_long_as_it_asks(
    status: int, directory: Path, serve: Callable[..., StubServer]
) -> None:
    times: list[float] = []

    def behave(number: int) -> Fault | None:
        times.append(time.monotonic())
        return Fault(status, {"Retry-After": "1"}) if number == 0 else None

    sample(directory, [serve(behave).url], ASKED[:2], batch_size=1)
    assert times[1] - times[0] >= 1


def test_a_server_that_stalls_is_left(
    directory: Path, serve: Callable[..., StubServer], expected: list[Completion]
) -> None:
    stalled, well = serve(lambda number: Fault(how="stall")), serve()
    found = sample(directory, [stalled.url, well.url], request_timeout=3.0)
    assert_same(found, expected)
    assert {one.endpoint for one in found} == {well.url} and stalled.asked


def test_a_server_that_is_not_there_and_one_that_dies(
    directory: Path, serve: Callable[..., StubServer], expected: list[Completion]
) -> None:
    absent, well = serve(), serve()
    absent.end()
    dying = serve(lambda number: threading.Thread(target=dying.end).start() if number == 4 else None)
    found = sample(directory, [absent.url, dying.url, well.url])
    assert_same(found, expected)
    assert {one.endpoint for one in found} >= {well.url} and absent.url not in {one.endpoint for one in found}


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fault(500, content=b"CUDA\nerror"), "answers 500 Internal Server Error: CUDA error; 2 attempts"),
        (Fault(429), "answers 429 Too Many Requests: a fault; 2 attempts"),
        (Fault(how="drop"), "Remote end closed connection without response; 2 attempts"),
        (Fault(how="torn"), "the answer is torn; 2 attempts"),
        (Fault(how="stall"), r"no answer within 3 s \(sampling.request_timeout\); 2 attempts"),
        (TRANSIENT["aborted"], r"answer.choices\[0\].finish_reason: got 'abort', needs stop or length; 2 attempts"),
    ],
)
def test_attempts_have_an_end_and_what_is_sampled_stays(
    fault: Fault, reason: str, directory: Path, serve: Callable[..., StubServer], expected: list[Completion]
) -> None:
    servers = [serve(lambda number: fault if number >= 4 else None) for _ in range(2)]
    options = dataclasses.replace(
        OPTIONS, urls=tuple(server.url for server in servers), attempts=2, batch_size=1, request_timeout=3.0
    )
    sampler = make_sampler(directory, options, device="cpu", stop=STOP)
    found: dict[int, Completion] = {}
    with pytest.raises(ServerError, match=rf"http://127\.0\.0\.1:\d+: {reason}") as caught:
        for part in sampler.complete(ASKED):
            found |= part
    assert any(str(caught.value).startswith(server.url) for server in servers)
    assert_same([found[index] for index in sorted(found)], [expected[index] for index in sorted(found)])
    assert {ASKED[index].seed: 1 for index in found} == sum((server.answered for server in servers), Counter())
    assert len(found) == 8


def of_logprobs(change: Callable[[list[float]], Any]) -> Fault:
    return Fault(
        change=lambda answer: changed(
            answer, logprobs={"token_logprobs": change(answer["choices"][0]["logprobs"]["token_logprobs"])}
        )
    )


BROKEN = {
    "not valid JSON": Fault(content=b'{"choices": ['),
    "not UTF-8 text": Fault(content=b"\xff\xfe"),
    "not valid JSON: ": Fault(content=b"<html>it works</html>"),
    "answer: got [], needs": Fault(content=b"[]"),
    "answer: choices is missing": Fault(content=b'{"error": "no"}'),
    "answer.choices: is empty": Fault(content=b'{"choices": []}'),
    "answer.choices: got {}": Fault(content=b'{"choices": {}}'),
    "answer.choices[0].text: got None": Fault(change=lambda answer: changed(answer, text=None)),
    "answer.choices[0]: logprobs is missing": Fault(
        change=lambda answer: {"choices": [{"text": "A", "finish_reason": "stop"}]}
    ),
    "answer.choices[0].logprobs: got None": Fault(change=lambda answer: changed(answer, logprobs=None)),
    "answer.choices[0].logprobs: token_logprobs is missing": Fault(change=lambda answer: changed(answer, logprobs={})),
    "answer.choices[0].logprobs.token_logprobs[0]: got None": of_logprobs(lambda values: [None, *values[1:]]),
    "answer.choices[0].logprobs.token_logprobs[0]: got '-1'": of_logprobs(lambda values: ["-1", *values[1:]]),
    "answer.choices[0].logprobs.token_logprobs[0]: got 0.5": of_logprobs(lambda values: [0.5, *values[1:]]),
    "answer.choices[0].logprobs.token_logprobs: is empty": Fault(
        change=lambda answer: changed(answer, token_ids=[], logprobs={"token_logprobs": []})
    ),
    "answer.choices[0].token_ids: got 1 tokens, but": Fault(change=lambda answer: changed(answer, token_ids=[5])),
    "answer.choices[0].token_ids: got 40, but the model has 40 tokens": Fault(
        change=lambda answer: changed(answer, token_ids=[40 for _ in answer["choices"][0]["token_ids"]])
    ),
    "answer.choices[0].token_ids: got -1, but the model has 40 tokens": Fault(
        change=lambda answer: changed(answer, token_ids=[-1 for _ in answer["choices"][0]["token_ids"]])
    ),
    "answer.choices[0].token_ids[0]: got 'A', needs": Fault(change=lambda answer: changed(answer, token_ids=["A"])),
    "answer.choices[0]: got 9 tokens, needs at most 8": Fault(
        change=lambda answer: changed(answer, token_ids=[5] * 9, logprobs={"token_logprobs": [-1.0] * 9})
    ),
    "answer.choices[0].finish_reason: got length after 1 tokens": Fault(
        change=lambda answer: changed(
            answer, token_ids=[5], logprobs={"token_logprobs": [-1.0]}, finish_reason="length"
        )
    ),
    "/v1/completions: answers 400 Bad Request: no such field": Fault(400, content=b"no such\nfield"),
    "/v1/completions: answers 401 Unauthorized": Fault(401),
    "/v1/completions: answers 404 Not Found": Fault(404),
    "/v1/completions: answers 302 Found": Fault(302, {"Location": "http://127.0.0.1:1/"}),
}


@pytest.mark.parametrize("problem", BROKEN)
def test_an_answer_that_cannot_be_used_is_named(
    problem: str, directory: Path, serve: Callable[..., StubServer]
) -> None:
    server = serve(lambda number: BROKEN[problem])
    with pytest.raises(ServerError) as caught:
        sample(directory, [server.url])
    between = "" if problem.startswith("/") else ": "
    assert str(caught.value).startswith(f"{server.url}{between}{problem}") and "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_log_probabilities_that_are_no_numbers(value: float, directory: Path, serve: Callable[..., StubServer]) -> None:
    server = serve(lambda number: of_logprobs(lambda values: [*values[:-1], value]))
    with pytest.raises(NonFiniteError, match=rf"{server.url}: answer\.choices\[0\]\.logprobs\.token_logprobs\[\d\]: "):
        sample(directory, [server.url])


def test_other_weights_are_found_before_anything_is_taken(
    directory: Path, other: Path, serve: Callable[..., StubServer]
) -> None:
    server = serve(path=other)
    with pytest.raises(
        ServerError, match=rf"{server.url}: has other weights than {directory}, .* the log-probability -\d+\.\d{{4}}, "
    ):
        sample(directory, [server.url])
    right = serve()
    found: dict[int, Completion] = {}
    sampler = make_sampler(
        directory, dataclasses.replace(OPTIONS, urls=(right.url, server.url)), device="cpu", stop=STOP
    )
    with pytest.raises(ServerError, match=f"{server.url}: has other weights"):
        for part in sampler.complete(ASKED):
            found |= part
    assert {one.endpoint for one in found.values()} <= {right.url}


def test_nothing_is_taken_before_the_last_of_the_first_is_compared(
    directory: Path, serve: Callable[..., StubServer], expected: list[Completion]
) -> None:
    """Completions of other weights were stored where these happened to give them nearly the same log-probability."""
    wrong = of_logprobs(lambda values: [value - 0.5 for value in values])
    for number, comes in ((0, 0), (2, 0), (3, 0), (4, 15)):
        server = serve(lambda place, number=number: wrong if place == number else None)
        found: dict[int, Completion] = {}
        options = dataclasses.replace(OPTIONS, urls=(server.url,), batch_size=1)
        sampler = make_sampler(directory, options, device="cpu", stop=STOP)
        try:
            for part in sampler.complete(ASKED):
                found |= part
        except ServerError as error:
            assert "has other weights" in str(error)
        assert len(found) == comes
    few = sample(directory, [serve().url, serve().url], ASKED[:3])  # fewer than are compared
    assert_same(few, expected[:3])


def test_log_probabilities_after_the_temperature_are_found(directory: Path, serve: Callable[..., StubServer]) -> None:
    with pytest.raises(ServerError, match=r"has other weights .* raw log-probabilities \(vLLM: --logprobs-mode raw"):
        sample(directory, [serve(raw=False).url])


@pytest.mark.parametrize(
    ("dtype", "noise", "accepted"),
    [
        ("float32", 0.005, True),
        ("bfloat16", 0.03, True),
        ("float32", 0.2, False),
        ("bfloat16", 0.6, False),
        ("float32", -0.2, False),
    ],
)
def test_rounding_is_no_other_model(
    dtype: str, noise: float, accepted: bool, directory: Path, serve: Callable[..., StubServer]
) -> None:
    server = serve(lambda number: of_logprobs(lambda values: [value - noise for value in values]), token_ids=True)
    urls, asked = [server.url], ASKED[:3]
    if accepted:
        assert len(sample(directory, urls, asked, dtype)) == 3
    else:
        with pytest.raises(ServerError, match="has other weights"):
            sample(directory, urls, asked, dtype)


def test_a_server_that_comes_back_is_checked_again(
    directory: Path, other: Path, serve: Callable[..., StubServer]
) -> None:
    """A server that had been started again on the weights of the iteration before went on unnoticed."""

    def behave(number: int) -> Fault | None:
        if number == 8:
            server.load(other)
            return Fault(how="drop")
        return None

    server = serve(behave)
    with pytest.raises(ServerError, match="has other weights"):
        sample(directory, [server.url], batch_size=1)


def test_without_token_ids_the_text_counts(
    directory: Path, serve: Callable[..., StubServer], expected: list[Completion]
) -> None:
    assert_same(sample(directory, [serve(token_ids=False).url]), expected)


def test_without_token_ids_other_weights_are_found_too(
    directory: Path, other: Path, serve: Callable[..., StubServer]
) -> None:
    with pytest.raises(ServerError, match="has other weights"):
        sample(directory, [serve(path=other, token_ids=False).url])
    odd = serve(lambda number: Fault(change=lambda answer: changed(answer, text="\N{BLACK CHESS KING}")))
    odd.token_ids = False
    with pytest.raises(ServerError, match=r"gives no token ids \(`return_token_ids`\)"):
        sample(directory, [odd.url])


@pytest.mark.parametrize(
    ("models", "asked", "problem"),
    [
        (("a", "b"), None, "has a, b, needs one model alone"),
        ((), None, "has no model, needs one model alone"),
        (("a", "b"), "c", "has a, b, needs 'c'"),
        (("a", "b"), "b", None),
        (("b",), None, None),
    ],
)
def test_the_name_of_the_model(
    models: tuple[str, ...],
    asked: str | None,
    problem: str | None,
    directory: Path,
    serve: Callable[..., StubServer],
) -> None:
    server = serve(models=models)
    if problem is None:
        sample(directory, [server.url], ASKED[:2], served_model=asked)
        assert {body["model"] for body in server.asked} == {"b"}
    else:
        with pytest.raises(ServerError, match=f"{server.url}: {problem}; set sampling.served_model"):
            sample(directory, [server.url], ASKED[:2], served_model=asked)


def test_a_context_that_is_too_short(directory: Path, serve: Callable[..., StubServer]) -> None:
    assert len(sample(directory, [serve(context=13).url], ASKED[:2])) == 2
    server = serve(context=12)
    with pytest.raises(ServerError, match=rf"{server.url}: reads 12 tokens, but problem ABCDE 0's prompt of 5 and"):
        sample(directory, [server.url])
    assert server.asked == []
    with pytest.raises(DataError, match=r"long: its prompt of 60 tokens and the 8 .* context of 64"):
        sample(directory, [server.url], [Request("A" * 60, 0, "long")])


def test_a_run_that_is_stopped_leaves_no_request_waiting(directory: Path, serve: Callable[..., StubServer]) -> None:
    before = threading.active_count()
    server = serve(lambda number: Fault(how="stall") if number > 5 else None)
    sampler = make_sampler(directory, dataclasses.replace(OPTIONS, urls=(server.url,)), device="cpu", stop=STOP)
    parts = sampler.complete(ASKED)
    next(parts)
    parts.close()  # type: ignore[attr-defined]  # of a generator
    sampler.close()
    server.end()
    end = time.monotonic() + 60
    while threading.active_count() > before and time.monotonic() < end:
        time.sleep(0.01)
    assert threading.active_count() <= before


@pytest.mark.parametrize(
    ("header", "seconds"),
    [(None, None), ("0", 0), ("2.5", 2.5), ("-1", None), ("nan", None), ("inf", None), ("x", None), ("", None)],
)
def test_the_time_that_a_server_asks_for(header: str | None, seconds: float | None) -> None:
    assert endpoint._seconds(header) == seconds
    assert endpoint._seconds(formatdate(time.time() + 100, usegmt=True)) == pytest.approx(100, abs=10)
    assert endpoint._seconds(formatdate(0, usegmt=True)) == 0


def test_a_model_that_is_broken_itself(tokenizer: Any, tmp_path: Path, serve: Callable[..., StubServer]) -> None:
    path = save(tokenizer, tmp_path, 0)
    server = serve()
    sampler = make_sampler(path, dataclasses.replace(OPTIONS, urls=(server.url,)), device="cpu", stop=STOP)
    broken = make_base("llama")
    with torch.no_grad():
        broken.lm_head.weight[7] = 3e38
        broken.model.norm.weight.fill_(3e38)
    broken.save_pretrained(path)
    with pytest.raises(QuietStarError, match="NaN or infinite"):
        list(sampler.complete(ASKED))

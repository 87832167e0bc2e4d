"""Sampling through any number of servers with an OpenAI-compatible completions endpoint.

`HttpSampler.complete` is read first. `_Spread` hands the requests out to the servers, and `_OwnModel` says whether a
server has the weights that this iteration samples from.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import PreTrainedTokenizerBase

from quietstar.config.sampling import SamplingOptions, server_url
from quietstar.data.examples import end_of_sequence
from quietstar.data.tokenizer import encode_prompt, load_tokenizer
from quietstar.errors import DataError, NonFiniteError, ServerError
from quietstar.model.loading import (
    check_weights,
    ending_tokens,
    load_causal_lm,
    load_configuration,
    load_generation_config,
)
from quietstar.sampling.endpoint import Answer, Endpoint, TransientError
from quietstar.sampling.requests import Completion, CompletionText, Request, encode_requests

CHECKED = 4
"""Completions of each server that are compared with the own model before any counts, and again after a failure: it may
have been started again with other weights."""

FREE_TOKENS = 8
"""Tokens by which a short completion may differ more: the tolerance is that of so many tokens more than it has."""

FIRST_WAIT, LONGEST_WAIT, LONGEST_ASKED = 1.0, 60.0, 600.0
"""Seconds that a server rests after its first failure, each time twice as long; at most; and at most if it asks to."""

WATCHED = 1.0
"""Seconds between two looks at a server of this run while no answer comes."""


class LocalServer(Protocol):
    """A server that this run has started."""

    def check(self) -> None:
        """Refuses to go on where the server has ended."""
        ...


class HttpSampler:
    """Samples through servers; a completion depends on the prompt, the seed and the model, not on the server.

    Each request has its own seed, and up to `batch_size` are at a server at once. Log-probabilities have to be the raw
    ones: of the model itself, before temperature, top-k and top-p. The first completions of each server are compared
    with what the model of this iteration gives them, so that no completion of other weights is taken.

    Args:
        path: Directory or hub name of the model that the servers should have, and its tokenizer.
        options: Sampling options, such as the temperature and the servers.
        urls: URLs of the servers.
        dtype: Dtype of the weights, such as `bfloat16`.
        device: Device of the own model, which is loaded to check the servers.
        stop: Strings that end a completion, besides the end-of-sequence token.
        server: Server of this run at the only URL; completions then have no endpoint.

    Raises:
        ConfigError: The model or its tokenizer cannot be used.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        options: SamplingOptions,
        urls: Sequence[str],
        *,
        dtype: str,
        device: torch.device,
        stop: Sequence[str] = (),
        server: LocalServer | None = None,
    ) -> None:
        self.options = options
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(path)
        end_of_sequence(self.tokenizer)
        whole = load_configuration(path)
        check_weights(path, whole)
        config = whole.get_text_config()
        self._ending = ending_tokens(self.tokenizer, config.vocab_size, load_generation_config(path), config)
        self._context = getattr(config, "max_position_embeddings", None)
        self._vocabulary: int = config.vocab_size
        self._text = CompletionText(self.tokenizer, stop)
        self._own = _OwnModel(path, dtype, device)
        self._server = server
        key = None if options.api_key_variable is None else os.environ[options.api_key_variable]
        self._states = [
            _State(
                Endpoint(
                    server_url(url), timeout=options.request_timeout, api_key=key, served_model=options.served_model
                )
            )
            for url in urls
        ]

    def complete(self, requests: Sequence[Request], done: Container[int] = ()) -> Iterator[dict[int, Completion]]:
        """Samples the completions that are missing, each by itself; see `Sampler`.

        Raises:
            DataError: A prompt has no tokens, or is too long for the model's context.
            ServerError: A server refuses a request, gives an answer that cannot be used or has other weights, or all
                servers fail.
            NonFiniteError: A log-probability is NaN or infinite.
        """
        prompts = encode_requests(self.tokenizer, requests, self.options.max_new_tokens, self._context)
        missing = [index for index in range(len(requests)) if index not in done]
        if not missing:
            return
        longest = max(missing, key=lambda index: len(prompts[index]))

        def greet(endpoint: Endpoint) -> str:
            return self._model_of(endpoint, requests[longest], len(prompts[longest]))

        def ask(endpoint: Endpoint, model: str, index: int) -> Answer:
            return endpoint.complete(self._body(model, prompts[index], requests[index].seed), self._vocabulary)

        spread = _Spread(self._states, greet, ask, missing, self.options.batch_size, self.options.attempts)
        left, held = len(missing), dict[int, _Held]()
        try:
            while left:
                found: dict[int, Completion] = {}
                for index, state, answer in spread.results(self._watch):
                    completion, tokens = self._read(requests[index], prompts[index], state.endpoint, answer)
                    if state.checked >= CHECKED:
                        found[index] = completion
                        continue
                    if tokens:
                        self._check(requests[index], prompts[index], state.endpoint, answer, tokens)
                        state.checked += 1
                    held[index] = _Held(state, completion, bool(tokens))
                at_end = spread.error is not None or left == len(found) + len(held)
                sure = [index for index, one in held.items() if one.is_sure(at_end)]
                found |= {index: held.pop(index).completion for index in sure}
                left -= len(found)
                if found:
                    yield found
                if spread.error is not None:
                    raise spread.error
                if at_end and held:
                    index, one = next(iter(held.items()))
                    raise ServerError(
                        f"{one.state.endpoint.url}: gives no token ids (`return_token_ids`), and the text of "
                        f"{requests[index].name} is not encoded into as many tokens as it has sampled, so its weights "
                        "cannot be checked; needs a server that gives them"
                    )
        finally:
            spread.close()

    def close(self) -> None:
        """Frees the own model; the servers stay."""
        self._own.close()

    def _watch(self) -> None:
        if self._server is not None:
            self._server.check()

    def _model_of(self, endpoint: Endpoint, longest: Request, length: int) -> str:
        name, context = endpoint.model()
        if context is not None and length + self.options.max_new_tokens > context:
            raise ServerError(
                f"{endpoint.url}: reads {context} tokens, but {longest.name}'s prompt of {length} and the "
                f"{self.options.max_new_tokens} of sampling.max_new_tokens are more; start it with a longer context "
                "(vLLM: --max-model-len), or lower that"
            )
        return name

    def _body(self, model: str, prompt: Sequence[int], seed: int) -> dict[str, Any]:
        return {
            "model": model,
            "prompt": list(prompt),
            "seed": seed,
            "max_tokens": self.options.max_new_tokens,
            "temperature": self.options.temperature,
            "top_p": self.options.top_p,
            "top_k": self.options.top_k,
            "min_p": 0.0,  # a server may take what is not named from the model's generation_config.json
            "repetition_penalty": 1.0,
            "stop": list(self._text.stop),
            "stop_token_ids": self._ending,
            "logprobs": 1,
            "return_token_ids": True,
        }

    def _read(
        self, request: Request, prompt: tuple[int, ...], endpoint: Endpoint, answer: Answer
    ) -> tuple[Completion, tuple[int, ...] | None]:
        """Returns a completion, and its tokens where they are known."""
        tokens, count = answer.tokens, len(answer.logprobs)
        if tokens is None:
            tokens = self._encoded(request.prompt, prompt, answer)
            ends = [place for place in map(answer.text.find, self._text.stop) if place >= 0]
            text, ended = (answer.text[: min(ends)] if ends else answer.text), answer.ended or bool(ends)
        else:
            last = tokens[-1] in self._ending
            text, stopped = self._text.decode(prompt, tokens[:-1] if last else tokens)
            ended = last or stopped or answer.ended
        limit = self.options.max_new_tokens
        if count > limit:
            raise ServerError(
                f"{endpoint.url}: answer.choices[0]: got {count} tokens, needs at most {limit} (max_tokens)"
            )
        if not ended and count < limit:
            raise ServerError(
                f"{endpoint.url}: answer.choices[0].finish_reason: got length after {count} tokens, but max_tokens is "
                f"{limit}; it may need a longer context (vLLM: --max-model-len)"
            )
        name = endpoint.url if self._server is None else None
        return Completion(text, sum(answer.logprobs), count, "stop" if ended else "length", name), tokens

    def _encoded(self, before: str, prompt: tuple[int, ...], answer: Answer) -> tuple[int, ...] | None:
        """Returns the tokens of a text that a server gives without them; None where others may have been sampled."""
        try:
            both = encode_prompt(self.tokenizer, before + answer.text)
        except DataError:
            return None
        if tuple(both[: len(prompt)]) != prompt:
            return None
        tokens = tuple(both[len(prompt) :])
        if answer.ended and len(tokens) + 1 == len(answer.logprobs) and not self._text.stop:
            tokens += (self._ending[0],)
        return tokens if len(tokens) == len(answer.logprobs) else None

    def _check(
        self, request: Request, prompt: tuple[int, ...], endpoint: Endpoint, answer: Answer, tokens: tuple[int, ...]
    ) -> None:
        own = self._own.logprobs(request.name, prompt, tokens)
        difference = sum(abs(one - other) for one, other in zip(own, answer.logprobs, strict=True))
        if not difference <= self._own.tolerance * (len(own) + FREE_TOKENS):
            raise ServerError(
                f"{endpoint.url}: has other weights than {self._own.path}, which this iteration samples from: it gives "
                f"a completion of {request.name} the log-probability {sum(answer.logprobs):.4f}, the model gives it "
                f"{sum(own):.4f} ({len(own)} tokens). Give the server these weights (sampling.reload_command does it "
                "each time), and raw log-probabilities (vLLM: --logprobs-mode raw_logprobs); then give the same "
                "command again"
            )


class _OwnModel:
    """The model that an iteration samples from, loaded when it is first asked.

    A token may differ by `tolerance` on average: eight units of rounding of the dtype or a hundredth of a nat, since
    engines round in other orders.
    """

    def __init__(self, path: str | os.PathLike[str], dtype: str, device: torch.device) -> None:
        self.path, self._device = os.fspath(path), device
        self._dtype: torch.dtype = getattr(torch, dtype)
        self.tolerance = max(0.01, 8 * torch.finfo(self._dtype).eps)
        self._model: Any = None

    @torch.inference_mode()
    def logprobs(self, name: str, prompt: Sequence[int], completion: Sequence[int]) -> list[float]:
        """Returns the log-probability of each token of a completion, at temperature 1."""
        if not completion:
            return []
        if self._model is None:
            model: Any = load_causal_lm(self.path, self._dtype)
            self._model = model.to(self._device).eval()
        tokens = torch.tensor([[*prompt, *completion]], device=self._device)
        logits = self._model(tokens[:, :-1], use_cache=False).logits[0, len(prompt) - 1 :].float()
        found = logits.log_softmax(-1).gather(-1, tokens[0, len(prompt) :, None])[:, 0]
        if not bool(found.isfinite().all()):
            raise NonFiniteError(f"{name}: the predictions of {self.path} are NaN or infinite")
        return [float(one) for one in found]

    def close(self) -> None:
        self._model = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@dataclass(eq=False)
class _State:
    """A server and how it has fared."""

    endpoint: Endpoint
    model: str | None = None
    checked: int = 0
    running: int = 0
    failures: int = 0
    failed_at: float = 0.0
    rests_until: float = 0.0


@dataclass(frozen=True)
class _Held:
    """A completion that waits until its server has been checked, and whether it has been compared itself."""

    state: _State
    completion: Completion
    is_compared: bool

    def is_sure(self, at_end: bool) -> bool:
        """Returns whether it can be taken; at the end no others come to compare."""
        return self.state.checked >= CHECKED or (at_end and (self.is_compared or self.state.checked > 0))


@dataclass(eq=False)
class _Task:
    """A request that has no answer yet, with its failures at each server."""

    index: int
    failures: dict[_State, int]


class _Spread:
    """Spreads requests over servers: each has threads that take the next request in order.

    A server that fails rests, longer each time, and then takes one request at a time until it has answered one. A
    request that has failed goes first, to the servers at which it has failed least.

    Args:
        states: Servers.
        greet: Function that finds the name of a server's model, called before its first request and after a failure.
        ask: Function `(server, model, index) -> answer` that sends one request.
        tasks: Indices of the requests, in order.
        width: Largest number of requests that are at a server at once.
        attempts: Failures of one request at each server after which it is given up.
    """

    def __init__(
        self,
        states: Sequence[_State],
        greet: Callable[[Endpoint], str],
        ask: Callable[[Endpoint, str, int], Answer],
        tasks: Sequence[int],
        width: int,
        attempts: int,
    ) -> None:
        self.error: BaseException | None = None
        self._states, self._greet, self._ask, self._attempts = states, greet, ask, attempts
        self._changed = threading.Condition()
        self._waiting = deque(_Task(index, dict.fromkeys(states, 0)) for index in tasks)
        self._closed = False
        self._results: queue.SimpleQueue[tuple[int, _State, Answer] | BaseException] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, args=(state,), daemon=True)
            for state in states
            for _ in range(min(width, len(tasks)))
        ]
        for thread in self._threads:
            thread.start()

    def results(self, watch: Callable[[], None]) -> Iterator[tuple[int, _State, Answer]]:
        """Yields the answers that have come, at least one unless `error` is set; `watch` is called while none comes."""
        while True:
            try:
                result = self._results.get(timeout=WATCHED)
                break
            except queue.Empty:
                watch()
        while True:
            if isinstance(result, BaseException):
                self.error = result
                return
            yield result
            try:
                result = self._results.get_nowait()
            except queue.Empty:
                return

    def close(self) -> None:
        """Ends the threads, and the requests that have no answer yet."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for state in self._states:
            state.endpoint.interrupt()
        end = time.monotonic() + WATCHED
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def _work(self, state: _State) -> None:
        while (task := self._take(state)) is not None:
            started = time.monotonic()
            try:
                model = state.model
                if model is None:
                    model = self._greet(state.endpoint)
                    with self._changed:
                        state.model = model
                        self._changed.notify_all()
                answer = self._ask(state.endpoint, model, task.index)
            except TransientError as error:
                self._fail(state, task, error, started)
            except BaseException as error:  # it is raised where the results are read
                self._results.put(error)
                return
            else:
                with self._changed:
                    state.running -= 1
                    state.failures = 0
                    self._changed.notify_all()
                self._results.put((task.index, state, answer))

    def _take(self, state: _State) -> _Task | None:
        """Waits for the next request of a server, and returns it; None at the end."""
        with self._changed:
            while not self._closed:
                rest = state.rests_until - time.monotonic()
                alone = state.model is None or state.failures > 0
                if rest <= 0 and not (alone and state.running):
                    for task in self._waiting:
                        if task.failures[state] == min(task.failures.values()):
                            self._waiting.remove(task)
                            state.running += 1
                            return task
                self._changed.wait(rest if rest > 0 else None)
        return None

    def _fail(self, state: _State, task: _Task, error: TransientError, started: float) -> None:
        with self._changed:
            now = time.monotonic()
            state.running -= 1
            if started >= state.failed_at:  # else it failed together with others
                state.failures += 1
                state.failed_at = now
                wait = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (state.failures - 1))
            else:
                wait = 0.0
            asked = min(LONGEST_ASKED, error.wait or 0.0)
            state.rests_until = max(state.rests_until, now + max(wait, asked))
            state.model, state.checked = None, 0
            task.failures[state] += 1
            self._waiting.appendleft(task)
            self._changed.notify_all()
            if min(task.failures.values()) >= self._attempts:
                self._results.put(
                    ServerError(
                        f"{state.endpoint.url}: {error}; {self._attempts} attempts at each server have failed "
                        "(sampling.attempts). What is sampled is kept: mend the servers, and give the same command "
                        "again"
                    )
                )

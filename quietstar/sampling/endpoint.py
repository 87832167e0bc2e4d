"""One server with an OpenAI-compatible completions endpoint: what it is asked, and what of its answer can be used.

It is reached directly, without a proxy, and redirections are not followed. An answer is data: it is read within limits,
and what is not as it should be is named with its field.
"""

from __future__ import annotations

import email.utils
import http.client
import json
import math
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

from quietstar.config.parsing import MAX_JSON_BYTES, check_type, parse_json, shown
from quietstar.errors import DataError, NonFiniteError, ServerError

COMPLETIONS, MODELS = "/v1/completions", "/v1/models"
TRANSIENT = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS)
"""Statuses below 500 after which the same request may succeed."""

SLACK = 1e-3
"""Largest log-probability that rounding can make of 0, in nats."""

CHUNK = 1 << 16
"""Bytes of an answer that are read at once."""


class TransientError(Exception):
    """A failure after which the same request may succeed, there or at another server.

    Args:
        reason: Failure in words.
        wait: Seconds that the server asks to wait; None where it does not say.
    """

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


@dataclass(frozen=True)
class Answer:
    """A completion as a server gives it.

    Args:
        text: Text of the completion.
        tokens: Ids of the sampled tokens; None where the server does not give them.
        logprobs: Log-probability of each sampled token, in nats.
        ended: Whether it ended by itself: by a token or a stop string.
    """

    text: str
    tokens: tuple[int, ...] | None
    logprobs: tuple[float, ...]
    ended: bool


class Endpoint:
    """A server.

    Args:
        url: URL of the server, without `/v1`.
        timeout: Time limit of a request in seconds.
        api_key: Key that the server asks for; None: none.
        served_model: Name under which the server knows the model; None: the only name that it lists.
    """

    def __init__(
        self, url: str, *, timeout: float, api_key: str | None = None, served_model: str | None = None
    ) -> None:
        self.url, self._timeout, self._served_model = url, timeout, served_model
        parts = urlsplit(url)
        self._https, self._host, self._port, self._path = (
            parts.scheme == "https",
            parts.hostname,
            parts.port,
            parts.path,
        )
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._lock = threading.Lock()
        self._open: set[http.client.HTTPConnection] = set()

    def model(self) -> tuple[str, int | None]:
        """Asks which model the server has.

        Returns:
            Its name, and the number of tokens that it can read; None where the server does not say.

        Raises:
            TransientError: The server failed.
            ServerError: It has no such model, or its answer cannot be used.
        """
        try:
            listed = self._read(self._exchange(MODELS), _Models)["data"]
        except _MissingError:
            if self._served_model is None:
                raise
            return self._served_model, None  # some servers list nothing
        found = [one for one in listed if self._served_model in (None, one["id"])]
        if len(found) != 1:
            names = ", ".join(one["id"] for one in listed)[:300] or "no model"
            asked = "one model alone" if self._served_model is None else shown(self._served_model)
            raise ServerError(f"{self.url}: has {names}, needs {asked}; set sampling.served_model to what it serves")
        return found[0]["id"], found[0].get("max_model_len")

    def complete(self, body: Mapping[str, Any], vocabulary: int) -> Answer:
        """Asks for one completion.

        Args:
            body: Request as the completions endpoint takes it, with `logprobs`.
            vocabulary: Number of tokens that the model knows.

        Raises:
            TransientError: The server failed.
            ServerError: It refuses the request, or its answer cannot be used; the message names the field.
            NonFiniteError: A log-probability is NaN or infinite.
        """
        choices = self._read(self._exchange(COMPLETIONS, body), _Completions)["choices"]
        if not choices:
            raise ServerError(f"{self.url}: answer.choices: is empty, needs the completion")
        choice, logprobs = choices[0], choices[0]["logprobs"]["token_logprobs"]
        if (reason := choice["finish_reason"]) not in ("stop", "length"):
            raise TransientError(f"answer.choices[0].finish_reason: got {shown(reason)}, needs stop or length")
        for place, value in enumerate(logprobs):
            name = f"{self.url}: answer.choices[0].logprobs.token_logprobs[{place}]"
            if not math.isfinite(value):
                raise NonFiniteError(f"{name}: got {value}, needs a finite number: the model's predictions are broken")
            if value > SLACK:
                raise ServerError(f"{name}: got {value}, needs the log-probability of a token, which is at most 0")
        tokens = choice.get("token_ids")
        if tokens is not None and len(tokens) != len(logprobs):
            raise ServerError(
                f"{self.url}: answer.choices[0].token_ids: got {len(tokens)} tokens, but {len(logprobs)} "
                "log-probabilities"
            )
        if wrong := [token for token in tokens or () if not 0 <= token < vocabulary]:
            raise ServerError(
                f"{self.url}: answer.choices[0].token_ids: got {wrong[0]}, but the model has {vocabulary} tokens: the "
                "server has another model"
            )
        if not logprobs and (tokens is not None or choice["text"]):
            raise ServerError(
                f"{self.url}: answer.choices[0].logprobs.token_logprobs: is empty, needs one for each token"
            )
        return Answer(choice["text"], None if tokens is None else tuple(tokens), tuple(logprobs), reason == "stop")

    def interrupt(self) -> None:
        """Ends all requests; those that wait for an answer fail at once."""
        with self._lock:
            connections = list(self._open)
        for connection in connections:
            if connection.sock is not None:
                with suppress(OSError):
                    connection.sock.shutdown(socket.SHUT_RDWR)

    def _read(self, content: bytes, kind: type[Any]) -> dict[str, Any]:
        try:
            value = parse_json(content, surrogates=True)
            check_type(value, kind, "answer")
        except DataError as error:
            raise ServerError(f"{self.url}: {error}") from None
        assert isinstance(value, dict)  # `kind` is a dataclass
        return value

    def _exchange(self, path: str, body: Mapping[str, Any] | None = None) -> bytes:
        """Sends one request, and returns the content of the answer."""
        deadline = time.monotonic() + self._timeout
        connection = (http.client.HTTPSConnection if self._https else http.client.HTTPConnection)(
            self._host or "", self._port, timeout=self._timeout
        )
        with self._lock:
            self._open.add(connection)
        try:
            sent = None if body is None else json.dumps(body).encode()
            connection.request("GET" if body is None else "POST", self._path + path, sent, self._headers)
            response = connection.getresponse()
            content = bytearray()
            while part := response.read1(CHUNK):
                content += part
                if len(content) > MAX_JSON_BYTES:
                    raise ServerError(f"{self.url}: its answer has more than {MAX_JSON_BYTES:,} bytes")
                if time.monotonic() > deadline:
                    raise TimeoutError
            if response.length:
                raise TransientError("the answer is torn")
        except TimeoutError:
            raise TransientError(f"no answer within {self._timeout:g} s (sampling.request_timeout)") from None
        except (OSError, http.client.HTTPException) as error:
            reason = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
            raise TransientError(" ".join(reason.split())[:300]) from None
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()
        if response.status == HTTPStatus.OK:
            return bytes(content)
        said = " ".join(content.decode(errors="replace").split())[:300]
        reason = f"answers {response.status} {response.reason}" + (f": {said}" if said else "")
        if response.status in TRANSIENT or response.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            raise TransientError(reason, _seconds(response.getheader("Retry-After")))
        kind = _MissingError if response.status == HTTPStatus.NOT_FOUND else ServerError
        raise kind(f"{self.url}{path}: {reason}")


class _MissingError(ServerError):
    """The server has no such path."""


@dataclass(frozen=True)
class _Model:
    id: str
    max_model_len: int | None = None


@dataclass(frozen=True)
class _Models:
    data: list[_Model]


@dataclass(frozen=True)
class _Logprobs:
    token_logprobs: list[float]


@dataclass(frozen=True)
class _Choice:
    text: str
    logprobs: _Logprobs
    finish_reason: str | None
    token_ids: list[int] | None = None


@dataclass(frozen=True)
class _Completions:
    choices: list[_Choice]


def _seconds(header: str | None) -> float | None:
    """Returns the seconds of a Retry-After header, which holds a number or a date; None where it is neither."""
    if header is None:
        return None
    with suppress(ValueError):
        seconds = float(header)
        return seconds if 0 <= seconds < math.inf else None
    with suppress(ValueError):
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    return None

"""A server with an OpenAI-compatible completions endpoint that computes real completions of a small model.

Each completion is computed by definition: one row, no cache, the whole text again for every token. The faults of real
servers are made on purpose: `StubServer.behave` says which answer gets which.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import torch
from transformers import AutoModelForCausalLM

from quietstar.data.tokenizer import load_tokenizer
from quietstar.model.draw import draw, uniforms

Change = Callable[[dict[str, Any]], Any]


class Fault:
    """What happens to a request in place of an answer.

    Args:
        status: HTTP status of the answer.
        headers: Headers of the answer.
        content: Content of the answer, as it is sent.
        change: Function that spoils the right answer.
        how: `stall` (no answer at all), `drop` (the connection is closed) or `torn` (it is closed in the middle of the
            right answer).
    """

    def __init__(
        self,
        status: int = 200,
        headers: dict[str, str] | None = None,
        content: bytes | None = None,
        change: Change | None = None,
        how: str = "",
    ) -> None:
        self.status, self.headers, self.content, self.change, self.how = status, headers or {}, content, change, how


class StubServer:
    """The server, on a port of its own.

    Args:
        directory: Model directory.
        behave: Function from the number of the request, from 0, to a fault, or None for the right answer.
        token_ids: Whether the answers have token ids.
        models: Names that it lists.
        context: Number of tokens that it says it reads; None: it does not say.
        raw: Whether log-probabilities are those before the temperature.
        key: Key that it asks for.
        port: Port; 0 takes a free one.
    """

    def __init__(
        self,
        directory: Path,
        behave: Callable[[int], Fault | None] = lambda number: None,
        *,
        token_ids: bool = True,
        models: tuple[str, ...] = ("served",),
        context: int | None = None,
        raw: bool = True,
        key: str | None = None,
        port: int = 0,
    ) -> None:
        self.behave, self.token_ids, self.models, self.context, self.raw, self.key = (
            behave,
            token_ids,
            models,
            context,
            raw,
            key,
        )
        self.asked: list[dict[str, Any]] = []
        self.answered: Counter[int] = Counter()
        self.most_at_once = self._at_once = 0
        self._lock, self._computing, self._ended = threading.Lock(), threading.Lock(), threading.Event()
        self._connections: set[socket.socket] = set()
        self.load(directory)
        server = self

        class Handler(BaseHTTPRequestHandler):
            def setup(self) -> None:
                super().setup()
                server._connections.add(self.connection)

            def finish(self) -> None:
                server._connections.discard(self.connection)
                with suppress(OSError):
                    super().finish()

            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                if self.path == "/health":
                    self._send(200, b"")
                elif self.path == "/v1/models":
                    listed = [{"id": name, "max_model_len": server.context} for name in server.models]
                    self._send(200, json.dumps({"data": listed}).encode())
                elif self.path.startswith("/load?"):
                    server.load(Path(unquote(self.path.removeprefix("/load?"))))
                    self._send(200, b"")
                else:
                    self._send(404, b"not here")

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if server.key is not None and self.headers["Authorization"] != f"Bearer {server.key}":
                    self._send(401, b"no key")
                    return
                with server._lock:
                    number = len(server.asked)
                    server.asked.append(body)
                with suppress(OSError):
                    self._answer(body, server.behave(number))

            def _answer(self, body: dict[str, Any], fault: Fault | None) -> None:
                fault = fault or Fault()
                if fault.how == "stall":
                    server._ended.wait()
                if fault.how in ("stall", "drop"):
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                if fault.content is not None or fault.status != 200:
                    self._send(fault.status, fault.content or b"a fault", fault.headers)
                    return
                made = server.complete(body)
                if fault.change is not None:
                    made = fault.change(made)
                content = json.dumps(made).encode()
                if fault.how == "torn":
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content[: len(content) // 2])
                    self.wfile.flush()
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                if fault.change is None:
                    with server._lock:
                        server.answered[body["seed"]] += 1
                self._send(200, content)

            def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
                self.send_response(status)
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        self._http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._http.handle_error = lambda *_: None  # type: ignore[method-assign]  # of connections that are cut
        self._http.block_on_close = False
        self.port: int = self._http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def load(self, directory: Path) -> None:
        """Takes other weights."""
        model = AutoModelForCausalLM.from_pretrained(directory).eval()
        self._model, self._tokenizer = model, load_tokenizer(directory)

    def end(self) -> None:
        """Ends at once: those who wait for an answer get none."""
        self._ended.set()
        self._http.shutdown()
        self._http.server_close()
        for connection in list(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._thread.join()

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request."""
        with self._lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            return self._complete(body)
        finally:
            with self._lock:
                self._at_once -= 1

    @torch.no_grad()
    def _complete(self, body: dict[str, Any]) -> dict[str, Any]:
        with self._computing:
            tokens, logprobs, text, reason = list[int](), list[float](), "", "length"
            uniform = uniforms([body["seed"]], body["max_tokens"])
            for step in range(body["max_tokens"]):
                logits = self._model(torch.tensor([body["prompt"] + tokens]), use_cache=False).logits[:, -1]
                how = {name: body[name] for name in ("temperature", "top_k", "top_p")}
                token, logprob = draw(logits, uniform[:, step], **how)
                if not self.raw:
                    logprob = (logits / body["temperature"]).log_softmax(-1)[:, int(token)]
                tokens.append(int(token))
                logprobs.append(float(logprob))
                if tokens[-1] in body["stop_token_ids"]:
                    reason = "stop"
                    break
                text = self._tokenizer.decode(tokens, skip_special_tokens=True)
                ends = [place for place in map(text.find, body["stop"]) if place >= 0]
                if ends:
                    text, reason = text[: min(ends)], "stop"
                    break
        choice = {"text": text, "finish_reason": reason, "logprobs": {"token_logprobs": logprobs}}
        if self.token_ids and body["return_token_ids"]:
            choice["token_ids"] = tokens
        return {"choices": [choice]}


def main() -> None:
    """Serves what the arguments of vLLM's server say, until the process is ended."""
    options = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=False))
    StubServer(Path(options["--model"]), port=int(options["--port"]))
    threading.Event().wait()

"""A tiny server on this machine that behaves as badly as it is told to."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Loopback:
    """What the server does and has seen."""

    behaviours: list[str] = field(default_factory=list)
    """What the next requests get, one each; after the last, good answers."""
    always: str = "good"
    answer: str = "A fine answer."
    finish_reason: str = "stop"
    models: tuple[str, ...] = ("tiny",)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    url: str = ""
    most_at_once: int = 0
    seconds: float = 0.0
    """How long a good answer takes."""
    die: Callable[[], None] = lambda: None
    """Ends the server; until the end of the block its port is nobody else's."""
    _at_once: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _over: threading.Event = field(default_factory=threading.Event)

    def behaviour(self) -> str:
        with self._lock:
            return self.behaviours.pop(0) if self.behaviours else self.always

    def enter(self, step: int) -> None:
        with self._lock:
            self._at_once += step
            self.most_at_once = max(self.most_at_once, self._at_once)


class _Handler(BaseHTTPRequestHandler):
    state: Loopback

    def do_GET(self) -> None:
        self._note()
        if self.state.always == "401":
            self._send(401, {"error": {"message": f"bad key {self.headers['authorization']}"}})
        else:
            self._send(200, {"data": [{"id": name} for name in self.state.models]})

    def do_POST(self) -> None:
        self.state.enter(1)
        try:
            self._post()
        finally:
            self.state.enter(-1)

    def _post(self) -> None:
        self._note()
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.state.bodies.append(body)
        behaviour = self.state.behaviour()
        if behaviour == "good":
            self.state._over.wait(self.state.seconds)
            self._send(200, {"choices": [self._choice()]})
        elif behaviour == "hang":
            self.state._over.wait(30)
        elif behaviour == "drip":
            self._head(200, "application/json", 100)
            while not self.state._over.wait(0.05):
                self.wfile.write(b" ")
        elif behaviour == "break":
            self._head(200, "application/json", 1000)
            self.wfile.write(b'{"choices": [')
        elif behaviour == "garbage":
            self._raw(200, "application/json", b'{"choices": [nonsense')
        elif behaviour == "page":
            self._raw(200, "text/html", b"<html>Welcome to the portal</html>")
        elif behaviour == "empty":
            self._send(200, {"choices": []})
        elif behaviour == "strange":
            self._send(200, {"choices": [{"message": {"content": ["no", 3]}}]})
        elif behaviour == "thinks":
            choice = {"message": {"content": None}, "finish_reason": "length"}
            self._send(200, {"choices": [choice]})
        else:
            status, _, wait = behaviour.partition(" ")
            headers = {"retry-after": wait} if wait else {}
            message = f"no, {self.headers['authorization']}"
            self._send(int(status), {"error": {"message": message}}, **headers)

    def _choice(self) -> dict[str, Any]:
        reason = self.state.finish_reason
        if self.path.endswith("/chat/completions"):
            return {"message": {"content": self.state.answer}, "finish_reason": reason}
        return {"text": self.state.answer, "finish_reason": reason}

    def _note(self) -> None:
        self.state.keys.append(self.headers["authorization"])
        self.state.paths.append(self.path)

    def _send(self, status: int, value: Any, **headers: str) -> None:
        self._raw(status, "application/json", json.dumps(value).encode(), **headers)

    def _raw(self, status: int, kind: str, data: bytes, **headers: str) -> None:
        self._head(status, kind, len(data), **headers)
        self.wfile.write(data)

    def _head(self, status: int, kind: str, length: int, **headers: str) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # a test's requests come at once, and a busy machine takes them slowly
    block_on_close = False

    def handle_error(self, *_: Any) -> None:
        pass  # clients that have given up waiting


@contextlib.contextmanager
def loopback(**more: Any) -> Iterator[Loopback]:
    """A server on a free port, until the end of the block."""
    state = Loopback(**more)
    handler = type("Handler", (_Handler,), {"state": state})
    server = _Server(("127.0.0.1", 0), handler)
    port = server.server_address[1]
    state.url = f"http://127.0.0.1:{port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})

    def end() -> None:
        state._over.set()
        server.shutdown()
        server.server_close()
        thread.join()

    with contextlib.ExitStack() as ends:
        ends.callback(end)

        def die() -> None:
            ends.pop_all().close()
            ends.enter_context(refusing_port(port))

        state.die = die
        thread.start()
        yield state


@contextlib.contextmanager
def refusing_port(port: int = 0) -> Iterator[int]:
    """A port (a free one for 0) where connections are refused: taken, so that nobody listens."""
    with socket.socket() as taken:
        if port:  # connections to its last owner may linger
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", port))
        yield taken.getsockname()[1]

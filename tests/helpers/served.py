"""Run the real server in a thread, with small models, and talk to it over real sockets."""

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="llamita[serve] is not installed")

from llamita.engine.llm import LLM
from llamita.serve import run, start
from llamita.serve.keys import Keys
from llamita.serve.state import ServerState


@dataclass
class Served:
    """A running server."""

    port: int
    state: ServerState

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self, timeout: float = 60) -> HTTPConnection:
        return HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def ask(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Send one request; return the status, the headers (small letters) and the body."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        kind = {} if body is None else {"Content-Type": "application/json"}
        connection = self.connect()
        try:
            connection.request(method, path, data, {**kind, **(headers or {})})
            response: HTTPResponse = connection.getresponse()
            return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
        finally:
            connection.close()

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        """Post a JSON object; return the answer, which must be 200."""
        status, _, data = self.ask("POST", path, body)
        assert status == 200, data
        return json.loads(data)

    def refuse(self, path: str, body: Any, headers: Mapping[str, str] | None = None) -> tuple[int, dict[str, Any]]:
        """Post what must be refused; return the status and the error object."""
        status, got, data = self.ask("POST", path, body, headers)
        assert got["content-type"] == "application/json"
        error = json.loads(data)["error"]
        assert set(error) >= {"message", "type", "param", "code"}
        assert len(data) < 2048
        return status, error

    def events(self, path: str, **body: Any) -> list[Any]:
        """Post; return the JSON values of the stream's events, which must end as OpenAI's do."""
        status, headers, data = self.ask("POST", path, {**body, "stream": True})
        assert status == 200, data
        assert headers["content-type"].startswith("text/event-stream")
        lines = [line for line in data.decode().split("\n\n") if line.startswith("data: ")]
        assert lines[-1] == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


@contextmanager
def serving(
    llms: Mapping[str, LLM],
    keys: Keys | None = None,
    limits: start.Limits | None = None,
    bounds: start.Bounds | None = None,
    adapters: Path | None = None,
    hosts: Sequence[str] = (),
    origins: Sequence[str] = (),
) -> Iterator[Served]:
    """Serve models while the block lasts."""
    limits, bounds = limits or start.Limits(drain_seconds=1), bounds or start.Bounds()
    state = start.make_state(start.Models(dict(llms)), keys or Keys(), limits, bounds, adapters)
    listener = start.listen("127.0.0.1", 0)
    ready, made, ports = threading.Event(), [], []

    def when_ready(port: int) -> None:
        ports.append(port)
        ready.set()

    access = start.access("127.0.0.1", hosts, origins, is_guarded=True)
    thread = threading.Thread(target=run.serve, args=(state, access, listener, when_ready, made.append))
    thread.start()
    try:
        assert ready.wait(30)
        yield Served(ports[0], state)
    finally:
        made[0].should_exit = True
        thread.join(30)
        assert not thread.is_alive()

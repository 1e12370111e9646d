"""One HTTP request and its answer, in plain ASGI: bounded reading, JSON, server-sent events, and the watch for a
client that goes away.

Frameworks' helpers miss disconnects of requests that are not streamed, and behind middleware; so one task waits in
`receive` for as long as the answer takes.
"""

import asyncio
import json
import math
import secrets
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from starlette.types import Receive, Scope, Send

from llamita.serve.bodies import MOST_VALUES, VALUE_BYTES, Bodies
from llamita.serve.errors import ApiError

BODY_SECONDS = 30  # for a client to send its body
_SAFE = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.")
_LONGEST_ID = 64
encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_R = TypeVar("_R")


class Disconnected(Exception):
    """The client has gone; nothing is left to answer."""


class Exchange:
    """A request and its answer.

    Attributes:
        request_id: the client's own if it is safe to repeat, else a new one.
        owner: whose request it is: a tag of its key, None without keys; the guard sets it.
        key: the key that came with it, "" without one; the guard sets it. It is never logged.
        status: the status that was sent, None before.
        body_bytes: the length of the body, as far as it was read.
        pieces: events and comments of a stream that were sent.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        self._receive, self._send = receive, send
        self.headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
        given = self.headers.get("x-request-id", "")
        is_safe = 0 < len(given) <= _LONGEST_ID and set(given) <= _SAFE
        self.request_id = given if is_safe else f"req_{secrets.token_hex(12)}"
        self.owner: str | None = None
        self.key = ""
        self.status: int | None = None
        self.body_bytes = 0
        self.pieces = 0
        self._bodies: Bodies | None = None
        self._taken = 0

    async def read_json(self, bodies: Bodies) -> dict[str, Any]:
        """Return the body, a JSON object, whose memory is counted until `release`.

        Raises:
            ApiError: it is not JSON, not an object, too large, or too slow, or others take all memory for bodies.
            Disconnected: the client went away.
        """
        kind = self.headers.get("content-type", "").split(";")[0].strip().lower()
        if kind != "application/json":  # what a form of a web page could send is refused, too
            raise ApiError(
                415, f"Content-Type: expected application/json, got {kind[:80] or 'none'}.", code="media_type"
            )
        try:
            async with asyncio.timeout(BODY_SECONDS):
                data = await self._read_body(bodies)
        except TimeoutError:
            message, close = f"The body did not come within {BODY_SECONDS} seconds.", {"Connection": "close"}
            raise ApiError(408, message, code="timeout", headers=close) from None
        values = data.count(b",") + data.count(b"[") + data.count(b"{")
        if values > MOST_VALUES:
            raise ApiError(413, f"The body has more than {MOST_VALUES} values.", code="request_too_large")
        self.hold(bodies, values * VALUE_BYTES)
        try:
            body = json.loads(data, parse_constant=_refuse_constant, parse_float=_finite)
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"The body is not JSON: {str(error)[:200]}.", code="invalid_json") from None
        if not isinstance(body, dict):
            raise ApiError(400, "The body must be a JSON object.", code="invalid_json")
        return body

    def release(self) -> None:
        """Stop counting the body's memory."""
        if self._bodies:
            self._bodies.free(self.owner, self._taken)
            self._bodies = None

    def hold(self, bodies: Bodies, size: int) -> None:
        """Count memory that this request takes until `release`; raise ApiError if there is none."""
        bodies.take(self.owner, size)
        self._bodies = bodies
        self._taken += size

    async def _read_body(self, bodies: Bodies) -> bytearray:
        declared = self.headers.get("content-length", "0")
        length = int(declared) if declared.isdecimal() and len(declared) < 20 else 0
        too_large = ApiError(413, f"The body is larger than {bodies.most} bytes.", code="request_too_large")
        too_large.headers["Connection"] = "close"  # the rest of the body is not read
        if length > bodies.most:
            raise too_large
        data = bytearray()
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise Disconnected
            part = message.get("body", b"")
            if len(data) + len(part) > bodies.most:
                raise too_large
            self.hold(bodies, len(part))
            data += part
            self.body_bytes = len(data)
            if not message.get("more_body"):
                return data

    async def send_json(self, value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        """Answer with JSON."""
        await self.send_bytes(to_bytes(value), "application/json", status, headers)

    async def send_bytes(
        self, data: bytes, media_type: str, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        """Answer with bytes."""
        await self._begin(status, {"content-type": media_type, "content-length": str(len(data)), **(headers or {})})
        body = b"" if self.scope["method"] == "HEAD" else data
        await self._send({"type": "http.response.body", "body": body})

    async def send_error(self, error: ApiError) -> None:
        """Answer with an error, or end a stream that has begun with it."""
        if self.status is None:
            await self.send_json(error.body(), error.status, error.headers)
        else:
            await self.send_event(error.body())
            await self.end_stream()

    async def begin_stream(self) -> None:
        """Send the head of a stream of events."""
        headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
        await self._begin(200, {**headers, "x-accel-buffering": "no"})  # for nginx, which else collects the events

    async def send_event(self, value: Any, name: str | None = None) -> None:
        """Send one event of a stream: a JSON value."""
        head = f"event: {name}\n" if name else ""
        await self.send_line(f"{head}data: {encode(value)}\n\n")

    async def send_line(self, text: str) -> None:
        """Send text of a stream as it is."""
        data = text.encode("utf-8", "replace")
        self.pieces += 1
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end_stream(self) -> None:
        """End the stream."""
        await self._send({"type": "http.response.body", "body": b""})

    async def watched(self, work: Callable[[], Awaitable[_R]]) -> _R:
        """Do the work and return its result; stop it as soon as the client goes away.

        Raises:
            Disconnected: the client went away, and the work has been cancelled and has ended.
        """
        task = asyncio.ensure_future(work())
        gone = asyncio.ensure_future(self._disconnect())
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise Disconnected
            return await task
        finally:
            for one in (task, gone):
                one.cancel()
            await asyncio.gather(task, gone, return_exceptions=True)

    async def _disconnect(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def _begin(self, status: int, headers: Mapping[str, str]) -> None:
        self.status = status
        every = {"x-request-id": self.request_id, "x-content-type-options": "nosniff", **headers}
        pairs = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in every.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": pairs})


def to_bytes(value: Any) -> bytes:
    """Return a value as JSON in UTF-8."""
    return encode(value).encode("utf-8", "replace")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):  # it could not be sent back
        raise ValueError(f"{text[:20]} is beyond the numbers of JSON's readers")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")

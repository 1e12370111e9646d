"""A client of streamed answers that costs little: it stamps what arrives, and takes it apart when the answer is whole.

Each request has its own connection, so that the end of the connection is the end of the answer, and the cost of
connecting is in every server's figures.
"""

import asyncio
import json
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

HOST = "127.0.0.1"
_HEAD = "POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"


@dataclass
class Reply:
    """An answer. Times are those of time.perf_counter.

    Attributes:
        started: before the connection was opened.
        ended: when it was closed.
        status: 0 if there was no answer.
        body: of an answer that is not streamed.
        events: when each event of a stream arrived, and its JSON.
    """

    started: float
    ended: float = 0.0
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    events: list[tuple[float, dict[str, Any]]] = field(default_factory=list)

    @property
    def texts(self) -> list[tuple[float, str]]:
        """When each piece of text arrived, and the piece."""
        pieces = [(at, text_of(event)) for at, event in self.events]
        return [(at, text) for at, text in pieces if text]

    @property
    def text(self) -> str:
        """The whole answer."""
        return "".join(text for _, text in self.texts)

    @property
    def usage(self) -> dict[str, Any]:
        """The counts at the stream's end."""
        return next((event["usage"] for _, event in reversed(self.events) if event.get("usage")), {})

    @property
    def timings(self) -> dict[str, Any]:
        """The server's own times of the answer."""
        return next((event["timings"] for _, event in reversed(self.events) if event.get("timings")), {})

    @property
    def tokens(self) -> int:
        """The tokens of the answer; 0 if it is not whole."""
        is_whole = any(choice.get("finish_reason") for _, event in self.events for choice in event.get("choices", []))
        return self.usage.get("completion_tokens", 0) if is_whole else 0

    @property
    def first_seconds(self) -> float:
        """From the start to the first piece of text."""
        return self.texts[0][0] - self.started

    @property
    def gaps(self) -> list[float]:
        """Seconds between pieces of text."""
        times = [at for at, _ in self.texts]
        return [after - before for before, after in pairwise(times)]


def text_of(event: Mapping[str, Any]) -> str:
    """Return the text of an event of a chat or a completion."""
    return "".join(c.get("text") or c.get("delta", {}).get("content") or "" for c in event.get("choices", []))


class Stream(asyncio.Protocol):
    """A request that is running.

    Args:
        data: the request's bytes.
        on_data: called with each arrival's bytes.
    """

    def __init__(self, data: bytes, on_data: Callable[[bytes], None] | None = None) -> None:
        self.started = time.perf_counter()
        self.ended: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._data, self._on_data = data, on_data
        self._times: list[float] = []
        self._parts: list[bytes] = []
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the request."""
        self._transport = transport
        self._transport.write(self._data)

    def data_received(self, data: bytes) -> None:
        """Stamp what arrived."""
        self._times.append(time.perf_counter())
        self._parts.append(data)
        if self._on_data:
            self._on_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """Note the end."""
        if not self.ended.done():
            self.ended.set_result(time.perf_counter())

    def abort(self) -> None:
        """Go away without a word."""
        self._transport.abort()

    def reply(self) -> Reply:
        """Take apart what has arrived so far."""
        reply = Reply(self.started, self.ended.result() if self.ended.done() else time.perf_counter())
        raw, ends, total = b"".join(self._parts), [], 0
        for part in self._parts:
            total += len(part)
            ends.append(total)
        head, found, rest = raw.partition(b"\r\n\r\n")
        if not found:
            return reply
        first, *lines = head.decode("latin-1").split("\r\n")
        reply.status = int(first.split(" ")[1])
        reply.headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
        if reply.headers.get("transfer-encoding") != "chunked":
            reply.body = rest
            return reply
        at, text = len(head) + 4, b""
        while (line := raw.find(b"\r\n", at)) > 0:
            size = int(raw[at:line], 16)
            at = line + 2 + size + 2
            if not size or at > len(raw):
                break
            text += raw[line + 2 : at - 2]
            *events, text = text.split(b"\n\n")
            stamp = self._times[bisect_left(ends, at)]
            reply.events += [(stamp, json.loads(e[6:])) for e in events if e.startswith(b"data: {")]
        reply.body = text
        return reply


async def start(
    port: int, path: str, body: Mapping[str, Any] | bytes, on_data: Callable[[bytes], None] | None = None
) -> Stream:
    """Send a request; return it while it runs. Bytes are sent as they are, right or not."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = _HEAD.format(path=path) + f"Content-Length: {len(data)}\r\n\r\n"
    stream = Stream(head.encode() + data, on_data)
    await asyncio.get_running_loop().create_connection(lambda: stream, HOST, port)
    return stream


async def post(port: int, path: str, body: Mapping[str, Any] | bytes) -> Reply:
    """Send a request and wait for its end."""
    stream = await start(port, path, body)
    await stream.ended
    return stream.reply()


def completion(ids: list[int], new: int, seed: int, **more: Any) -> dict[str, Any]:
    """Return the body of a streamed completion of token ids with exactly so many new tokens.

    The sampling is llama.cpp's default without its min_p.
    """
    drawn = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.0, "seed": seed}
    counted = {"stream": True, "stream_options": {"include_usage": True}}
    return {"prompt": ids, "max_tokens": new, "ignore_eos": True, **counted, **drawn, **more}

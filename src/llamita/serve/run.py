"""Runs the server: uvicorn with bounds on connections, heads and stuck readers, and an end that loses nothing."""

import asyncio
import errno
import logging
import math
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from llamita.errors import LlamitaError, RunError
from llamita.serve.app import make_app
from llamita.serve.guard import Access
from llamita.serve.state import ServerState

MOST_CONNECTIONS = 512
HEAD_BYTES = 16 << 10  # of a request's line and headers
HEAD_SECONDS = 30  # for a client to send them
STUCK_SECONDS = 30  # that a client may read nothing while there is something for it
KEEP_ALIVE_SECONDS = 30
READ_BYTES = 16 << 10  # at once from one connection
FEW_CHUNKS = 5000  # of a body, whatever their size
SMALL_CHUNK = 64  # bytes of a chunk and its head, on average, if there are more
_CHUNK_HEAD = re.compile(rb"\r\n[0-9A-Fa-f]+\r\n")
_BAD_HEAD = b'{"error":{"message":"%s","type":"invalid_request_error","param":null,"code":"bad_request"}}'
_FULL = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 5\r\nConnection: close\r\nContent-Type: application/json\r\n"


class BoundedProtocol(H11Protocol):
    """uvicorn's protocol with what it leaves unbounded: how many connect, how slowly they send, and read."""

    _head_timer: asyncio.TimerHandle | None = None
    _stuck_timer: asyncio.TimerHandle | None = None
    _body_bytes = _chunks = 0  # of the request that comes

    def connection_made(self, transport: Any) -> None:
        """Refuse a connection too many; else wait for a request, but not for long."""
        super().connection_made(transport)
        transport.max_size = READ_BYTES  # of asyncio's transports: who sends much takes turns with the others
        if len(self.connections) > MOST_CONNECTIONS:
            body = _BAD_HEAD % b"Too many connections."
            transport.write(_FULL + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            transport.close()
            return
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        """Take in data. Between requests, it begins the head of another one, which has its own time."""
        before = self.cycle
        is_between = before is None or before.response_complete
        if is_between and self._head_timer is None:
            self._wait_for_head()
        super().data_received(data)
        if self.cycle is not before:
            self._stop_waiting()
            self._body_bytes = self._chunks = 0
        elif self.cycle is not None and not self.transport.is_closing():
            self._count_chunks(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timers."""
        self._stop_waiting()
        self.resume_writing()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Give a client that does not read a while, then cut it: its buffer and its sequence are needed."""
        super().pause_writing()
        if self._stuck_timer is None:
            self._stuck_timer = self.loop.call_later(STUCK_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """Go on with a client that reads again."""
        if self._stuck_timer is not None:
            self._stuck_timer.cancel()
            self._stuck_timer = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Refuse a head that is not HTTP, or is too large, in the form of all other refusals."""
        body = _BAD_HEAD % msg.encode("ascii", "replace")
        head = b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Type: application/json\r\n"
        self.transport.write(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        self.transport.close()

    def _count_chunks(self, data: bytes) -> None:
        """Refuse a body of tiny chunks: each takes the time of a large one, and a megabyte of them seconds."""
        if not self.cycle.response_started and (b"transfer-encoding", b"chunked") in self.headers:
            self._body_bytes += len(data)
            self._chunks += len(_CHUNK_HEAD.findall(data))
            if self._chunks > FEW_CHUNKS and self._body_bytes < SMALL_CHUNK * self._chunks:
                self.send_400_response("The chunks of the body are too small.")

    def _wait_for_head(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


class _Server(uvicorn.Server):
    """uvicorn's server, whose end is ours: what runs may finish, and the exit code is 0."""

    def __init__(
        self, config: uvicorn.Config, state: ServerState, when_ready: Callable[[int], None], note: Callable[[str], None]
    ) -> None:
        super().__init__(config)
        self._state, self._when_ready, self._note = state, when_ready, note

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the engine and listen."""
        self._state.engine.start()
        # The first answer with a grammar would wait for these: most of a second with 128,000 tokens.
        threading.Thread(target=_warm, args=(self._state,), name="warm", daemon=True).start()
        await super().startup(sockets)
        self._when_ready(self.servers[0].sockets[0].getsockname()[1])

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Catch SIGTERM and Ctrl-C. The first stops taking work, the second ends at once."""
        if threading.current_thread() is not threading.main_thread():  # others get no signals
            yield
            return
        handlers = {number: signal.signal(number, self._end) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _end(self, number: int, frame: object) -> None:
        if self._state.is_draining:
            self.force_exit = True
            for task in self.server_state.tasks:
                task.get_loop().call_soon_threadsafe(task.cancel)
        self._state.is_draining = True
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let what runs finish, and say so. A terminal that takes nothing must not stop that, so a thread says it."""
        if running := self._state.queue.open:
            seconds = f"{self._state.limits.drain_seconds:g} s"
            line = f"stopping: {running} answers run or wait, for {seconds} at most; Ctrl-C again ends at once"
            threading.Thread(target=self._note, args=(line,), name="note", daemon=True).start()
        await super().shutdown(sockets)


def _warm(state: ServerState) -> None:
    """Make ready what the first request of its kind would wait for."""
    for served in state.models.all:
        with suppress(LlamitaError):  # the request that needs it says what is wrong
            _ = served.adapter or served.structure.grammars


def listen(host: str, port: int) -> socket.socket:
    """Return a bound socket; before the model is loaded, so that a taken port is found at once. It listens later.

    Raises:
        RunError: the address or the port cannot be had.
    """
    try:
        info = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        # With its protocol: asyncio turns off Nagle's waiting only for sockets that say TCP, and a client's delayed
        # acknowledgement would else add 40 ms to every answer in two parts.
        listener = socket.socket(*info[:3])
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(info[4])
        listener.set_inheritable(False)
    except (OSError, UnicodeError) as error:
        is_taken = getattr(error, "errno", None) in (errno.EADDRINUSE, errno.EACCES)
        expected, other = ("a free port", "--port") if is_taken else ("an address of this machine", "--host")
        raise RunError(f"--host {host} --port {port}", expected, str(error), f"try another {other}") from None
    return listener


def serve(
    state: ServerState,
    access: Access,
    listener: socket.socket,
    when_ready: Callable[[int], None],
    when_made: Callable[[uvicorn.Server], None] = lambda server: None,
    note: Callable[[str], None] = lambda text: None,
) -> None:
    """Serve until SIGTERM or Ctrl-C, then finish what runs.

    Args:
        state: the server's parts.
        access: who may connect.
        listener: the socket that listens.
        when_ready: called with the port once requests are answered.
        when_made: called with uvicorn's server, whose `should_exit` ends it from another thread.
        note: called with what somebody at the terminal wants to know.
    """
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    config = uvicorn.Config(
        make_app(state, access),
        http=BoundedProtocol,
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=math.ceil(state.limits.drain_seconds),
        h11_max_incomplete_event_size=HEAD_BYTES,
    )
    server = _Server(config, state, when_ready, note)
    when_made(server)
    try:
        server.run([listener])
    finally:
        state.engine.stop()
        state.preparation.shut_down()
        state.embedder.shutdown(wait=False, cancel_futures=True)

"""A stand-in for the server: serves the page with its security policy and plays answers that a test wrote.

Everything that the page asks for is recorded, and whether it went away before its answer was through.
"""

import asyncio
import json
import math
import socket
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from places import ROOT

pytest.importorskip("uvicorn", reason="llamita[serve] is not installed")

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

PAGE = ROOT / "src" / "llamita" / "serve" / "page"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "font-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
SECONDS = 30  # that a start may take; it is waited for, never measured
SAMPLING = {"temperature": 0.6, "top_p": 0.9, "top_k": 40, "min_p": 0.0, "repetition_penalty": 1.0}


@dataclass
class Answer:
    """What the stand-in says to one request."""

    pieces: list[str] = field(default_factory=lambda: ["Hello", " there", "."])
    finish: str = "stop"
    delay: float = 0.0  # seconds before each piece
    hold: int | None = None  # pieces after which it waits until the page goes away
    calls: list[dict[str, Any]] = field(default_factory=list)
    status: int = 200  # another: an error instead of an answer
    error: dict[str, Any] = field(default_factory=dict)  # its fields; with status 200 it comes after the pieces
    headers: dict[str, str] = field(default_factory=dict)
    alternatives: dict[int, list[tuple[str, float]]] = field(default_factory=dict)  # (text, probability) of a place


def model_entry(name: str, has_chat: bool = True, parent: str | None = None, room: int = 512) -> dict[str, Any]:
    """Return an entry of /v1/models."""
    meta = {"n_params": 5_800_000, "size": 4_600_000, "n_vocab": 4096, "scheme": "w4a8", "has_chat": has_chat}
    entry = {"id": name, "object": "model", "created": 1, "owned_by": "llamita", "parent": parent}
    return {**entry, "max_model_len": room, "meta": {**meta, "sampling": SAMPLING}}


def scored(text: str, alternatives: list[tuple[str, float]] | None) -> dict[str, Any]:
    """Return a token as `logprobs.content` has it; its own probability is the first alternative's of its text."""
    top = alternatives or [(text, 0.75), (" other", 0.125), (" third", 0.0625)]
    own = dict(top).get(text, 0.01)
    entry = [{"token": t, "logprob": math.log(p), "bytes": list(t.encode())} for t, p in top]
    return {"token": text, "logprob": math.log(own), "bytes": list(text.encode()), "top_logprobs": entry}


class PageServer:
    """The stand-in's state; tests change it between requests."""

    def __init__(self) -> None:
        self.models = [model_entry("small"), model_entry("small:4bit"), model_entry("teller", has_chat=False)]
        self.answers: dict[str, list[Answer]] = defaultdict(list)  # of a model, used up in order
        self.bodies: list[dict[str, Any]] = []  # of every answer that was asked for
        self.aborted = 0  # answers that the page did not wait for
        self.key: str | None = None
        self.counted = 0  # questions of the meter
        self.load: dict[str, Any] = {"models": [], "uptime_s": 1}
        self.address = ""

    def say(self, *answers: Answer | str, model: str = "small") -> None:
        """Queue what a model says next. Text is cut into pieces of a few characters."""
        for answer in answers:
            self.answers[model].append(Answer(pieces_of(answer)) if isinstance(answer, str) else answer)

    def application(self) -> Starlette:
        """Return the routes."""
        post = ["POST"]
        return Starlette(
            routes=[
                Route("/", lambda _request: self._file("index.html")),
                Route("/page/{name:path}", lambda request: self._file(request.path_params["name"])),
                Route("/v1/models", self._models),
                Route("/v1/load", self._load),
                Route("/v1/chat/completions", self._answer, methods=post),
                Route("/v1/chat/completions/input_tokens", self._count, methods=post),
                Route("/v1/completions", self._answer, methods=post),
                Route("/tokenize", self._count, methods=post),
            ]
        )

    def _file(self, name: str) -> Response:
        path = PAGE / name
        headers = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}
        if not path.is_file():
            return Response(status_code=404, headers=headers)
        return FileResponse(path, headers=headers, media_type=TYPES.get(path.suffix, "text/plain"))

    def _refused(self, request: Request) -> Response | None:
        if self.key is None or request.headers.get("authorization") == f"Bearer {self.key}":
            return None
        return error_response(401, {"message": "A key is needed.", "code": "invalid_api_key"})

    def _models(self, request: Request) -> Response:
        return self._refused(request) or JSONResponse({"object": "list", "data": self.models})

    def _load(self, request: Request) -> Response:
        return self._refused(request) or JSONResponse(self.load)

    async def _count(self, request: Request) -> Response:
        body = await request.json()
        self.counted += 1
        text = body["prompt"] if "prompt" in body else "".join(m["content"] or "" for m in body["messages"])
        return self._refused(request) or JSONResponse({"input_tokens": len(text.split()), "count": len(text.split())})

    async def _answer(self, request: Request) -> Response:
        body = await request.json()
        if refused := self._refused(request):
            return refused
        self.bodies.append(body)
        queue = self.answers[body["model"]]
        answer = queue.pop(0) if queue else Answer()
        if answer.status != 200:
            return error_response(answer.status, answer.error, answer.headers)
        is_chat = request.url.path.endswith("chat/completions")
        return StreamingResponse(self._stream(answer, body, is_chat), media_type="text/event-stream")

    async def _stream(self, answer: Answer, body: dict[str, Any], is_chat: bool) -> AsyncIterator[str]:
        through = False
        try:
            yield ": ping\n\n"
            for place, piece in enumerate(answer.pieces):
                if place == answer.hold:
                    await asyncio.sleep(SECONDS)
                await asyncio.sleep(answer.delay)
                yield event(chunk(answer, place, piece, body, is_chat))
            if answer.hold == len(answer.pieces):
                await asyncio.sleep(SECONDS)
            for call in call_deltas(answer.calls):
                yield event({"choices": [{"index": 0, "delta": {"tool_calls": [call]}}]})
            if answer.error:
                yield event({"error": answer.error})
            else:
                yield event({"choices": [{"index": 0, "delta": {}, "finish_reason": answer.finish}]})
                yield event(usage_of(answer))
            yield "data: [DONE]\n\n"
            through = True
        finally:
            self.aborted += not through


def error_response(status: int, error: dict[str, Any], headers: dict[str, str] | None = None) -> Response:
    """Return an error in OpenAI's form."""
    body = {"message": "refused", "type": "invalid_request_error", "param": None, "code": None, **error}
    return JSONResponse({"error": body}, status, headers=headers)


def pieces_of(text: str) -> list[str]:
    """Cut a text as a model's tokens might cut it."""
    return [text[start : start + 4] for start in range(0, len(text), 4)]


def event(data: dict[str, Any]) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(data)}\n\n"


def chunk(answer: Answer, place: int, piece: str, body: dict[str, Any], is_chat: bool) -> dict[str, Any]:
    """Return a piece of an answer in the form of its endpoint."""
    token = scored(piece, answer.alternatives.get(place))
    if is_chat:
        choice: dict[str, Any] = {"index": 0, "delta": {"content": piece}}
        if body.get("logprobs"):
            choice["logprobs"] = {"content": [token]}
        return {"choices": [choice]}
    choice = {"index": 0, "text": piece}
    if body.get("logprobs"):
        top = {entry["token"]: entry["logprob"] for entry in token["top_logprobs"]}
        choice["logprobs"] = {"tokens": [piece], "token_logprobs": [token["logprob"]], "top_logprobs": [top]}
    return {"choices": [choice]}


def call_deltas(calls: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield tool calls as OpenAI streams them: the name, then the arguments piece by piece."""
    for index, call in enumerate(calls):
        yield {
            "index": index,
            "id": f"call_{index}",
            "type": "function",
            "function": {"name": call["name"], "arguments": ""},
        }
        for piece in pieces_of(call["arguments"]):
            yield {"index": index, "function": {"arguments": piece}}


def usage_of(answer: Answer) -> dict[str, Any]:
    """Return the last chunk."""
    count = len(answer.pieces)
    usage = {"prompt_tokens": 24, "completion_tokens": count, "total_tokens": 24 + count}
    timings = {"predicted_per_second": 42.5, "first_token_ms": 120.0, "queue_ms": 0.0, "draft_n": 0}
    return {"choices": [], "usage": {**usage, "prompt_tokens_details": {"cached_tokens": 16}}, "timings": timings}


@contextmanager
def serving() -> Iterator[PageServer]:
    """Serve the page on a free port of this machine, in a thread."""
    page = PageServer()
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    page.address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    settings = uvicorn.Config(page.application(), log_level="critical", timeout_graceful_shutdown=1, lifespan="off")
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    end = time.monotonic() + SECONDS
    while not server.started and time.monotonic() < end:
        time.sleep(0.01)
    assert server.started
    try:
        yield page
    finally:
        server.should_exit = True
        thread.join(SECONDS)
        listener.close()

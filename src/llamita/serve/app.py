"""The table of paths, and the ASGI application around it."""

from collections.abc import Awaitable, Callable
from typing import NamedTuple

from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from llamita.serve import chat, completions, embeddings, openapi, page_files, responses, small
from llamita.serve.exchange import Exchange
from llamita.serve.guard import Access, Guard
from llamita.serve.state import ServerState

Endpoint = Callable[[ServerState, Exchange], Awaitable[None]]


class Path(NamedTuple):
    """A row of the table."""

    path: str
    methods: tuple[str, ...]
    endpoint: Endpoint
    has_v1: bool = True  # served below /v1, too: some clients' base addresses end with it, others' do not


PATHS = (
    Path("/chat/completions", ("POST",), chat.chat),
    Path("/chat/completions/input_tokens", ("POST",), chat.input_tokens),
    Path("/completions", ("POST",), completions.completions),
    Path("/responses", ("POST",), responses.responses),
    Path("/responses/input_tokens", ("POST",), responses.input_tokens),
    Path("/embeddings", ("POST",), embeddings.embeddings),
    Path("/models", ("GET",), small.models),
    Path("/models/{name:path}", ("GET",), small.model),
    Path("/adapters", ("GET", "POST"), small.adapters),
    Path("/adapters/{name:path}", ("DELETE",), small.unload_adapter),
    Path("/load", ("GET",), small.load),
    Path("/health", ("GET",), small.health),
    Path("/ready", ("GET",), small.ready),
    Path("/tokenize", ("POST",), small.tokenize),
    Path("/detokenize", ("POST",), small.detokenize),
    Path("/tokenizer_info", ("GET",), small.tokenizer_info),
    Path("/metrics", ("GET",), small.metrics, has_v1=False),
    Path("/openapi.json", ("GET",), openapi.document, has_v1=False),
    Path("/", ("GET",), page_files.index, has_v1=False),
    Path("/page/{name:path}", ("GET",), page_files.file, has_v1=False),
)


class _Bound:
    """An endpoint as an ASGI application; the router would wrap a function."""

    def __init__(self, endpoint: Endpoint, state: ServerState) -> None:
        self._endpoint, self._state = endpoint, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request that the guard let in."""
        exchange = scope["exchange"]
        exchange.scope = scope  # the router's, with the parts of the path
        await self._endpoint(self._state, exchange)


def make_app(state: ServerState, access: Access) -> ASGIApp:
    """Return the ASGI application."""
    routes = []
    for row in PATHS:
        for prefix in ("/v1", "") if row.has_v1 else ("",):
            routes.append(Route(prefix + row.path, _Bound(row.endpoint, state), methods=list(row.methods)))
    router = Router(routes, redirect_slashes=False, default=_Bound(small.not_found, state))
    guard = Guard(router, state, access)
    if not access.origins:
        return guard
    return CORSMiddleware(
        guard,
        sorted(access.origins),
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=["*"],  # OpenAI's library sends several of its own
        expose_headers=["x-request-id", "retry-after"],
    )

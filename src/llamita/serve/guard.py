"""What every request passes before its endpoint: the Host and Origin checks, the key; and how errors become answers."""

import asyncio
import logging
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from llamita.errors import InputError, LlamitaError
from llamita.serve.errors import ApiError, from_llamita, internal, unavailable
from llamita.serve.exchange import Disconnected, Exchange
from llamita.serve.state import ServerState

_log = logging.getLogger(__package__)
# Without a key: that a balancer asks, and the page, which asks for the key itself.
_OPEN = ("/health", "/ready", "/v1/health", "/v1/ready", "/", "/favicon.ico")
_OPEN_BELOW = "/page/"
_CODES = {404: "not_found", 405: "method_not_allowed"}


@dataclass(frozen=True)
class Access:
    """Who may connect.

    Attributes:
        hosts: names that the Host header may have, without ports; None for any. A page of another site that makes its
            own name point at this machine (DNS rebinding) fails here.
        origins: of web pages that may send requests, besides the server's own page.
    """

    hosts: frozenset[str] | None
    origins: frozenset[str]


class Guard:
    """Wraps the endpoints, in plain ASGI."""

    def __init__(self, app: ASGIApp, state: ServerState, access: Access):
        self._app, self._state, self._access = app, state, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request, let its endpoint answer, and answer for it if it fails."""
        if scope["type"] != "http":  # the lifespan, and websockets, which are closed
            return
        began = time.monotonic()
        exchange = Exchange(scope, receive, send)
        scope["exchange"], scope["app"] = exchange, self
        try:
            self._check(exchange)
            await self._app(scope, receive, send)
        except Disconnected:
            exchange.status = exchange.status or 499  # nginx's number; nobody reads it but the log
        except asyncio.CancelledError:  # the server ends, and has waited long enough
            await exchange.send_error(unavailable("The server stopped before the end of the answer.", "stopped"))
        except Exception as error:
            await exchange.send_error(self._answer(error, exchange))
        finally:
            exchange.release()
            self._state.metrics.note_response(exchange.status or 499)
            seconds = time.monotonic() - began
            path = scope["path"][:100].encode("unicode_escape").decode()
            _log.info("%s %s %s %.3f s %s", scope["method"], path, exchange.status, seconds, exchange.request_id)

    def _check(self, exchange: Exchange) -> None:
        """Raise ApiError for a request that may not come in; else say whose it is."""
        access, headers, scope = self._access, exchange.headers, exchange.scope
        if "content-length" in headers and "transfer-encoding" in headers:  # a proxy may see another end than we do
            message, close = "Send Content-Length or Transfer-Encoding, not both.", {"Connection": "close"}
            raise ApiError(400, message, code="bad_request", headers=close)
        host = headers.get("host", "")
        if access.hosts is not None and host_name(host) not in access.hosts:
            raise ApiError(403, f"Host {host[:80]!r} is not this server's.", kind="permission_error", code="host")
        origin = headers.get("origin")
        if origin is not None and scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            own = (f"http://{host}", f"https://{host}")  # a proxy before the server may have ended TLS
            if origin not in (*own, *access.origins):
                raise ApiError(403, f"Origin {origin[:80]!r} may not ask.", kind="permission_error", code="origin")
        exchange.key = _key(headers)
        if scope["path"] in _OPEN or scope["path"].startswith(_OPEN_BELOW) or not self._state.keys.are_needed:
            return
        exchange.owner = self._state.keys.owner(exchange.key)
        if exchange.owner is None:
            how = "Send a key as `Authorization: Bearer KEY`." if not exchange.key else "This key is not known here."
            headers = {"WWW-Authenticate": "Bearer"}
            raise ApiError(401, how, kind="authentication_error", code="invalid_api_key", headers=headers)

    def _answer(self, error: Exception, exchange: Exchange) -> ApiError:
        """Return the answer for an error of an endpoint."""
        if isinstance(error, ApiError):
            return error
        if isinstance(error, InputError):
            return from_llamita(error)
        if isinstance(error, HTTPException):  # of Starlette's router
            message = f"{error.detail}: {exchange.scope['method']} {exchange.scope['path'][:100]}"
            code = _CODES.get(error.status_code, "http")
            return ApiError(error.status_code, message, code=code, headers=dict(error.headers or {}))
        if isinstance(error, LlamitaError):
            _log.error("%s: %s", exchange.request_id, error)
        else:
            _log.exception("%s failed", exchange.request_id)
        return internal(exchange.request_id)


def host_name(host: str) -> str:
    """Return the name of a Host header, without its port."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _key(headers: dict[str, str]) -> str:
    """Return the key of a request, "" without one. Anthropic's header and Azure's are clients' second choice."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" and key.strip() else headers.get("x-api-key", "").strip()


def check_admin(state: ServerState, exchange: Exchange) -> None:
    """Raise ApiError for a request without an administrator's key."""
    if not state.keys.has_admins:
        raise ApiError(
            403, "This server has no administrator (--admin-key-file).", kind="permission_error", code="admin"
        )
    if not state.keys.is_admin(exchange.key):
        raise ApiError(403, "This needs an administrator's key.", kind="permission_error", code="admin")

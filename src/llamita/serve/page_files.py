"""Sends the page: the files below `page/`, and no others."""

import hashlib
import mimetypes
from functools import lru_cache
from importlib.resources import files
from importlib.resources.abc import Traversable

from llamita.serve.errors import ApiError
from llamita.serve.exchange import Exchange
from llamita.serve.state import ServerState

# Nothing from elsewhere is loaded, no text becomes a script, and no other site shows the page in a frame.
_POLICY = "; ".join((
    "default-src 'none'",
    "script-src 'self'",
    "style-src 'self'",
    "connect-src 'self'",
    "img-src 'self' data:",
    "font-src 'self'",
    "object-src 'none'",
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
    "require-trusted-types-for 'script'",
    "trusted-types 'none'",
))  # fmt: skip
_HEADERS = {
    "content-security-policy": _POLICY,
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",  # ask each time, and get 304: a new version is never mixed with an old one
}
_TYPES = {".js": "text/javascript", ".css": "text/css", ".html": "text/html", ".svg": "image/svg+xml"}


async def index(state: ServerState, exchange: Exchange) -> None:
    """Send the page."""
    await _send(exchange, "index.html")


async def file(state: ServerState, exchange: Exchange) -> None:
    """Send a file of the page."""
    await _send(exchange, exchange.scope["path_params"]["name"])


async def _send(exchange: Exchange, name: str) -> None:
    found = page().get(name)  # a look-up in a table: no path of a request reaches the disk
    if found is None:
        raise ApiError(404, f"The page has no file {name[:80]!r}.", code="not_found")
    data, media_type, tag = found
    headers = {**_HEADERS, "etag": tag}
    if exchange.headers.get("if-none-match") == tag:
        await exchange.send_bytes(b"", media_type, 304, headers)
    else:
        await exchange.send_bytes(data, media_type, 200, headers)


@lru_cache(maxsize=1)
def page() -> dict[str, tuple[bytes, str, str]]:
    """Return the page's files: name to bytes, media type and tag."""
    found = {}
    for name, entry in _walk(files(__package__ or "") / "page", ""):
        data = entry.read_bytes()
        suffix = name[name.rfind(".") :]
        media_type = _TYPES.get(suffix) or mimetypes.guess_type(name)[0] or "text/plain"
        is_text = media_type.startswith("text/") or media_type.endswith("xml")
        tag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
        found[name] = (data, media_type + ("; charset=utf-8" if is_text else ""), tag)
    return found


def _walk(directory: Traversable, prefix: str) -> list[tuple[str, Traversable]]:
    found = []
    for entry in directory.iterdir():
        if entry.is_dir():
            found += _walk(entry, f"{prefix}{entry.name}/")
        else:
            found.append((f"{prefix}{entry.name}", entry))
    return found

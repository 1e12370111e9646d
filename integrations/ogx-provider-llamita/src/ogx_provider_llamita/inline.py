"""The engine in OGX's own process: llamita's server in a thread, on a port that only this machine reaches.

One way into the engine serves all: the same scheduler, grammars and limits as a server that runs alone.
"""

import asyncio
import secrets
import threading
from typing import Any

from pydantic import PrivateAttr

from llamita import load
from llamita.imports.names import split_scheme
from llamita.serve import start
from llamita.serve.keys import Keys
from ogx_provider_llamita.adapter import LlamitaAdapter
from ogx_provider_llamita.config import LlamitaInlineConfig

_HOST = "127.0.0.1"
_END_SECONDS = 30  # what runs gets 10 of them


class LlamitaInline(LlamitaAdapter):
    """Loads models and sends requests to them."""

    config: LlamitaInlineConfig
    _key: str = PrivateAttr(default_factory=secrets.token_urlsafe)  # keeps other users of this machine out
    _port: int = PrivateAttr(default=0)
    _server: Any = PrivateAttr(default=None)
    _thread: threading.Thread | None = PrivateAttr(default=None)

    async def initialize(self) -> None:
        """Load the models and start the server; a model that cannot be loaded is an error here."""
        state = await asyncio.to_thread(self._load)
        ready = asyncio.get_running_loop().create_future()
        loop, made = ready.get_loop(), []
        self._thread = threading.Thread(target=start.serve, daemon=True, args=(
            state, start.access(_HOST, [], []), start.listen(_HOST, 0),
            lambda port: loop.call_soon_threadsafe(ready.set_result, port), made.append,
        ))  # fmt: skip
        self._thread.start()
        self._port = await ready
        (self._server,) = made

    def _load(self) -> Any:
        llms = {}
        for model in self.config.models:
            source, scheme = split_scheme(model)
            llms[model] = load(source, scheme=scheme[1:] or None)
        return start.make_state(start.Models(llms), Keys([self._key]), start.Limits(), start.Bounds(), None)

    async def shutdown(self) -> None:
        """Stop the server once what runs has ended."""
        await super().shutdown()
        if self._thread:
            self._server.should_exit = True
            await asyncio.to_thread(self._thread.join, _END_SECONDS)

    def get_base_url(self) -> str:
        """Return the server's address."""
        return f"http://{_HOST}:{self._port}/v1"

    def get_api_key(self) -> str:
        """Return the key that this process made."""
        return self._key

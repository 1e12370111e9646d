"""Threads for what comes before an answer: templates, tokens, grammars. One client cannot keep them from others.

What takes milliseconds has two threads of its own. What may take a second, a large body or a grammar, has two others,
and of these each key uses one at a time. What waits is bounded, and dropped when its client goes away.
"""

import asyncio
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

from llamita.errors import InputError
from llamita.serve.errors import busy, from_llamita
from llamita.serve.exchange import Exchange
from llamita.serve.queue_limits import Bounds

LARGE = 64 << 10  # bytes of a body; its tokens take some 30 ms
_R = TypeVar("_R")


class Preparation:
    """Runs functions in threads. All calls are from the event loop.

    Args:
        bounds: how many may run and wait.
    """

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self._fast = ThreadPoolExecutor(2, "prepare")
        self._slow = ThreadPoolExecutor(2, "prepare-slow")
        self._turns: dict[str | None, asyncio.Lock] = {}
        self._waiting: Counter[str | None] = Counter()  # by owner, with what runs

    async def run(self, exchange: Exchange, function: Callable[[], _R], is_slow: bool = False) -> _R:
        """Return what a function returns; it is not begun, or its result is dropped, if the client goes away.

        Args:
            exchange: the request.
            function: runs in a thread. Errors of the library are the request's fault.
            is_slow: it may take long; that of a large body may, too.

        Raises:
            ApiError: too many wait, or the function refuses.
            Disconnected: the client went away.
        """
        owner = exchange.owner
        count, own = self._waiting.total(), self._waiting[owner]
        if count >= self._bounds.requests:
            raise busy(f"{count} requests are being prepared here.", 1, "queue_full")
        if owner is not None and own >= self._bounds.requests_per_key:
            raise busy(f"{own} requests of this key are being prepared.", 1, "key_queue_full")
        self._waiting[owner] += 1
        try:
            if is_slow or exchange.body_bytes > LARGE:
                return await exchange.watched(lambda: self._in_turn(owner, function))
            return await exchange.watched(lambda: run_in(self._fast, function))
        finally:
            self._waiting[owner] -= 1
            if not self._waiting[owner]:
                del self._waiting[owner]
                self._turns.pop(owner, None)

    async def _in_turn(self, owner: str | None, function: Callable[[], _R]) -> _R:
        async with self._turns.setdefault(owner, asyncio.Lock()):
            return await run_in(self._slow, function)

    async def compute(self, function: Callable[[], _R]) -> _R:
        """Return what a function returns that would hold the event loop for long."""
        return await run_in(self._fast, function)

    def shut_down(self) -> None:
        """Begin nothing more."""
        for pool in (self._fast, self._slow):
            pool.shutdown(wait=False, cancel_futures=True)


async def run_in(pool: ThreadPoolExecutor, function: Callable[[], _R], stop: Callable[[], None] = lambda: None) -> _R:
    """Run a function in a pool. If this is cancelled, wait for what has begun: its thread is not free before.

    `stop` is called then; it may let the function end sooner.
    """

    def run() -> _R:
        try:
            return function()
        except InputError as error:
            raise from_llamita(error) from None

    begun = pool.submit(run)
    future = asyncio.wrap_future(begun)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        stop()
        if not begun.cancel():  # asyncio's future could be cancelled though its thread runs
            with suppress(Exception):
                await future
        raise

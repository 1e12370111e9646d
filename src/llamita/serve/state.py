"""What all endpoints share: the models, the engine's thread, limits and counters; and how a job runs through them."""

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from llamita.engine.requests import Request
from llamita.errors import InputError, LlamitaError
from llamita.serve.bodies import Bodies
from llamita.serve.engine_thread import EngineThread, Mailbox, Update, merge
from llamita.serve.errors import ApiError, from_llamita, timed_out, unavailable
from llamita.serve.exchange import Exchange
from llamita.serve.keys import Keys
from llamita.serve.metrics import Metrics
from llamita.serve.preparation import Preparation
from llamita.serve.queue_limits import Bounds, QueueLimits
from llamita.serve.served import Models, Served

_LEAST_WAIT = 0.05  # seconds between looks at the time while a reader is late
SIGN_OF_LIFE = 15  # seconds of silence after which a stream gets a comment: proxies close silent ones after 30 to 60
SLOW_FIELDS = ("response_format", "guided_regex", "guided_grammar", "tools")  # a grammar may take a second
_R = TypeVar("_R")


@dataclass(frozen=True)
class Limits:
    """Bounds of a server, in seconds and bytes.

    Attributes:
        first_token_seconds: from a request to its first token.
        total_seconds: from a request to its end.
        body_bytes: of a request.
        drain_seconds: for what runs when the server is told to stop.
    """

    first_token_seconds: float = 600
    total_seconds: float = 3600
    body_bytes: int = 8 << 20
    drain_seconds: float = 10


@dataclass
class Job:
    """Checked requests of the engine that answer one HTTP request.

    Attributes:
        served: the model.
        requests: one for each choice of each prompt, all choices of the first prompt first.
        choices: how many for each prompt.
    """

    served: Served
    requests: list[Request]
    choices: int = 1

    @property
    def prompt_tokens(self) -> int:
        """The tokens of all prompts, each counted once."""
        return sum(len(request.ids) for request in self.requests[:: self.choices])


@dataclass
class ServerState:
    """A server's parts.

    Attributes:
        is_draining: it takes no more work.
        adapters_directory: where adapters are that an administrator may load; None for nowhere.
        bodies: counts the memory of bodies.
        preparation: threads for what comes before an answer.
        embedder: one thread for embeddings, which take as long as their texts are, beside the engine's thread.
    """

    models: Models
    engine: EngineThread
    keys: Keys
    limits: Limits
    queue: QueueLimits
    metrics: Metrics
    bodies: Bodies
    preparation: Preparation
    adapters_directory: Path | None = None
    is_draining: bool = False
    started: float = field(default_factory=time.time)
    embedder: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="embed"))

    def check_room(self, exchange: Exchange, model: str | None) -> None:
        """Refuse a request that the queue has no place for, before it is prepared.

        Raises:
            ApiError: 404, there is no such model; 429, the queue is full; 503, the server stops.
        """
        if self.is_draining:
            raise unavailable("The server is stopping.", "draining")
        scheduler = self.models.find(model).llm.scheduler
        self.queue.check(exchange.owner, lambda: scheduler.load)

    async def prepared(
        self, exchange: Exchange, values: Mapping[str, Any], function: Callable[["ServerState", Mapping[str, Any]], _R]
    ) -> _R:
        """Return what a function makes of a checked body; see `Preparation.run`."""
        is_slow = not values.keys().isdisjoint(SLOW_FIELDS)
        return await self.preparation.run(exchange, lambda: function(self, values), is_slow)

    @contextmanager
    def run(self, owner: str | None, job: Job) -> Iterator["Running"]:
        """Run a job while the block lasts; leaving it ends what is left of it.

        Raises:
            ApiError: the server stops, there is no room, or a sequence can never fit the memory.
        """
        if self.is_draining:
            raise unavailable("The server is stopping.", "draining")
        llm = job.served.llm
        with self.queue.place(owner, len(job.requests), job.prompt_tokens, lambda: llm.scheduler.load):
            mailbox = Mailbox(llm.scheduler, [llm.sequence(request) for request in job.requests])
            try:
                self.engine.submit(mailbox)
            except InputError as error:
                raise from_llamita(error, "max_tokens") from None
            running = Running(mailbox, self.limits, self.metrics)
            try:
                yield running
            finally:
                self.engine.cancel(mailbox)
                running.note_end()


def make_state(models: Models, keys: Keys, limits: Limits, bounds: Bounds, adapters: Path | None = None) -> ServerState:
    """Return the state of a server whose engine's thread is not started yet."""
    schedulers = [llm.scheduler for llm in models.llms.values()]
    engine = EngineThread(schedulers)
    bodies, preparation = Bodies(limits.body_bytes), Preparation(bounds)
    parts = models, engine, keys, limits, QueueLimits(bounds), Metrics(models.llms), bodies, preparation
    return ServerState(*parts, adapters)


class Running:
    """The updates of a job, by choice, until all its sequences have ended.

    An empty update says that nothing was sent for `SIGN_OF_LIFE` seconds. One timer, which is set anew only when it
    rings, costs less than one for each update. It rings until `note_end`.
    """

    def __init__(self, mailbox: Mailbox, limits: Limits, metrics: Metrics) -> None:
        self._mailbox, self._limits, self._metrics = mailbox, limits, metrics
        self._left = len(mailbox.sequences)
        self._began = self._last = self._sent = time.monotonic()  # sent: when the client last got something
        self._has_token = False
        self._set_timer()

    def __aiter__(self) -> "Running":
        return self

    async def __anext__(self) -> dict[int, Update]:
        if not self._left:
            raise StopAsyncIteration
        updates: dict[int, Update] = {}
        while not updates:
            updates = await self._mailbox.take()
            self._check(updates)
            if not updates and self.is_silent:
                return {}
        self._note(updates)
        self._left -= _ended(updates)
        return updates

    def _check(self, updates: Mapping[int, Update]) -> None:
        """Raise the error of an update, or ApiError if the time is over. What came before its end counts."""
        for update in updates.values():
            if isinstance(update.error, LlamitaError):
                raise _failure(update.error)
            if update.error:
                raise update.error
        has_token = self._has_token or bool(updates)
        end = self._end(has_token)
        if time.monotonic() >= end and _ended(updates) < self._left:
            what = "The answer" if has_token else "The first token"
            raise timed_out(f"{what} took longer than {end - self._began:g} seconds.")

    def _end(self, has_token: bool) -> float:
        limits = self._limits
        first = limits.total_seconds if has_token else limits.first_token_seconds
        return self._began + min(first, limits.total_seconds)

    @property
    def is_silent(self) -> bool:
        """True if the client has got nothing for long, though there may have been updates: some text is held back."""
        return time.monotonic() >= self._sent + SIGN_OF_LIFE

    def note_sent(self) -> None:
        """Note that the client gets something."""
        self._sent = time.monotonic()

    def _set_timer(self) -> None:
        seconds = min(self._end(self._has_token), self._sent + SIGN_OF_LIFE) - time.monotonic()
        self._timer = self._mailbox.loop.call_later(max(seconds, _LEAST_WAIT), self._ring)

    def _ring(self) -> None:
        """Wake the reader, who looks at the time, and set the timer to the next time that matters."""
        self._mailbox.wake()
        self._set_timer()

    async def all(self) -> list[Update]:
        """Return everything, by choice."""
        whole = [Update() for _ in self._mailbox.sequences]
        async for updates in self:
            self.note_sent()  # nothing is sent before the end
            for choice, update in updates.items():
                whole[choice] = merge(whole[choice], update)
        return whole

    def _note(self, updates: dict[int, Update]) -> None:
        """Count times; an update without text may be that of a token whose text is held back."""
        now = time.monotonic()
        if self._has_token:
            self._metrics.note_gap(now - self._last)
        else:
            self._metrics.note_first(now - self._began)
        self._has_token, self._last = True, now
        for update in updates.values():
            if update.generation:
                self._metrics.note_generation(update.generation)

    def note_end(self) -> None:
        """Count the end of the job, and the answers that were stopped before theirs."""
        self._timer.cancel()
        self._metrics.note_end(time.monotonic() - self._began, self._left)


def _ended(updates: Mapping[int, Update]) -> int:
    return sum(update.generation is not None for update in updates.values())


def _failure(error: LlamitaError) -> ApiError | LlamitaError:
    """Return a refusal where the request is at fault, such as its grammar; else the error itself."""
    return from_llamita(error) if isinstance(error, InputError) else error

"""The one thread that steps the schedulers, and the mailboxes through which text reaches the HTTP side.

A mailbox merges what comes while nobody reads: a slow reader gets fewer, larger pieces and never holds the engine. All
mailboxes that a step filled wake their readers by one call into the event loop.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from queue import SimpleQueue

from llamita.engine.logprobs import TokenLogprob
from llamita.engine.requests import Generation
from llamita.engine.scheduler import Scheduler
from llamita.engine.sequence import SequenceState
from llamita.errors import RunError

_log = logging.getLogger(__package__)


@dataclass
class Update:
    """What one sequence has made since the last look.

    Attributes:
        text: new text, perhaps "".
        logprobs: its new tokens' log-probabilities, if the request asked for them.
        prompt_logprobs: those of the prompt, with the first update that has tokens.
        generation: the whole, at the end.
        error: why it ended without one.
    """

    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    generation: Generation | None = None
    error: Exception | None = None


class Mailbox:
    """The sequences of one HTTP request, and what they made that the event loop has not read.

    Args:
        scheduler: runs them.
        sequences: one for each choice; not submitted yet.

    Attributes:
        loop: the event loop that reads.
        open: choices whose last event has not come; for the engine's thread alone.
    """

    def __init__(self, scheduler: Scheduler, sequences: Sequence[SequenceState]) -> None:
        self.scheduler, self.sequences = scheduler, tuple(sequences)
        self.loop = asyncio.get_running_loop()
        self._filled = asyncio.Event()
        self._lock = threading.Lock()
        self._updates: dict[int, Update] = {}  # by choice; the lock protects it
        self._seen = [-1] * len(sequences)  # how many logprobs were handed out; -1 before the first update
        self.open = set(range(len(sequences)))  # choices whose last event has not come; of the engine's thread

    async def take(self) -> dict[int, Update]:
        """Wait for updates; return them by choice."""
        await self._filled.wait()
        with self._lock:
            self._filled.clear()
            updates, self._updates = self._updates, {}
        return updates

    def collect(self) -> bool:
        """Move what the sequences made into the mailbox; return whether there was anything. Engine's thread only."""
        news = {}
        for choice in self.open:
            sequence, update = self.sequences[choice], Update()
            scores, seen = sequence.answer.logprobs, self._seen[choice]
            update.logprobs = scores[max(seen, 0) :]
            while sequence.events:
                _add(update, sequence.events.popleft())
            if update.text or update.logprobs or update.generation or update.error:
                if seen < 0:
                    update.prompt_logprobs = sequence.answer.prompt_logprobs
                self._seen[choice] = len(scores)
                news[choice] = update
        self.open -= {c for c, update in news.items() if update.generation or update.error}
        if news:
            with self._lock:
                for choice, update in news.items():
                    self._updates[choice] = merge(self._updates.get(choice), update)
        return bool(news)

    @property
    def is_done(self) -> bool:
        """True if no sequence will make anything more: each is at its end or cancelled. Engine's thread only."""
        return all(self.sequences[choice].is_over and not self.sequences[choice].events for choice in self.open)

    def fail(self, error: Exception) -> None:
        """End every open sequence with an error. Engine's thread only."""
        for choice in self.open:
            sequence = self.sequences[choice]
            sequence.events.append(error)
            self.scheduler.cancel(sequence)

    def wake(self) -> None:
        """Wake the reader. The event loop's thread only."""
        self._filled.set()


class EngineThread:
    """Steps the schedulers while they have work, and sleeps otherwise. `submit` and `cancel` are for the event loop.

    Args:
        schedulers: one for each loaded model; they take turns.
    """

    def __init__(self, schedulers: Sequence[Scheduler]) -> None:
        self._schedulers = tuple(schedulers)
        self._incoming: deque[Mailbox] = deque()
        self._open: list[Mailbox] = []
        self._woken = threading.Event()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._filled: SimpleQueue[list[Mailbox] | None] = SimpleQueue()
        self._waker = threading.Thread(target=self._wake_readers, name="waker", daemon=True)
        self._stepped = time.monotonic()
        self._is_working = False

    def start(self) -> None:
        """Start the thread."""
        self._waker.start()
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its step, and wait for that."""
        self._is_stopping = True
        self._woken.set()
        if self._thread.is_alive():
            self._thread.join()
        self._filled.put(None)

    def submit(self, mailbox: Mailbox) -> None:
        """Queue all sequences of a request.

        Raises:
            InputError: one can never fit the memory for keys and values; none is queued.
        """
        queued: list[SequenceState] = []
        try:
            for sequence in mailbox.sequences:
                queued.append(sequence)
                mailbox.scheduler.submit(sequence)
        except BaseException:
            for sequence in queued:
                mailbox.scheduler.cancel(sequence)
            raise
        self._incoming.append(mailbox)
        self._woken.set()

    def cancel(self, mailbox: Mailbox) -> None:
        """End what is left of a request; its places are free after the present step."""
        for sequence in mailbox.sequences:
            mailbox.scheduler.cancel(sequence)
        self._woken.set()

    @property
    def stalled_seconds(self) -> float:
        """How long the present step has taken, 0 while there is no work."""
        return time.monotonic() - self._stepped if self._is_working else 0.0

    def _run(self) -> None:
        while not self._is_stopping:
            self._woken.clear()  # before the look for work: what comes after it is seen at the wait
            self._stepped, self._is_working = time.monotonic(), True
            has_work = False
            for scheduler in self._schedulers:
                has_work = self._step(scheduler) or has_work
            self._hand_out()
            if not has_work and not self._incoming:
                self._is_working = False
                self._woken.wait()

    def _step(self, scheduler: Scheduler) -> bool:
        """Run one step; return whether work remains. A fault ends the requests of this scheduler, not the thread."""
        try:
            return scheduler.step()
        except Exception as error:
            _log.exception("a step failed")
            self._take_in()
            for mailbox in self._open:
                if mailbox.scheduler is scheduler:
                    mailbox.fail(RunError(f"engine: {type(error).__name__}"))
            return False

    def _take_in(self) -> None:
        while self._incoming:
            self._open.append(self._incoming.popleft())

    def _hand_out(self) -> None:
        """Fill the mailboxes, and wake the readers of those that got something."""
        self._take_in()
        filled = [mailbox for mailbox in self._open if mailbox.collect()]
        self._open = [mailbox for mailbox in self._open if not mailbox.is_done]
        if filled:
            self._filled.put(filled)

    def _wake_readers(self) -> None:
        """Pass filled mailboxes to the event loop, until None comes.

        Waking the loop lets go of the interpreter's lock. The engine's thread would then wait until the loop has sent
        everything; this one can wait for the next step, which runs without the lock.
        """
        while filled := self._filled.get():
            with suppress(RuntimeError):  # the loop is closed: nobody reads any more
                filled[0].loop.call_soon_threadsafe(_wake_all, filled)


def _wake_all(mailboxes: list[Mailbox]) -> None:
    for mailbox in mailboxes:
        mailbox.wake()


def _add(update: Update, event: str | Generation | Exception) -> None:
    if isinstance(event, str):
        update.text += event
    elif isinstance(event, Exception):
        update.error = event
    else:
        update.generation = event


def merge(old: Update | None, new: Update) -> Update:
    """Return two updates of a choice as one."""
    if old is None:
        return new
    return Update(
        old.text + new.text,
        old.logprobs + new.logprobs,
        old.prompt_logprobs + new.prompt_logprobs,
        new.generation or old.generation,
        new.error or old.error,
    )

"""Bounds on what waits: requests in all, prompt tokens in all, and requests of one key. What exceeds them is refused at
once, with an honest time to wait, rather than answered after its reader has left."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from llamita.engine.load import SchedulerLoad
from llamita.serve.errors import busy, wrong

_LONGEST_WAIT = 60  # seconds of Retry-After; OpenAI's library does not retry at all after more than 120


@dataclass(frozen=True)
class Bounds:
    """What may wait.

    Attributes:
        requests: answers that run or wait, of all keys.
        requests_per_key: the same of one key.
        prompt_tokens: tokens of prompts that wait, unless no other request waits.
    """

    requests: int = 80
    requests_per_key: int = 40
    prompt_tokens: int = 262_144


class QueueLimits:
    """Counts what runs and waits. All calls are from the event loop.

    Args:
        bounds: the most of each.
    """

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self.open = 0  # answers that run or wait
        self._by_owner: Counter[str | None] = Counter()

    def check(self, owner: str | None, load: Callable[[], SchedulerLoad]) -> None:
        """Refuse a request for which there is no place, before it is prepared.

        Raises:
            ApiError: 429, as `place` does.
        """
        with self.place(owner, 1, 0, load):
            pass

    @contextmanager
    def place(self, owner: str | None, answers: int, tokens: int, load: Callable[[], SchedulerLoad]) -> Iterator[None]:
        """Hold places for a request's answers while it lasts.

        Args:
            owner: whose request it is.
            answers: how many sequences it takes.
            tokens: the prompt tokens of all.
            load: gives what waits at the request's model.

        Raises:
            ApiError: 429, there is no room, and Retry-After says when there may be; 400, there can never be.
        """
        bounds, now = self.bounds, load()
        most = bounds.requests if owner is None else min(bounds.requests, bounds.requests_per_key)
        if answers > most:
            raise wrong("n", f"expected at most {most} answers in one request, got {answers}.")
        if self.open + answers > bounds.requests:
            raise busy(f"{self.open} answers run or wait here, the most is {bounds.requests}.", wait(now), "queue_full")
        if self._by_owner[owner] + answers > most:  # without keys, everybody has the same owner, and no such bound
            message = f"{self._by_owner[owner]} answers of this key run or wait, the most is {most}."
            raise busy(message, wait(now), "key_queue_full")
        if now.waiting_tokens + tokens > bounds.prompt_tokens and now.waiting:
            message = f"{now.waiting_tokens} prompt tokens wait here, the most is {bounds.prompt_tokens}."
            raise busy(message, wait(now), "queue_full")
        self.open += answers
        self._by_owner[owner] += answers
        try:
            yield
        finally:
            self.open -= answers
            self._by_owner[owner] -= answers
            if not self._by_owner[owner]:
                del self._by_owner[owner]


def wait(load: SchedulerLoad) -> int:
    """Return seconds until the prompts that wait are taken in, at the measured speed: 1 to 60."""
    if not load.prefill_rate:
        return 1
    begun = sum(s.prompt_tokens - s.tokens for s in load.sequences if not s.is_decoding)
    return min(_LONGEST_WAIT, max(1, math.ceil((load.waiting_tokens + begun) / load.prefill_rate)))

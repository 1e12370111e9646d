"""The state of one generation that the scheduler runs: its tokens, cache, sampler and drafts, and its events.

`SequenceState.events` is what a driver reads: pieces of text, at last a Generation or an error.
"""

import time
from collections import deque

import numpy as np

from llamita.engine.kv_cache import SequenceCache
from llamita.engine.logprobs import score
from llamita.engine.prefixes import Prefix, whole_blocks
from llamita.engine.requests import Answer, Generation, Request
from llamita.engine.sampler import Sampler
from llamita.engine.speculation import Drafter


class SequenceState:
    """One generation, from its submission to its last event. Only the thread that steps changes it, but for
    `is_over`, which a cancellation sets, and `events`, which a driver empties.

    Attributes:
        events: pieces of text, then the Generation or an error; a driver takes them from the left.
        is_over: no more events will come.
        is_begun: it has a cache.
        is_decoding: its prompt is computed.
        count: how many tokens are known. The cache counts for at most all of them but the newest.
        drafted: how many tokens after these the step verifies.
        positions: how many it may take memory for.
    """

    cache: SequenceCache  # `begin` sets the cache, ids and sampler
    ids: np.ndarray  # int32 (declared length,)
    sampler: Sampler
    drafter: Drafter | None  # set with the first token

    def __init__(self, request: Request, answer: Answer) -> None:
        self.request = request
        self.answer = answer
        self.events: deque[str | Generation | Exception] = deque()
        self.is_over = False
        self.is_begun = False
        self.is_decoding = False
        self.count = len(request.ids)
        self.drafted = 0
        self.positions = whole_blocks(request.declared_length)

    def begin(self, cache: SequenceCache, taken: int, vocab_size: int) -> None:
        """Take a cache, which may hold a beginning of the prompt and memory for `taken` positions already."""
        request, timings = self.request, self.answer.timings
        self.cache, self._taken = cache, taken
        self.ids = np.empty(request.declared_length, dtype=np.int32)
        self.ids[: self.count] = request.ids
        self.sampler = Sampler(request.sampling, request.ids, vocab_size, request.rules)
        self.is_begun = True
        timings.reused_tokens = cache.length
        timings.queue_seconds = time.perf_counter() - request.started

    def settle(self) -> int:
        """Cut refused drafts and the rest of an interrupted step from the cache; return its length."""
        self._taken = max(self._taken, whole_blocks(self.cache.length))
        self.cache.length = min(self.cache.length, self.count - 1)
        return self.cache.length

    def prefix(self) -> Prefix:
        """Return the cache and its tokens, for other sequences to begin with."""
        return Prefix(self.ids[: self.settle()], self.cache, self.request.declared_length, self._taken)

    def release(self) -> None:
        """Let go of the cache: the driver may keep this object for long."""
        if self.is_begun:
            self.is_begun = False
            del self.cache

    def draft(self, most: int) -> int:
        """Write up to `most` tokens after the known ones; return how many.

        What the grammar forces comes first, and may be more than the request's `speculate`.
        """
        most = min(most, self.request.declared_length - self.count - 1)
        if self.drafter is None or most < 1:
            return 0
        constraint = self.sampler.constraint
        forced = constraint.forced(most) if constraint else []
        return self.drafter.propose(min(most, self.request.speculate), forced)

    def take(self, logits: np.ndarray, began: float) -> None:
        """Draw a token from each row of logits (rows, vocab), up to the first that differs from the draft.

        `began` is when the step began, by time.perf_counter.
        """
        answer, pieces, drawn = self.answer, [], 0
        for row in logits:
            token = self.sampler.choose(row)
            is_hit = self._append(token)
            if self.request.logprobs is not None:
                answer.logprobs.append(score(row, token, self.request.logprobs))
            pieces.append(answer.add(token))
            drawn += 1
            if answer.finish_reason or not is_hit:
                break
        answer.timings.note(len(logits) - 1, drawn - 1, self.request.started, began)
        self.events.extend(piece for piece in pieces if piece)
        if answer.finish_reason:
            self.finish()

    def finish(self) -> None:
        """Add the last events."""
        piece, generation = self.answer.finish()
        self.events.extend((piece, generation) if piece else (generation,))
        self.is_over = True

    def fail(self, error: Exception) -> None:
        """End with an error, unless the Generation is there already. The cache cannot be trusted any more."""
        if not self.is_over and Generation not in map(type, self.events):
            self.events.append(error)
        self.is_over = True
        self.release()

    def _append(self, token: int) -> bool:
        """Add a token; return whether the draft has it."""
        if not self.is_decoding:
            self.drafter = Drafter(self.ids, self.count) if self.request.speculate else None
            self.is_decoding = True
        self.count += 1
        if self.drafter:
            return self.drafter.add(token)
        self.ids[self.count - 1] = token
        return False

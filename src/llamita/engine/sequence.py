"""The state of one generation that the scheduler runs: its tokens, cache, sampler and drafts, and its events.

`SequenceState.events` is what a driver reads: pieces of text, at last a Generation or an error.
"""

import math
import time
from collections import deque

import numpy as np

from llamita.engine.kv_cache import SequenceCache
from llamita.engine.logprobs import score
from llamita.engine.matches import Corpus
from llamita.engine.prefixes import BLOCK, Prefix, whole_blocks
from llamita.engine.requests import Answer, Generation, Request
from llamita.engine.sampler import Sampler
from llamita.engine.speculation import Drafter
from llamita.errors import RunError


class SequenceState:
    """One generation, from its submission to its last event. Only the thread that steps changes it, but for
    `is_over`, which a cancellation sets, and `events`, which a driver empties.

    Attributes:
        corpus: texts of the user that drafts come from, too.
        events: pieces of text, then the Generation or an error; a driver takes them from the left.
        arrival: smaller for those that were submitted before.
        is_over: no more events will come.
        is_begun: it has a cache.
        is_decoding: all its tokens but the newest are computed.
        ids: int32 (declared length,), of which the first `count` are known.
        count: how many tokens are known. The cache counts for at most all of them but the newest.
        drafted: how many tokens after these the step verifies.
        positions: how many its cache may take memory for, in whole blocks.
        was_begun: it has, or had before a pause.
    """

    cache: SequenceCache  # `begin` sets the cache and, the first time, the sampler
    sampler: Sampler
    drafter: Drafter | None  # set with the first token

    def __init__(self, request: Request, answer: Answer, corpus: Corpus | None = None) -> None:
        self.request = request
        self.answer = answer
        self.corpus = corpus
        self.events: deque[str | Generation | Exception] = deque()
        self.arrival = 0
        self.is_over = False
        self.is_begun = False
        self.is_decoding = False
        self.ids = np.empty(request.declared_length, dtype=np.int32)
        self.count = len(request.ids)
        self.ids[: self.count] = request.ids
        self.drafted = 0
        self.positions = 0
        self.was_begun = False

    @property
    def committed(self) -> int:
        """The positions that its known tokens take memory for."""
        return max(self.positions, whole_blocks(self.count))

    @property
    def wanted(self) -> int:
        """The positions that must be free for it to enter: its known tokens and a block more, if it declares so many.

        Without the block more, a sequence that was paused would soon be paused again.
        """
        return whole_blocks(min(self.request.declared_length, self.count + BLOCK))

    @property
    def first_row(self) -> int:
        """The first known token whose logits are needed: one that scores a prompt token, or else the newest."""
        return max(0, len(self.answer.prompt_logprobs) - 1) if self.scores else self.count - 1

    @property
    def scores(self) -> bool:
        """Whether log-probabilities of its prompt are still to come."""
        return self.request.prompt_logprobs is not None and len(self.answer.prompt_logprobs) < len(self.request.ids)

    @property
    def taken_in(self) -> int:
        """How many tokens its cache holds; it may be asked while a step runs."""
        cache = self.__dict__.get("cache")
        return cache.length if cache else 0

    def begin(self, cache: SequenceCache, vocab_size: int) -> None:
        """Take a cache, which may hold a beginning of the known tokens already."""
        request, timings = self.request, self.answer.timings
        if not self.was_begun:
            self.sampler = Sampler(request.sampling, request.ids, vocab_size, request.rules)
            timings.reused_tokens = cache.length
            timings.queue_seconds = time.perf_counter() - request.started
            self.was_begun = True
        self.cache = cache
        self.is_begun = True

    def settle(self) -> int:
        """Cut refused drafts and the rest of an interrupted step from the cache; return its length."""
        self.cache.length = min(self.cache.length, self.first_row)
        return self.cache.length

    def prefix(self, owner: str | None) -> Prefix:
        """Return the cache and its tokens, for other sequences to begin with."""
        return Prefix(self.ids[: self.settle()], self.cache, self.request.declared_length, self.positions, owner)

    def note_prompt(self, seconds: float, rows: int) -> None:
        """Count a step that took in some of its prompt, or of what it has to compute again."""
        timings = self.answer.timings
        if not timings.first_token_seconds:
            timings.prefill_seconds += seconds
        elif not rows:  # else `take` counts it
            timings.decode_seconds += seconds

    def release(self) -> None:
        """Let go of the cache: the driver may keep this object for long."""
        self.positions = 0
        if self.is_begun:
            self.is_begun = False
            del self.cache

    def receive(self, logits: np.ndarray, began: float) -> None:
        """Take the logits (rows, vocab) of a step that began then: score the prompt with them, then draw."""
        if self.scores:
            ids, scored = self.request.ids, self.answer.prompt_logprobs
            if not scored:
                scored.append(None)  # nothing comes before the first token
            rest = len(ids) - len(scored)
            for row in logits[:rest]:
                if not math.isfinite(largest := row.max()):
                    raise RunError("logits", "finite values", f"{largest}", "the weights are broken")
                scored.append(score(row, int(ids[len(scored)]), self.request.prompt_logprobs or 0))
            logits = logits[rest:]
        if len(logits) and self.answer.finish_reason:  # only the prompt was to be scored
            self.finish()
        elif len(logits):
            self.take(logits, began)

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
        if self.count == len(self.request.ids):
            self.drafter = Drafter(self.ids, self.count, self.corpus) if self.request.speculate else None
        self.is_decoding = True
        self.count += 1
        if self.drafter:
            return self.drafter.add(token)
        self.ids[self.count - 1] = token
        return False

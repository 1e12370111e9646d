"""Runs any number of generations through shared steps of the model.

`docs/reference/engine.md`, "Scheduling and speculation", says what a step takes in and why. There is no thread here:
whoever waits for a piece of text runs the next step for all, unless somebody else is at it.
"""

import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from llamita.engine.kv_cache import SequenceCache
from llamita.engine.model import Model
from llamita.engine.prefixes import BLOCK, SHORTEST, Prefix, PrefixCache, whole_blocks
from llamita.engine.requests import Answer, Generation, Request
from llamita.engine.sampler import Sampler
from llamita.engine.speculation import DECODE_ROWS, Drafter, StepTimes
from llamita.errors import InputError, RunError

PREFILL_CHUNK = 256  # tokens a step: enough for the kernels' full speed, little memory for what lies between
MIXED_CHUNK = 64  # beside running generations, which wait for the step to end


@dataclass(frozen=True)
class Limits:
    """What the sequences of a scheduler may take.

    Attributes:
        sequences: that run at once.
        cache_memory: bytes of keys and values, of running sequences and kept ones together; each counts
            in whole blocks of positions, as its cache takes memory.
        prefix_memory: bytes of them that may be kept ones.
        kv_dtype: of the caches.
        context: tokens of a sequence at most.
    """

    sequences: int
    cache_memory: int
    prefix_memory: int
    kv_dtype: str
    context: int


class Stream:
    """An answer as it comes: an iterator over pieces of text and, at last, the Generation.

    `close` cancels, at any time and from any thread; so does letting go of the stream.
    """

    def __init__(self, scheduler: "Scheduler", sequence: "_Sequence") -> None:
        self._scheduler = scheduler
        self._sequence = sequence

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> str | Generation:
        sequence = self._sequence
        while True:
            is_over = sequence.is_over  # before the events: another thread may end it between
            if sequence.events:
                break
            if is_over:
                raise StopIteration
            self._scheduler.advance(sequence)
        event = sequence.events.popleft()
        if isinstance(event, Exception):
            raise event
        return event

    def close(self) -> None:
        """Cancel what is not computed yet; the iterator ends after the pieces that are there."""
        self._scheduler.cancel(self._sequence)

    def __del__(self) -> None:
        self.close()


class _Sequence:
    """One generation's state. Its cache never counts for more than all tokens but the newest."""

    cache: SequenceCache  # these four from `begin` on
    ids: np.ndarray  # int32 (declared length,)
    sampler: Sampler
    drafter: Drafter | None

    def __init__(self, request: Request, answer: Answer) -> None:
        self.request = request
        self.answer = answer
        self.events: deque[str | Generation | Exception] = deque()
        self.is_over = False  # no more events will come
        self.is_begun = False  # and has a cache
        self.is_decoding = False
        self.count = len(request.ids)  # tokens known
        self.drafted = 0  # tokens after these to verify in this step
        self.positions = whole_blocks(request.declared_length)  # that it may take

    def begin(self, cache: SequenceCache, taken: int, vocab_size: int) -> None:
        """Take resources; `cache` may hold a beginning of the prompt, and `taken` positions' memory."""
        request, timings = self.request, self.answer.timings
        self.cache, self._taken = cache, taken
        self.ids = np.empty(request.declared_length, dtype=np.int32)
        self.ids[: self.count] = request.ids
        self.sampler = Sampler(request.sampling, request.ids, vocab_size)
        self.is_begun = True
        timings.reused_tokens = cache.length
        timings.queue_seconds = time.perf_counter() - request.started

    def settle(self) -> int:
        """Cut from the cache what no step is to build on: refused drafts, a step that was interrupted."""
        self._taken = max(self._taken, whole_blocks(self.cache.length))
        self.cache.length = min(self.cache.length, self.count - 1)
        return self.cache.length

    def prefix(self) -> Prefix:
        """What the cache holds, for other sequences."""
        return Prefix(self.ids[: self.settle()], self.cache, self.request.declared_length, self._taken)

    def release(self) -> None:
        """Let go of the cache: the caller's stream may live on."""
        if self.is_begun:
            self.is_begun = False
            del self.cache

    def take(self, logits: np.ndarray, began: float) -> None:
        """Draw the next token from each row (rows, vocab), as long as the one before was the draft's."""
        answer, pieces, drawn = self.answer, [], 0
        for row in logits:
            token = self.sampler.choose(row)
            is_hit = self._append(token)
            pieces.append(answer.add(token))
            drawn += 1
            if answer.finish_reason or not is_hit:
                break
        answer.timings.note(len(logits) - 1, drawn - 1, self.request.started, began)
        self.events.extend(piece for piece in pieces if piece)
        if answer.finish_reason:
            self.finish()

    def finish(self) -> None:
        piece, generation = self.answer.finish()
        self.events.extend((piece, generation) if piece else (generation,))
        self.is_over = True

    def fail(self, error: Exception) -> None:
        """End with an error, unless the end is there already; what the cache holds is not to be trusted."""
        if not self.is_over and Generation not in map(type, self.events):
            self.events.append(error)
        self.is_over = True
        self.release()

    def _append(self, token: int) -> bool:
        """Add a token; whether it is the draft's."""
        if not self.is_decoding:
            self.drafter = Drafter(self.ids, self.count) if self.request.speculate else None
            self.is_decoding = True
        self.count += 1
        if self.drafter:
            return self.drafter.add(token)
        self.ids[self.count - 1] = token
        return False


class _Part(NamedTuple):
    """A sequence's share of a step."""

    sequence: _Sequence
    ids: np.ndarray  # its next tokens, int32 (tokens,)
    rows: int  # how many of them, the last ones, give logits: the newest known and the drafted


class Scheduler:
    """The sequences of one model, waiting and running.

    Attributes:
        model: what the steps are run on.
    """

    def __init__(self, model: Model, limits: Limits) -> None:
        self.model = model
        self._limits = limits
        config = model.config
        block = SequenceCache(config, BLOCK, limits.kv_dtype, BLOCK).nbytes
        self._room = limits.cache_memory // block * BLOCK  # positions of all sequences, kept ones too
        self._kept = PrefixCache(limits.prefix_memory // block * BLOCK, config.rope, config.head_dim)
        self._times = StepTimes()
        self._logits = np.empty((1, config.vocab_size), dtype=np.float32)
        self._waiting: deque[_Sequence] = deque()
        self._prompts: list[_Sequence] = []  # that run and have no token yet, in order of arrival
        self._decoding: list[_Sequence] = []  # that have one
        self._lock = threading.RLock()  # guards the queue, and who steps; who does has the rest
        self._changed = threading.Condition(self._lock)  # not for `with`, which is Python code here
        self._is_stepping = False

    def submit(self, request: Request, answer: Answer) -> Stream:
        """Queue a request; its answer comes as somebody waits for it.

        Raises:
            InputError: it can never fit the memory for keys and values.
        """
        if request.declared_length > self._room:
            raise InputError(
                "max_tokens",
                f"up to {self._room} tokens with the prompt, for which there is memory",
                f"{request.declared_length}",
                "try fewer (--max-tokens, --context), smaller keys and values (--kv-cache int8, in Python kv_dtype), or there more cache_memory",
            )
        sequence = _Sequence(request, answer)
        stream = Stream(self, sequence)  # first: what is queued must have somebody who can close it
        if answer.finish_reason:  # no room for an answer
            sequence.finish()
        else:
            with self._lock:
                self._waiting.append(sequence)
        return stream

    def cancel(self, sequence: _Sequence) -> None:
        """End a sequence; what its cache holds is kept for others."""
        if sequence.is_over:
            return
        sequence.is_over = True
        with self._lock:
            if not self._is_stepping:  # else who steps does it
                self._sweep()
            self._changed.notify_all()

    def advance(self, sequence: _Sequence) -> None:
        """Run a step, or wait while another thread runs one, unless the sequence has an event or ended.

        An interrupt can come wherever a function begins or returns, so that of all here only plain
        assignments and the lock's own `with` are sure to happen.
        """
        is_mine = False
        try:
            with self._lock:
                while self._is_stepping and not sequence.events and not sequence.is_over:
                    self._changed.wait()
                if sequence.events or sequence.is_over:
                    return
                is_mine = self._is_stepping = True
            self._step()
        finally:
            if is_mine:
                try:
                    with self._lock:
                        self._sweep()
                        self._changed.notify_all()
                        is_mine = self._is_stepping = False
                finally:
                    if is_mine:  # interrupted there
                        self._is_stepping = False
                        with self._lock:
                            self._changed.notify_all()

    def _sweep(self) -> None:
        """Let go of the sequences that are over."""
        over = [s for s in self._running() if s.is_over]
        if not over:
            return
        self._prompts = [s for s in self._prompts if s not in over]
        self._decoding = [s for s in self._decoding if s not in over]
        for sequence in over:
            if sequence.is_begun:
                prefix = sequence.prefix()
                self._kept.keep(prefix._replace(ids=prefix.ids.copy()))
            sequence.release()

    def _running(self) -> list[_Sequence]:
        return self._decoding + self._prompts

    def _step(self) -> None:
        """One step of the model over whatever there is."""
        if self._waiting:
            self._admit()
        parts = self._plan()
        if not parts:
            return
        rows, tokens = [], 0
        for part in parts:
            tokens += len(part.ids)
            rows += range(tokens - part.rows, tokens)
        if len(rows) > len(self._logits):
            self._logits = np.empty((len(rows), self._logits.shape[1]), dtype=np.float32)
        began = time.perf_counter()
        logits = self.model.step(
            [(sequence.cache, ids) for sequence, ids, _ in parts],
            np.array(rows, dtype=np.intp),
            self._logits[: len(rows)],
        )
        seconds = time.perf_counter() - began
        if self._prompts:
            for part in parts:
                if not part.sequence.is_decoding:
                    part.sequence.answer.timings.prefill_seconds += seconds
        else:
            self._times.add(len(rows), seconds)
        self._hand_out(parts, logits, began)

    def _hand_out(self, parts: list[_Part], logits: np.ndarray, began: float) -> None:
        """Give each sequence its rows."""
        first = 0
        for sequence, _, rows in parts:
            if rows and not sequence.is_over:
                try:
                    sequence.take(logits[first : first + rows], began)
                except Exception as error:  # its own: the others go on
                    sequence.fail(error)
                except BaseException:  # an interrupt with a token half taken
                    sequence.fail(RunError("generation: interrupted"))
                    raise
            first += rows
        if self._prompts:
            decoding = self._decoding + [s for s in self._prompts if s.is_decoding]
            prompts = [s for s in self._prompts if not s.is_decoding]
            self._decoding, self._prompts = decoding, prompts  # no call between, so no interrupt

    def _admit(self) -> None:
        """Let waiting sequences in, first come, first served; kept caches give way as they begin."""
        running = self._running()
        used, count = sum(s.positions for s in running), len(running)
        while self._waiting and count < self._limits.sequences:
            sequence = self._waiting[0]
            if sequence.is_over:  # cancelled before its turn
                del self._waiting[0]
                continue
            if used + sequence.positions > self._room:
                break
            self._prompts = [*self._prompts, sequence]  # no call between these, so no interrupt
            del self._waiting[0]
            used, count = used + sequence.positions, count + 1

    def _plan(self) -> list[_Part]:
        """What the next step takes in."""
        self._draft()
        parts = []
        for s in self._decoding:
            if not s.is_over:  # else it may have no cache, where an interrupt came in the way of the sweep
                parts.append(_Part(s, s.ids[s.settle() : s.count + s.drafted], 1 + s.drafted))
        budget = MIXED_CHUNK if self._decoding else PREFILL_CHUNK
        for s in self._prompts:
            if not budget:
                break
            if s.is_over or not (s.is_begun or self._begin(s)):
                continue  # others need not wait for what it waits for
            start = s.settle()
            stop = min(s.count, start + budget)
            parts.append(_Part(s, s.ids[start:stop], int(stop == s.count)))
            budget -= stop - start
        return parts

    def _draft(self) -> None:
        """Draft as much as pays; beside a prompt the step has work enough without."""
        sequences = len(self._decoding)
        most = 0 if self._prompts or not sequences else (DECODE_ROWS - sequences) // sequences
        drafts = []
        for s in self._decoding:
            s.drafted = 0
            limit = min(most, s.request.speculate, s.request.declared_length - s.count - 1)
            if s.drafter and limit > 0:
                s.drafted = s.drafter.propose(limit)
                if s.drafted:
                    drafts.append((s.drafted, s.drafter.rate))
        if drafts:
            length = self._times.best_length(sequences, drafts)
            for s in self._decoding:
                s.drafted = min(s.drafted, length)

    def _begin(self, sequence: _Sequence) -> bool:
        """Give a sequence its cache; False if it had better wait for what another one is taking in."""
        request, config, adapter = sequence.request, self.model.config, sequence.request.adapter
        ids, declared = request.ids[:-1], request.declared_length  # one is left, for the logits
        found, shared, others = None, 0, [s for s in self._running() if s.is_begun]
        if self._limits.prefix_memory:
            found, shared = self._kept.find(ids, declared, [s.prefix() for s in others], adapter)
            for other in others:
                whole = other.prefix()._replace(ids=other.request.ids)
                coming = self._kept.shared(whole, ids, declared, adapter)
                if not other.is_decoding and coming >= shared + SHORTEST:
                    return False
        room = self._room - sum(s.positions for s in others) - sequence.positions
        cache, taken = None, 0
        if found and (cache := self._kept.take(found, shared, declared, room)):
            taken = found.positions
        self._kept.shrink(room)
        if cache is None:
            capacity = min(self._limits.context, max(BLOCK, 1 << (declared - 1).bit_length()))
            try:
                cache = SequenceCache(config, capacity, self._limits.kv_dtype, declared)
            except MemoryError:
                sequence.fail(RunError("memory", f"room for keys and values of {capacity} tokens"))
                return False
            cache.adapter = adapter
            if found:  # even where it just gave way: it is there until it has been copied
                cache.copy_prefix(found.cache, shared)
        cache.length = shared
        sequence.begin(cache, taken, config.vocab_size)
        return True

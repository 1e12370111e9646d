"""Runs any number of generations through shared steps of the model.

`docs/reference/engine.md`, "Scheduling and speculation", says what a step takes in and why. There is no thread here:
a driver calls `step`, either the readers of streams in turn (`stream.py`) or one thread of a server.
"""

import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from llamita.engine.kv_cache import SequenceCache
from llamita.engine.model import Model
from llamita.engine.prefixes import BLOCK, SHORTEST, Prefix, PrefixCache
from llamita.engine.sequence import SequenceState
from llamita.engine.speculation import DECODE_ROWS, StepTimes
from llamita.errors import InputError, RunError

PREFILL_CHUNK = 256  # prompt tokens in a step: enough for the kernels' full speed, small intermediate arrays
MIXED_CHUNK = 64  # the same in a step with running generations, which wait for its end


@dataclass(frozen=True)
class SequenceLimits:
    """Bounds for the sequences of a scheduler.

    Attributes:
        sequences: how many run at once.
        cache_memory: bytes of keys and values, of running sequences and kept caches together. Each counts in whole
            blocks of positions, because its cache takes memory by blocks.
        prefix_memory: how many of these bytes kept caches may take.
        kv_dtype: the type of keys and values.
        context: the most tokens of a sequence.
    """

    sequences: int
    cache_memory: int
    prefix_memory: int
    kv_dtype: str
    context: int


class StepPart(NamedTuple):
    """A sequence's share of a step."""

    sequence: SequenceState
    ids: np.ndarray  # its next tokens, int32 (tokens,)
    rows: int  # how many of them, from the end, give logits: the newest known token and the drafted ones


class Scheduler:
    """The waiting and running sequences of one model. `submit`, `cancel` and `step` may be called from any thread.

    Attributes:
        model: runs the steps.
    """

    def __init__(self, model: Model, limits: SequenceLimits) -> None:
        self.model = model
        self._limits = limits
        config = model.config
        block = SequenceCache(config, BLOCK, limits.kv_dtype, BLOCK).nbytes
        self._room = limits.cache_memory // block * BLOCK  # positions of all sequences and kept caches
        self._kept = PrefixCache(limits.prefix_memory // block * BLOCK, config.rope, config.head_dim)
        self._times = StepTimes()
        self._logits = np.empty((1, config.vocab_size), dtype=np.float32)
        self._waiting: deque[SequenceState] = deque()
        self._prompts: list[SequenceState] = []  # running, without a token yet, in order of arrival
        self._decoding: list[SequenceState] = []  # running, with a token
        # The lock protects `_waiting` and `_is_stepping`. The thread that is stepping owns everything else.
        self._lock = threading.RLock()
        # Only wait and notify: `with` on a Condition runs Python code, where Ctrl-C could leave the lock taken.
        self._changed = threading.Condition(self._lock)
        self._is_stepping = False

    def submit(self, sequence: SequenceState) -> None:
        """Queue a sequence. Its events come as steps are run.

        The caller must be able to cancel it even if this is interrupted, for it may be queued already.

        Raises:
            InputError: it can never fit the memory for keys and values.
        """
        declared = sequence.request.declared_length
        if declared > self._room:
            raise InputError(
                "max_tokens",
                f"up to {self._room} tokens with the prompt, for which there is memory",
                f"{declared}",
                "try fewer (--max-tokens, --context), int8 keys and values (--kv-cache int8, in Python kv_dtype) "
                "or, in Python, more cache_memory",
            )
        if sequence.answer.finish_reason:  # no room for an answer
            sequence.finish()
        else:
            with self._lock:
                self._waiting.append(sequence)

    def cancel(self, sequence: SequenceState) -> None:
        """End a sequence. Its cache is kept for others."""
        if sequence.is_over:
            return
        sequence.is_over = True
        with self._lock:
            if not self._is_stepping:  # else the thread that is stepping does it
                self._sweep()
            self._changed.notify_all()

    def step(self, reader: SequenceState | None = None) -> bool:
        """Run one step of the model for all sequences; return whether work remains.

        A server's thread calls this while it returns True, and hands out the events after each call. It should be the
        only one that steps. Where several threads do, they take turns: a call waits while another one runs.

        Args:
            reader: the sequence whose next event the caller waits for. If it has one or is over, now or after a wait,
                no step is run.
        """
        # An interrupt can come wherever a function begins or returns. Only plain assignments and the lock's own
        # `with` are sure to happen.
        is_mine = False
        try:
            with self._lock:
                while self._is_stepping and not _is_served(reader):
                    self._changed.wait()
                if not _is_served(reader):
                    is_mine = self._is_stepping = True
            if is_mine and (parts := self._schedule()):
                began = time.perf_counter()
                logits = self._run(parts)
                self._deliver(parts, logits, began)
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
        # In the order in which sequences move on: another thread's step moves none past this look.
        return bool(self._waiting or self._prompts or self._decoding)

    def _schedule(self) -> list[StepPart]:
        """Let waiting sequences in; return the parts of the next step."""
        if self._waiting:
            self._admit()
        self._draft()
        parts = []
        for s in self._decoding:
            if not s.is_over:  # an over one may have no cache: an interrupted sweep leaves it here
                parts.append(StepPart(s, s.ids[s.settle() : s.count + s.drafted], 1 + s.drafted))
        return parts + self._plan_prompts(MIXED_CHUNK if self._decoding else PREFILL_CHUNK)

    def _run(self, parts: list[StepPart]) -> np.ndarray:
        """Run the model; return the logits of all parts, one after the other: (rows, vocab)."""
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
        return logits

    def _deliver(self, parts: list[StepPart], logits: np.ndarray, began: float) -> None:
        """Give each sequence its rows of logits to draw from."""
        first = 0
        for sequence, _, rows in parts:
            if rows and not sequence.is_over:
                try:
                    sequence.take(logits[first : first + rows], began)
                except Exception as error:  # it ends this sequence alone
                    sequence.fail(error)
                except BaseException:  # an interrupt, with a token half taken
                    sequence.fail(RunError("generation: interrupted"))
                    raise
            first += rows
        if self._prompts:
            decoding = self._decoding + [s for s in self._prompts if s.is_decoding]
            prompts = [s for s in self._prompts if not s.is_decoding]
            self._decoding, self._prompts = decoding, prompts  # no call between, so no interrupt

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

    def _running(self) -> list[SequenceState]:
        return self._decoding + self._prompts

    def _admit(self) -> None:
        """Let waiting sequences in, first come, first served. Kept caches give way only when one begins."""
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

    def _draft(self) -> None:
        """Draft as many tokens as pay. A step with a prompt drafts none: it has work enough."""
        sequences = len(self._decoding)
        most = 0 if self._prompts or not sequences else (DECODE_ROWS - sequences) // sequences
        drafts = []
        for s in self._decoding:
            s.drafted = s.draft(most)
            if s.drafted and s.drafter:
                drafts.append((s.drafted, s.drafter.rate))
        if drafts:
            length = self._times.best_length(sequences, drafts)
            for s in self._decoding:
                s.drafted = min(s.drafted, length)

    def _plan_prompts(self, budget: int) -> list[StepPart]:
        """Return the prompts' parts of the next step, in order of arrival, with up to `budget` tokens."""
        parts = []
        for s in self._prompts:
            if not budget:
                break
            if not (s.is_begun or s.is_over):
                found, shared = self._find_prefix(s)
                if self._is_longer_prefix_coming(s, shared):
                    continue  # it waits for that, but those behind it need not wait
                self._begin(s, found, shared)
            if s.is_over:  # cancelled, or there is no memory for it
                continue
            start = s.settle()
            stop = min(s.count, start + budget)
            parts.append(StepPart(s, s.ids[start:stop], int(stop == s.count)))
            budget -= stop - start
        return parts

    def _begun(self) -> list[SequenceState]:
        return [s for s in self._running() if s.is_begun]

    def _find_prefix(self, sequence: SequenceState) -> tuple[Prefix | None, int]:
        """Return the kept or running cache with the longest common beginning, and the length of that."""
        if not self._limits.prefix_memory:
            return None, 0
        request, running = sequence.request, [s.prefix() for s in self._begun()]
        ids = request.ids[:-1]  # the last one must be computed, for its logits
        return self._kept.find(ids, request.declared_length, running, request.adapter)

    def _is_longer_prefix_coming(self, sequence: SequenceState, shared: int) -> bool:
        """Return whether a running prompt will soon share a beginning much longer than `shared`."""
        if not self._limits.prefix_memory:
            return False
        request = sequence.request
        for other in self._begun():
            if not other.is_decoding:
                whole = other.prefix()._replace(ids=other.request.ids)
                coming = self._kept.shared(whole, request.ids[:-1], request.declared_length, request.adapter)
                if coming >= shared + SHORTEST:
                    return True
        return False

    def _begin(self, sequence: SequenceState, found: Prefix | None, shared: int) -> None:
        """Give a sequence its cache, with the first `shared` tokens of `found`, or end it if there is no memory.

        Kept caches give way to it.
        """
        config, declared = self.model.config, sequence.request.declared_length
        room = self._room - sum(s.positions for s in self._begun()) - sequence.positions
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
                return
            cache.adapter = sequence.request.adapter
            if found:  # it can be copied even if it just gave way: `found` still holds it
                cache.copy_prefix(found.cache, shared)
        cache.length = shared
        sequence.begin(cache, taken, config.vocab_size)


def _is_served(reader: SequenceState | None) -> bool:
    return reader is not None and (bool(reader.events) or reader.is_over)

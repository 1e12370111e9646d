"""Runs any number of generations through shared steps of the model.

`docs/reference/engine.md`, "Scheduling and speculation", says what a step takes in and why. There is no thread here:
a driver calls `step`, either the readers of streams in turn (`stream.py`) or one thread of a server.
"""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llamita.engine import prefix_file
from llamita.engine.adapters import Adapter
from llamita.engine.admission import Waiting
from llamita.engine.cache_memory import CacheMemory
from llamita.engine.load import Counters, RunningSequence, SchedulerLoad, SequenceLimits
from llamita.engine.model import Model
from llamita.engine.prompt_budget import PromptBudget, share
from llamita.engine.sequence import SequenceState
from llamita.engine.speculation import DECODE_ROWS, StepTimes
from llamita.errors import InputError, RunError

SCORED_ROWS = 64  # prompt tokens of a step that give logits to score: their rows take 33 MB at 128,000 logits


class StepPart(NamedTuple):
    """A sequence's share of a step."""

    sequence: SequenceState
    ids: np.ndarray  # its next tokens, int32 (tokens,)
    rows: int  # how many of them, from the end, give logits: the newest known token and the drafted ones


class Scheduler:
    """The waiting and running sequences of one model. `submit`, `cancel` and `step` may be called from any thread.

    Attributes:
        model: runs the steps.
        limits: its bounds, which do not change.
        counters: what was done so far.
    """

    def __init__(self, model: Model, limits: SequenceLimits) -> None:
        self.model = model
        self.counters = Counters()
        self.limits = limits
        self._memory = CacheMemory(model.config, limits, self.counters, self._pause)
        self._times = StepTimes()
        self._budget = PromptBudget(limits.beside_seconds, limits.alone_seconds)
        self._logits = np.empty((1, model.config.vocab_size), dtype=np.float32)
        self._waiting = Waiting()
        self._is_cancelled = False  # some of them are over
        self._submitted = 0
        self._prompts: list[SequenceState] = []  # running, with tokens to take in, in the order in which they entered
        self._decoding: list[SequenceState] = []  # running, with all tokens but the newest taken in
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
        if declared > self._memory.room:
            raise InputError(
                "max_tokens",
                f"up to {self._memory.room} tokens with the prompt, for which there is memory",
                f"{declared}",
                "try fewer (--max-tokens, --context), int8 keys and values (--kv-cache int8, in Python kv_dtype) "
                "or, in Python, more cache_memory",
            )
        if sequence.answer.finish_reason and not sequence.scores:  # no room for an answer
            sequence.finish()
        else:
            with self._lock:
                self._submitted = sequence.arrival = self._submitted + 1
                self._waiting.append(sequence)

    def cancel(self, sequence: SequenceState) -> None:
        """End a sequence. Its cache is kept for others."""
        if sequence.is_over:
            return
        sequence.is_over = True
        with self._lock:
            self._is_cancelled = (
                True  # it is dropped later: this may run, by a collected stream, in the midst of a look
            )
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
        # In the order in which sequences move on: another thread's step moves none past this look. A pause moves back.
        return bool(self._waiting or self._prompts or self._decoding or self._waiting.paused)

    @property
    def load(self) -> SchedulerLoad:
        """A snapshot of the work, from any thread, in which a step may be half counted."""
        with self._lock:
            waiting = [s for s in self._waiting if not s.is_over]
            paused = sum(not s.is_over for s in self._waiting.paused)
        decoding, prompts = self._decoding, self._prompts
        running = decoding + prompts
        return SchedulerLoad(
            waiting=len(waiting),
            waiting_tokens=sum(s.count for s in waiting),
            running=len(running),
            decoding=len(decoding),
            used_positions=sum(s.positions for s in running),
            room_positions=self._memory.room,
            kept_positions=self._memory.kept.positions,
            prefill_rate=self._budget.rate,
            paused=paused,
            sequences=tuple(
                RunningSequence(s.taken_in, len(s.request.ids), s.is_decoding, s.request.owner) for s in running
            ),
        )

    def save_prefixes(self, path: Path) -> int:
        """Write the kept caches to a file, for `load_prefixes` of a later run; return how many.

        Steps wait meanwhile.

        Raises:
            RunError: the file cannot be written; one that was there is unchanged.
        """
        with self._alone():
            kept = self._memory.kept.all()
            prefix_file.save(path, self.model, self.limits.kv_dtype, kept)
            return len(kept)

    def load_prefixes(self, path: Path, adapters: Mapping[str, Adapter] | None = None) -> int:
        """Keep the caches of a file that `save_prefixes` wrote, as far as there is memory; return how many.

        Args:
            adapters: those that the model was loaded with; prefixes of others are left out.

        Raises:
            InputError: the file is missing, damaged, or of another model, kv_dtype or version; nothing was changed.
            RunError: it cannot be read, or memory is short.
        """
        with self._alone():
            used = sum(s.positions for s in self._running())
            free = min(self._memory.kept.limit, self._memory.room - used)
            limits = self.limits
            found = prefix_file.load(path, self.model, limits.kv_dtype, limits.context, free, adapters or {})
            for prefix in found:
                self._memory.kept.keep(prefix)
            self._memory.kept.shrink(free)
            kept = {id(prefix) for prefix in self._memory.kept.all()}
            return sum(id(prefix) in kept for prefix in found)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Let no step run during the block."""
        with self._lock:
            while self._is_stepping:
                self._changed.wait()
            self._is_stepping = True
        try:
            yield
        finally:
            with self._lock:
                self._is_stepping = False
                self._sweep()  # what was cancelled meanwhile
                self._changed.notify_all()

    def _schedule(self) -> list[StepPart]:
        """Let waiting sequences in; return the parts of the next step."""
        if self._waiting:
            self._admit()
        self._draft()
        parts = []
        for s in self._decoding:
            if not s.is_begun:  # an over one may have no cache: an interrupted sweep leaves it here
                continue
            if s.drafted and not self._memory.is_free(s, s.count + s.drafted, self._begun):
                s.drafted = 0
            if not s.is_over and self._memory.reserve(s, s.count + s.drafted, self._begun):
                parts.append(StepPart(s, s.ids[s.settle() : s.count + s.drafted], 1 + s.drafted))
        if self._prompts:
            decode_seconds = self._times.seconds(len(parts)) if parts else 0.0
            parts += self._plan_prompts(self._budget.tokens(decode_seconds, bool(parts), len(self._prompts)))
        return [part for part in parts if part.sequence.is_begun]  # without those that were paused for others

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
        self._note(parts, len(rows), time.perf_counter() - began)
        return logits

    def _note(self, parts: list[StepPart], rows: int, seconds: float) -> None:
        """Count a step and learn from its time."""
        prompts = [part for part in parts if not part.sequence.is_decoding]
        tokens = sum(len(part.ids) for part in prompts)
        self.counters.steps += 1
        self.counters.prompt_tokens += tokens
        if not prompts:
            self._times.add(rows, seconds)
            return
        for part in prompts:
            part.sequence.note_prompt(seconds, part.rows)
        if all(part.rows <= 1 for part in prompts):  # the logits of whole prompts take time of their own
            decoding = sum(part.rows for part in parts if part.sequence.is_decoding)
            self._budget.add(tokens, seconds, self._times.seconds(decoding) if decoding else 0.0, decoding > 0)

    def _deliver(self, parts: list[StepPart], logits: np.ndarray, began: float) -> None:
        """Give each sequence its rows of logits to draw from."""
        first = 0
        for sequence, _, rows in parts:
            known = sequence.count
            if rows and not sequence.is_over:
                try:
                    sequence.receive(logits[first : first + rows], began)
                except Exception as error:  # it ends this sequence alone
                    sequence.fail(error)
                except BaseException:  # an interrupt, with a token half taken
                    sequence.fail(RunError("generation: interrupted"))
                    raise
            first += rows
            self.counters.generated_tokens += sequence.count - known
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
                self._memory.keep(sequence)
            sequence.release()

    def _running(self) -> list[SequenceState]:
        return self._decoding + self._prompts

    def _begun(self) -> list[SequenceState]:
        return [s for s in self._running() if s.is_begun]

    def _admit(self) -> None:
        """Let waiting sequences in. Kept caches give way only when one begins."""
        with self._lock:
            if self._is_cancelled:
                self._is_cancelled = False
                self._waiting.drop_cancelled()
            running = self._running()
            used, slots = sum(s.committed for s in running), self.limits.sequences
            while len(running) < slots and (queue := self._waiting.next(running, slots)):
                sequence = queue[0]
                if used + sequence.wanted > self._memory.room:
                    break
                self._prompts = [*self._prompts, sequence]  # no call between these, so no interrupt
                del queue[0]
                self._waiting.note(sequence)
                used += sequence.wanted
                running.append(sequence)

    def _pause(self, sequence: SequenceState) -> None:
        """Let a running sequence wait, without its cache. Later its known tokens are computed again."""
        with self._lock:  # a cancellation may change the queue
            paused = sorted((*self._waiting.paused, sequence), key=lambda s: s.arrival)
            prompts = [s for s in self._prompts if s is not sequence]
            decoding = [s for s in self._decoding if s is not sequence]
            sequence.is_decoding, self._waiting.paused = False, paused  # no call from here on, so no interrupt
            self._prompts, self._decoding = prompts, decoding
        self.counters.preemptions += sequence.is_begun
        sequence.release()

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
        """Return the prompts' parts of the next step, with up to `budget` tokens."""
        ready, remaining, scored = list[SequenceState](), list[int](), SCORED_ROWS
        for s in sorted(self._prompts, key=lambda s: s.arrival):
            if not (s.is_begun or s.is_over) and s in self._prompts:  # else it was paused for one of those before it
                found = self._memory.find(s, self._begun())
                if found is None:
                    continue  # it waits for a longer prefix, but those behind it need not wait
                self._memory.begin(s, *found, self._running)
            if s.is_over or not s.is_begun:  # cancelled, or there is no memory for it
                continue
            rest = s.count - s.settle()
            if s.scores:
                rest = min(rest, scored)
                scored -= rest
            ready.append(s)
            remaining.append(rest)
        parts = []
        for s, tokens in zip(ready, share(budget, remaining), strict=True):
            if tokens and s.is_begun and self._memory.reserve(s, (start := s.settle()) + tokens, self._begun):
                stop = start + tokens
                parts.append(StepPart(s, s.ids[start:stop], max(0, stop - max(start, s.first_row))))
        return parts


def _is_served(reader: SequenceState | None) -> bool:
    return reader is not None and (bool(reader.events) or reader.is_over)

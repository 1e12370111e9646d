"""The memory for keys and values: who holds how much of it, who gives way, and with what a sequence begins."""

from collections.abc import Callable, Sequence

from llamita.engine.kv_cache import SequenceCache
from llamita.engine.load import Counters, SequenceLimits
from llamita.engine.prefixes import BLOCK, SHORTEST, Prefix, PrefixCache, capacity_for, whole_blocks
from llamita.engine.requests import Request
from llamita.engine.sequence import SequenceState
from llamita.errors import RunError
from llamita.models.config import ModelConfig


class CacheMemory:
    """The caches of one scheduler, which calls this from the thread that steps.

    Args:
        pause: takes the cache of a running sequence away, and lets the sequence wait.

    Attributes:
        room: the most positions of all running and kept caches.
        kept: the caches of ended sequences.
    """

    def __init__(
        self, config: ModelConfig, limits: SequenceLimits, counters: Counters, pause: Callable[[SequenceState], None]
    ) -> None:
        self._config, self._limits, self._counters, self._pause = config, limits, counters, pause
        block = SequenceCache(config, BLOCK, limits.kv_dtype, BLOCK).nbytes
        self.room = limits.cache_memory // block * BLOCK
        self.kept = PrefixCache(limits.prefix_memory // block * BLOCK, config.rope, config.head_dim)

    def reserve(self, sequence: SequenceState, length: int, begun: Callable[[], Sequence[SequenceState]]) -> bool:
        """Make room for the first `length` tokens of a sequence; return whether it still runs.

        Kept caches give way first, then the youngest of `begun()`, which have caches, perhaps this one. The oldest
        never has to, for a sequence that could not fit alone was refused when it came.
        """
        while (positions := whole_blocks(length)) > sequence.positions:
            others = [s for s in begun() if s is not sequence]
            room = self.room - positions - sum(s.positions for s in others)
            if room >= 0:
                self.kept.shrink(room)
                sequence.positions = positions
                break
            youngest = max((*others, sequence), key=lambda s: s.arrival)
            self._pause(youngest)
            if youngest is sequence:
                return False
        return True

    def is_free(self, sequence: SequenceState, length: int, begun: Callable[[], Sequence[SequenceState]]) -> bool:
        """Return whether the first `length` tokens of a sequence fit without a pause of any."""
        more = whole_blocks(length) - sequence.positions
        return more <= 0 or more + sum(s.positions for s in begun()) <= self.room

    def keep(self, sequence: SequenceState) -> None:
        """Keep the cache of a sequence that is over."""
        prefix = sequence.prefix(self._owner(sequence.request))
        self.kept.keep(prefix._replace(ids=prefix.ids.copy()))

    def find(self, sequence: SequenceState, begun: Sequence[SequenceState]) -> tuple[Prefix | None, int] | None:
        """Return the kept or running cache with the longest common beginning, and the length of that.

        None if a running prompt will soon share a beginning that is much longer.
        """
        if not self._limits.prefix_memory:
            return None, 0
        request = sequence.request
        ids = sequence.ids[: sequence.first_row]  # what follows must be computed, for its logits
        wanted = (ids, request.declared_length)
        whose = (request.adapter, self._owner(request))
        running = [s.prefix(self._owner(s.request)) for s in begun]
        found, shared = self.kept.find(*wanted, running, *whose)
        for other, prefix in zip(begun, running, strict=True):
            if not other.is_decoding:
                whole = prefix._replace(ids=other.ids[: other.count])
                if self.kept.shared(whole, *wanted, *whose) >= shared + SHORTEST:
                    return None
        return found, shared

    def begin(
        self, sequence: SequenceState, found: Prefix | None, shared: int, running: Callable[[], Sequence[SequenceState]]
    ) -> None:
        """Give a sequence its cache, with the first `shared` tokens of `found`.

        It is paused instead if others hold all of the room, and ends if there is no memory.
        """
        declared = sequence.request.declared_length
        rest = self.room - sum(s.committed for s in running())  # with its own
        cache = self.kept.take(found, shared, declared, rest) if found else None
        if found and cache:
            sequence.positions = found.positions
        elif self.reserve(sequence, shared, lambda: [s for s in running() if s.is_begun]):
            capacity = capacity_for(declared, min(self._limits.context, self.room))
            try:
                cache = SequenceCache(self._config, capacity, self._limits.kv_dtype, declared)
            except MemoryError:
                sequence.fail(RunError("memory", f"room for keys and values of {capacity} tokens"))
                return
            cache.adapter = sequence.request.adapter
            if found:  # it can be copied even if it just gave way: `found` still holds it
                cache.copy_prefix(found.cache, shared)
        else:
            return
        cache.length = shared
        if not sequence.was_begun:
            self._counters.prefix_queries += len(sequence.request.ids)
            self._counters.prefix_hits += shared
        sequence.begin(cache, self._config.vocab_size)

    def _owner(self, request: Request) -> str | None:
        return None if self._limits.share_prefixes else request.owner

"""Who waits for a slot and for memory, and who enters next. `docs/reference/engine.md`, "Scheduling", has the rules."""

from collections import deque
from collections.abc import Iterator, Sequence

from llamita.engine.sequence import SequenceState

_REMEMBERED = 1024  # owners whose last turn is known

Queue = deque[SequenceState] | list[SequenceState]


class Waiting:
    """The sequences that wait: those that were paused, then a queue for each owner. The scheduler's lock protects it.

    Attributes:
        paused: sequences that gave their memory away, the oldest first. They enter before all others.
    """

    def __init__(self) -> None:
        self.paused: list[SequenceState] = []
        self._queues: dict[str | None, deque[SequenceState]] = {}
        self._turns: dict[str | None, int] = {}  # when an owner's sequence entered last
        self._turn = 0

    def __bool__(self) -> bool:
        return bool(self.paused) or any(self._queues.copy().values())

    def __iter__(self) -> Iterator[SequenceState]:
        yield from self.paused
        for queue in self._queues.values():
            yield from queue

    def append(self, sequence: SequenceState) -> None:
        """Queue a sequence behind those of its owner."""
        self._queues.setdefault(sequence.request.owner, deque()).append(sequence)

    def drop_cancelled(self) -> None:
        """Take out the sequences that are over."""
        for queue in (self.paused, *self._queues.values()):
            for sequence in [s for s in queue if s.is_over]:
                queue.remove(sequence)
                sequence.release()  # an interrupted pause leaves the cache

    def next(self, running: Sequence[SequenceState], slots: int) -> Queue | None:
        """Return the queue whose first sequence enters next, None if there is none.

        Owners take turns. While others wait, nobody enters for an owner who has half of the slots.
        """
        if self.paused:
            return self.paused
        for owner in [owner for owner, queue in self._queues.items() if not queue]:
            del self._queues[owner]
        owners = list(self._queues)
        if len(owners) > 1:
            most = (slots + 1) // 2
            owners = [o for o in owners if sum(s.request.owner == o for s in running) < most] or owners
        if not owners:
            return None
        return self._queues[min(owners, key=lambda owner: self._turns.get(owner, -1))]  # the first of equal ones

    def note(self, sequence: SequenceState) -> None:
        """Note that a sequence has entered: the other owners' turns come first."""
        self._turn += 1
        self._turns.pop(sequence.request.owner, None)
        self._turns[sequence.request.owner] = self._turn
        if len(self._turns) > _REMEMBERED:
            del self._turns[next(iter(self._turns))]

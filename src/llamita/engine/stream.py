"""A driver of the scheduler without a thread: whoever reads a stream runs the steps.

The other kind of driver is one thread that submits sequences, calls `Scheduler.step` and hands out their events.
"""

from llamita.engine.requests import Generation
from llamita.engine.scheduler import Scheduler
from llamita.engine.sequence import SequenceState


class Stream:
    """An iterator over the pieces of text of one answer and, at last, its Generation.

    `close` cancels, at any time and from any thread. So does letting go of the stream.

    Raises:
        InputError: the request can never fit the memory for keys and values.
    """

    def __init__(self, scheduler: Scheduler, sequence: SequenceState) -> None:
        self._scheduler = scheduler
        self._sequence = sequence
        scheduler.submit(sequence)  # last: an interrupt in it drops the stream, which cancels

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> str | Generation:
        sequence = self._sequence
        while True:
            is_over = sequence.is_over  # read before the events: another thread may end it in between
            if sequence.events:
                break
            if is_over:
                raise StopIteration
            self._scheduler.step(reader=sequence)
        event = sequence.events.popleft()
        if isinstance(event, Exception):
            raise event
        return event

    def close(self) -> None:
        """Cancel what is not computed yet. The iterator ends after the pieces that are there."""
        self._scheduler.cancel(self._sequence)

    def __del__(self) -> None:
        self.close()

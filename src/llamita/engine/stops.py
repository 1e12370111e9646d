"""Finds stop strings in a stream of text, even across pieces."""

from collections.abc import Sequence


class StopStrings:
    """Passes text on up to the first stop string, and holds back what may be the beginning of one.

    Attributes:
        found: a stop string has come; no more text is passed on.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.found = False
        self._stops = tuple(stops)
        self._held = ""

    def add(self, text: str) -> str:
        """Add text; return what can be shown now."""
        if not self._stops or self.found:
            return "" if self.found else text
        self._held += text
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.found = True
            return self._held[: min(places)]
        return self._release(len(self._held) - self._open_length())

    def finish(self) -> str:
        """Return what was held back; no more text comes."""
        return "" if self.found else self._release(len(self._held))

    def _open_length(self) -> int:
        """Return the length of the longest end of the held text that a stop string begins with."""
        longest = min(len(self._held), max(map(len, self._stops)) - 1)
        return next((n for n in range(longest, 0, -1) if self._begins_stop(self._held[-n:])), 0)

    def _begins_stop(self, end: str) -> bool:
        return any(stop.startswith(end) for stop in self._stops)

    def _release(self, length: int) -> str:
        released, self._held = self._held[:length], self._held[length:]
        return released

"""Prompt-lookup speculation: drafts from the text's own n-grams, and the decision whether they pay.

A draft is what followed the last occurrence of the newest n-gram (Saxena 2023, "Prompt Lookup Decoding";
drafts by reference in general: arXiv 2304.04487). The scheduler verifies drafts, this module learns from it.
"""

import numpy as np

ORDERS = (3, 2)  # lengths of n-grams, the longer match first
DECODE_ROWS = 16  # of a step, drafted ones included: up to here another row costs little
_KEEP = 0.875  # of a moving average, when a new value comes
_TRUSTED = 3  # measurements before a time is believed: the first ones fault pages in
_SPIKE = 2.0  # times the estimate; what is above was the machine's other work
_FORGIVE = 0.995  # per refusal, so that an estimate too high by half is tried again after some 80


class Drafter:
    """The drafts of one sequence, found in O(1) per token.

    Args:
        ids: int32 (capacity,), the sequence's tokens; a draft is written after those that are known.
        count: how many are known.
    """

    def __init__(self, ids: np.ndarray, count: int) -> None:
        known = ids[:count].tolist()
        self._ids, self._count = ids, count
        self._end = 0  # the draft is ids[count:end]
        self._tail = tuple(known[-ORDERS[0] :])
        # What each n-gram was followed by, last: the position of that token
        self._after = [
            dict(zip(zip(*(known[i:] for i in range(n)), strict=False), range(n, count), strict=False))
            for n in ORDERS
        ]
        self._accepted = [1.0] * len(ORDERS)  # of a draft's tokens, on average
        self._hits, self._order = 0, 0  # of the current draft: accepted so far; index of its n-gram's length

    @property
    def expected(self) -> float:
        """Tokens of the draft that will be accepted, by the measure of earlier ones."""
        return self._accepted[self._order]

    def propose(self, limit: int) -> int:
        """Write a draft of `limit` tokens, unless one is still open or nothing is known; its length now."""
        if self._end <= self._count and limit > 0:
            for order, n in enumerate(ORDERS):
                start = self._after[order].get(self._tail[-n:])
                if start is not None:
                    self._write(start, limit)
                    self._order = order
                    break
        return max(0, min(self._end - self._count, limit))

    def add(self, token: int) -> bool:
        """Take in the sequence's next token; whether the draft had it."""
        at, ids = self._count, self._ids
        is_hit = at < self._end and int(ids[at]) == token
        if at < self._end:
            self._hits += is_hit
            if not is_hit or at + 1 == self._end:
                self._end = 0
                average = self._accepted[self._order]
                self._accepted[self._order] = _KEEP * average + (1 - _KEEP) * self._hits
        for order, n in enumerate(ORDERS):
            self._after[order][self._tail[-n:]] = at  # a tail shorter than n is found by no other n-gram
        self._tail = (*self._tail[1 - ORDERS[0] :], token)
        ids[at] = token
        self._count = at + 1
        return is_hit

    def _write(self, start: int, limit: int) -> None:
        ids, count = self._ids, self._count
        for i in range(limit):  # one by one: a loop in the text goes on from the draft's own tokens
            ids[count + i] = ids[start + i]
        self._end, self._hits = count + limit, 0


class StepTimes:
    """Measured seconds of decoding steps by their number of rows, for one model."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._counts: dict[int, int] = {}

    def add(self, rows: int, seconds: float) -> None:
        """A step of this many rows and no prompt took so long."""
        count, old = self._counts.get(rows, 0), self._seconds.get(rows, seconds)
        self._counts[rows] = count + 1
        if seconds < old:
            self._seconds[rows] = seconds if count < _TRUSTED else (old + seconds) / 2
        elif count >= _TRUSTED:
            self._seconds[rows] = _KEEP * old + (1 - _KEEP) * min(seconds, _SPIKE * old)
        else:
            self._seconds[rows] = old

    def pays(self, sequences: int, drafted: int, expected: float) -> bool:
        """Whether drafts bring more tokens a second: `expected` more a step for `drafted` more rows."""
        if self._counts.get(sequences, 0) < _TRUSTED:
            return False  # first see what a plain step costs
        rows = sequences + drafted
        if self._counts.get(rows, 0) < _TRUSTED:
            return True
        if (sequences + expected) * self._seconds[sequences] > sequences * self._seconds[rows]:
            return True
        self._seconds[rows] *= _FORGIVE
        return False

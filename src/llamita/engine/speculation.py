"""Prompt-lookup speculation: drafts from the text's own n-grams, and the decision whether they pay.

A draft is what followed the last occurrence of the newest n-gram (Saxena 2023, "Prompt Lookup Decoding";
drafts by reference in general: arXiv 2304.04487). The scheduler verifies drafts, this module learns from it.
"""

import numpy as np

ORDERS = (3, 2)  # lengths of n-grams, the longer match first
DECODE_ROWS = 16  # of a step, drafted ones included: up to here one more costs about a tenth of a step
_KEEP = 0.9  # of a moving average, when a new value comes
_TRUSTED = 3  # measurements before a time is believed: the first ones fault pages in
_MARGIN = 1.05  # that drafts must bring at least: drafting and comparing take time, too
_SPIKE = 2.0  # times the estimate; what is above was the machine's other work
_FORGIVE = 0.998  # per refusal: a time too high by half is tried again after some 200


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
            dict(zip(zip(*(known[i:] for i in range(n)), strict=False), range(n, count), strict=False)) for n in ORDERS
        ]
        self._order = 0  # index of the length of the n-gram that made the draft
        self._rates = [0.5] * len(ORDERS)

    @property
    def rate(self) -> float:
        """How often a drafted token was right of late where those before it were."""
        return self._rates[self._order]

    def propose(self, limit: int) -> int:
        """Write a draft of `limit` tokens, if the newest n-gram has occurred before; its length."""
        for order, n in enumerate(ORDERS):
            start = self._after[order].get(self._tail[-n:])
            if start is not None:
                for i in range(limit):  # one by one: a loop in the text goes on from the draft's own tokens
                    self._ids[self._count + i] = self._ids[start + i]
                self._order, self._end = order, self._count + limit
                return limit
        return 0

    def add(self, token: int) -> bool:
        """Take in the sequence's next token; whether the draft had it, verified or not."""
        at, ids, rates = self._count, self._ids, self._rates
        is_hit = at < self._end and int(ids[at]) == token
        if at < self._end:
            rates[self._order] = _KEEP * rates[self._order] + (1 - _KEEP) * is_hit
            if not is_hit:
                self._end = 0
        for order, n in enumerate(ORDERS):
            self._after[order][self._tail[-n:]] = at  # a tail shorter than n is found by no other n-gram
        self._tail = (*self._tail[1 - ORDERS[0] :], token)
        ids[at] = token
        self._count = at + 1
        return is_hit


class StepTimes:
    """Measured seconds of decoding steps by their number of rows, for one model."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._counts: dict[int, int] = {}
        self._doubt: dict[int, float] = {}  # what a time is multiplied by, less with each refusal

    def add(self, rows: int, seconds: float) -> None:
        """A step of this many rows and no prompt took so long."""
        count, old = self._counts.get(rows, 0), self._seconds.get(rows, seconds)
        self._counts[rows] = count + 1
        self._doubt[rows] = 1.0
        if seconds < old:  # what disturbs a measurement makes it longer, so a short one counts for more
            self._seconds[rows] = seconds if count < _TRUSTED else (old + seconds) / 2
        elif count >= _TRUSTED:
            self._seconds[rows] = _KEEP * old + (1 - _KEEP) * min(seconds, _SPIKE * old)
        else:
            self._seconds[rows] = old

    def best_length(self, sequences: int, drafts: list[tuple[int, float]]) -> int:
        """The length to cut drafts to so that most tokens a second are to be expected; 0 for no drafts.

        Args:
            sequences: that decode in the step.
            drafts: of those that have one, its length and the rate at which its tokens are right.
        """
        if self._counts.get(sequences, 0) < _TRUSTED:
            return 0  # first see what a plain step costs
        best, most = 0, _MARGIN * sequences / self._seconds[sequences]
        for length in range(1, max(length for length, _ in drafts) + 1):
            rows, tokens = sequences, float(sequences)
            for drafted, rate in drafts:
                cut = min(drafted, length)
                rows += cut
                tokens += sum(rate**i for i in range(1, cut + 1))
            if self._counts.get(rows, 0) < _TRUSTED:
                return length  # try it
            speed = tokens / (self._seconds[rows] * self._doubt[rows])
            if speed > most:
                best, most = length, speed
            else:
                self._doubt[rows] *= _FORGIVE
        return best

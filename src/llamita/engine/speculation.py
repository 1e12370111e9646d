"""Prompt-lookup speculation: drafts from the n-grams of the text, and the decision whether they pay.

Where a grammar leaves one way to go on, that is the draft.

A draft is what followed the last occurrence of the newest n-gram (Saxena 2023, "Prompt Lookup Decoding"; drafts by
reference in general: arXiv 2304.04487). The scheduler verifies drafts, and this module learns from the result.
"""

from collections.abc import Sequence

import numpy as np

ORDERS = (3, 2)  # lengths of n-grams, the longer match first
DECODE_ROWS = 16  # rows of a decoding step, with drafts: up to here each more costs about a tenth of a step
_KEEP = 0.9  # the old value's share of a moving average
_TRUSTED = 3  # a time counts after this many measurements: the first ones fault pages in
_MARGIN = 1.05  # drafts must raise tokens per second by this factor, because drafting and comparing take time, too
_SPIKE = 2.0  # a measurement counts for at most this many times the estimate: the rest was other work of the machine
_FORGIVE = 0.998  # each refusal lowers a time by 0.2 %, so one that is 50 % too high is retried after about 200


class Drafter:
    """Drafts for one sequence, in O(1) per token.

    Args:
        ids: int32 (capacity,), the sequence's tokens; a draft is written after the known ones.
        count: how many tokens are known.
    """

    def __init__(self, ids: np.ndarray, count: int) -> None:
        known = ids[:count].tolist()
        self._ids, self._count = ids, count
        self._end = 0  # the draft is ids[count:end]
        self._tail = tuple(known[-ORDERS[0] :])
        # For each n-gram the position of the token that followed it last.
        self._after = [
            dict(zip(zip(*(known[i:] for i in range(n)), strict=False), range(n, count), strict=False)) for n in ORDERS
        ]
        self._order = 0  # index in ORDERS of the n-gram that made the draft, or that of forced tokens
        self._rates = [0.5] * len(ORDERS) + [1.0]  # the last one of forced tokens

    @property
    def rate(self) -> float:
        """How often, of late, a drafted token was right if those before it were."""
        return self._rates[self._order]

    def propose(self, limit: int, forced: Sequence[int] = ()) -> int:
        """Write a draft and return its length: the forced tokens, all of them.

        Without any, it is `limit` tokens if the newest n-gram has occurred before, else none.
        """
        if forced:
            self._order, self._end = len(ORDERS), self._count + len(forced)
            self._ids[self._count : self._end] = forced
            return len(forced)
        for order, n in enumerate(ORDERS):
            start = self._after[order].get(self._tail[-n:])
            if start is not None:
                for i in range(limit):  # one by one, because a repetition continues from the draft's own tokens
                    self._ids[self._count + i] = self._ids[start + i]
                self._order, self._end = order, self._count + limit
                return limit
        return 0

    def add(self, token: int) -> bool:
        """Add the next token; return whether the draft has it, even if no step verified it."""
        at, ids, rates = self._count, self._ids, self._rates
        is_hit = at < self._end and int(ids[at]) == token
        if at < self._end:
            rates[self._order] = _KEEP * rates[self._order] + (1 - _KEEP) * is_hit
            if not is_hit:
                self._end = 0
        for order, n in enumerate(ORDERS):
            self._after[order][self._tail[-n:]] = at  # no n-gram equals a tail shorter than n
        self._tail = (*self._tail[1 - ORDERS[0] :], token)
        ids[at] = token
        self._count = at + 1
        return is_hit


class StepTimes:
    """Measures the decoding steps of one model, by their number of rows."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._counts: dict[int, int] = {}
        self._doubt: dict[int, float] = {}  # times are multiplied by this; each refusal lowers it

    def add(self, rows: int, seconds: float) -> None:
        """Add a measurement of a step without prompts."""
        count, old = self._counts.get(rows, 0), self._seconds.get(rows, seconds)
        self._counts[rows] = count + 1
        self._doubt[rows] = 1.0
        if seconds < old:  # disturbances only lengthen a measurement, so a short one counts more
            self._seconds[rows] = seconds if count < _TRUSTED else (old + seconds) / 2
        elif count >= _TRUSTED:
            self._seconds[rows] = _KEEP * old + (1 - _KEEP) * min(seconds, _SPIKE * old)
        else:
            self._seconds[rows] = old

    def seconds(self, rows: int) -> float:
        """Return what a step of so many rows takes, or of the nearest number that is measured; 0.0 before any."""
        nearest = min(self._seconds, key=lambda known: abs(known - rows), default=None)
        return 0.0 if nearest is None else self._seconds[nearest]

    def best_length(self, sequences: int, drafts: list[tuple[int, float]]) -> int:
        """Return the length to cut drafts to that promises the most tokens a second, 0 for no drafts.

        Args:
            sequences: how many decode in the step.
            drafts: the length of each draft and the rate at which its tokens are right.
        """
        if self._counts.get(sequences, 0) < _TRUSTED:
            return 0  # first measure a plain step
        best, most = 0, _MARGIN * sequences / self._seconds[sequences]
        for length in range(1, max(length for length, _ in drafts) + 1):
            rows, tokens = sequences, float(sequences)
            for drafted, rate in drafts:
                cut = min(drafted, length)
                rows += cut
                tokens += sum(rate**i for i in range(1, cut + 1))
            if self._counts.get(rows, 0) < _TRUSTED:
                return length  # measure it
            speed = tokens / (self._seconds[rows] * self._doubt[rows])
            if speed > most:
                best, most = length, speed
            else:
                self._doubt[rows] *= _FORGIVE
        return best

"""Speculation without a second model: drafts from the text and from texts of the user, and whether they pay.

A draft is what followed the last of the longest earlier occurrences of the text's end (as in Saxena 2023, "Prompt
Lookup Decoding", with matches of any length). Where a grammar leaves one way to go on, that is the draft. The
scheduler verifies drafts, and this module learns from the result.
"""

from collections.abc import Sequence

import numpy as np

from llamita.engine.matches import Corpus, Match, find_match

DECODE_ROWS = 16  # rows of a decoding step, with drafts: up to here each more costs a tenth to a quarter of a step
_KEEP = 0.9  # the old value's share of a moving average
_RATES = (0.2, 0.4, 0.6, 0.8, 0.9)  # of drafts after matches of 1, 2, 4, 8 and 16 tokens or more, before any is seen
_TRUSTED = 3  # a time counts after this many measurements: the first ones fault pages in
_MARGIN = 1.05  # drafts must raise tokens per second by this factor, because drafting and comparing take time, too
_SPIKE = 2.0  # a measurement counts for at most this many times the estimate: the rest was other work of the machine
_FORGIVE = 0.998  # each refusal lowers a time by 0.2 %, so one that is 50 % too high is retried after about 200


class Drafter:
    """Drafts for one sequence.

    Args:
        ids: int32 (capacity,), the sequence's tokens; a draft is written after the known ones.
        count: how many tokens are known.
        corpus: texts of the user in which to look, too.
    """

    def __init__(self, ids: np.ndarray, count: int, corpus: Corpus | None = None) -> None:
        self._ids, self._count, self._corpus = ids, count, corpus
        self._end = 0  # the draft is ids[count:end]
        self._match: Match | None = None  # of the end of the known tokens; None if it is to be looked for
        self._rates = [*_RATES, 1.0]  # the last one of forced tokens
        self._kind = 0  # which of these is that of the draft

    @property
    def rate(self) -> float:
        """How often, of late, a drafted token was right if those before it were."""
        return self._rates[self._kind]

    def propose(self, limit: int, forced: Sequence[int] = ()) -> int:
        """Write a draft and return its length: the forced tokens, all of them.

        Without any, it is what followed the match: up to `limit` tokens, and up to twice as many as match.
        """
        count, draft = self._count, forced
        if forced:
            self._kind = len(_RATES)
        else:
            self._match = self._match or find_match(self._ids[:count], self._corpus)
            if self._match is None:
                return 0
            ids, after, length = self._match
            self._kind = min(length.bit_length(), len(_RATES)) - 1
            limit = min(limit, 2 * length)
            if ids is not None:
                draft = ids[after : after + limit]
            else:  # the text itself, where a repetition goes on with the draft's own tokens
                draft = self._ids[after + np.arange(limit) % (count - after)]
        self._end = count + len(draft)
        self._ids[count : self._end] = draft
        return len(draft)

    def add(self, token: int) -> bool:
        """Add the next token; return whether the draft has it, even if no step verified it."""
        at, ids, rates = self._count, self._ids, self._rates
        is_hit = at < self._end and int(ids[at]) == token
        if at < self._end:
            rates[self._kind] = _KEEP * rates[self._kind] + (1 - _KEEP) * is_hit
            if not is_hit:
                self._end = 0
        if self._match:
            self._match = self._match.extended(ids, token)
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
        best, most, rows, tokens = 0, _MARGIN * sequences / self._seconds[sequences], sequences, float(sequences)
        chances = [rate for _, rate in drafts]  # that so many drafted tokens are right
        for length in range(1, max(length for length, _ in drafts) + 1):
            for i, (drafted, rate) in enumerate(drafts):
                if length <= drafted:
                    rows += 1
                    tokens += chances[i]
                    chances[i] *= rate
            doubt = self._doubt.get(rows, 1.0)
            speed = tokens / (self._expected(rows) * doubt)
            if speed > most:
                best, most = length, speed
            else:
                self._doubt[rows] = doubt * _FORGIVE
        return best

    def _expected(self, rows: int) -> float:
        """Return the seconds of a step: as measured, or between its neighbours, or at least those of fewer rows."""
        if self._counts.get(rows, 0) >= _TRUSTED:
            return self._seconds[rows]
        known = [n for n, count in self._counts.items() if count >= _TRUSTED]
        below, above = max(n for n in known if n < rows), min((n for n in known if n > rows), default=None)
        if above is None:
            return self._seconds[below]
        share = (rows - below) / (above - below)
        return (1 - share) * self._seconds[below] + share * self._seconds[above]

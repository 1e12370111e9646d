"""How many prompt tokens a step takes in, and whose: by the clock, so that a step ends in time on any machine.

The seconds of a prompt token are a moving average over recent steps. A step's fixed costs are in it, so the budget
that follows from it brings the next average closer: it settles where a step takes as long as wanted.
"""

from collections.abc import Sequence

PREFILL_CHUNK = 256  # prompt tokens in a step before any is measured; enough for the kernels' full speed
MIXED_CHUNK = 64  # the same in a step with running generations, which wait for its end
LEAST_TOKENS, MOST_TOKENS = 8, 512  # fewer read the weights for too little; more need larger buffers
BESIDE_SECONDS, ALONE_SECONDS = 0.15, 0.5  # the most a step should take beside running generations, and without
SMOOTH_SECONDS = 0.05  # a shorter step shows no reader anything: this is 20 tokens a second
_STRETCH = 3.0  # beside running generations, a step may take this many times what it takes without prompts
_CROWD = 4  # where more prompts are taken in than this, a step takes the most that it may: then answers a second count
_LEAST_SHARE = 0.5  # of the seconds that running generations take, for prompts, where even those are long
_KEEP = 0.8  # the old value's share of a moving average
_SPIKE = 2.0  # a measurement counts for at most this many times the average: the rest was other work of the machine
_LEAST_COST = 0.25  # of a step's seconds are its prompts', at least: those without prompts may have been measured late
_QUARTER = 4  # the oldest prompt gets the budget divided by this, at least


class PromptBudget:
    """Measures the steps with prompt tokens of one model.

    Args:
        beside: the most seconds that a step with running generations should take.
        alone: what a step without any should take.
    """

    def __init__(self, beside: float = BESIDE_SECONDS, alone: float = ALONE_SECONDS) -> None:
        self._beside, self._alone = beside, alone
        self._seconds: dict[bool, float] = {}  # of a prompt token, by whether generations run beside it

    def add(self, tokens: int, seconds: float, decode_seconds: float, is_mixed: bool) -> None:
        """Add a measurement of a step with prompt tokens.

        Args:
            tokens: the prompt tokens; a few say nothing about many and are passed over.
            seconds: the whole step's.
            decode_seconds: what the step would have taken without them, 0.0 if that is not known.
            is_mixed: generations ran beside it.
        """
        if tokens < LEAST_TOKENS:
            return
        new = max(seconds - decode_seconds, _LEAST_COST * seconds) / tokens if is_mixed else seconds / tokens
        old = self._seconds.get(is_mixed, new)
        if new < old:  # disturbances only lengthen a measurement, so a short one counts more
            self._seconds[is_mixed] = (old + new) / 2
        else:
            self._seconds[is_mixed] = _KEEP * old + (1 - _KEEP) * min(new, _SPIKE * old)

    def tokens(self, decode_seconds: float, is_mixed: bool, prompts: int = 1) -> int:
        """Return the prompt tokens of the next step, a multiple of LEAST_TOKENS; `prompts` have a place."""
        seconds = self._seconds.get(is_mixed) or self._seconds.get(not is_mixed)
        if not seconds:
            return MIXED_CHUNK if is_mixed else PREFILL_CHUNK
        wanted = self._wanted(decode_seconds, prompts) if is_mixed else self._alone
        pieces = round(min(wanted / seconds, MOST_TOKENS) / LEAST_TOKENS)
        return LEAST_TOKENS * max(1, pieces)

    def _wanted(self, decode_seconds: float, prompts: int) -> float:
        """Return the seconds for prompts beside running generations.

        A few fast streams should stay smooth. Where they are slow already, prompts must not wait for them for ever.
        """
        smooth = min(self._beside, max(SMOOTH_SECONDS, _STRETCH * decode_seconds))
        wanted = smooth if prompts <= _CROWD else self._beside
        return max(wanted - decode_seconds, _LEAST_SHARE * decode_seconds)

    @property
    def rate(self) -> float:
        """Prompt tokens per second of late, 0.0 before any."""
        seconds = self._seconds.get(False) or self._seconds.get(True)
        return 1 / seconds if seconds else 0.0


def share(budget: int, remaining: Sequence[int]) -> list[int]:
    """Split a budget among prompts, the oldest first, by how many tokens each still has; return the parts.

    The oldest gets a quarter. The rest goes to the shortest, so that a short prompt need not wait for a long one. While
    it is the oldest, a prompt is overtaken by at most 3 tokens for each of its own.
    """
    parts = [0] * len(remaining)
    if parts:
        parts[0] = min(remaining[0], max(1, budget // _QUARTER))
        budget -= parts[0]
    for i in sorted(range(len(parts)), key=remaining.__getitem__):
        more = min(remaining[i] - parts[i], budget)
        parts[i] += more
        budget -= more
    return parts

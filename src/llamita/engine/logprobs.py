"""Log-probabilities of tokens, from the logits as the model gives them: before penalties, biases and temperature.

Evaluation uses the same arithmetic, so a text has the same perplexity by either way.
"""

from typing import NamedTuple

import numpy as np

from llamita.engine.sampler import kth_largest


class TokenLogprob(NamedTuple):
    """A token's log-probability.

    Attributes:
        token: its id.
        logprob: natural logarithm; the identical number to its entry in `top`, if it has one.
        top: the likeliest tokens with theirs, the best first; of equal ones the lower id.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def score(logits: np.ndarray, token: int, count: int) -> TokenLogprob:
    """Return a token's log-probability and those of the `count` likeliest, from its row of logits, float32 (vocab,)."""
    shifted, _, total = exponentials(logits[None])
    row, normalizer = shifted[0], np.log(total[0])
    count = min(count, len(row))
    candidates = np.flatnonzero(row >= kth_largest(row, count)) if count else np.empty(0, dtype=np.intp)
    best = candidates[np.argsort(-row[candidates], kind="stable")[:count]]
    top = tuple((int(other), float(row[other] - normalizer)) for other in best)
    return TokenLogprob(int(token), float(row[token] - normalizer), top)


def exponentials(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return logits (rows, vocab) less their row's largest, the exp of that (both float32), and its sum (float64)."""
    with np.errstate(invalid="ignore"):  # infinity less infinity; callers find what is not finite
        shifted = logits - logits.max(axis=1, keepdims=True)
    exps = np.exp(shifted)
    return shifted, exps, exps.sum(axis=1, dtype=np.float64)

"""Chooses the next token from logits: the likeliest, or a draw from the distribution that the settings leave.

Biases and what is not allowed come first. Then steps, order and edge cases are those of transformers' logits
processors: repetition penalty, temperature, top-k, top-p, min-p, then the draw. OpenAI's penalties follow that of
repetition. The result depends only on the logits, the tokens so far and the seed.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from llamita.engine.constraint import Constraint
from llamita.errors import InputError, RunError, shown

_BLOCK = 64  # numbers whose maximum is taken together
_PENALTIES = (0.01, 1e6)  # outside, logits of trained models come near infinity in float32
_MOST_PENALTY = 2.0  # OpenAI's bounds of the frequency and presence penalties
_NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")
_LARGEST = float(np.finfo(np.float32).max)
_COLDEST = 1e-30  # a lower temperature is greedy but for exact ties, and float32 could not divide by it


@dataclass(frozen=True)
class Sampling:
    """The settings by which the next token is chosen.

    Attributes:
        temperature: divides the logits; 0 means greedy.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the likeliest tokens until their probabilities sum to this; 1 keeps all.
        min_p: keep tokens at least this likely relative to the likeliest; 0 keeps all.
        repetition_penalty: divides the positive logits of tokens already in the text and multiplies their negative ones
            (CTRL, arXiv 1909.05858), 0.01 to 1e6; 1 changes nothing.
        seed: makes the draws repeatable; None takes a new one each time.
        frequency_penalty: taken from the logit of a generated token each time that it came, -2 to 2.
        presence_penalty: taken from the logit of a generated token once, -2 to 2.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0

    def __post_init__(self) -> None:
        for name in _NUMBERS:
            value = getattr(self, name)
            _expect(name, value, "a number", isinstance(value, int | float) and -_LARGEST <= value <= _LARGEST)
        _expect("temperature", self.temperature, "at least 0", self.temperature >= 0)
        whole = isinstance(self.top_k, int) and not isinstance(self.top_k, bool)
        _expect("top_k", self.top_k, "a whole number, 0 for all", whole and self.top_k >= 0)
        _expect("top_p", self.top_p, "a number from 0 to 1", 0 <= self.top_p <= 1)
        _expect("min_p", self.min_p, "a number from 0 to 1", 0 <= self.min_p <= 1)
        least, most = _PENALTIES
        _expect(
            "repetition_penalty",
            self.repetition_penalty,
            f"{least:g} to {most:g}",
            least <= self.repetition_penalty <= most,
        )
        _expect("seed", self.seed, "0 or more", self.seed is None or (isinstance(self.seed, int) and self.seed >= 0))
        for name in ("frequency_penalty", "presence_penalty"):
            value = getattr(self, name)
            _expect(name, value, f"{-_MOST_PENALTY:g} to {_MOST_PENALTY:g}", abs(value) <= _MOST_PENALTY)

    @classmethod
    def from_generation_config(cls, values: dict[str, Any]) -> "Sampling":
        """Return the settings of a model's `generation_config.json` if it asks for sampling, else the defaults."""
        if not values.get("do_sample"):
            return cls()
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        given = {n: values[n] for n in names if isinstance(values.get(n), int | float)}
        # A setting that is not in the file does nothing, as in transformers (where only top_k defaults to 50).
        return replace(cls(temperature=1.0, top_p=1.0), **given)


@dataclass(frozen=True)
class Rules:
    """What a request asks of the next token besides `Sampling`.

    Attributes:
        logit_bias: added to the logits of these tokens.
        ends: the end tokens.
        min_tokens: no end token comes before so many others; None for no end token at all. Where a grammar allows end
            tokens alone, one comes all the same.
        constraint: a grammar.
    """

    logit_bias: Mapping[int, float] = field(default_factory=dict)
    ends: tuple[int, ...] = ()
    min_tokens: int | None = 0
    constraint: Constraint | None = None


class Sampler:
    """Chooses tokens for one sequence.

    Args:
        sampling: the settings.
        prompt: token ids to which the repetition penalty applies from the start.
        vocab_size: number of logits.
        rules: the rest; the constraint is copied.

    Attributes:
        constraint: the grammar in the state after the tokens chosen, None without one.
    """

    def __init__(self, sampling: Sampling, prompt: np.ndarray, vocab_size: int, rules: Rules | None = None) -> None:
        rules = rules or Rules()
        self.constraint = rules.constraint and rules.constraint.copy()
        self._sampling = sampling
        self._rules = rules
        self._random = np.random.default_rng(sampling.seed)
        self._seen = np.zeros(vocab_size, dtype=bool)
        self._seen[prompt] = True
        self._count = 0  # generated tokens
        self._counts = Counter[int]()  # of each
        self._less = np.zeros(vocab_size, dtype=np.float32)  # OpenAI's penalties
        self._has_penalties = bool(sampling.frequency_penalty or sampling.presence_penalty)
        self._biased = np.fromiter(rules.logit_bias, dtype=np.intp)
        self._biases = np.fromiter(rules.logit_bias.values(), dtype=np.float32)
        self._ends = np.array(rules.ends, dtype=np.intp)

    def choose(self, logits: np.ndarray) -> int:
        """Return the next token for its logits, float32 (vocab,), which are not changed.

        Raises:
            InputError, RunError: the largest logit is not finite, because of broken weights; or the grammar fails.
        """
        best = int(logits.argmax())  # argmax takes a NaN for the largest
        if not math.isfinite(logits[best]):
            raise RunError("logits", "finite values", f"{logits[best]} for token {best}", "the weights are broken")
        changed = self._mask(self._penalize(logits))
        if changed is not logits:
            best = int(changed.argmax())
        token = best if self._sampling.temperature == 0 else self._draw(changed)
        self._note(token)
        return token

    def _penalize(self, logits: np.ndarray) -> np.ndarray:
        """Return the logits with biases and penalties."""
        if len(self._biased):
            logits = logits.copy()
            logits[self._biased] += self._biases
        if self._sampling.repetition_penalty != 1:
            logits = penalize(logits, np.flatnonzero(self._seen), self._sampling.repetition_penalty)
        return logits - self._less if self._has_penalties else logits

    def _mask(self, logits: np.ndarray) -> np.ndarray:
        """Return the logits with minus infinity for tokens that may not come."""
        least = self._rules.min_tokens
        no_end = len(self._ends) > 0 and (least is None or self._count < least)
        if self.constraint:
            allowed = self.constraint.allowed()
            if not allowed.any():
                raise RunError("grammar", "a token that may come next", "none")
            logits = np.where(allowed, logits, np.float32(-np.inf))
            no_end = no_end and allowed.sum() > allowed[self._ends].sum()
        elif no_end:
            logits = logits.copy()
        if no_end:
            logits[self._ends] = -np.inf
        return logits

    def _note(self, token: int) -> None:
        self._seen[token] = True
        self._count += 1
        if self._has_penalties:
            self._counts[token] += 1
            sampling = self._sampling
            self._less[token] = self._counts[token] * sampling.frequency_penalty + sampling.presence_penalty
        if self.constraint:
            self.constraint.accept(token)

    def _draw(self, logits: np.ndarray) -> int:
        tokens, probabilities = distribution(logits, self._sampling)
        return int(tokens[_position(probabilities, self._random.random())])


def _position(probabilities: np.ndarray, uniform: float) -> int:
    """Return the index of the first probability whose running sum exceeds a number from [0, 1).

    Many are first summed in blocks, because NumPy sums several times faster than it computes running sums.
    """
    blocks = np.arange(0, len(probabilities), _BLOCK)
    first = 0
    if len(blocks) > 1:
        upto = np.cumsum(np.add.reduceat(probabilities, blocks))
        block = min(int(np.searchsorted(upto, uniform * upto[-1], side="right")), len(blocks) - 1)
        before = upto[block - 1] if block else 0.0
        uniform = (uniform * upto[-1] - before) / (upto[block] - before)
        first = int(blocks[block])
    cumulative = np.cumsum(probabilities[first : first + _BLOCK])
    at = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
    return first + min(at, len(cumulative) - 1)  # `uniform * cumulative[-1]` can round up to the whole sum


def penalize(logits: np.ndarray, seen: np.ndarray, penalty: float) -> np.ndarray:
    """Return a copy of the logits in which seen tokens are less likely."""
    changed = logits.copy()
    values = changed[seen]
    changed[seen] = np.where(values < 0, values * np.float32(penalty), values / np.float32(penalty))
    return changed


def distribution(logits: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens left to draw from, ascending, and their probabilities: float64, sum 1.

    Tokens are dropped as early as possible, without sorting them all, and only sums are in float64: a full sort of
    128,000 logits would take as long as a layer.
    """
    with np.errstate(over="ignore"):  # an overflow to minus infinity is right
        scores = logits - logits.max()  # the largest is 0
        scores /= np.float32(max(sampling.temperature, _COLDEST))
    tokens = None  # all of them
    if 0 < sampling.top_k < len(scores):
        tokens = np.flatnonzero(scores >= kth_largest(scores, sampling.top_k))  # with ties, as in transformers
        scores = scores[tokens]
    weights = np.exp(scores, out=scores)  # not yet divided by their sum; the largest is 1
    if sampling.top_p < 1:
        kept = _top_p(weights, sampling.top_p)
        tokens, weights = kept if tokens is None else tokens[kept], weights[kept]
    if sampling.min_p > 0:
        kept = np.flatnonzero(weights >= np.float32(sampling.min_p))
        tokens, weights = kept if tokens is None else tokens[kept], weights[kept]
    if tokens is None:
        tokens = np.arange(len(weights))
    return tokens, weights / weights.sum(dtype=np.float64)


def kth_largest(scores: np.ndarray, k: int) -> np.ndarray:
    """Return the k-th largest score, k from 1.

    The k-th largest of the maxima of blocks is not larger, and few scores reach it, so only these are looked at.
    """
    whole = len(scores) // _BLOCK * _BLOCK
    maxima = scores[:whole].reshape(-1, _BLOCK).max(axis=1)
    if len(maxima) >= k:
        scores = scores[scores >= np.partition(maxima, -k)[-k]]
    return np.partition(scores, -k)[-k]


def _top_p(weights: np.ndarray, top_p: float) -> np.ndarray:
    """Return the indices, ascending, of the likeliest tokens that reach `top_p` together, at least one.

    From the least likely upwards, a token is dropped while the share up to it is at most 1 - top_p. If all tokens below
    a bound have at most that share together, they are dropped without being sorted. For the bound (1 - top_p) / count
    that is always so, and in most texts for a larger bound too.
    """
    total = weights.sum(dtype=np.float64)
    rest = (1 - top_p) * total
    for bound in (rest / 16, rest / 256, rest / 4096, rest / len(weights)):
        candidates = np.flatnonzero(weights > bound)
        if total - weights[candidates].sum(dtype=np.float64) <= rest:
            break
    if not len(candidates):  # top_p is 0, and no token exceeds the bound
        return np.array([weights.argmax()])
    ascending = np.sort(weights[candidates])
    upwards = total - ascending.sum(dtype=np.float64) + np.cumsum(ascending, dtype=np.float64)
    count = max(1, len(ascending) - int(np.searchsorted(upwards, rest, side="right")))
    cut = ascending[-count]
    above = candidates[weights[candidates] > cut]
    ties = candidates[weights[candidates] == cut]
    return np.sort(np.concatenate([above, ties[: count - len(above)]]))


def _expect(name: str, value: object, expected: str, is_right: bool) -> None:
    if not is_right:
        raise InputError(name, expected, shown(value))

"""Let a model write calibration text, from only its beginning-of-text token, at temperature 1.

A model writes what it has learned to expect, so its layers read on this text what they read in use, and no data is
needed. LLM-QAT (arXiv 2305.17888) trains on such text; here each token is drawn from the whole distribution. Rows are
written together, one token of each in every step of the model.
"""

from collections import deque
from collections.abc import Callable

import numpy as np

from llamita.engine.kv_cache import SequenceCache
from llamita.engine.model import Model
from llamita.engine.sampler import Sampler, Sampling
from llamita.engine.weights import load_weights
from llamita.errors import InputError
from llamita.models.config import ModelConfig
from llamita.models.weights import ModelSource
from llamita.text.tokenizer import Tokenizer

ROWS_AT_ONCE = 32  # rows in a step; with more, the time of a step grows as fast as its rows
CACHE_BYTES = 2**29  # bytes of keys and values of all rows; a large model writes fewer rows at once
_SEEDS = 2**32  # rows whose draws differ from those of another seed


class Writer:
    """A model that writes rows of text, each of `length` tokens, which fit into its context.

    A row begins with the BOS token. Where a document ends, its end token stays, and a new document begins with BOS and
    without knowledge of those before it. Each row depends only on the weights, the seed and its place. So more samples
    do not change the first ones, and neither threads nor the number of rows in a step change a token.

    Raises:
        InputError: the model has no BOS token.
    """

    def __init__(self, source: ModelSource, length: int, seed: int) -> None:
        self._tokenizer = Tokenizer(source.path, source.config)
        if self._tokenizer.bos_token_id is None:
            raise InputError(
                f"{source.path}: bos_token",
                "one for the model to begin its text with",
                "none",
                "try --calibration FILE",
            )
        self._config, self._length, self._seed = source.config, length, seed
        self._model = Model(source.config, load_weights(source))

    def write(self, places: range, report: Callable[[int], None] | None = None) -> np.ndarray:
        """Return the rows of these places, int32 (places, length).

        Args:
            report: called after each step with the number of tokens that are written.

        Raises:
            RunError: logits that are not finite, from broken weights.
        """
        caches = _caches(self._config, len(places), self._length)
        rows = [_Row(place, self._length, self._seed, self._tokenizer, self._config.vocab_size) for place in places]
        waiting, writing = deque(rows), list[_Row]()
        while waiting or writing:
            while waiting and caches:
                writing.append(waiting.popleft())
                writing[-1].begin(caches.pop())
            logits = self._model.step([(row.cache, row.newest) for row in writing])  # (rows, vocab)
            for row, own in zip(writing, logits, strict=True):
                row.take(own)
            caches += [row.cache for row in writing if row.is_full]
            writing = [row for row in writing if not row.is_full]
            if report:
                report(sum(row.count for row in rows))
        return np.stack([row.ids for row in rows])


def _caches(config: ModelConfig, rows: int, length: int) -> list[SequenceCache]:
    """Return caches for the rows of a step, as many as fit."""
    first = SequenceCache(config, length, "f16", length)
    count = max(1, min(rows, ROWS_AT_ONCE, CACHE_BYTES // first.nbytes))
    return [first, *(SequenceCache(config, length, "f16", length) for _ in range(count - 1))]


class _Row:
    """A row of the text while it is written.

    Attributes:
        ids: int32 (length,), of which `count` are written.
        cache: of the current document, from `begin` on.
    """

    cache: SequenceCache

    def __init__(self, place: int, length: int, seed: int, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.ids = np.empty(length, dtype=np.int32)
        self.count = 0
        self._tokenizer = tokenizer
        sampling = Sampling(temperature=1.0, top_p=1.0, seed=seed * _SEEDS + place)
        self._sampler = Sampler(sampling, self.ids[:0], vocab_size)

    @property
    def is_full(self) -> bool:
        """Whether every token is written."""
        return self.count == len(self.ids)

    @property
    def newest(self) -> np.ndarray:
        """The token that the model has not seen yet: int32 (1,)."""
        return self.ids[self.count - 1 : self.count]

    def begin(self, cache: SequenceCache) -> None:
        """Begin a document, and clear the cache."""
        self.cache = cache
        cache.length = 0
        assert self._tokenizer.bos_token_id is not None
        self._append(self._tokenizer.bos_token_id)

    def take(self, logits: np.ndarray) -> None:
        """Draw the next token from its logits (vocab,)."""
        token = self._sampler.choose(logits)
        self._append(token)
        if token in self._tokenizer.eos_token_ids and not self.is_full:
            self.begin(self.cache)

    def _append(self, token: int) -> None:
        self.ids[self.count] = token
        self.count += 1

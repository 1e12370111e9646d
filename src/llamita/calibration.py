"""Calibration text as a plain value: windows of token ids, with where they come from and their hash.

Methods measure on these tokens what each layer will see. `calibrate` makes the value; everything after
it, the record in `llamita.json` included, needs no more than this.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from llamita.errors import InputError


@dataclass(frozen=True, eq=False)
class Calibration:
    """Tokens to calibrate on. Each window is a text of its own that begins at position 0.

    Attributes:
        name: "self", a file's name, or a hub data set.
        sha256: of the tokens as little-endian int32 in order, in hexadecimal.
        tokens: int32 (samples, length).
    """

    name: str
    sha256: str
    tokens: np.ndarray

    @classmethod
    def of(cls, name: str, tokens: np.ndarray) -> "Calibration":
        """The value with its hash."""
        tokens = np.ascontiguousarray(tokens, dtype=np.int32)
        assert tokens.ndim == 2, "calibration tokens are (samples, length)"
        return cls(name, hashlib.sha256(tokens.astype("<i4").tobytes()).hexdigest(), tokens)

    @property
    def samples(self) -> int:
        """Number of windows."""
        return self.tokens.shape[0]

    @property
    def length(self) -> int:
        """Tokens of a window."""
        return self.tokens.shape[1]

    def record(self) -> dict[str, Any]:
        """What llamita.json says of it."""
        return {"name": self.name, "samples": self.samples, "length": self.length, "sha256": self.sha256}


def join_documents(documents: Iterable[list[int]], bos: int | None, eos: int | None) -> np.ndarray:
    """One stream of token ids, int32 (tokens,): every document between its BOS and EOS, where there are."""
    begin, end = [[] if token is None else [token] for token in (bos, eos)]
    stream: list[int] = []
    for ids in documents:
        stream += [*begin, *ids, *end]
    return np.array(stream, dtype=np.int32)


def draw_windows(
    stream: np.ndarray, samples: int, length: int, seed: int, bos: int | None, name: str
) -> np.ndarray:
    """Random windows that share no token, in the order of the text: int32 (samples, length).

    The stream (tokens,) is cut into pieces from a random offset, and as many as wanted are drawn. Each
    window begins with the BOS token, where the model has one, as every text does that it will see.

    Raises:
        InputError: the stream, which messages call `name`, has fewer tokens than the windows take.
    """
    piece = length - (bos is not None)
    if len(stream) < samples * piece:
        raise InputError(
            f"{name}: expected at least {samples * piece:,} tokens for {samples} windows of {length}, got "
            f"{len(stream):,}; try a longer text, or fewer (--samples) or shorter ones (--length)"
        )
    random = np.random.default_rng(seed)
    offset = int(random.integers(min(piece, len(stream) - samples * piece + 1)))
    pieces = stream[offset : offset + (len(stream) - offset) // piece * piece].reshape(-1, piece)
    windows = np.empty((samples, length), dtype=np.int32)
    windows[:, length - piece :] = pieces[np.sort(random.permutation(len(pieces))[:samples])]
    if bos is not None:
        windows[:, 0] = bos
    return windows

"""Finds the longest earlier occurrence of a text's end, in the text itself and in texts of the user.

There is no index of the text. To compare all its tokens with the last one takes 4 µs at 8,192 tokens and 21 µs at
131,072, where attention reads thousands of times as many bytes. So nothing is built, kept or saved.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llamita.errors import InputError
from llamita.system.files import read_text
from llamita.text.tokenizer import Tokenizer

LARGEST_CORPUS = 16 * 2**20  # bytes of text: about 4 million tokens, which take 64 MB and some ten seconds to load
_PIECE = 2**18  # characters
_LONGEST = 32  # tokens of a match that are compared: of matches that are longer, the last is taken
_ORDER = 3  # tokens by which a corpus is sorted: shorter matches in it are chance
_MOST = 2**13  # occurrences that are looked at: a table of zeros has too many
_BITS = 21  # of a token: three fit an int64


class Match(NamedTuple):
    """An earlier occurrence of a text's end."""

    ids: np.ndarray | None  # the corpus it is in, int32 (tokens,); None for the text itself
    after: int  # the position that follows it
    length: int  # tokens

    def extended(self, text: np.ndarray, token: int) -> "Match | None":
        """Return the match of the text with one more token, None if it ends: then another may be the longest.

        If it goes on, it is still the last of the longest, for any other would have been so before. (But for matches in
        a corpus, which count from three tokens on.)
        """
        ids = text if self.ids is None else self.ids
        goes_on = self.after < len(ids) and int(ids[self.after]) == token
        return Match(self.ids, self.after + 1, self.length + 1) if goes_on else None


class Corpus:
    """Texts of the user whose continuations are drafts, too. It takes 16 bytes a token.

    Args:
        ids: their tokens one after the other, int32 (tokens,). Ids of 2 million and more may give wrong drafts.
    """

    def __init__(self, ids: np.ndarray) -> None:
        self.ids = ids
        keys = _keys(ids)
        self._order = np.argsort(keys, kind="stable").astype(np.int32)
        self._keys = keys[self._order]

    def after(self, text: np.ndarray) -> np.ndarray:
        """Return the positions that follow the last three tokens of a text, ascending: the last 8,192 of them."""
        first, last = (np.searchsorted(self._keys, _keys(text[-_ORDER:]), side) for side in ("left", "right"))
        return self._order[first[0] : last[0]][-_MOST:] + _ORDER if len(first) else self._order[:0]


def read_corpus(paths: Sequence[str | Path], tokenizer: Tokenizer) -> Corpus | None:
    """Return the texts of these files as a corpus; None for no files.

    Raises:
        InputError: they are too large together, or one is missing or not UTF-8.
        RunError: one cannot be read.
    """
    if isinstance(paths, str | Path):
        raise InputError("draft_from", "several files", "one", "try [file]")
    parts, rest = list[np.ndarray](), LARGEST_CORPUS
    for path in map(Path, paths):
        text = read_text(path, LARGEST_CORPUS)
        rest -= len(text.encode())
        if rest < 0:
            raise InputError("draft_from", f"at most {LARGEST_CORPUS:,} bytes of text in all files together",
                             f"more with {path}", "try fewer files")  # fmt: skip
        parts += [np.array(tokenizer.encode(piece, add_bos=False), dtype=np.int32) for piece in _pieces(text)]
    return Corpus(np.concatenate(parts)) if parts else None


def _pieces(text: str) -> Iterator[str]:
    """Yield the text in pieces of whole lines: the tokenizer takes 150 times the memory of what it gets at once."""
    start = 0
    while start < len(text):
        stop = text.find("\n", start + _PIECE) + 1 or len(text)
        yield text[start:stop]
        start = stop


def find_match(text: np.ndarray, corpus: Corpus | None = None) -> Match | None:
    """Return the last of the longest occurrences of the end of a text, int32 (tokens,), in itself or the corpus.

    Of two that are equally long, the text's own is taken.
    """
    after, length = _longest(text, np.flatnonzero(text[:-1] == text[-1]) + 1, text, 1)
    found = Match(None, after, length) if length else None
    if corpus:
        after, longer = _longest(corpus.ids, corpus.after(text), text, _ORDER)
        if longer > length:
            return Match(corpus.ids, after, longer)
    return found


def _longest(ids: np.ndarray, after: np.ndarray, text: np.ndarray, length: int) -> tuple[int, int]:
    """Return the position that follows the last of the longest matches, and their length; 0, 0 for none.

    Args:
        ids: where the matches are.
        after: the positions that follow them, ascending.
        text: its end is what they match.
        length: tokens that are known to match.
    """
    if not len(after):
        return 0, 0
    most = min(_LONGEST, len(text))
    while length < most:
        longer = after[1:] if after[0] == length else after  # the first may be at the beginning, with nothing before it
        longer = longer[ids[longer - (length + 1)] == text[-length - 1]]
        if not len(longer):
            break
        after, length = longer, length + 1
    return int(after[-1]), length


def _keys(ids: np.ndarray) -> np.ndarray:
    """Return each three tokens in a row as one int64."""
    wide = ids.astype(np.int64)
    return (wide[:-2] << 2 * _BITS) | (wide[1:-1] << _BITS) | wide[2:]

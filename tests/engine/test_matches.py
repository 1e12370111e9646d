"""The longest match of a text's end: against a search through all of them, in the text and in a corpus."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import llamita
from llamita.engine import matches
from llamita.engine.llm import LLM
from llamita.engine.matches import Corpus, find_match
from llamita.engine.speculation import StepTimes
from llamita.errors import InputError

TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=30)
WORDS = "The grey ferry carries seven barrels of honey to the northern lighthouse every second Thursday. " * 2
Found = tuple[bool, int, int] | None  # whether it is in the text itself, the position that follows it, its length


def ends(ids: list[int], end: list[int], last: int) -> list[int]:
    """Return the positions up to `last` that follow an occurrence of `end`."""
    return [at for at in range(len(end), last + 1) if ids[at - len(end) : at] == end]


def longest(text: list[int], corpus: list[int]) -> Found:
    """Try all lengths and all places."""
    for length in range(len(text), 0, -1):
        if own := ends(text, text[-length:], len(text) - 1):
            return True, own[-1], length
        if length >= 3 and (others := ends(corpus, text[-length:], len(corpus))):
            return False, others[-1], length
    return None


def found(text: list[int], corpus: list[int]) -> Found:
    match = find_match(np.array(text, dtype=np.int32), Corpus(np.array(corpus, dtype=np.int32)) if corpus else None)
    return match and (match.ids is None, match.after, match.length)


@settings(deadline=None)
@given(text=TOKENS, corpus=st.lists(st.integers(0, 2), max_size=60))
@example(text=[0, 1, 2], corpus=[0, 1, 2])
@example(text=[1, 2], corpus=[1])
def test_the_last_of_the_longest_is_found(text: list[int], corpus: list[int]) -> None:
    assert found(text, corpus) == longest(text, corpus)


@settings(deadline=None)
@given(text=TOKENS, more=TOKENS, corpus=st.lists(st.integers(0, 2), max_size=60))
def test_a_match_that_goes_on_is_one_that_would_be_found(text: list[int], more: list[int], corpus: list[int]) -> None:
    """In the corpus, one of the same length: a text that has grown may have another by then.

    The text's own matches of one and two tokens hide what begins to match in the corpus with the third.
    """
    ids = np.array([*text, *more][:32], dtype=np.int32)
    indexed = Corpus(np.array(corpus, dtype=np.int32)) if corpus else None
    for known in range(len(text), len(ids)):
        match = find_match(ids[:known], indexed)
        longer = match and match.extended(ids[:known], int(ids[known]))
        if match and longer and (indexed is None or match.length >= 3):
            again = find_match(ids[: known + 1], indexed)
            assert again is not None
            assert again.length == longer.length
            assert again == longer or longer.ids is not None


def test_a_corpus_ends_where_it_ends() -> None:
    corpus = Corpus(np.array([7, 8, 9], dtype=np.int32))
    match = find_match(np.array([7, 8, 9], dtype=np.int32), corpus)
    assert match is not None
    assert match.after == 3
    assert match.extended(np.array([7, 8, 9]), 7) is None


@pytest.fixture(scope="module")
def embedded() -> LLM:
    return llamita.load("embedded", scheme="llama3.2")


def test_files_are_drafted_from_and_change_no_answer(
    embedded: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StepTimes, "best_length", lambda *_: 100)
    plain = embedded.generate("Once upon a time", max_tokens=60, greedy=True, speculate=0)
    file, other = tmp_path / "told.txt", tmp_path / "other.txt"
    file.write_text("Once upon a time" + plain.text)
    other.write_text(WORDS)
    helped = llamita.load("embedded", scheme="llama3.2", draft_from=[other, str(file)])
    drafted = helped.generate("Once upon a time", max_tokens=60, greedy=True)
    assert drafted.token_ids == plain.token_ids
    alone = embedded.generate("Once upon a time", max_tokens=60, greedy=True)
    assert drafted.timings.decode_steps < alone.timings.decode_steps / 2


def test_pieces_are_whole_lines(embedded: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(f"Line {n} is short.\n" for n in range(20)) + "no end of line"
    (tmp_path / "lines.txt").write_text(text)
    monkeypatch.setattr(matches, "_PIECE", 50)
    corpus = matches.read_corpus([tmp_path / "lines.txt"], embedded.tokenizer)
    assert corpus is not None
    assert embedded.tokenizer.decode(corpus.ids.tolist()).split() == text.split()


def test_errors_of_files(embedded: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*names: str) -> Corpus | None:
        return matches.read_corpus([tmp_path / name for name in names], embedded.tokenizer)

    (tmp_path / "empty").touch()
    (tmp_path / "small").write_text("a b c d")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    assert read() is read("empty") is None
    monkeypatch.setattr(matches, "LARGEST_CORPUS", 10)
    assert read("small") is not None
    with pytest.raises(InputError, match="at most 10 bytes of text in all files together, got more with"):
        read("small", "small")
    (tmp_path / "large").write_text("x" * 11)
    for name, message in (("large", "at most 10 bytes"), ("binary", "UTF-8"), ("none", "cannot be read")):
        with pytest.raises(InputError, match=message):
            read(name)
    with pytest.raises(InputError, match="draft_from"):
        llamita.load("embedded", draft_from="one.txt")

"""Read and tokenize pairs of answers of which one is preferred, as data sets for DPO hold them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from llamita.errors import InputError
from llamita.text.chat_template import ChatTemplate
from llamita.text.tokenizer import Tokenizer
from llamita.train.examples import join_places, tokenize
from llamita.train.records import Record
from llamita.train.tasks import Conversation, Turn, read_turns


@dataclass(frozen=True)
class Pair:
    """Token ids of the prompt, of the preferred answer, and of the other answer."""

    place: str
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def length(self) -> int:
        """Count the tokens of the longer of the two conversations."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


def read_pairs(
    records: Iterable[Record], tokenizer: Tokenizer, template: ChatTemplate | None, length: int
) -> tuple[list[Pair], str | None]:
    """Return the pairs of at most `length` tokens, and a line about any longer ones.

    Args:
        records: with `chosen` and `rejected`, each a text or turns. The turns before the answer are in `prompt`, as
            a text or turns, or in both.

    Raises:
        InputError: the record at a named place is not such a pair, or no pair is left.
    """
    pairs = [_pair(record, tokenizer, template) for record in records]
    if not pairs:
        raise InputError("--preferences", "pairs of answers", "no records")
    kept = [pair for pair in pairs if pair.length <= length]
    if not kept:
        expected = f"pairs of at most {length} tokens"
        raise InputError("--preferences", expected, f"none of {len(pairs)}", "try --set length=N")
    long = [pair.place for pair in pairs if pair.length > length]
    if not long:
        return kept, None
    return kept, f"{len(long)} of {len(pairs)} pairs have more than {length} tokens: left out ({join_places(long)})"


def _pair(record: Record, tokenizer: Tokenizer, template: ChatTemplate | None) -> Pair:
    before = _turns(record, "prompt", "user") if "prompt" in record.values else ()
    answered = [tokenize(Conversation(record.place, turns), tokenizer, template) for turns in _answers(record, before)]
    starts = [_answer_start(example.is_learned) for example in answered]
    prompts = [example.ids[:start].tolist() for example, start in zip(answered, starts, strict=True)]
    if prompts[0] != prompts[1]:
        raise InputError(record.place, "the same conversation before both answers", "two")
    chosen, rejected = (e.ids[start:].tolist() for e, start in zip(answered, starts, strict=True))
    if chosen == rejected:
        raise InputError(record.place, "two answers that differ", "one twice")
    return Pair(record.place, prompts[0], chosen, rejected)


def _answers(record: Record, before: tuple[Turn, ...]) -> Iterator[tuple[Turn, ...]]:
    """Yield the conversation with the preferred answer, then with the other; the turns may include `before`."""
    for name in ("chosen", "rejected"):
        turns = list(_turns(record, name, "assistant"))
        begins = bool(before) and turns[: len(before)] == list(before)
        if before and not begins and len(turns) > 1:
            raise InputError(f"{record.place}: {name}", "an answer, or the turns of prompt before it")
        whole = tuple(turns) if begins else (*before, *turns)
        last = turns[-1]
        if len(whole) == 1 or last["role"] != "assistant" or not last["content"].strip():
            raise InputError(f"{record.place}: {name}", "the assistant's answer to a prompt")
        yield whole


def _turns(record: Record, name: str, role: str) -> tuple[Turn, ...]:
    """Return a text as one turn of `role`, or a list of turns as it is."""
    value: Any = record.values.get(name)
    if isinstance(value, str) and value.strip():
        return ({"role": role, "content": value},)
    return read_turns(record, name)


def _answer_start(is_learned: np.ndarray) -> int:
    """Return the place where the last run of learned tokens begins."""
    return int(np.flatnonzero(is_learned & ~np.roll(is_learned, 1))[-1])

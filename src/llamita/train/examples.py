"""Turn conversations into token ids that know which of them are learned, and pack these into rows of one length."""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from llamita.errors import InputError
from llamita.text.chat_template import ChatTemplate
from llamita.text.tokenizer import Tokenizer
from llamita.train.tasks import Conversation, Turn

IGNORED = -100  # the label of a token that is not learned, as in Torch's cross-entropy
_SHOWN = 3  # places named in a message


@dataclass(frozen=True)
class Example:
    """Token ids int32 (tokens,), and flags of those that are learned: bool (tokens,), never set for the first.

    Attributes:
        is_text: this is plain text, which can be divided; a conversation cannot.
    """

    place: str
    ids: np.ndarray
    is_learned: np.ndarray
    is_text: bool = False


@dataclass(frozen=True)
class Windows:
    """Several examples in each row of one length; none of them sees another.

    Attributes:
        ids, labels, positions: int64 (rows, length). Labels are ids where they are learned, else IGNORED. Positions
            count from 0 in each example; by them attention keeps examples apart.
    """

    ids: np.ndarray
    labels: np.ndarray
    positions: np.ndarray

    @property
    def is_target(self) -> np.ndarray:
        """Return the flags of tokens that the loss counts: bool (rows, length)."""
        return self.labels != IGNORED


def tokenize(conversation: Conversation, tokenizer: Tokenizer, template: ChatTemplate | None) -> Example:
    """Return ids as in generation: the text before an answer is encoded apart from the answer.

    Without a template each turn begins a new line, as a base model reads it.

    Raises:
        InputError: the template refuses the conversation, or changes the text before an answer.
    """
    if conversation.text is not None:
        ids = _closed(tokenizer.encode(conversation.text), tokenizer)
        learned = np.ones(len(ids), bool)
    else:
        ids, flags = list[int](), list[bool]()
        for text, is_answer in _pieces(conversation, template):
            begins = not ids and template is None  # a template writes its BOS token out
            piece = tokenizer.encode(text, add_bos=None if begins else False)
            ids += piece
            flags += [is_answer] * len(piece)
        closed = _closed(ids, tokenizer)
        learned = np.array(flags + [True] * (len(closed) - len(ids)))
        ids = closed
    learned[:1] = False
    return Example(conversation.place, np.array(ids, np.int32), learned, conversation.text is not None)


def _closed(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """Append an end-of-text token, if the model has one and the template did not put it there."""
    ends = tokenizer.eos_token_ids
    return ids if not ends or (ids and ids[-1] in ends) else [*ids, ends[0]]


def line_of(turn: Turn) -> str:
    """Return a turn that another one follows, as a model without a chat template reads it."""
    return turn["content"] + "\n"


def _pieces(conversation: Conversation, template: ChatTemplate | None) -> list[tuple[str, bool]]:
    """Return the conversation's text in pieces, each with a flag: it is the assistant's."""
    turns = conversation.turns
    if template is None:
        return [
            *((line_of(turn), turn["role"] == "assistant") for turn in turns[:-1]),
            (turns[-1]["content"], turns[-1]["role"] == "assistant"),
        ]
    pieces, done = list[tuple[str, bool]](), ""
    for i, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        before = template.render(turns[:i], add_generation_prompt=True)
        after = template.render(turns[: i + 1], add_generation_prompt=False)
        if not before.startswith(done) or not after.startswith(before):
            expected = "a chat template that leaves earlier turns as they are"
            where = f"{conversation.place}: turn {i + 1}"
            raise InputError(where, expected, "another text", "try a record for each turn")
        pieces += [(before[len(done) :], False), (after[len(before) :], True)]
        done = after
    return pieces


def keep_fitting(examples: Iterable[Example], length: int, bos: int | None) -> tuple[list[Example], str | None]:
    """Return the examples of at most `length` tokens with something to learn, and a line about any others.

    Longer plain texts are divided; each part begins with the BOS token, if there is one.
    """
    kept, long, empty, divided, total = list[Example](), list[Example](), list[Example](), list[Example](), 0
    for example in examples:
        total += 1
        if len(example.ids) > length and example.is_text:
            divided.append(example)
            kept += _parts(example, length, bos)
        else:
            group = long if len(example.ids) > length else kept if example.is_learned.any() else empty
            group.append(example)
    notes = [
        f"{len(group)} of {total} examples {why} ({join_places([example.place for example in group])})"
        for group, why in (
            (long, f"have more than {length} tokens: left out"),
            (divided, f"are texts of more than {length} tokens: divided"),
            (empty, "have nothing to learn: left out"),
        )
        if group
    ]
    return kept, "; ".join(notes) or None


def _parts(example: Example, length: int, bos: int | None) -> Iterator[Example]:
    """Yield consecutive parts of a plain text; every token is learned in one of them."""
    head = [] if bos is None else [bos]
    rest = example.ids[len(head) :]  # the text begins with BOS, too
    step = length - len(head)
    for start in range(0, len(rest), step):
        ids = np.array([*head, *rest[start : start + step]], np.int32)
        learned = np.ones(len(ids), bool)
        learned[:1] = False
        if len(ids) > 1:
            yield Example(example.place, ids, learned, is_text=True)


def join_places(places: Sequence[str]) -> str:
    """Return the first few places for a message."""
    return ", ".join(places[:_SHOWN]) + (", …" if len(places) > _SHOWN else "")


def pack(examples: Sequence[Example], length: int, pad: int) -> Windows:
    """Put each example whole into the fullest row that has room for it, the longest first (best fit decreasing).

    Args:
        pad: the id that fills the end of a row; nothing is learned there.
    """
    rows = list[list[Example]]()
    room = list[tuple[int, int]]()  # (free tokens, number) of each row, sorted
    for example in sorted(examples, key=lambda e: -len(e.ids)):
        at = bisect_left(room, (len(example.ids), 0))
        if at == len(room):
            rows.append([])
            free, row = length, len(rows) - 1
        else:
            free, row = room.pop(at)
        rows[row].append(example)
        insort(room, (free - len(example.ids), row))
    ids = np.full((len(rows), length), pad, np.int64)
    labels, positions = np.full_like(ids, IGNORED), np.zeros_like(ids)
    for row, chosen in enumerate(rows):
        start = 0
        for example in chosen:
            stop = start + len(example.ids)
            ids[row, start:stop] = example.ids
            labels[row, start:stop] = np.where(example.is_learned, example.ids, IGNORED)
            positions[row, start:stop] = np.arange(stop - start)
            start = stop
        positions[row, start:] = np.arange(length - start)
    return Windows(ids, labels, positions)

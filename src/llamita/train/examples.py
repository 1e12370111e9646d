"""From conversations to token ids with the places that are learned, and to windows of many of them."""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from llamita.errors import InputError
from llamita.text.chat_template import ChatTemplate
from llamita.text.tokenizer import Tokenizer
from llamita.train.tasks import Conversation, Turn

IGNORED = -100  # a label that is no target, as Torch's cross-entropy has it
_SHOWN = 3  # places named in a message


@dataclass(frozen=True)
class Example:
    """Token ids int32 (tokens,), and which of them are learned: bool (tokens,), the first never.

    Attributes:
        is_text: whether this is plain text, which can be divided where a conversation cannot.
    """

    place: str
    ids: np.ndarray
    is_learned: np.ndarray
    is_text: bool = False


@dataclass(frozen=True)
class Windows:
    """Examples side by side in rows of one length, each seeing only itself.

    Attributes:
        ids, labels, positions: int64 (rows, length); labels are ids where they are learned, else IGNORED;
            positions count from 0 in each example, which is how attention tells them apart.
    """

    ids: np.ndarray
    labels: np.ndarray
    positions: np.ndarray

    @property
    def is_target(self) -> np.ndarray:
        """Which tokens the loss counts: bool (rows, length)."""
        return self.labels != IGNORED


def tokenize(conversation: Conversation, tokenizer: Tokenizer, template: ChatTemplate | None) -> Example:
    """Ids as generation would meet them: what stands before an answer is encoded apart from the answer.

    Without a template the turns stand one below the other, which is how a base model reads.

    Raises:
        InputError: the template refuses the conversation, or changes what stands before an answer.
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
    """With a token that ends the text, where the model has one and the template did not put it there."""
    ends = tokenizer.eos_token_ids
    return ids if not ends or (ids and ids[-1] in ends) else [*ids, ends[0]]


def line_of(turn: Turn) -> str:
    """A turn in front of another one, as a model without a chat template reads it."""
    return turn["content"] + "\n"


def _pieces(conversation: Conversation, template: ChatTemplate | None) -> list[tuple[str, bool]]:
    """The conversation's text in pieces, and which of them are the assistant's."""
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
            raise InputError(
                f"{conversation.place}: turn {i + 1}",
                "a chat template that leaves earlier turns as they are",
                "another text",
                "try a record for each turn",
            )
        pieces += [(before[len(done) :], False), (after[len(before) :], True)]
        done = after
    return pieces


def fitting(examples: Iterable[Example], length: int, bos: int | None) -> tuple[list[Example], str | None]:
    """Those of at most `length` tokens with something to learn, and a line about the others, if any.

    Longer plain texts are divided, each part behind a BOS token where there is one.
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
        f"{len(group)} of {total} examples {why} ({_places(group)})"
        for group, why in (
            (long, f"have more than {length} tokens: left out"),
            (divided, f"are texts of more than {length} tokens: divided"),
            (empty, "have nothing to learn: left out"),
        )
        if group
    ]
    return kept, "; ".join(notes) or None


def _parts(example: Example, length: int, bos: int | None) -> Iterator[Example]:
    """Consecutive parts of a plain text, every token learned in one of them."""
    head = [] if bos is None else [bos]
    rest = example.ids[len(head) :]  # the text began with it, too
    step = length - len(head)
    for start in range(0, len(rest), step):
        ids = np.array([*head, *rest[start : start + step]], np.int32)
        learned = np.ones(len(ids), bool)
        learned[:1] = False
        if len(ids) > 1:
            yield Example(example.place, ids, learned, is_text=True)


def _places(examples: Sequence[Example]) -> str:
    names = ", ".join(example.place for example in examples[:_SHOWN])
    return names + (", …" if len(examples) > _SHOWN else "")


def pack(examples: Sequence[Example], length: int, pad: int) -> Windows:
    """Best fit, longest first: each example whole, in the fullest row that has room for it.

    Args:
        pad: the id that fills a row's end; nothing is learned there.
    """
    rows = list[list[Example]]()
    room = list[tuple[int, int]]()  # what is free in a row, and its number, in order
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

"""Read training data by name; tokenize, divide and pack it into rows that are learned and rows only measured."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from llamita.errors import InputError, shown
from llamita.methods.setup import Calibration
from llamita.models.checkpoint import Checkpoint
from llamita.system.progress import Progress
from llamita.text.chat_template import ChatTemplate, find_template
from llamita.text.tokenizer import Tokenizer
from llamita.train.examples import Example, Windows, join_places, keep_fitting, pack, tokenize
from llamita.train.preferences import Pair, read_pairs
from llamita.train.recipe import Recipe
from llamita.train.records import Record, read_data
from llamita.train.tasks import TASKS, Conversation, conversation

T = TypeVar("T", Example, Pair)
_LEAST_HELD_OUT = 2  # examples, if any are held out


@dataclass(frozen=True)
class Data:
    """The rows and pairs that training reads.

    Attributes:
        rows, held_out: packed examples that are learned, and packed examples that are only measured.
        learned: the number of examples that are learned.
        measured: each example that is only measured, with its conversation.
        note: a line about examples that were left out or divided; None if there are none.
        sha256: of all tokens, in hexadecimal.
        pairs, held_out_pairs: preferences that are learned, and preferences that are only measured.
    """

    rows: Windows
    held_out: Windows
    learned: int
    measured: tuple[tuple[Example, Conversation], ...]
    note: str | None
    sha256: str
    pairs: tuple[Pair, ...] = ()
    held_out_pairs: tuple[Pair, ...] = ()

    @property
    def learned_tokens(self) -> int:
        """Count the tokens of the loss in one pass over the data."""
        return int(self.rows.is_target.sum())

    def calibration(self, name: str, samples: int) -> Calibration:
        """Draw rows for methods that measure activations: the first ones hold only long examples, by packing."""
        order = np.random.default_rng(0).permutation(len(self.rows.ids))
        tokens = np.ascontiguousarray(self.rows.ids[np.sort(order[:samples])], np.int32)
        return Calibration(name, hashlib.sha256(tokens.astype("<i4").tobytes()).hexdigest(), tokens)


def load_data(
    name: str, task: str | None, source: Checkpoint, recipe: Recipe, seed: int, limit: int | None = None,
    progress: Progress = None, skip_bad_rows: bool = False,
) -> Data:  # fmt: skip
    """Read, tokenize, divide and pack.

    Args:
        name: a file or a data set of the hub, as `records.read_data` takes it.
        task: a key of `TASKS`; None if the columns of the records say it.
        seed: draws the order and the examples that are held out.
        limit: read at most this many records.
        skip_bad_rows: leave out records that cannot be used, and name them in the note.

    Raises:
        InputError: an unknown task, a bad record, or nothing to learn.
    """
    if task is not None and task not in TASKS:
        raise InputError("--task", f"one of {', '.join(TASKS)}", shown(task))
    if recipe.length > source.config.context:
        expected = f"at most {source.config.context} tokens, the model's context"
        raise InputError("length", expected, str(recipe.length), "try --set length=N")
    tokenizer, template = _text_readers(source)
    conversations, bad = _conversations(read_data(name, limit, skip_bad_rows), task, skip_bad_rows)
    examples = []
    for number, one in enumerate(conversations):
        if progress and number % 100 == 0:
            progress("tokenizing", number, len(conversations))
        examples.append(tokenize(one, tokenizer, template))
    bos = tokenizer.bos_token_id if tokenizer.adds_bos else None
    kept, note = keep_fitting(examples, recipe.length, bos)
    note = "; ".join(part for part in (bad, note) if part) or None
    if not kept:
        found, hint = (f"none: {note}", "try --set length=N") if note else ("none", None)
        raise InputError(name, "examples to learn from", found, hint)
    learned, held_out_examples = _divide(kept, recipe.held_out, seed)
    pad = tokenizer.eos_token_ids[0] if tokenizer.eos_token_ids else 0
    rows, held_out = pack(learned, recipe.length, pad), pack(held_out_examples, recipe.length, pad)
    by_place = {one.place: one for one in conversations}
    measured = tuple((example, by_place[example.place]) for example in held_out_examples)
    digest = hashlib.sha256()
    for windows in (rows, held_out):
        digest.update(windows.ids.astype("<i4").tobytes() + windows.labels.astype("<i4").tobytes())
    return Data(rows, held_out, len(learned), measured, note, digest.hexdigest())


def _conversations(records: Iterable[Record], task: str | None, skips: bool) -> tuple[list[Conversation], str | None]:
    """Return the conversations of records, and a line about those that were left out."""
    found, bad, total = list[Conversation](), list[str](), 0
    for record in records:
        total += 1
        try:
            found.append(conversation(record, task))
        except InputError:
            if not skips:
                raise
            bad.append(record.place)
    if not bad:
        return found, None
    return found, f"{len(bad)} of {total} rows cannot be used: left out ({join_places(bad)})"


def with_preferences(
    data: Data, name: str, source: Checkpoint, recipe: Recipe, seed: int, limit: int | None = None
) -> Data:
    """Return the data together with pairs of answers.

    Args:
        name: a file or a data set of the hub, as for `load_data`.

    Raises:
        InputError: a record is not a pair, or there are too few pairs.
    """
    tokenizer, template = _text_readers(source)
    pairs, note = read_pairs(read_data(name, limit), tokenizer, template, recipe.length)
    learned, measured = _divide(pairs, recipe.held_out, seed, "--preferences")
    digest = hashlib.sha256(bytes.fromhex(data.sha256))
    for pair in (*learned, *measured):
        digest.update(repr((pair.prompt, pair.chosen, pair.rejected)).encode())
    notes = "; ".join(part for part in (data.note, note) if part)
    return replace(data, pairs=tuple(learned), held_out_pairs=tuple(measured), note=notes or None,
                   sha256=digest.hexdigest())  # fmt: skip


def _text_readers(source: Checkpoint) -> tuple[Tokenizer, ChatTemplate | None]:
    """Return the model's tokenizer and chat template; a base model has none and reads each turn on its own line."""
    tokenizer, text = Tokenizer(source.path, source.config), find_template(source.path)
    if text is None:
        return tokenizer, None
    return tokenizer, ChatTemplate(text, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token)


def _divide(examples: list[T], share: float, seed: int, option: str = "--data") -> tuple[list[T], list[T]]:
    """Divide examples into those that are learned and a share, drawn by the seed, that is only measured."""
    count = 0 if share == 0 else max(_LEAST_HELD_OUT, round(share * len(examples)))
    if count >= len(examples):
        expected = f"more than {count} examples, {count} of them to be held out"
        raise InputError(option, expected, str(len(examples)), "try more data, or --set held_out=0")
    order = np.random.default_rng(seed).permutation(len(examples))
    return [examples[i] for i in order[count:]], [examples[i] for i in order[:count]]

"""What a task's records mean: a conversation to learn, whose last turn is the answer.

Each task names the columns that public data sets of its kind have. Records with `messages`, or `prompt`
and `completion`, need no task; a record with `text` alone is learned whole.
"""

from collections.abc import Callable
from dataclasses import dataclass

from llamita.errors import InputError
from llamita.train.records import Record

_ROLES = ("system", "user", "assistant", "tool", "ipython")
Turn = dict[str, str]  # {"role": …, "content": …}


@dataclass(frozen=True)
class Conversation:
    """What is learned from a record.

    Attributes:
        turns: the conversation; the assistant's turns are learned.
        text: a plain text instead, learned whole.
        answers: what counts as right, for tasks that are scored; the last turn's content among them.
    """

    place: str
    turns: tuple[Turn, ...] = ()
    text: str | None = None
    answers: tuple[str, ...] = ()


def conversation(record: Record, task: str | None) -> Conversation:
    """What a record says, by the task's template or by the columns it has.

    Raises:
        InputError: a column is missing or is no text, by the record's place.
    """
    if task is not None:
        return TASKS[task](record)
    if "messages" in record.values:
        return _of_messages(record)
    if "prompt" in record.values:
        return _answered(record, _text(record, "prompt"), _text(record, "completion"))
    if "instruction" in record.values:
        return TASKS["assistant"](record)
    if "text" in record.values:
        return Conversation(record.place, text=_text(record, "text"))
    columns = ", ".join(list(record.values)[:8])
    raise InputError(
        f"{record.place}",
        "messages, prompt and completion, instruction and output, or text",
        f"{columns}",
        f"try --task {'|'.join(TASKS)}",
    )


def _text(record: Record, *names: str) -> str:
    """The first of these columns that is there."""
    for name in names:
        value = record.values.get(name)
        if isinstance(value, str) and value.strip():
            return value
        if value is not None or (name in record.values and len(names) == 1):
            found = "an empty text" if isinstance(value, str) else type(value).__name__
            found = "null" if value is None else found
            raise InputError(f"{record.place}: {name}", "a text", f"{found}")
    columns = ", ".join(list(record.values)[:8])
    raise InputError(f"{record.place}", f"the column {' or '.join(names)}", f"{columns}")


def _optional(record: Record, name: str) -> str:
    value = record.values.get(name, "")
    if not isinstance(value, str):
        raise InputError(f"{record.place}: {name}", "a text", f"{type(value).__name__}")
    return value.strip()


def read_turns(record: Record, name: str) -> tuple[Turn, ...]:
    """The turns in a column. Raises InputError, by the record's place, if it has none."""
    turns = record.values.get(name)
    if (
        not isinstance(turns, list)
        or not turns
        or not all(
            isinstance(t, dict) and isinstance(t.get("role"), str) and isinstance(t.get("content"), str) for t in turns
        )
    ):
        raise InputError(f"{record.place}: {name}", "objects with the texts role and content")
    for turn in turns:
        if turn["role"] not in _ROLES:
            raise InputError(f"{record.place}: {name}: role", f"{', '.join(_ROLES)}", f"{turn['role'][:40]!r}")
    return tuple({"role": turn["role"], "content": turn["content"]} for turn in turns)


def _of_messages(record: Record) -> Conversation:
    turns = read_turns(record, "messages")
    if not any(turn["role"] == "assistant" for turn in turns):
        raise InputError(f"{record.place}: messages", "a turn of the assistant to learn", "none")
    if turns[-1]["role"] != "assistant":
        raise InputError(f"{record.place}: messages", "the assistant's turn last", f"{turns[-1]['role']}")
    return Conversation(record.place, turns, answers=(turns[-1]["content"],))


def _answered(record: Record, prompt: str, answer: str, answers: tuple[str, ...] = ()) -> Conversation:
    turns: list[Turn] = []
    if system := _optional(record, "system"):
        turns.append({"role": "system", "content": system})
    turns += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return Conversation(record.place, tuple(turns), answers=answers or (answer,))


def _translation(record: Record) -> Conversation:
    language = _optional(record, "target_language") or "French"
    source, target = _text(record, "source", "sentence"), _text(record, "target", "translation")
    return _answered(record, f"Translate to {language}: {source}", target)


def _question(record: Record) -> Conversation:
    context, question = _text(record, "context", "passage"), _text(record, "question")
    answers = record.values.get("answers")
    if isinstance(answers, dict):  # as the hub has SQuAD
        answers = answers.get("text")
    known = tuple(answers) if isinstance(answers, list) and all(isinstance(a, str) for a in answers) else ()
    answer = known[0] if known else _text(record, "answer")
    return _answered(record, f"{context}\n\nQuestion: {question}\nAnswer:", answer, known)


def _summary(record: Record) -> Conversation:
    document = _text(record, "document", "article", "text", "dialogue")
    return _answered(record, f"Summarize:\n\n{document}", _text(record, "summary", "highlights"))


def _assistant(record: Record) -> Conversation:
    instruction, given = _text(record, "instruction", "prompt"), _optional(record, "input")
    prompt = f"{instruction}\n\n{given}" if given else instruction
    return _answered(record, prompt, _text(record, "output", "response", "completion"))


def _writing(record: Record) -> Conversation:
    return _answered(record, _text(record, "prompt"), _text(record, "story", "completion", "response"))


TASKS: dict[str, Callable[[Record], Conversation]] = {
    "translation": _translation,
    "qa": _question,
    "summarization": _summary,
    "chat": _of_messages,
    "assistant": _assistant,
    "writing": _writing,
}

"""Turn a record into a conversation to learn, whose last turn is the answer.

Each task names the columns that public data sets of its kind have. Records with `messages`, or `prompt` and
`completion`, need no task; a record with only `text` is learned whole.
"""

from collections.abc import Callable
from dataclasses import dataclass

from llamita.errors import InputError, shown
from llamita.train.records import Record

_ROLES = ("system", "user", "assistant", "tool", "ipython")
Turn = dict[str, str]  # {"role": …, "content": …}


@dataclass(frozen=True)
class Conversation:
    """The turns or the text that a record teaches.

    Attributes:
        turns: the conversation; the assistant's turns are learned.
        text: a plain text instead, learned whole.
        answers: the right answers, for tasks that are scored; the last turn's content is one of them.
    """

    place: str
    turns: tuple[Turn, ...] = ()
    text: str | None = None
    answers: tuple[str, ...] = ()


def conversation(record: Record, task: str | None) -> Conversation:
    """Return the conversation of a record, by the task or else by the record's columns.

    Raises:
        InputError: a column of the record at a named place is missing or is not a text.
    """
    if record.problem is not None:
        raise record.problem
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
    expected = "messages, prompt and completion, instruction and output, or text"
    raise InputError(record.place, expected, _columns(record), f"try --task {'|'.join(TASKS)}")


def _text(record: Record, *names: str) -> str:
    """Return the text of the first of these columns that exists."""
    for name in names:
        value = record.values.get(name)
        if isinstance(value, str) and value.strip():
            return value
        if value is not None or (name in record.values and len(names) == 1):
            raise InputError(f"{record.place}: {name}", "a text", _kind_of(value))
    raise InputError(record.place, f"the column {' or '.join(names)}", _columns(record))


def _columns(record: Record) -> str:
    return ", ".join(list(record.values)[:8])


def _kind_of(value: object) -> str:
    return "an empty text" if isinstance(value, str) else "null" if value is None else type(value).__name__


def _optional(record: Record, name: str) -> str:
    value = record.values.get(name, "")
    if not isinstance(value, str):
        raise InputError(f"{record.place}: {name}", "a text", type(value).__name__)
    return value.strip()


def read_turns(record: Record, name: str) -> tuple[Turn, ...]:
    """Return the turns in a column. Raises InputError, which names the record's place, if there are none."""
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
            raise InputError(f"{record.place}: {name}: role", ", ".join(_ROLES), shown(turn["role"]))
    return tuple({"role": turn["role"], "content": turn["content"]} for turn in turns)


def _of_messages(record: Record) -> Conversation:
    turns = read_turns(record, "messages")
    if not any(turn["role"] == "assistant" for turn in turns):
        raise InputError(f"{record.place}: messages", "a turn of the assistant to learn", "none")
    if turns[-1]["role"] != "assistant":
        raise InputError(f"{record.place}: messages", "the assistant's turn last", turns[-1]["role"])
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
    if isinstance(answers, dict):  # SQuAD on the hub
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

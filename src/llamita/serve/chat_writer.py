"""Turns the updates of one choice into OpenAI's deltas of a chat; an answer that is not streamed is their fold."""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from llamita.engine.logprobs import TokenLogprob
from llamita.engine.requests import Generation
from llamita.serve.engine_thread import Update
from llamita.serve.logprobs import chat_entry
from llamita.serve.reply import Part, reason_of
from llamita.text.tokenizer import Tokenizer

Delta = dict[str, Any]


class Parser(Protocol):
    """Finds calls of functions in text as it comes."""

    @property
    def has_calls(self) -> bool:
        """A call has begun."""
        ...

    def add(self, text: str) -> list[Delta]:
        """Add text; return what is sure by now."""
        ...

    def finish(self) -> list[Delta]:
        """Return the rest; no more text comes."""
        ...


class ChatWriter:
    """Writes one choice.

    Args:
        tokenizer: of the model, for log-probabilities.
        parser: finds calls; None where there are no functions.
        has_logprobs: log-probabilities are sent.
    """

    def __init__(self, tokenizer: Tokenizer, parser: Parser | None, has_logprobs: bool) -> None:
        self._tokenizer, self._parser, self._has_logprobs = tokenizer, parser, has_logprobs
        self._waiting: deque[tuple[int, TokenLogprob]] = deque()  # of tokens that have not been sent, with their place
        self._known = 0  # bytes of all tokens so far
        self._shown = 0  # bytes of all text so far: what may be the beginning of a stop text is held back

    def opening(self) -> list[Part]:
        """Return the part that names the role."""
        return [self._part({"role": "assistant", "content": ""}, [])]

    def parts(self, update: Update) -> Iterator[Part]:
        """Yield the deltas of an update, and the reason at the end."""
        for delta, logprobs in self.deltas(update):
            yield self._part(delta, logprobs)
        if update.generation:
            yield {**self._part({}, []), "finish_reason": self.reason(update.generation)}

    def whole(self, update: Update) -> Part:
        """Return the fold of all deltas: the same answer as streamed."""
        assert update.generation
        message, logprobs = fold(self.deltas(update))
        shown = {"content": logprobs, "refusal": None} if self._has_logprobs else None
        return {"message": message, "logprobs": shown, "finish_reason": self.reason(update.generation)}

    def reason(self, generation: Generation) -> str:
        """Return OpenAI's word for the end."""
        reason = reason_of(generation)
        return "tool_calls" if reason == "stop" and self._parser and self._parser.has_calls else reason

    def deltas(self, update: Update) -> Iterator[tuple[Delta, list[dict[str, Any]]]]:
        """Yield deltas with the log-probabilities of their tokens, which join to the content.

        So neither the end token nor those of a stop text are among them.
        """
        if self._parser:
            pieces = self._parser.add(update.text) if update.text else []
            pieces += self._parser.finish() if update.generation else []
        else:
            pieces = [{"content": update.text}] if update.text else []
        logprobs = self._shown_logprobs(update)
        if logprobs and not pieces:  # the parser holds the text back
            pieces = [{"content": ""}]
        for delta in pieces:
            yield delta, logprobs
            logprobs = []

    def _shown_logprobs(self, update: Update) -> list[dict[str, Any]]:
        """Return the entries of the tokens that begin in the text so far."""
        for score in update.logprobs:
            self._waiting.append((self._known, score))
            self._known += len(self._tokenizer.token_bytes(score.token))
        self._shown += len(update.text.encode("utf-8", "replace"))
        entries = []
        while self._waiting and self._waiting[0][0] < self._shown:
            entries.append(chat_entry(self._waiting.popleft()[1], self._tokenizer))
        return entries

    def _part(self, delta: Delta, logprobs: list[Any]) -> Part:
        shown = {"content": logprobs, "refusal": None} if self._has_logprobs and logprobs else None
        return {"delta": delta, "logprobs": shown, "finish_reason": None}


def fold(deltas: Iterable[tuple[Delta, list[dict[str, Any]]]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the message that deltas add up to, and all log-probabilities."""
    content, calls, logprobs = [], {}, []
    for delta, scores in deltas:
        logprobs += scores
        if delta.get("content"):
            content.append(delta["content"])
        for part in delta.get("tool_calls", []):
            call = calls.setdefault(part["index"], {"id": "", "type": "function", "function": {}})
            call["id"] = part.get("id", call["id"])
            for name, value in part["function"].items():
                call["function"][name] = call["function"].get(name, "") + value
    message: dict[str, Any] = {"role": "assistant", "content": "".join(content), "refusal": None}
    if calls:
        message["content"] = message["content"] or None
        message["tool_calls"] = [calls[index] for index in sorted(calls)]
    return message, logprobs

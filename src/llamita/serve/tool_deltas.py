"""Turns what the parser of calls finds into the deltas of OpenAI's chat form."""

from llamita.serve.chat_writer import Delta
from llamita.serve.tool_calls import CallArguments, CallBegin, CallParser, Content


class ToolDeltas:
    """Finds calls of functions in one answer.

    Args:
        names: the functions that may be called.

    Attributes:
        has_calls: a call has come.
    """

    def __init__(self, names: frozenset[str]) -> None:
        self.has_calls = False
        self._parser = CallParser(names)

    def add(self, text: str) -> list[Delta]:
        """Add text; return what is sure by now."""
        return [self._delta(event) for event in self._parser.add(text)]

    def finish(self) -> list[Delta]:
        """Return the rest; no more text comes."""
        return [self._delta(event) for event in self._parser.finish()]

    def _delta(self, event: Content | CallBegin | CallArguments) -> Delta:
        if isinstance(event, Content):
            return {"content": event.text}
        self.has_calls = True
        if isinstance(event, CallBegin):
            function = {"name": event.name, "arguments": ""}
            return {"tool_calls": [{"index": event.index, "id": event.id, "type": "function", "function": function}]}
        return {"tool_calls": [{"index": event.index, "function": {"arguments": event.text}}]}

"""Turns what the parser of calls finds into the deltas of OpenAI's chat form."""

from llamita.serve.chat_writer import Delta
from llamita.serve.tool_calls import CallBegin, Content, Event, ToolCallParser
from llamita.serve.tools import CallForm, ToolChoice


class ToolDeltas:
    """Finds calls of functions in one answer.

    Args:
        tools: the functions that may be called, or must be.
        form: how a grammar has the calls written where a response format holds beside them.
    """

    def __init__(self, tools: ToolChoice, form: CallForm | None = None) -> None:
        self._parser = ToolCallParser(tools.tools, is_sure=tools.mode == "required", form=form)
        self._only_first = not tools.parallel

    @property
    def has_calls(self) -> bool:
        """A call has begun."""
        return self._parser.has_calls

    def add(self, text: str) -> list[Delta]:
        """Add text; return what is sure by now."""
        return self._deltas(self._parser.add(text))

    def finish(self) -> list[Delta]:
        """Return the rest; no more text comes."""
        return self._deltas(self._parser.finish())

    def _deltas(self, events: list[Event]) -> list[Delta]:
        return [self._delta(e) for e in events if isinstance(e, Content) or not (self._only_first and e.index)]

    def _delta(self, event: Event) -> Delta:
        if isinstance(event, Content):
            return {"content": event.text}
        if isinstance(event, CallBegin):
            function = {"name": event.name, "arguments": ""}
            return {"tool_calls": [{"index": event.index, "id": event.id, "type": "function", "function": function}]}
        return {"tool_calls": [{"index": event.index, "function": {"arguments": event.text}}]}

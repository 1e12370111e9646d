"""Finds calls of tools in an answer while it is written, in every form that Llama, Hermes, Qwen and SmolLM3 use.

One parser for answers at once and in pieces: whatever the pieces, the events add up to the same. Text is held back
while it may be a call, and what turns out to be none is content, letter for letter. Nothing is ever taken back.
"""

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llamita.serve.call_syntax import BracketScan, read_json_call, read_python_calls
from llamita.serve.tools import CallForm

_PYTHON_TAG, _TOOL_CALL = "<|python_tag|>", "<tool_call>"
_MARKERS = (_TOOL_CALL, _PYTHON_TAG)
_KEYS = ("name", "type", "function", "parameters", "arguments", "id")  # a call's first key is one of these
_FENCE = re.compile(r"```\w*\s+")
_FENCE_BEGUN = re.compile(r"`{1,2}|```\w{0,16}")
_KEY = re.compile(r'\{\s*"(\w+)"')
_KEY_BEGUN = re.compile(r'\{\s*("\w{0,16})?')
_JSON_NAME = re.compile(r'\{\s*"name"\s*:\s*"([\w-]{1,64})"')
_JSON_HEAD = re.compile(r'\{\s*"name"\s*:\s*"([\w-]{1,64})"\s*,\s*"(?:parameters|arguments)"\s*:\s*(?=\{)')
_LONGEST_HEAD = 256  # characters before the arguments of a call in the form of a grammar
_SPACE = re.compile("(?<=[,:]) ")  # which that form may leave out
_PYTHON_HEAD = re.compile(r"\[?\s*([A-Za-z_]\w{0,63})(?:\.call)?\s*\(")
_PYTHON_BEGUN = re.compile(r"\[?\s*([A-Za-z_]\w{0,63}(\.(c(a(ll?)?)?)?)?\s*)?")


@dataclass(frozen=True)
class Content:
    """Text that is no call."""

    text: str


@dataclass(frozen=True)
class CallBegin:
    """A call begins; calls are counted from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    """A piece of the arguments of a call, a JSON object in all; never empty."""

    index: int
    text: str


Event = Content | CallBegin | CallArguments


class ToolCallParser:
    """Turns the text of one answer into events.

    Args:
        tools: the tools of the request, checked; calls of others are content.
        is_sure: a grammar holds the answer to calls, so that arguments are passed on as they come. Otherwise a call is
            passed on when it is complete and right.
        form: that of the calls of a grammar which lets the answer be either calls or JSON of another kind, which may
            look like a call in another form. So no other is one.

    Attributes:
        has_calls: a call has begun.
    """

    def __init__(
        self, tools: Sequence[Mapping[str, Any]], *, is_sure: bool = False, form: CallForm | None = None
    ) -> None:
        self._tools = {tool["function"]["name"]: _parameters(tool) for tool in tools}
        self._is_sure = is_sure
        self._form = form
        self._mode = self._formed if form else self._open
        self._held = ""  # neither content nor a call yet
        self._first = 0  # where in it the call begins that is being read
        self._seen = 0  # how far the scan has come
        self._scan = BracketScan("")
        self._is_likely = False  # the beginning of what is being read is that of a call
        self._closes: list[str] = []  # what has to close the block, from the inside
        self._is_after = False  # a block has ended: white space is no content
        self._count = 0
        self._events: list[Event] = []

    @property
    def has_calls(self) -> bool:
        """A call has begun."""
        return self._count > 0

    def add(self, text: str) -> list[Event]:
        """Add text; return what is sure by now."""
        self._held += text
        return self._run(final=False)

    def finish(self) -> list[Event]:
        """Return the rest; no more text comes. Where a grammar holds, what begins after a call is one, cut off."""
        if self._count and (self._is_sure or self._form) and (self._is_after or self._mode != self._text):
            self._held = ""
        return self._run(final=True)

    # Each mode is a method that returns whether it got further; without more text it may not.

    def _run(self, final: bool) -> list[Event]:
        while self._held and self._mode(final):
            pass
        events, self._events = self._events, []
        return events

    def _text(self, final: bool) -> bool:
        """Pass text on up to a marker."""
        if self._is_after:
            stripped = self._held.lstrip()
            if not stripped:
                self._held = "" if final else self._held
                return False
            if not final and any(marker.startswith(stripped) for marker in _MARKERS):
                return False
            self._held = stripped if stripped.startswith(_MARKERS) else self._held
            self._is_after = False
        places = [place for marker in _MARKERS if (place := self._held.find(marker)) >= 0]
        end = min(places) if places else len(self._held) - (0 if final else _open_length(self._held))
        self._say(end)
        if not places:
            return False
        self._seen, self._closes, self._mode = 0, [], self._open
        return True

    def _open(self, final: bool) -> bool:
        """Look at what a block begins with: the answer itself, or what follows a marker."""
        marker = next((marker for marker in _MARKERS if self._held.startswith(marker)), "")
        if marker == _TOOL_CALL and not self._closes:
            self._closes = ["</tool_call>"]
        self._seen = max(self._seen, len(marker))
        rest = self._held[self._seen :].lstrip()
        first = len(self._held) - len(rest)
        if not rest:
            return self._refuse() if final else False
        if rest[0] == "{":
            return self._begin(first, self._json, '"')
        if rest[0] == "`" and not self._closes and marker != _TOOL_CALL:
            if fence := _FENCE.match(rest):
                self._seen, self._closes = first + fence.end(), ["```"]
                return True
            return False if not final and _FENCE_BEGUN.fullmatch(rest) else self._refuse()
        if rest[0] == "[":
            inner = rest[1:].lstrip()
            if not inner:
                return self._refuse() if final else False
            if inner[0] == "{":
                self._closes = ["]", *self._closes]
                return self._begin(len(self._held) - len(inner), self._json, '"')
            return self._begin(first, self._python, "\"'")
        return self._begin(first, self._python, "\"'") if marker == _PYTHON_TAG else self._refuse()

    def _formed(self, final: bool) -> bool:
        """Look at whether the answer begins as a call in the form of the grammar."""
        assert self._form
        heads = [_SPACE.sub("", self._form.begin(name)) + "{" for name in self._tools]
        begun = _SPACE.sub("", self._held[:_LONGEST_HEAD])
        if begun.startswith(tuple(heads)):
            closing = self._form.end[1:].strip()
            self._closes = [closing] if closing else []
            self._begin(self._held.index("{"), self._json, '"')
            self._is_likely = True
            return True
        return False if not final and any(head.startswith(begun) for head in heads) else self._refuse()

    def _answer(self, _final: bool) -> bool:
        """Pass all on: it is no call."""
        self._say(len(self._held))
        return False

    def _begin(self, first: int, mode: Any, quotes: str) -> bool:
        self._first = self._seen = first
        self._mode, self._scan, self._is_likely = mode, BracketScan(quotes), False
        return True

    def _json(self, final: bool) -> bool:
        """Read an object to its end."""
        if self._is_sure and (head := _JSON_HEAD.match(self._held, self._first)) and head[1] in self._tools:
            self._call(head[1])
            self._drop(head.end())
            self._scan, self._mode = BracketScan('"'), self._arguments
            return True
        if not self._is_likely and not self._looks_like_json_call():
            return False if not final and self._may_begin(_KEY_BEGUN) else self._refuse()
        end = self._scan.feed(self._held, self._seen)
        self._seen = len(self._held)
        if end is None:
            return self._refuse() if final else False
        call = read_json_call(self._held[self._first : end], self._tools, is_bare=self._form is not None)
        return self._complete([call], end) if call else self._refuse()

    def _python(self, final: bool) -> bool:
        """Read a list of calls in Python, or one call, to its end."""
        if not self._is_likely:
            head = _PYTHON_HEAD.match(self._held, self._first)
            if head is None and not final and self._may_begin(_PYTHON_BEGUN):
                return False
            if head is None or head[1] not in self._tools:
                return self._refuse()
            self._is_likely = True
        end = self._scan.feed(self._held, self._seen)
        self._seen = len(self._held)
        if end is None:
            return self._refuse() if final else False
        calls = read_python_calls(self._held[self._first : end], self._tools)
        return self._complete(calls, end) if calls else self._refuse()

    def _arguments(self, _final: bool) -> bool:
        """Pass the arguments of a sure call on, up to their end."""
        end = self._scan.feed(self._held, 0)
        self._events.append(CallArguments(self._count - 1, self._held[:end]))
        self._drop(len(self._held) if end is None else end)
        if end is not None:
            self._closes, self._mode = ["}", *self._closes], self._between
        return end is not None

    def _between(self, final: bool) -> bool:
        """After a call: what closes the block, or a separator and another call."""
        rest = self._held.lstrip()
        if not rest or rest in ";,":
            self._held = "" if final else self._held
            return False
        if self._closes and rest.startswith(self._closes[0]):
            self._drop(len(self._held) - len(rest) + len(self._closes.pop(0)))
            return True
        if self._closes and not final and self._closes[0].startswith(rest):
            return False
        inner = rest[1:].lstrip() if rest[0] in ";," else rest
        if not inner:
            self._held = "" if final else self._held
            return False
        if inner[0] == "{":
            return self._begin(len(self._held) - len(inner), self._json, '"')
        if inner.startswith(_MARKERS):
            self._drop(len(self._held) - len(inner))
        elif not final and any(marker.startswith(inner) for marker in _MARKERS):
            return False
        self._mode, self._is_after = self._text, True
        return True

    def _looks_like_json_call(self) -> bool:
        key = _KEY.match(self._held, self._first)
        if key is None or key[1] not in _KEYS:
            return False
        if key[1] != "name":
            self._is_likely = True
        elif name := _JSON_NAME.match(self._held, self._first):
            self._is_likely = name[1] in self._tools
        return self._is_likely

    def _may_begin(self, begun: re.Pattern[str]) -> bool:
        """Return whether more text may make the beginning of a call of what is held."""
        if begun.fullmatch(self._held, self._first):
            return True
        key = _KEY.match(self._held, self._first)  # then the name is open
        return bool(key) and key[1] == "name" and bool(_NAME_BEGUN.fullmatch(self._held, self._first))

    def _complete(self, calls: Sequence[tuple[str, str]], end: int) -> bool:
        for name, arguments in calls:
            self._call(name)
            self._events.append(CallArguments(self._count - 1, arguments))
        self._drop(end)
        self._mode = self._between
        return True

    def _call(self, name: str) -> None:
        self._events.append(CallBegin(self._count, f"call_{secrets.token_hex(12)}", name))
        self._count += 1

    def _drop(self, end: int) -> None:
        self._held, self._seen = self._held[end:], 0

    def _refuse(self) -> bool:
        """What is held is no call: the marker that it may begin with is text, and what follows is looked at again."""
        if self._form and not self._count:
            self._mode = self._answer
            return True
        marker = next((marker for marker in _MARKERS if self._held.startswith(marker)), "")
        self._mode = self._text
        self._say(len(marker))
        return True

    def _say(self, end: int) -> None:
        if end:
            self._events.append(Content(self._held[:end]))
            self._drop(end)


_NAME_BEGUN = re.compile(r'\{\s*"name"\s*(:\s*("[\w-]{0,64})?)?')


def _parameters(tool: Mapping[str, Any]) -> list[str]:
    """Return the names of a tool's parameters, in order."""
    properties = (tool["function"].get("parameters") or {}).get("properties")
    return list(properties) if isinstance(properties, Mapping) else []


def _open_length(text: str) -> int:
    """Return the length of the longest end of a text that a marker begins with."""
    longest = min(len(text), max(map(len, _MARKERS)) - 1)
    return next((n for n in range(longest, 0, -1) if any(m.startswith(text[-n:]) for m in _MARKERS)), 0)

"""Reads single calls of tools: JSON objects, and calls as Python writes them, with literals alone as arguments."""

import ast
import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

_CONSTANTS = {"true": True, "false": False, "null": None}  # JSON's, which models mix in
_LONGEST_PYTHON = 1 << 16  # characters
_DEEPEST_PYTHON = 50  # brackets


class BracketScan:
    """Finds where a value in brackets ends, in text that comes in pieces.

    Args:
        quotes: the characters that begin and end a text.

    Attributes:
        deepest: the most brackets that were open together.
    """

    def __init__(self, quotes: str) -> None:
        self.deepest = 0
        self._quotes = quotes
        self._depth = 0
        self._quote = ""  # that of the text that is open
        self._is_escaped = False

    def feed(self, text: str, start: int) -> int | None:
        """Go on at `start`; return the place after the closing bracket, None if it has not come."""
        for place in range(start, len(text)):
            character = text[place]
            if self._quote:
                if self._is_escaped:
                    self._is_escaped = False
                elif character == "\\":
                    self._is_escaped = True
                elif character == self._quote:
                    self._quote = ""
            elif character in self._quotes:
                self._quote = character
            elif character in "{[(":
                self._depth += 1
                self.deepest = max(self.deepest, self._depth)
            elif character in "}])":
                self._depth -= 1
                if self._depth <= 0:
                    return place + 1
        return None


def read_json_call(text: str, tools: Mapping[str, Sequence[str]], is_bare: bool = False) -> tuple[str, str] | None:
    """Return the name and the arguments, as JSON, of a call of one of the tools; None if it is none.

    A bare one has its name and its arguments alone.

    The forms are {"name": …, "parameters" or "arguments": {…}}, also with "type", and {"function": {…}} around that.
    """
    try:
        call = json.loads(text, parse_constant=_no_constant)
        if is_bare and len(call) != 2:
            return None
        if isinstance(inner := call.get("function"), dict):
            call = inner
        name = call.get("name", call.get("function"))
        arguments = call.get("parameters", call.get("arguments"))
        if isinstance(arguments, str):
            arguments = json.loads(arguments or "{}", parse_constant=_no_constant)
        return _written(name, {} if arguments is None else arguments, tools)
    except (ValueError, RecursionError):
        return None


def read_python_calls(text: str, tools: Mapping[str, Sequence[str]]) -> list[tuple[str, str]] | None:
    """Return the calls of `[f(a=1), g("x")]`, `f(a=1)` or `f.call(a=1)`; None unless all are calls of the tools.

    Arguments without a name get those of the tool's parameters, in order.
    """
    scan = BracketScan("\"'")
    scan.feed(text, 0)
    if len(text) > _LONGEST_PYTHON or scan.deepest > _DEEPEST_PYTHON:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of doubtful escapes
            body = ast.parse(text.strip(), mode="eval").body
        nodes = body.elts if isinstance(body, ast.List) else [body]
        calls = [_python_call(node, tools) for node in nodes]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return [call for call in calls if call] if calls and all(calls) else None


def _python_call(node: ast.expr, tools: Mapping[str, Sequence[str]]) -> tuple[str, str] | None:
    if not isinstance(node, ast.Call):
        return None
    function = node.func
    if isinstance(function, ast.Attribute) and function.attr == "call":
        function = function.value
    if not isinstance(function, ast.Name):
        return None
    places = tools.get(function.id, ())
    names = [keyword.arg for keyword in node.keywords]
    if len(node.args) > len(places) or None in names or set(names) & set(places[: len(node.args)]):
        return None
    values = [*node.args, *(keyword.value for keyword in node.keywords)]
    arguments = dict(zip([*places[: len(node.args)], *names], map(_literal, values), strict=True))
    return _written(function.id, arguments, tools)


def _literal(node: ast.expr) -> Any:
    """Return the value of a literal that JSON has, too; raise ValueError for another."""
    if isinstance(node, ast.Constant) and (node.value is None or isinstance(node.value, str | int | float)):
        return node.value
    if isinstance(node, ast.Name) and node.id in _CONSTANTS:
        return _CONSTANTS[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _literal(node.operand)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(part) for part in node.elts]
    if isinstance(node, ast.Dict):
        keys = [_literal(key) if key else None for key in node.keys]
        if all(isinstance(key, str) for key in keys):
            return dict(zip(keys, map(_literal, node.values), strict=True))
    raise ValueError("no literal")


def _written(name: object, arguments: object, tools: Mapping[str, Sequence[str]]) -> tuple[str, str] | None:
    """Return the name and the arguments as JSON, in Unicode unless that has stray surrogates."""
    if not isinstance(name, str) or name not in tools or not isinstance(arguments, dict):
        return None
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(arguments)
    return name, text


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")

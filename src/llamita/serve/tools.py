"""Checks the tools and the choice among them of a request in OpenAI's form, and knows how a model writes a call."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llamita.errors import InputError, shown

MOST_TOOLS = 128
LARGEST_TOOLS = 64 * 1024  # bytes of all tools
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True)
class CallForm:
    """How the models of a kind write a call.

    Attributes:
        head: what comes before the tool's name.
        middle: what comes between that and the arguments, an object in JSON.
        end: what comes after them.
        between: what comes between two calls; "" where there is only one.
    """

    head: str
    middle: str
    end: str
    between: str

    def begin(self, name: str) -> str:
        """Return what comes before the arguments of a tool."""
        return f"{self.head}{name}{self.middle}"


LLAMA = CallForm('{"name": "', '", "parameters": ', "}", "; ")  # Llama 3.1, 3.2
HERMES = CallForm('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>", "\n")  # Hermes, Qwen, SmolLM3


def call_form(template: str) -> CallForm:
    """Return how a model writes calls, by its chat template."""
    return HERMES if "<tool_call>" in template else LLAMA


@dataclass(frozen=True)
class ToolChoice:
    """The tools of a request, and which of them the answer calls.

    Attributes:
        tools: those that the model sees; none if it may not call any.
        mode: "none", "auto" or "required".
        name: the tool that has to be called, if it is named.
        parallel: whether one answer may hold several calls.
        has_format: whether a response format holds for an answer that calls none.
    """

    tools: tuple[Mapping[str, Any], ...]
    mode: str
    name: str | None
    parallel: bool
    has_format: bool = False

    @property
    def names(self) -> frozenset[str]:
        """The names of the tools."""
        return frozenset(tool["function"]["name"] for tool in self.tools)


def check_tools(tools: object, choice: object = None, parallel: object = None) -> ToolChoice:
    """Return the checked `tools`, `tool_choice` and `parallel_tool_calls` of a request; each may be None.

    Raises:
        InputError: one is not OpenAI's, or beyond a limit.
    """
    checked = _check_list(tools)
    names = [tool["function"]["name"] for tool in checked]
    if parallel is not None and not isinstance(parallel, bool):
        raise InputError("parallel_tool_calls", "true or false", shown(parallel))
    name, mode = None, "auto" if choice is None else choice
    if isinstance(choice, Mapping):
        function = choice.get("function", choice)  # Responses has the name outside
        name = function.get("name") if isinstance(function, Mapping) and choice.get("type") == "function" else None
        if not isinstance(name, str) or name not in names:
            raise InputError("tool_choice", "the name of one of the tools", shown(choice))
        mode = "required"
    elif not isinstance(mode, str) or mode not in ("none", "auto", "required"):
        raise InputError("tool_choice", "none, auto, required or a function", shown(choice))
    if mode == "required" and not checked:
        raise InputError("tool_choice", "tools to choose from", "none")
    if mode == "none" or not checked:
        return ToolChoice((), "none", None, False)
    return ToolChoice(tuple(checked), mode, name, parallel is not False)


def _check_list(tools: object) -> list[Mapping[str, Any]]:
    if tools is None:
        return []
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise InputError("tools", "a list", shown(tools))
    if len(tools) > MOST_TOOLS:
        raise InputError("tools", f"at most {MOST_TOOLS}", f"{len(tools)}")
    names = set()
    for place, tool in enumerate(tools):
        name = _check_tool(f"tools[{place}]", tool)
        if name in names:
            raise InputError(f"tools[{place}].function.name", "another name than those before", shown(name))
        names.add(name)
    try:
        size = len(json.dumps(tools))
    except (TypeError, ValueError, RecursionError):
        raise InputError("tools", "values that JSON has", shown(tools)) from None
    if size > LARGEST_TOOLS:
        raise InputError("tools", f"at most {LARGEST_TOOLS} bytes together", f"{size}")
    return list(tools)


def _check_tool(where: str, tool: object) -> str:
    """Return the name of a tool."""
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(tool, Mapping) or tool.get("type") != "function" or not isinstance(function, Mapping):
        raise InputError(where, 'an object of type "function"', shown(tool))
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InputError(f"{where}.function.name", "1 to 64 letters, digits, _ and -", shown(name))
    if parameters is not None and (not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object"):
        raise InputError(f"{where}.function.parameters", "a JSON schema of an object", shown(parameters))
    if not isinstance(function.get("description"), str | None):
        raise InputError(f"{where}.function.description", "a text", shown(function["description"]))
    return name

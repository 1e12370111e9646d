"""Checks the messages of a conversation in OpenAI's form, and puts them into the form that chat templates expect."""

import json
from collections.abc import Sequence
from typing import Any

from llamita.errors import InputError, shown

# {"role": str, "content": str or [{"type": "text", "text": str}, …]}; an assistant's may have "tool_calls".
Message = dict[str, Any]
_ROLES = {"developer": "system", "function": "tool"}  # OpenAI's newer and older names for what templates know
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}  # by type: the key


def plain_messages(messages: Sequence[Message]) -> list[Message]:
    """Return copies of messages as templates of text models expect them.

    Each content is one text, "" next to calls of tools. The arguments of calls are objects, as templates write them as
    JSON themselves. What is null is left out.

    Raises:
        InputError: a message is not a role with a text, or a call is not OpenAI's.
    """
    return [_plain(f"messages[{place}]", message) for place, message in enumerate(messages)]


def has_parallel_calls(messages: Sequence[Message]) -> bool:
    """Return whether an assistant's turn calls more than one tool."""
    return any(len(message.get("tool_calls", ())) > 1 for message in messages)


def unroll_calls(messages: Sequence[Message]) -> list[Message]:
    """Return the conversation with one call a turn: call, result, call, result, for templates that know no other.

    Results are paired with calls by their `tool_call_id`, or else by their order.

    Raises:
        InputError: the results that follow several calls are not one for each.
    """
    unrolled, place = [], 0
    while place < len(messages):
        message = messages[place]
        place += 1
        calls = message.get("tool_calls", [])
        if len(calls) < 2:
            unrolled.append(message)
            continue
        results = []
        while place < len(messages) and messages[place]["role"] in ("tool", "ipython"):
            results.append(messages[place])
            place += 1
        if len(results) != len(calls):
            raise InputError("messages", f"a result for each of {len(calls)} tool calls", f"{len(results)}")
        by_id = {str(result.get("tool_call_id")): result for result in results}
        if all(str(call.get("id")) in by_id for call in calls) and len(by_id) == len(calls):
            results = [by_id[str(call.get("id"))] for call in calls]
        for number, (call, result) in enumerate(zip(calls, results, strict=True)):
            content = message["content"] if number == 0 else ""
            unrolled += [{**message, "content": content, "tool_calls": [call]}, result]
    return unrolled


def _plain(where: str, message: Message) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise InputError(where, "an object with a role and a content", shown(message))
    message = {key: value for key, value in message.items() if value is not None}
    calls = message.pop("tool_calls", None)
    role = _ROLES.get(message["role"], message["role"])
    content = message.get("content", "" if calls else None)
    plain = {**message, "role": role, "content": _text(f"{where}.content", content)}
    if calls:
        if not isinstance(calls, list):
            raise InputError(f"{where}.tool_calls", "a list", shown(calls))
        plain["tool_calls"] = [_call(f"{where}.tool_calls[{i}]", call) for i, call in enumerate(calls)]
    return plain


def _text(where: str, content: object) -> str:
    """Return a content as one text."""
    if isinstance(content, list):
        return "".join(_part(f"{where}[{place}]", part) for place, part in enumerate(content))
    if not isinstance(content, str):
        raise InputError(where, "a text", shown(content))
    return content


def _part(where: str, part: object) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    key = _TEXT_PARTS.get(kind) if isinstance(kind, str) else None
    text = part.get(key) if isinstance(part, dict) and key else None
    if not isinstance(text, str):
        raise InputError(where, "a part of type text", shown(part if kind is None else kind))
    return text


def _call(where: str, call: object) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InputError(where, "a call of a function with a name", shown(call))
    arguments = function.get("arguments")
    try:
        decoded = json.loads(arguments or "{}") if isinstance(arguments, str | None) else arguments
    except (ValueError, RecursionError):
        decoded = None
    if not isinstance(decoded, dict):
        raise InputError(f"{where}.function.arguments", "a JSON object, as text", shown(arguments))
    return {**call, "type": "function", "function": {**function, "arguments": decoded}}

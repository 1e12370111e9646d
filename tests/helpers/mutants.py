"""Bodies of requests that are nearly right: valid ones with one to four places changed, each made from its number."""

import copy
import json
import random
from collections.abc import Callable
from typing import Any

from llamita.serve import tables

_TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks",
        "parameters": {"type": "object", "properties": {"at": {"type": "string"}}, "required": ["at"]},
    },
}
_CALL = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"at": "it"}'}}
_SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": [1, 2]}, "b": {"type": "array", "items": {"$ref": "#/$defs/c"}, "maxItems": 2}},
    "required": ["a"],
    "$defs": {"c": {"anyOf": [{"type": "string", "pattern": "^[a-c]+$", "maxLength": 3}, {"type": "null"}]}},
}
_USER = {"role": "user", "content": "Once upon a time"}
_HISTORY = [
    {"role": "developer", "content": [{"type": "text", "text": "Be kind."}]},
    _USER,
    {"role": "assistant", "content": None, "tool_calls": [_CALL, {**_CALL, "id": "call_2"}]},
    {"role": "tool", "tool_call_id": "call_1", "content": "here"},
    {"role": "tool", "tool_call_id": "call_2", "content": [{"type": "text", "text": "there"}]},
]
_FORMAT = {"type": "json_schema", "json_schema": {"name": "s", "strict": True, "schema": _SCHEMA}}
_FEW = {"max_tokens": 2}
_ITEM = {"type": "function_call", "call_id": "1", "name": "look", "arguments": "{}"}
_INPUT = [
    {"role": "user", "content": [{"type": "input_text", "text": "Hello"}]},
    _ITEM,
    {"type": "function_call_output", "call_id": "1", "output": "x"},
    {"type": "reasoning", "summary": []},
]
_CHAT, _COMPLETIONS, _RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
# Every endpoint that takes a body, with bodies that reach its parts.
BODIES: list[tuple[str, dict[str, Any]]] = [
    (_CHAT, {"model": "embedded", "messages": [_USER], **_FEW, "temperature": 0.5, "top_p": 0.9, "seed": 1}),
    (_CHAT, {"messages": [_USER], **_FEW, "stream": True, "stream_options": {"include_usage": True}, "n": 2}),
    (_CHAT, {"messages": [_USER], **_FEW, "logprobs": True, "top_logprobs": 3, "logit_bias": {"5": -100}}),
    (_CHAT, {"messages": [_USER], "max_completion_tokens": 3, "stop": ["a", "\n"], "frequency_penalty": 0.5}),
    (_CHAT, {"messages": _HISTORY, **_FEW, "tools": [_TOOL], "tool_choice": "auto", "parallel_tool_calls": False}),
    (_CHAT, {"messages": [_USER], **_FEW, "tools": [_TOOL], "tool_choice": {"type": "function", "function": {"name": "look"}}}),
    (_CHAT, {"messages": [_USER], **_FEW, "response_format": _FORMAT}),
    (_CHAT, {"messages": [_USER], **_FEW, "guided_regex": "[ab]{2}(c|d)*", "min_tokens": 1, "ignore_eos": False}),
    (_CHAT, {"messages": [_USER], **_FEW, "guided_grammar": 'start: "a" word\nword: /[b-d]+/'}),
    (_CHAT, {"messages": [_USER, {"role": "assistant", "content": "The"}], **_FEW, "continue_final_message": True,
             "chat_template_kwargs": {"enable_thinking": False, "date_string": "1 May"}}),
    (_CHAT + "/input_tokens", {"messages": _HISTORY, "tools": [_TOOL]}),
    (_COMPLETIONS, {"prompt": "Once", **_FEW, "echo": True, "logprobs": 2, "min_p": 0.1, "top_k": 5, "n": 2}),
    (_COMPLETIONS, {"prompt": [[5, 6, 7], [8, 9]], **_FEW, "repetition_penalty": 1.1, "presence_penalty": -1}),
    (_COMPLETIONS, {"prompt": ["One", "Two"], **_FEW, "stream": True, "suffix": "", "best_of": 1}),
    (_RESPONSES, {"input": _INPUT, "instructions": "Be kind.", "max_output_tokens": 2, "metadata": {"a": "b"}}),
    (_RESPONSES, {"input": "Hello", "max_output_tokens": 2, "stream": True, "tools": [{"type": "function", "name": "look",
                  "parameters": {"type": "object"}}], "tool_choice": {"type": "function", "name": "look"}}),
    (_RESPONSES, {"input": "Hello", "max_output_tokens": 2, "top_logprobs": 2,
                  "text": {"format": {"type": "json_schema", "name": "s", "schema": _SCHEMA}}}),
    ("/v1/embeddings", {"input": ["One", "Two"], "model": "embedded", "encoding_format": "base64"}),
    ("/v1/adapters", {"name": "poet", "model": "embedded"}),
    ("/tokenize", {"prompt": "Once", "add_special_tokens": True, "return_token_strs": True}),
    ("/tokenize", {"messages": [_USER], "tools": [_TOOL]}),
    ("/detokenize", {"tokens": [5, 6, 7]}),
]  # fmt: skip


def _deep(depth: int) -> Callable[[], Any]:
    def make() -> Any:
        value: Any = []
        for level in range(depth):
            value = [value] if level % 2 else {"a": value}
        return value

    return make


_RAW = "raw\u2063"  # marks a number that Python's writer of JSON cannot write
_ODD: list[Callable[[], Any]] = [
    *(lambda v=v: copy.deepcopy(v) for v in (
        None, True, False, 0, 1, -1, 3.0, 0.5, -0.0, 2**31, 2**63, -(2**63) - 1, 10**309, -(10**400), 1e308, 5e-324,
        _RAW + "1e400", _RAW + "-1E999", _RAW + "9" * 4300, _RAW + "9" * 5000, _RAW + "NaN", _RAW + "1e-9999",
        "", "a", " ", "\x00", "\ud800", "a\udfff\ud800b", "\U0001f999" * 3, "e\u0301\u202e\u2028", "<|end_of_text|>",
        "{{ 7 * 7 }}{% raw %}", "embedded", "embedded:none", "none", "auto", "required", "function", "json_schema",
        "\u0661", "1", "-1", "(((", "[", "\\", "a" * 3000, "\n" * 3000, [], {}, [[]], [None], [{}], {"": ""}, ["a"],
        {"type": []}, {"type": "text", "text": "x"}, {"type": "function"}, {"name": []}, [1.5], [True], [[1], ["a"]],
        {"a": {"$ref": "#"}}, {"$ref": "#/$defs/none"}, {"role": "user", "content": "x"}, _TOOL, _CALL, _SCHEMA, _FORMAT,
        list(range(300)), dict.fromkeys(map(str, range(300)), 1),
    )),
    *(_deep(depth) for depth in (20, 60, 200, 900)),
]  # fmt: skip
_TABLES = (tables.CHAT, tables.COMPLETIONS, tables.RESPONSES, tables.EMBEDDINGS, tables.TOKENIZE, tables.ADAPTER)
_FIELDS = sorted({name for table in _TABLES for name in table})
_INNER = ["type", "name", "role", "content", "text", "id", "tool_call_id", "call_id", "tool_calls", "function",
          "arguments", "parameters", "required", "properties", "patternProperties", "items", "enum", "const", "allOf",
          "anyOf", "oneOf", "not", "pattern", "format", "minimum", "maxLength", "minItems", "multipleOf", "$ref",
          "$defs", "x-guidance", "schema", "json_schema", "strict", "include_usage", "refusal", "output"]  # fmt: skip


def mutant(number: int) -> tuple[str, bytes]:
    """Return the path and the body of this number; the same each time."""
    random_ = random.Random(number)
    path, body = random_.choice(BODIES)
    value: Any = copy.deepcopy(body)
    for _ in range(random_.choice((1, 1, 2, 3, 4))):
        value = _changed(random_, value)
    data = _text(value, random_).encode("utf-8", "surrogatepass")
    if random_.random() < 0.1:
        data = _damaged(random_, data)
    return path, data


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Return every container with each of its keys."""
    found, left = [], [value] if isinstance(value, dict | list) else []
    while left:
        container = left.pop()
        keys = container.keys() if isinstance(container, dict) else range(len(container))
        for key in keys:
            found.append((container, key))
            if isinstance(container[key], dict | list):
                left.append(container[key])
    return found


def _changed(random_: random.Random, value: Any) -> Any:
    """Change one place."""
    places = _places(value)
    if not places or random_.random() < 0.01:
        return random_.choice(_ODD)()
    container, key = random_.choice(places)
    what = random_.random()
    if what < 0.45:
        container[key] = random_.choice(_ODD)()
    elif what < 0.6:
        other, place = random_.choice(places)
        container[key] = _copied(other[place])
    elif what < 0.7:
        del container[key]
    elif what < 0.75:
        container[key] = [container[key]] if random_.random() < 0.5 else {"a": container[key]}
    elif what < 0.8 and isinstance(container, list):
        container += (_copied(container) or []) * random_.choice((1, 30))
    elif isinstance(container, dict):
        name = random_.choice(_FIELDS if random_.random() < 0.5 else _INNER)
        container[name] = random_.choice(_ODD)() if random_.random() < 0.7 else _copied(container[key])
    return value


def _copied(value: Any) -> Any:
    """Return a copy; nothing of what is too deep to be copied."""
    try:
        return copy.deepcopy(value)
    except RecursionError:
        return None


def _text(value: Any, random_: random.Random) -> str:
    """Return a value as JSON; now and then a key comes twice, and surrogates are written as such."""
    if isinstance(value, str) and value.startswith(_RAW):
        return value.removeprefix(_RAW)
    try:
        text = json.dumps(value, ensure_ascii=random_.random() < 0.7)
    except RecursionError:
        text = "[" * 5000 + "]" * 5000
    if isinstance(value, dict) and value and random_.random() < 0.05:
        text = text[:-1] + f", {json.dumps(random_.choice(list(value)))}: {json.dumps(random_.choice([1, None, []]))}}}"
    for quoted in set(_quoted(text)):
        text = text.replace(quoted, json.loads(quoted).removeprefix(_RAW))
    return text


def _quoted(text: str) -> list[str]:
    """Return the texts of a JSON text that stand for raw numbers."""
    found, place = [], 0
    for mark in (json.dumps(_RAW)[:-1], '"' + _RAW):
        while (place := text.find(mark, place)) >= 0:
            found.append(text[place : text.index('"', place + 1) + 1])
            place += 1
        place = 0
    return found


def _damaged(random_: random.Random, data: bytes) -> bytes:
    place = random_.randrange(len(data) + 1)
    what = random_.randrange(4)
    if what == 0:
        return data[:place]
    if what == 1:
        return data[:place] + bytes(random_.randrange(256) for _ in range(3)) + data[place:]
    if what == 2:
        return data.decode("utf-8", "replace").encode(random_.choice(("utf-16", "utf-32", "utf-8-sig")))
    return data[:place] + data[random_.randrange(len(data) + 1) :]

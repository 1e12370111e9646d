"""Calls in every form, whole and in any pieces; what is no call stays text, letter for letter."""

import json
import time
from collections.abc import Iterable, Sequence
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llamita.serve.tool_calls import CallArguments, CallBegin, Content, Event, ToolCallParser
from llamita.serve.tools import HERMES, LLAMA, CallForm

TOOLS = [
    {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {}, "b": {}}, "type": "object"}}},
    {"type": "function", "function": {"name": "get_weather"}},
]
F1 = ("f", '{"a": 1}')
NONE = ("f", "{}")
TAG = "<|python_tag|>"
CALLS: list[tuple[str, str, list[tuple[str, str]]]] = [  # text, content, calls
    ('{"name": "f", "parameters": {"a": 1}}', "", [F1]),
    ('{"name": "f", "arguments": {"a": 1}}', "", [F1]),
    ('\n {"name":"f","parameters":{"a":1}} \n', "", [F1]),
    ('{"type": "function", "function": {"name": "f", "parameters": {"a": 1}}}', "", [F1]),
    ('{"type": "function", "name": "f", "parameters": {"a": 1}}', "", [F1]),
    ('{"function": "f", "parameters": {"a": 1}}', "", [F1]),
    ('{"parameters": {"a": 1}, "name": "f"}', "", [F1]),
    ('{"name": "f", "arguments": "{\\"a\\": 1}"}', "", [F1]),
    ('{"name": "f"}', "", [NONE]),
    ('{"name": "f", "parameters": null}', "", [NONE]),
    (TAG + '{"name": "f", "parameters": {"a": 1}}', "", [F1]),
    ('{"name": "f", "parameters": {"a": ";}{"}}; {"name": "f"}', "", [("f", '{"a": ";}{"}'), NONE]),
    (f'{TAG}{{"name": "f"}}; {TAG}{{"name": "get_weather"}}', "", [NONE, ("get_weather", "{}")]),
    ('{"name": "f"}\n{"name": "f"}', "", [NONE, NONE]),
    ('[{"name": "f"}, {"name": "f", "parameters": {"a": 1}}]', "", [NONE, F1]),
    ('```json\n{"name": "f", "parameters": {"a": 1}}\n```', "", [F1]),
    ('```\n[{"name": "f"}]\n```\nDone.', "\nDone.", [NONE]),
    ('{"name": "f", "parameters": {"a": "\\u00e9 \\"ü\\" \\\\"}}', "", [("f", '{"a": "é \\"ü\\" \\\\"}')]),
    ('{"name": "f", "parameters": {"a": "\\ud800"}}', "", [("f", '{"a": "\\ud800"}')]),
    ('[f(a=1), get_weather(city="O\'slo", x=[1, -2.5, None, {"k": True}], y=true, z=null)]', "",
     [F1, ("get_weather", '{"city": "O\'slo", "x": [1, -2.5, null, {"k": true}], "y": true, "z": null}')]),
    ("[f(1, 'x')]", "", [("f", '{"a": 1, "b": "x"}')]),
    ("[f(1, b=(2, 3))]", "", [("f", '{"a": 1, "b": [2, 3]}')]),
    (TAG + "[f(a=1)]", "", [F1]),
    (TAG + 'get_weather.call(city="x)]")', "", [("get_weather", '{"city": "x)]"}')]),
    (TAG + "f(a=1)", "", [F1]),
    ('<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', "", [F1]),
    ('Let me see.\n<tool_call>{"name": "f"}</tool_call>\n<tool_call>{"name": "f"}</tool_call>', "Let me see.\n",
     [NONE, NONE]),
    ('<tool_call>{"name": "f", "arguments": {"a": "</tool_call>"}}</tool_call>', "", [("f", '{"a": "</tool_call>"}')]),
    ('<tool_call>{"name": "f"}', "", [NONE]),
    ('<tool_call>[{"name": "f"}, {"name": "f"}]</tool_call> ok', " ok", [NONE, NONE]),
    ('{"name": "f"} and so on', " and so on", [NONE]),
    ('{"name": "f"}; {"name": "g"}', '; {"name": "g"}', [NONE]),
]  # fmt: skip
TEXTS = [  # none of which is a call
    "", " ", "Hello.", "{", '{"', '{"name": "f', '{"name": "f", "parameters": {"a": 1}',
    '{"name": "g", "parameters": {}}',
    '{"name": 5}', '{"city": "Oslo"}', '{"name": "f", "parameters": [1]}', '{"name": "f", "parameters": {"a": NaN}}',
    '{"name": "f", "parameters": {"a": 1e999}}', '{"name": "f", "parameters": {"a": }}', '{"name": "f"]',
    '{"name": "f", "arguments": "{"}', "[1, 2]", "[f]", "[f(a=g())]", "[f(a=1), g()]", "[f(1, 2, 3)]", "[f(1, a=2)]",
    "[f(**x)]", "[f(a=1j)]", "[f(a=b'x')]", "[f(a=f'{1}')]", "[f(a=1)", "[see](http://x)", "f(a=1)", "a[f(a=1)]",
    '```python\nprint(1)\n```', "``", "```json\n", '```json\n{"x": 1}\n```', "<tool_call>", "<tool_call>hm</tool_call>",
    '<tool_call>{"name": "g"}</tool_call>', "<tool_", "a <|python_tag|", TAG, TAG + "print(1)", TAG + "g.call(x=1)",
    TAG + "f.run(a=1)", TAG + "import os\nf(a=1)", "[" * 200 + "f()", "[f(a=" + "[" * 200 + "1" + "]" * 200 + ")]",
    '{"name": "f", "parameters": ' + '{"a":' * 3000 + "1" + "}" * 3000 + "}", "<tool_call><tool_call>",
    "[f(a='\\d', b=-'x')]", '{"name" "f"}', "[" + "f" * 100 + "(", '{"name": "' + "f" * 100 + '"}',
]  # fmt: skip


def events_of(parts: Iterable[str], is_sure: bool = False) -> list[Event]:
    parser = ToolCallParser(TOOLS, is_sure=is_sure)
    events = [event for part in parts for event in parser.add(part)]
    events += parser.finish()
    assert parser.has_calls == any(isinstance(event, CallBegin) for event in events)
    return events


def fold(events: Sequence[Event]) -> tuple[str, list[tuple[str, str]]]:
    """What events add up to, with their order and counts checked."""
    content, calls, ids = [], [], set()
    for event in events:
        if isinstance(event, Content):
            content.append(event.text)
        elif isinstance(event, CallBegin):
            assert event.index == len(calls)
            assert event.id.startswith("call_")
            ids.add(event.id)
            calls.append((event.name, ""))
        else:
            assert event.index == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + event.text)
        assert isinstance(event, CallBegin) or event.text
    assert len(ids) == len(calls)
    return "".join(content), calls


def splits(text: str) -> Iterable[list[str]]:
    """Letter by letter, and in two at every place."""
    yield list(text)
    for place in range(1, min(len(text), 300)):
        yield [text[:place], text[place:]]


@pytest.mark.parametrize(("text", "content", "calls"), CALLS, ids=range(len(CALLS)))
@pytest.mark.parametrize("is_sure", [False, True])
def test_calls_whole_and_in_pieces(text: str, content: str, calls: list[tuple[str, str]], is_sure: bool) -> None:
    found = fold(events_of([text], is_sure))
    decoded = [(name, json.loads(arguments)) for name, arguments in found[1]]
    assert decoded == [(name, json.loads(arguments)) for name, arguments in calls]
    assert found[0] == content
    if not is_sure:  # else the arguments are as the model wrote them
        assert found[1] == calls
    assert all(fold(events_of(parts, is_sure)) == found for parts in splits(text))


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_what_is_no_call_is_text(text: str) -> None:
    assert fold(events_of([text])) == (text, [])
    assert all(fold(events_of(parts)) == (text, []) for parts in splits(text))


def test_text_is_passed_on_at_once_and_calls_as_soon_as_they_are_sure() -> None:
    parser = ToolCallParser(TOOLS)
    assert parser.add("Hello") == [Content("Hello")]
    assert parser.add(" you <") == [Content(" you ")]
    assert parser.add("3") == [Content("<3")]
    assert ToolCallParser(TOOLS).add('{"city"') == [Content('{"city"')]
    assert ToolCallParser(TOOLS).add("[see") == []
    assert ToolCallParser(TOOLS).add("[see]") == [Content("[see]")]
    parser = ToolCallParser(TOOLS)
    assert parser.add('{"name": "f", "parameters": {"a"') == []
    begin, arguments = parser.add(": 1}}")
    assert isinstance(begin, CallBegin)
    assert arguments == CallArguments(0, '{"a": 1}')


LOOSE = ['{"name":"f","note":"hello"}', '{"name": "f"}', '{"name": "f", "parameters": {"a": 1}, "note": 1}',
         '{"name": "f", "parameters": null}', '{"parameters": {}, "name": "f"}', '{"x": "<|python_tag|>f(a=1)"}',
         '{"type": "function", "name": "f", "parameters": {}}', '{"name": "f", "parameters": {"a": 1}']  # fmt: skip


@pytest.mark.parametrize(("form", "other"), [(LLAMA, HERMES), (HERMES, LLAMA)])
def test_beside_a_format_only_calls_in_the_form_of_the_grammar_are_calls(form: CallForm, other: CallForm) -> None:
    def found(parts: Iterable[str]) -> tuple[str, list[tuple[str, str]]]:
        parser = ToolCallParser(TOOLS, form=form)
        return fold([event for part in parts for event in parser.add(part)] + parser.finish())

    call = form.begin("f") + '{"a": 1}' + form.end
    for text in (call, call.replace(": ", ":").replace(", ", ",")):
        assert found([text]) == found(text) == ("", [F1])
    assert found(call + form.between + call) == ("", [F1, F1])
    for text in [*LOOSE, other.begin("f") + "{}" + other.end]:
        assert found([text]) == found(text) == (text, [])


@pytest.mark.parametrize("form", [LLAMA, HERMES])
@pytest.mark.parametrize("is_sure", [False, True])
def test_a_call_that_is_cut_after_another_leaves_no_text(form: CallForm, is_sure: bool) -> None:
    call = form.begin("f") + '{"a": 1}' + form.end
    for cut in range(len(form.between + form.begin("f")) + 1):
        parser = ToolCallParser(TOOLS, is_sure=is_sure, form=None if is_sure else form)
        events = parser.add(call + (form.between + call)[:cut]) + parser.finish()
        assert fold(events)[0] == ""
    parser = ToolCallParser(TOOLS, is_sure=True)
    assert fold(parser.add(call[:-3]) + parser.finish())[0] == ""


@pytest.mark.parametrize("key", ["id", "type", "function", "parameters", "arguments"])
def test_beside_a_format_an_answer_is_streamed_as_soon_as_it_is_no_call(key: str) -> None:
    parser = ToolCallParser(TOOLS, form=LLAMA)
    assert parser.add('{"') == []
    assert parser.add(key) == [Content('{"' + key)]
    assert parser.add('": 1') == [Content('": 1')]


def test_arguments_of_sure_calls_are_passed_on_as_they_come() -> None:
    parser = ToolCallParser(TOOLS, is_sure=True)
    assert parser.add('{"name": "f", "parameters":') == []
    begin, first = parser.add(' {"a"')
    assert isinstance(begin, CallBegin)
    assert first == CallArguments(0, '{"a"')
    assert parser.add(":  1") == [CallArguments(0, ":  1")]
    assert parser.finish() == []


PIECES = st.sampled_from([
    "{", "}", "[", "]", "(", ")", '"', "'", "\\", ",", ";", ":", " ", "\n", "=", "`", "```json\n", "<", "<tool_call>",
    "</tool_call>", TAG, '"name"', '"f"', '"parameters"', '"arguments"', "f", "get_weather", ".call", "a", "1", "-",
    '{"name": "f", "parameters": ', '{"name": "f"}', "[f(a=1)]", "ü", "\ud800", "None", "*", "lambda:", "\0",
])  # fmt: skip


@settings(deadline=None, max_examples=400)
@given(st.lists(PIECES, max_size=25), st.lists(st.integers(0, 60), max_size=6), st.booleans())
@example(["<tool_call>", '{"name": "f"}', "<", "</tool_call>"], [13], False)
def test_any_text_in_any_pieces(parts: list[str], cuts: list[int], is_sure: bool) -> None:
    """Pieces change nothing, and nothing is lost but what frames calls."""
    text = "".join(parts)
    content, calls = found = fold(events_of([text], is_sure))
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    assert fold(events_of([text[a:b] for a, b in pairwise(edges)], is_sure)) == found
    assert fold(events_of(list(text), is_sure)) == found
    rest = iter(text)
    assert all(letter in rest for letter in content)  # in order
    if not calls:
        assert content == text
    elif not is_sure:
        assert all(isinstance(json.loads(arguments), dict) for _, arguments in calls)


def test_long_answers_take_linear_time() -> None:
    """A hundred thousand letters one by one; quadratic time would be minutes."""
    began = time.perf_counter()
    for text in ("word " * 20_000, '{"name": "f", "parameters": {"a": "' + "x" * 100_000 + '"}}', "< " * 50_000):
        fold(events_of(text))
    assert time.perf_counter() - began < 30

"""Conversations with tools, and turns to be continued: as transformers renders them, and what only we take."""

import copy
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import llamita
from llamita.errors import InputError
from llamita.text.chat_template import ChatTemplate

TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
DATE = {"date_string": "26 Jul 2024"}


def call(name: str, id_: str, **arguments: Any) -> dict[str, Any]:
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}


CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Oslo?"},
    {"role": "assistant", "content": None, "tool_calls": [call("weather", "1", city="Oslo <ü>")]},
    {"role": "tool", "tool_call_id": "1", "content": "cold"},
    {"role": "assistant", "content": " It is cold. "},
]
PARALLEL = [
    *CHAT[:2],
    {"role": "assistant", "content": None, "tool_calls": [call("weather", "a", city="Oslo"), call("weather", "b")]},
    {"role": "tool", "tool_call_id": "b", "content": "second"},
    {"role": "tool", "tool_call_id": "a", "content": "first"},
]
ONE_CALL = """{% for m in messages %}{% if m.tool_calls %}{% if m.tool_calls|length != 1 %}
{{ raise_exception('only one call') }}{% endif %}{{ m.tool_calls[0].function.arguments | tojson }}
{% else %}{{ m.role }}:{{ m.content }} {% endif %}{% endfor %}"""


def template_of(name: str) -> str:
    spec = find_spec("trl")
    if spec is None or spec.origin is None:
        pytest.skip("compares with templates that trl ships")
    path = Path(spec.origin).parent / "chat_templates" / f"{name}.jinja"
    if not path.exists():
        pytest.skip("this trl has no such template")
    return path.read_text()


def decoded(chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The form that transformers expects of its callers."""
    chat = copy.deepcopy(chat)
    for message in chat:
        message["content"] = message["content"] or ""
        for one in message.get("tool_calls", []):
            one["function"]["arguments"] = json.loads(one["function"]["arguments"])
    return chat


@pytest.mark.parametrize("name", ["llama3", "llama3_1", "llama3_2", "qwen2_5", "qwen3", "phi3"])
@pytest.mark.parametrize("tools", [None, [TOOL]])
@pytest.mark.parametrize("end", ["open", "closed", "continued"])
def test_tools_and_continued_turns_are_those_of_transformers(name: str, tools: Any, end: str) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils", reason="compares with transformers")
    source, chat = template_of(name), CHAT if tools else [*CHAT[:2], CHAT[4]]
    expected, _ = utils.render_jinja_template(
        conversations=[decoded(chat)], chat_template=source, tools=tools, bos_token="<B>", eos_token="<E>", **DATE,
        add_generation_prompt=end == "open", continue_final_message=end == "continued",
    )  # fmt: skip
    found = ChatTemplate(source, bos_token="<B>", eos_token="<E>").render(
        chat, tools=tools, add_generation_prompt=end != "closed", continue_final_message=end == "continued", extra=DATE
    )
    assert found == expected[0]


def test_parallel_calls_become_pairs_where_a_template_takes_one() -> None:
    before = copy.deepcopy(PARALLEL)
    text = ChatTemplate(ONE_CALL).render(PARALLEL)
    assert text == 'system:Be brief. user:Oslo? {"city": "Oslo"}\ntool:first {}\ntool:second '
    assert before == PARALLEL
    several = ChatTemplate("{% for m in messages %}{{ m.tool_calls|length }}{% endfor %}")
    assert several.render(PARALLEL) == "00200"
    by_order = [PARALLEL[2], {"role": "tool", "content": "x"}, {"role": "tool", "content": "y"}]
    assert ChatTemplate(ONE_CALL).render(by_order) == '{"city": "Oslo"}\ntool:x {}\ntool:y '
    with pytest.raises(InputError, match="messages: expected a result for each of 2 tool calls, got 1"):
        ChatTemplate(ONE_CALL).render(PARALLEL[:4])


def test_roles_nulls_and_arguments_are_put_right() -> None:
    dump = ChatTemplate("{% for m in messages %}{{ m | tojson }}\n{% endfor %}")
    chat = [
        {"role": "developer", "content": "D", "name": None},
        {"role": "function", "content": [{"type": "text", "text": "F"}, {"type": "refusal", "refusal": "R"}]},
        {"role": "assistant", "content": "A", "tool_calls": None, "refusal": None},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": ""}}]},
    ]
    assert [json.loads(line) for line in dump.render(chat).splitlines()] == [
        {"role": "system", "content": "D"},
        {"role": "tool", "content": "FR"},
        {"role": "assistant", "content": "A"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}],
        },
    ]


@pytest.mark.parametrize(("message", "where"), [
    ({"role": "user", "content": None}, r"messages\[1\].content: expected a text, got None"),
    ({"role": "user", "content": [{"type": "image_url"}]}, "expected a part of type text, got 'image_url'"),
    ({"role": "user", "content": [{"type": []}]}, r"content\[0\]: expected a part of type text"),
    ({"role": "user", "content": ["x"]}, r"content\[0\]: expected a part"),
    ({"role": "assistant", "tool_calls": 5}, "tool_calls: expected a list"),
    ({"role": "assistant", "tool_calls": [{"function": {}}]}, r"tool_calls\[0\]: expected a call"),
    ({"role": "assistant", "tool_calls": [call("f", "1") | {"function": {"name": "f", "arguments": "[1]"}}]},
     r"tool_calls\[0\].function.arguments: expected a JSON object"),
    ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{" * 100_000}}]}, "arguments"),
])  # fmt: skip
def test_wrong_messages_are_named(message: dict[str, Any], where: str) -> None:
    with pytest.raises(InputError, match=where):
        ChatTemplate("x").render([{"role": "user", "content": "x"}, message])


def test_only_an_assistants_text_can_be_continued() -> None:
    template = ChatTemplate("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    assert template.render([CHAT[1], CHAT[4]], continue_final_message=True) == "[Oslo?][ It is cold. "
    assert template.render([{"role": "assistant", "content": ""}], continue_final_message=True) == "["
    for chat in ([], CHAT[:2], CHAT[:3]):
        with pytest.raises(InputError, match="an assistant's text at the end"):
            template.render(chat, continue_final_message=True)
    with pytest.raises(InputError, match="does not write out the last message"):
        ChatTemplate("x").render([CHAT[4]], continue_final_message=True)


def test_further_variables_are_of_a_list() -> None:
    template = ChatTemplate("{{ date_string }}{{ enable_thinking }}{{ tools }}")
    assert template.render([], extra={"date_string": "now", "enable_thinking": False}) == "nowFalseNone"
    for extra in ({"messages": []}, {"custom_tools": []}, {1: 2}, {"enable_thinking": "yes"}, {"date_string": 5},
                  {"date_string": "x" * 65}, {"date_string": "a\nb"}):  # fmt: skip
        with pytest.raises(InputError, match="chat template"):
            template.render([], extra=extra)  # type: ignore[arg-type]


def test_whether_a_template_looks_at_tools() -> None:
    assert ChatTemplate("{% if tools %}x{% endif %}").takes_tools
    assert not ChatTemplate("{{ messages[0].content }} has tools_of").takes_tools


def test_a_conversation_is_encoded_open_or_continued() -> None:
    llm = llamita.load("embedded")
    chat = [{"role": "user", "content": "Once upon a time"}, {"role": "assistant", "content": "there was a dog"}]
    ids = llm.encode_chat(chat, continue_last=True)
    assert ids == llm.tokenizer.encode(llm.chat_template.render(chat, continue_final_message=True), add_bos=False)
    assert llm.tokenizer.decode(ids).endswith("there was a dog")
    assert not llm.check(chat).continues
    assert llm.check(ids).continues
    assert not llm.check(ids, continues=False).continues

"""Tools for models whose chat template knows none."""

import json

import pytest
from served import serving

import llamita
from llamita.errors import InputError
from llamita.serve.tool_calls import CallArguments, CallBegin, ToolCallParser
from llamita.serve.tool_text import in_text
from llamita.serve.tools import HERMES, LLAMA, CallForm

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {}}}}}
CALL = {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": "é; \\"x\\""}'}}


def test_tools_join_the_system_message() -> None:
    user = {"role": "user", "content": "1 + 1?"}
    alone = in_text([user], [TOOL], LLAMA)
    assert [message["role"] for message in alone] == ["system", "user"]
    assert json.dumps(TOOL["function"]) in alone[0]["content"]
    joined = in_text([{"role": "developer", "content": "Be brief."}, user], [TOOL], LLAMA)
    assert joined[0]["content"] == f"Be brief.\n\n{alone[0]['content']}"
    assert in_text([user], [], LLAMA) == [user]


@pytest.mark.parametrize("form", [LLAMA, HERMES])
def test_a_written_call_is_read_as_the_same_call(form: CallForm) -> None:
    message = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    (told,) = in_text([message], [], form)
    parser = ToolCallParser([TOOL])
    begin, *rest = [*parser.add(told["content"]), *parser.finish()]
    assert isinstance(begin, CallBegin)
    assert begin.name == "add"
    arguments = "".join(event.text for event in rest if isinstance(event, CallArguments))
    assert json.loads(arguments) == json.loads(CALL["function"]["arguments"])


def test_results_become_the_users_words() -> None:
    (told,) = in_text([{"role": "tool", "tool_call_id": "c", "content": "2"}], [], LLAMA)
    assert told["role"] == "user"
    assert told["content"].endswith("2")
    with pytest.raises(InputError):
        in_text([{"role": "tool"}], [], LLAMA)


def test_the_model_sees_them_and_they_are_counted() -> None:
    llm = llamita.load("embedded")
    assert not llm.chat_template.takes_tools
    with serving({"embedded": llm}) as served:
        body = {"messages": [{"role": "user", "content": "Once"}], "max_tokens": 1}
        plain = served.post("/v1/chat/completions", **body)["usage"]["prompt_tokens"]
        none = served.post("/v1/chat/completions", **body, tools=[TOOL], tool_choice="none")["usage"]["prompt_tokens"]
        shown = served.post("/v1/chat/completions", **body, tools=[TOOL])["usage"]["prompt_tokens"]
        assert plain == none < shown

"""Structured output and tools over HTTP: valid by construction, and refused where they cannot be kept."""

import json

import pytest
from served import Served, serving

import llamita
from llamita.engine.llm import LLM
from llamita.serve.schemas import prepare_schema
from llamita.serve.tool_deltas import ToolDeltas
from llamita.serve.tools import check_tools

MESSAGES = [{"role": "user", "content": "Once upon a time"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 10},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"enum": ["Paris", "Rome"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city", "days"],
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def llm() -> LLM:
    return llamita.load("embedded", scheme="llama3.2")


@pytest.fixture(scope="module")
def server(llm: LLM):
    with serving({"embedded": llm}) as served:
        yield served


def json_schema(schema: object) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}


@pytest.mark.parametrize("seed", range(5))
def test_an_answer_fits_its_schema(server: Served, seed: int) -> None:
    body = {"messages": MESSAGES, "max_tokens": 200, "seed": seed, "response_format": json_schema(SCHEMA)}
    choice = server.post("/v1/chat/completions", **body)["choices"][0]
    assert choice["finish_reason"] == "stop"
    value = json.loads(choice["message"]["content"])
    assert set(value) == {"name", "age"}
    assert isinstance(value["name"], str)
    assert value["age"] in range(100)
    streamed = server.events("/v1/chat/completions", **body)
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in streamed)
    assert text == choice["message"]["content"]


def test_an_answer_is_an_object(server: Served) -> None:
    body = {"messages": MESSAGES, "max_tokens": 300, "seed": 1, "response_format": {"type": "json_object"}}
    for choice in server.post("/v1/chat/completions", **body, n=3)["choices"]:
        text = choice["message"]["content"]
        assert text.startswith("{")
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(text), dict)


def test_regular_expressions_and_grammars(server: Served) -> None:
    for path, start in (
        ("/v1/completions", {"prompt": "My number:"}),
        ("/v1/chat/completions", {"messages": MESSAGES}),
    ):
        for rule in ({"guided_regex": "[0-9]{3}-[0-9]{2}"}, {"guided_grammar": 'start: /[0-9]{3}/ "-" /[0-9]{2}/'}):
            choice = server.post(path, **start, **rule, max_tokens=20, seed=4)["choices"][0]
            text = choice["text"] if "text" in choice else choice["message"]["content"]
            assert len(text) == 6
            assert text[3] == "-"
            assert (text[:3] + text[4:]).isdecimal()


def test_choices_have_grammars_of_their_own(server: Served) -> None:
    body = {"messages": MESSAGES, "max_tokens": 200, "seed": 1, "response_format": json_schema(SCHEMA)}
    alone = [server.post("/v1/chat/completions", **{**body, "seed": 1 + i})["choices"][0]["message"] for i in range(4)]
    together = server.post("/v1/chat/completions", **body, n=4)["choices"]
    assert [choice["message"] for choice in together] == alone


def calls_of(server: Served, **body: object) -> list[dict]:
    """Return the calls of an answer, whole, after comparing them with the streamed ones."""
    body = {"messages": MESSAGES, "max_tokens": 300, "seed": 3, **body}
    choice = server.post("/v1/chat/completions", **body)["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    calls: dict[int, dict] = {}
    events = server.events("/v1/chat/completions", **body)
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"
    for event in events:
        for part in event["choices"][0]["delta"].get("tool_calls", []):
            if part["index"] not in calls:
                assert part["id"]
                assert part["function"]["arguments"] == ""
                calls[part["index"]] = part
            else:
                assert part["function"]["arguments"]
                assert set(part) == {"index", "function"}
                calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]
    streamed = [calls[index]["function"] for index in sorted(calls)]
    assert streamed == [call["function"] for call in choice["message"]["tool_calls"]]
    return choice["message"]["tool_calls"]


def test_a_required_call_is_valid(server: Served) -> None:
    for parallel in (False, True):
        calls = calls_of(
            server, tools=[WEATHER], tool_choice="required", parallel_tool_calls=parallel, max_tokens=1500
        )  # fmt: skip
        assert parallel or len(calls) == 1
        for call in calls:
            assert call["type"] == "function"
            assert call["function"]["name"] == "get_weather"
            arguments = json.loads(call["function"]["arguments"])
            assert arguments["city"] in ("Paris", "Rome")
            assert arguments["days"] in range(1, 10)


def test_a_named_call_is_that_function(server: Served) -> None:
    named = {"type": "function", "function": {"name": "get_time"}}
    (call,) = calls_of(server, tools=[WEATHER, CLOCK], tool_choice=named, parallel_tool_calls=False)
    assert call["function"] == {"name": "get_time", "arguments": "{}"}


def test_without_a_call_the_answer_is_text(server: Served) -> None:
    body = {"messages": MESSAGES, "max_tokens": 20, "seed": 3, "temperature": 0}
    for choice in ("auto", "none"):
        answer = server.post("/v1/chat/completions", **body, tools=[WEATHER], tool_choice=choice)["choices"][0]
        assert answer["finish_reason"] == "length"
        assert answer["message"]["content"]
        assert "tool_calls" not in answer["message"]


def test_beside_tools_an_answer_is_a_call_or_fits_the_schema(server: Served) -> None:
    kinds = set()
    schema = {"type": "object", "properties": {"x": {"type": "integer", "maximum": 99}}, "required": ["x"]}
    body = {"tools": [WEATHER], "response_format": json_schema(schema), "max_tokens": 300, "temperature": 2}
    for seed in range(40):
        choice = server.post("/v1/chat/completions", messages=MESSAGES, seed=seed, **body)["choices"][0]
        calls = choice["message"].get("tool_calls")
        kinds.add("call" if calls else "answer")
        if calls:
            assert json.loads(calls[0]["function"]["arguments"])["city"] in ("Paris", "Rome")
        else:
            assert list(json.loads(choice["message"]["content"])) == ["x"]
    assert kinds == {"call", "answer"}
    named = {"tools": [CLOCK], "tool_choice": "required", "parallel_tool_calls": False}
    calls_of(server, response_format=json_schema(schema), **named)


def test_beside_tools_an_answer_that_looks_like_a_call_stays_an_answer(server: Served) -> None:
    schema = {"type": "object", "properties": {"name": {"const": "get_time"}, "note": {"const": "x"}}}
    schema["required"] = ["name", "note"]
    tool = {"type": "function", "function": {"name": "get_time", "parameters": WEATHER["function"]["parameters"]}}
    body = {"tools": [tool], "response_format": json_schema(schema), "max_tokens": 300, "temperature": 2}
    answers = [
        server.post("/v1/chat/completions", messages=MESSAGES, seed=seed, **body)["choices"][0]["message"]
        for seed in range(20)
    ]
    texts = [answer["content"] for answer in answers if answer["content"]]
    assert texts
    assert all(json.loads(text) == {"name": "get_time", "note": "x"} for text in texts)
    assert all(answer["content"] or "days" in str(answer["tool_calls"]) for answer in answers)


def test_beside_tools_references_to_anchors_hold(server: Served) -> None:
    parameters = {"properties": {"p": {"$ref": "#foo"}}, "$defs": {"x": {"$anchor": "foo", "type": "integer"}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", **parameters}}}
    body = {"messages": MESSAGES, "tools": [tool], "response_format": json_schema(SCHEMA), "max_tokens": 4}
    assert server.post("/v1/chat/completions", **body)["choices"]


def test_a_conversation_with_calls_goes_on(server: Served) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "get_time", "arguments": "{}"}}
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "12:00"},
    ]
    assert server.post("/v1/chat/completions", messages=messages, tools=[CLOCK], max_tokens=4)["choices"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": json_schema({"type": "nothing"})}, "response_format"),
        ({"response_format": json_schema({"$ref": "https://example.com/x"})}, "response_format"),
        ({"response_format": json_schema({"type": "string", "pattern": "(?=a)b"})}, "response_format"),
        ({"guided_regex": "foo**("}, "guided_regex"),
        ({"guided_regex": "a?" * 10_000 + "a" * 10_000}, "guided_regex"),
        ({"guided_grammar": "start: nothing"}, "guided_grammar"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex"),
        ({"tools": [{"type": "function"}]}, "tools[0]"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [WEATHER, WEATHER]}, "tools[1].function.name"),
        ({"tools": [WEATHER] * 129}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": "perhaps"}, "tool_choice"),
        ({"tools": [WEATHER], "guided_regex": "a"}, "guided_regex"),
        ({"tools": [WEATHER], "response_format": json_schema(5)}, "response_format"),
        ({"tools": [WEATHER], "response_format": json_schema({"type": "nothing"})}, "response_format"),
        (
            {"tools": [CLOCK], "tool_choice": "required", "response_format": json_schema({"type": "x"})},
            "response_format",
        ),
        ({"chat_template_kwargs": {"secret": 1}}, "chat_template_kwargs"),
    ],
)
def test_what_cannot_be_kept_is_refused(server: Served, change: dict, param: str) -> None:
    status, error = server.refuse("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 4, **change})
    assert status == 400
    assert error["param"] == param


def test_responses_call_functions_too(server: Served) -> None:
    tool = {"type": "function", **WEATHER["function"]}
    body = {
        "input": "Once",
        "tools": [tool, {"type": "web_search"}],
        "tool_choice": "required",
        "max_output_tokens": 300,
    }
    answer = server.post("/v1/responses", **body)
    call = answer["output"][0]
    assert (call["type"], call["name"], call["status"]) == ("function_call", "get_weather", "completed")
    assert json.loads(call["arguments"])["city"] in ("Paris", "Rome")
    follow = [
        {"role": "user", "content": "Once"},
        {"type": "function_call", "call_id": call["call_id"], "name": call["name"], "arguments": call["arguments"]},
        {"type": "function_call_output", "call_id": call["call_id"], "output": "Sun"},
    ]
    answer = server.post("/v1/responses", input=follow, tools=[tool], max_output_tokens=5)
    assert answer["status"] == "incomplete"
    assert answer["output"][0]["content"][0]["type"] == "output_text"


def test_responses_fit_a_schema(server: Served) -> None:
    form = {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA, "strict": True}}
    answer = server.post("/v1/responses", input="Once", text=form, max_output_tokens=200)
    assert set(json.loads(answer["output"][0]["content"][0]["text"])) == {"name", "age"}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"input": 3}, "input"),
        ({"input": [{"type": "computer_call"}]}, "input[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
        ({"text": {"format": 3}}, "text.format"),
        ({"truncation": "auto"}, "truncation"),
    ],
)
def test_responses_name_what_is_wrong(server: Served, change: dict, param: str) -> None:
    status, error = server.refuse("/v1/responses", {"input": "a", "max_output_tokens": 2, **change})
    assert (status, error["param"]) == (400, param)


def test_one_call_alone_if_several_are_not_wanted() -> None:
    text = '{"name": "get_time", "parameters": {}}; {"name": "get_time", "parameters": {}}'
    for parallel, count in ((True, 2), (False, 1)):
        deltas = ToolDeltas(check_tools([CLOCK], "auto", parallel))
        found = [delta for piece in text for delta in deltas.add(piece)] + deltas.finish()
        assert len([d for d in found if d["tool_calls"][0].get("id")]) == count


def test_of_several_branches_exactly_one_fits() -> None:
    branches = [{"properties": {"a": {"type": "integer"}}, "required": ["a"]}, {"properties": {"b": {"type": "null"}}}]
    prepared = prepare_schema({"oneOf": [{"type": "object", **branch} for branch in branches]}, "x")
    assert isinstance(prepared, dict)
    assert not any(
        "additionalProperties" in branch for branch in prepared["oneOf"]
    )  # else {"a": 1} would fit one alone

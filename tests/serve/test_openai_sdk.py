"""The openai package as a client: the server understands what it sends, and its answers fit the package's own types."""

import asyncio
import base64
import json
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import pytest
from served import Served, serving

import llamita
from llamita.engine.llm import LLM
from llamita.serve.keys import Keys
from llamita.serve.start import Bounds

pydantic: Any = pytest.importorskip("pydantic", reason="comes with the package openai")
openai: Any = pytest.importorskip("openai", reason="needs the package openai: pip install '.[dev]'")

KEY = "a-key-of-this-test"
MESSAGES: Any = [{"role": "user", "content": "Once upon a time"}]
GREEDY: Any = {"model": "embedded", "messages": MESSAGES, "temperature": 0, "max_tokens": 12}
LONG: Any = {**GREEDY, "max_tokens": 1900, "extra_body": {"ignore_eos": True}}
TOO_LONG: Any = [{"role": "user", "content": "a dog " * 1200}]
SOON = 10  # seconds in which even a busy machine runs a step


@pytest.fixture(scope="module")
def llm() -> LLM:
    return llamita.load("embedded", scheme="llama3.2")


@pytest.fixture(scope="module")
def server(llm: LLM) -> Iterator[Served]:
    with serving({"embedded": llm}) as served:
        yield served


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[Any]:
    with make_client(server) as made:
        yield made


@pytest.fixture
def slow(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that takes its time: 20 ms for a token."""
    step = llm.scheduler.step
    monkeypatch.setattr(llm.scheduler, "step", lambda: (time.sleep(0.02), step())[1])


def make_client(server: Served, **options: Any) -> Any:
    return openai.OpenAI(base_url=f"{server.address}/v1", **{"api_key": "none", "max_retries": 0, **options})


def fits(value: Any) -> Any:
    """Return an answer of the package, which itself takes anything, once its declared type has checked it."""
    type(value).model_validate(value.to_dict(mode="json"))
    return value


def wait_until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + SOON
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def is_idle(server: Served) -> bool:
    (load,) = json.loads(server.ask("GET", "/v1/load")[2])["models"]
    return not load["running"] and not load["waiting"] and not server.state.queue.open


def test_models(client: Any) -> None:
    (model,) = fits(client.models.list()).data
    assert fits(client.models.retrieve(model.id)) == model
    assert (model.id, model.owned_by) == ("embedded", "llamita")


def test_chat(client: Any, llm: LLM) -> None:
    answer = fits(client.chat.completions.create(**GREEDY))
    assert answer.choices[0].message.content == llm.generate(MESSAGES, greedy=True, max_tokens=12).text
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 12
    assert answer._request_id == client.chat.completions.with_raw_response.create(
        **GREEDY, extra_headers={"x-request-id": answer._request_id}
    ).headers.get("x-request-id")


def test_a_stream(client: Any) -> None:
    whole = client.chat.completions.create(**GREEDY)
    stream = client.chat.completions.create(**GREEDY, stream=True, stream_options={"include_usage": True})
    *chunks, last = [fits(chunk) for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "length"
    assert last.choices == []
    assert last.usage.total_tokens == whole.usage.total_tokens


def test_the_stream_helper_makes_the_same_answer(client: Any) -> None:
    body = {**GREEDY, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**body).choices[0]
    del body["max_tokens"]
    with client.chat.completions.stream(**body, stop=["."]) as stream:
        kinds = [event.type for event in stream]
        choice = stream.get_final_completion().choices[0]
    assert choice.message.content.startswith(whole.message.content)
    assert choice.logprobs.content[:12] == whole.logprobs.content
    assert choice.finish_reason == "stop"
    assert {"content.delta", "content.done", "logprobs.content.delta", "logprobs.content.done"} <= set(kinds)


def test_completions_with_log_probabilities(client: Any, llm: LLM) -> None:
    body: Any = {"model": "embedded", "temperature": 0, "max_tokens": 6, "logprobs": 3}
    answer = fits(client.completions.create(**body, prompt=["Once upon", "The dog"]))
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice, prompt in zip(answer.choices, ["Once upon", "The dog"], strict=True):
        expected = llm.generate(prompt, greedy=True, max_tokens=6)
        assert choice.text == "".join(choice.logprobs.tokens) == expected.text
        for token, logprob, top in zip(
            choice.logprobs.tokens, choice.logprobs.token_logprobs, choice.logprobs.top_logprobs, strict=True
        ):
            assert len(top) == 3
            assert top[token] == max(top.values()) == logprob
    # Not `fits`: the package declares a reason for every piece, and OpenAI itself sends none before the last.
    pieces = [chunk.choices[0] for chunk in client.completions.create(**body, prompt="The dog", stream=True)]
    assert "".join(piece.text for piece in pieces) == answer.choices[1].text
    ids = llm.tokenizer.encode("The dog")
    assert client.completions.create(**body, prompt=ids).choices[0].text == answer.choices[1].text


def test_embeddings_are_the_same_in_both_encodings(client: Any, llm: LLM) -> None:
    texts = ["A dog.", "Two cats sat on a mat."]
    default = fits(client.embeddings.create(model="embedded", input=texts))  # the package asks for base64
    floats = fits(client.embeddings.create(model="embedded", input=texts, encoding_format="float"))
    raw = client.embeddings.create(model="embedded", input=texts, encoding_format="base64").data
    for one, other, coded, text in zip(default.data, floats.data, raw, texts, strict=True):
        assert np.frombuffer(base64.b64decode(coded.embedding), "<f4").tolist() == one.embedding == other.embedding
        assert np.array_equal(np.float32(one.embedding), llm.embed(llm.tokenizer.encode(text)))
    assert default.usage.prompt_tokens == sum(len(llm.tokenizer.encode(text)) for text in texts)


def test_a_response(client: Any) -> None:
    chat = client.chat.completions.create(**GREEDY)
    body: Any = {"model": "embedded", "temperature": 0, "max_output_tokens": 12}
    answer = fits(client.responses.create(**body, input="Once upon a time"))
    assert answer.output_text == chat.choices[0].message.content
    assert answer.status == "incomplete"
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage.total_tokens == chat.usage.total_tokens
    items: Any = [{"role": "user", "content": [{"type": "input_text", "text": "Once upon a time"}]}]
    assert client.responses.create(**body, input=items, store=False).output_text == answer.output_text
    # The answer's items are the next question's first ones, as the package's examples do it.
    again = client.responses.create(**body, input=[*items, *answer.output, {"role": "user", "content": "More"}])
    assert again.output_text
    assert client.responses.input_tokens.count(model="embedded", input=items).input_tokens == answer.usage.input_tokens


def test_a_streamed_response(client: Any) -> None:
    body: Any = {"model": "embedded", "temperature": 0, "max_output_tokens": 12, "input": "Once upon a time"}
    events = [fits(event) for event in client.responses.create(**body, stream=True)]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [events[0].type, events[1].type] == ["response.created", "response.in_progress"]
    whole = client.responses.create(**body)
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text
    assert events[-1].type == "response.incomplete"
    del body["max_output_tokens"]  # an answer that is cut is an error to the package's helper
    with client.responses.stream(**body) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert final.status == "completed"
    assert final.output_text.startswith(whole.output_text)
    assert kinds.count("response.output_text.done") == kinds.count("response.output_item.done") == 1


class Animal(pydantic.BaseModel):
    name: Literal["dog", "cat", "bird"]
    legs: Literal[2, 4]
    is_big: bool


def test_structured_answers_are_parsed(client: Any) -> None:
    for seed in range(5):
        body = {**GREEDY, "temperature": 1, "seed": seed, "max_tokens": 60}
        choice = client.chat.completions.parse(**body, response_format=Animal).choices[0]
        assert isinstance(choice.message.parsed, Animal)
        assert choice.finish_reason == "stop"
        with client.chat.completions.stream(**body, response_format=Animal) as stream:
            assert stream.get_final_completion().choices[0].message.parsed == choice.message.parsed
        body = {"model": "embedded", "input": "Once upon a time", "temperature": 1}
        answer = client.responses.parse(**body, text_format=Animal)
        assert isinstance(answer.output_parsed, Animal)
    with pytest.raises(openai.LengthFinishReasonError):  # half an object is not taken for one
        client.chat.completions.parse(**{**GREEDY, "max_tokens": 3}, response_format=Animal)


def test_a_schema_that_cannot_be_kept_to_is_refused(client: Any) -> None:
    schema = {"type": "string", "format": "no-such-format"}
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**GREEDY, response_format=form)
    assert caught.value.param.startswith("response_format")


class Weather(pydantic.BaseModel):
    """Tell the weather of a city."""

    city: Literal["Paris", "Rome"]


CALLS: Any = {**GREEDY, "max_tokens": 60, "tool_choice": "required", "parallel_tool_calls": False}


def test_calls_are_the_same_streamed_and_not(client: Any) -> None:
    tools = [openai.pydantic_function_tool(Weather)]
    for seed in range(5):
        body = {**CALLS, "temperature": 1, "seed": seed, "tools": tools}
        whole = fits(client.chat.completions.create(**body)).choices[0]
        assert (whole.finish_reason, whole.message.content) == ("tool_calls", None)
        (call,) = whole.message.tool_calls
        assert (call.type, call.function.name) == ("function", "Weather")
        assert Weather.model_validate_json(call.function.arguments).city in ("Paris", "Rome")
        chunks = [fits(chunk).choices[0] for chunk in client.chat.completions.create(**body, stream=True)]
        deltas = [delta for chunk in chunks for delta in chunk.delta.tool_calls or []]
        assert chunks[-1].finish_reason == "tool_calls"
        assert (deltas[0].id[:5], deltas[0].type, deltas[0].function.name) == ("call_", "function", "Weather")
        assert "".join(delta.function.arguments or "" for delta in deltas) == call.function.arguments
        with client.chat.completions.stream(**body) as stream:
            final = stream.get_final_completion().choices[0].message.tool_calls[0].function
        assert final.parsed_arguments == Weather.model_validate_json(call.function.arguments)


def test_a_call_and_its_result_go_back(client: Any) -> None:
    tools = [openai.pydantic_function_tool(Weather)]
    message = client.chat.completions.create(**CALLS, tools=tools).choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"}
    body = {**GREEDY, "messages": [*MESSAGES, message, result], "tools": tools, "tool_choice": "none"}
    assert client.chat.completions.create(**body).choices[0].message.content


def test_calls_of_a_response(client: Any) -> None:
    tool = openai.pydantic_function_tool(Weather)["function"]
    body: Any = {
        "model": "embedded", "input": "What is the weather?", "temperature": 0, "tool_choice": "required",
        "parallel_tool_calls": False, "tools": [{"type": "function", **tool}],
    }  # fmt: skip
    (call,) = fits(client.responses.create(**body)).output
    assert (call.type, call.name, call.status) == ("function_call", "Weather", "completed")
    assert Weather.model_validate_json(call.arguments)
    events = [fits(event) for event in client.responses.create(**body, stream=True)]
    pieces = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert all(pieces)  # an empty piece has ended clients
    assert "".join(pieces) == call.arguments
    with client.responses.stream(**body) as stream:
        assert stream.get_final_response().output[0].arguments == call.arguments
    items = [{"role": "user", "content": body["input"]}, call]
    items.append({"type": "function_call_output", "call_id": call.call_id, "output": "sunny"})
    assert client.responses.create(**{**body, "input": items, "tool_choice": "none"}).output_text


def test_many_at_once_from_the_async_client(server: Served, client: Any) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0) as made:

            async def one(i: int) -> str:
                stream = await made.chat.completions.create(**{**GREEDY, "temperature": 1, "seed": i}, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*[one(i) for i in range(12)])

    alone = [client.chat.completions.create(**{**GREEDY, "temperature": 1, "seed": i}) for i in range(12)]
    assert asyncio.run(ask()) == [answer.choices[0].message.content for answer in alone]


def test_an_aborted_stream_frees_its_sequence(server: Served, client: Any, slow: None) -> None:
    stream = client.chat.completions.create(**LONG, stream=True)
    next(iter(stream))
    assert not is_idle(server)
    stream.close()
    wait_until(lambda: is_idle(server))


def test_a_client_that_times_out_frees_its_sequence(server: Served, client: Any, slow: None) -> None:
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.3).chat.completions.create(**LONG)
    wait_until(lambda: is_idle(server))


def test_a_cancelled_task_frees_its_sequence(server: Served, slow: None) -> None:
    async def ask() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0) as made:
            async with asyncio.timeout(0.3):
                await made.chat.completions.create(**LONG)

    with pytest.raises(TimeoutError):
        asyncio.run(ask())
    wait_until(lambda: is_idle(server))


@pytest.mark.parametrize(
    ("change", "error", "code", "param"),
    [
        ({"messages": TOO_LONG}, "BadRequestError", "context_length_exceeded", "messages"),
        ({"temperature": 9}, "BadRequestError", "invalid_value", "temperature"),
        ({"messages": [{"role": "user"}]}, "BadRequestError", "invalid_value", "messages[0].content"),
        ({"model": "gpt-4o"}, "NotFoundError", "model_not_found", "model"),
    ],
)
def test_refusals_are_the_packages_errors_and_not_tried_again(
    server: Served, change: dict, error: str, code: str, param: str
) -> None:
    sent = []
    http = openai.DefaultHttpxClient(event_hooks={"request": [sent.append]})
    with make_client(server, max_retries=2, http_client=http) as made:
        with pytest.raises(getattr(openai, error)) as caught:
            made.chat.completions.create(**{**GREEDY, **change})
        assert (caught.value.code, caught.value.param) == (code, param)
        if code == "context_length_exceeded":  # LangChain looks for it in the text, which has the message alone
            assert code in str(caught.value)
        assert caught.value.type == "invalid_request_error"
        with pytest.raises(getattr(openai, error)):  # also before a stream begins
            made.chat.completions.create(**{**GREEDY, **change}, stream=True)
    assert len(sent) == 2


def test_keys_and_a_full_queue(llm: LLM, slow: None) -> None:
    with serving({"embedded": llm}, keys=Keys([KEY]), bounds=Bounds(requests=1)) as server:
        with make_client(server) as made, pytest.raises(openai.AuthenticationError) as denied:
            made.models.list()
        assert denied.value.code == "invalid_api_key"
        with make_client(server, api_key=KEY) as made:
            stream = made.chat.completions.create(**LONG, stream=True)
            next(iter(stream))
            with pytest.raises(openai.RateLimitError) as full:
                made.chat.completions.create(**GREEDY)
            assert full.value.code == "queue_full"
            assert 1 <= int(full.value.response.headers["retry-after"]) <= 60
            stream.close()
            # Retry-After is obeyed, so a second try finds room.
            assert made.with_options(max_retries=2).chat.completions.create(**GREEDY).choices[0].message.content


def test_a_server_without_the_v1_in_its_address(server: Served) -> None:
    with openai.OpenAI(base_url=server.address, api_key="none") as made:
        assert made.models.list().data[0].id == "embedded"
        assert made.chat.completions.create(**GREEDY).choices[0].message.content

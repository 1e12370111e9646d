"""`/v1/chat/completions` over real sockets, against the engine's own answers."""

import math

import pytest
from served import Served, serving

import llamita
from llamita.engine.llm import LLM

MESSAGES = [{"role": "user", "content": "Once upon a time"}]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return llamita.load("embedded", scheme="llama3.2")


@pytest.fixture(scope="module")
def server(llm: LLM):
    with serving({"embedded": llm}) as served:
        yield served


def test_an_answer_is_the_engines(server: Served, llm: LLM) -> None:
    answer = server.post("/v1/chat/completions", messages=MESSAGES, max_completion_tokens=30, seed=7)
    expected = llm.generate(MESSAGES, max_tokens=30, seed=7)
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected.text, "refusal": None}
    assert choice["finish_reason"] == "length"
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "embedded"
    assert answer["usage"]["prompt_tokens"] == expected.timings.prompt_tokens
    assert answer["usage"]["completion_tokens"] == 30
    assert answer["usage"]["total_tokens"] == expected.timings.prompt_tokens + 30


def test_a_stream_adds_up_to_the_whole(server: Served) -> None:
    body = {"messages": MESSAGES, "max_tokens": 30, "seed": 7, "logprobs": True, "top_logprobs": 2}
    whole = server.post("/v1/chat/completions", **body)["choices"][0]
    events = server.events("/v1/chat/completions", **body)
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert {e["object"] for e in events} == {"chat.completion.chunk"}
    assert len({e["id"] for e in events}) == 1
    deltas = [e["choices"][0]["delta"] for e in events[1:-1]]
    assert all(d["content"] for d in deltas)
    assert "".join(d["content"] for d in deltas) == whole["message"]["content"]
    assert events[-1]["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}
    logprobs = [e["choices"][0]["logprobs"]["content"] for e in events[1:-1] if e["choices"][0]["logprobs"]]
    assert [entry for part in logprobs for entry in part] == whole["logprobs"]["content"]


def test_usage_comes_last_if_it_is_asked_for(server: Served) -> None:
    body = {"messages": MESSAGES, "max_tokens": 5}
    events = server.events("/v1/chat/completions", **body, stream_options={"include_usage": True})
    assert all(e["usage"] is None for e in events[:-1])
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == 5
    assert all("usage" not in e for e in server.events("/v1/chat/completions", **body))


def test_log_probabilities_are_those_of_the_logits(server: Served, llm: LLM) -> None:
    body = {"messages": MESSAGES, "max_tokens": 8, "temperature": 0, "logprobs": True, "top_logprobs": 3}
    entries = server.post("/v1/chat/completions", **body)["choices"][0]["logprobs"]["content"]
    ids = llm.encode_chat(MESSAGES)
    expected = llm.generate(MESSAGES, max_tokens=8, greedy=True)
    logits = llm.logits([*ids, *expected.token_ids])[len(ids) - 1 : -1].astype(float)
    assert len(entries) == 8
    for entry, token, row in zip(entries, expected.token_ids, logits, strict=True):
        log_sum = math.log(sum(math.exp(value - row.max()) for value in row)) + row.max()
        assert entry["logprob"] == pytest.approx(row[token] - log_sum, abs=1e-4)
        assert bytes(entry["bytes"]).decode() == entry["token"] == llm.tokenizer.decode([token])
        assert entry["top_logprobs"][0]["logprob"] == entry["logprob"]  # greedy: the likeliest is the token
        assert len(entry["top_logprobs"]) == 3


def test_several_choices_draw_with_seeds_of_their_own(server: Served) -> None:
    body = {"messages": MESSAGES, "max_tokens": 12}
    answer = server.post("/v1/chat/completions", **body, n=3, seed=5)
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    alone = [server.post("/v1/chat/completions", **body, seed=5 + i)["choices"][0] for i in range(3)]
    assert texts == [choice["message"]["content"] for choice in alone]
    assert answer["usage"]["completion_tokens"] == 36
    assert answer["usage"]["prompt_tokens"] == server.post("/v1/chat/completions", **body)["usage"]["prompt_tokens"]


def test_a_second_turn_reuses_the_first(server: Served) -> None:
    first = [{"role": "user", "content": "Tell me about a dog and a cat who lived in a big house. " * 4}]
    answer = server.post("/v1/chat/completions", messages=first, max_tokens=20, seed=1)["choices"][0]["message"]
    second = [*first, {"role": "assistant", "content": answer["content"]}, {"role": "user", "content": "More!"}]
    usage = server.post("/v1/chat/completions", messages=second, max_tokens=2)["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= usage["prompt_tokens"] - 30


def test_the_last_message_of_the_assistant_is_continued(server: Served, llm: LLM) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "there was a little"}]
    text = server.post("/v1/chat/completions", messages=messages, max_tokens=8, temperature=0)["choices"][0]
    ids = llm.encode_chat(messages, continue_last=True)
    assert llm.tokenizer.decode(ids).endswith("there was a little")
    assert text["message"]["content"] == llm.generate(ids, max_tokens=8, greedy=True).text


def test_stop_texts_end_an_answer_and_are_not_part_of_it(server: Served) -> None:
    body = {"messages": MESSAGES, "max_tokens": 60, "temperature": 0}
    whole = server.post("/v1/chat/completions", **body)["choices"][0]["message"]["content"]
    stop = whole[20:24]
    cut = server.post("/v1/chat/completions", **body, stop=[stop])["choices"][0]
    assert cut["message"]["content"] == whole[: whole.index(stop)]
    assert cut["finish_reason"] == "stop"
    streamed = server.events("/v1/chat/completions", **body, stop=stop)
    text = "".join(e["choices"][0]["delta"].get("content", "") for e in streamed)
    assert text == cut["message"]["content"]


def test_without_a_limit_an_answer_may_fill_the_context(server: Served) -> None:
    long = [{"role": "user", "content": "a dog " * 1010}]
    answer = server.post("/v1/chat/completions", messages=long, ignore_eos=True)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == 2048


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": 3, "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
        ({"messages": None}, "messages"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"n": 9}, "n"),
        ({"n": True}, "n"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"functions": [{}]}, "functions"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"stream": True, "stream_options": {"include_usage": 3}}, "stream_options.include_usage"),
        ({"chat_template": "x"}, "chat_template"),
    ],
)
def test_a_wrong_field_is_named(server: Served, change: dict, param: str) -> None:
    status, error = server.refuse("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 2, **change})
    assert status == 400
    assert error["type"] == "invalid_request_error"
    assert error["param"].split(":")[0].split("[")[0] == param


def test_fields_without_effect_and_unknown_ones_are_ignored(server: Served) -> None:
    body = {"messages": MESSAGES, "max_tokens": 4, "seed": 1, "temperature": None}
    plain = server.post("/v1/chat/completions", **body)["choices"]
    assert server.post("/v1/chat/completions", **body, user="me", store=True, frobnicate=3)["choices"] == plain


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_is_never_cut(server: Served, stream: bool) -> None:
    messages = [{"role": "user", "content": "a dog " * 1200}]
    status, error = server.refuse("/v1/chat/completions", {"messages": messages, "stream": stream})
    assert status == 400
    assert error["code"] == "context_length_exceeded"
    assert error["n_ctx"] == 2048
    assert error["n_prompt_tokens"] > 2048
    for phrase in ("This model's maximum context length is 2048 tokens", f"{error['n_prompt_tokens']} tokens"):
        assert phrase in error["message"]


def test_tokens_are_counted_without_an_answer(server: Served, llm: LLM) -> None:
    counted = server.post("/v1/chat/completions/input_tokens", messages=MESSAGES)
    assert counted["input_tokens"] == len(llm.encode_chat(MESSAGES))


def test_tokens_with_log_probabilities_join_to_the_content(server: Served) -> None:
    body = {"messages": MESSAGES, "max_tokens": 40, "temperature": 0, "logprobs": True}
    whole = server.post("/v1/chat/completions", **body)["choices"][0]["message"]["content"]
    for stop in (whole[17:25], whole[30:33], "nowhere"):
        choice = server.post("/v1/chat/completions", **body, stop=stop)["choices"][0]
        joined = "".join(entry["token"] for entry in choice["logprobs"]["content"])
        assert joined.startswith(choice["message"]["content"])
        last = choice["logprobs"]["content"][-1]["token"]
        assert len(joined) - len(choice["message"]["content"]) < len(last)  # a token may reach into the stop text
        events = server.events("/v1/chat/completions", **body, stop=stop)
        parts = [event["choices"][0]["logprobs"] for event in events]
        streamed = [entry for part in parts if part for entry in part["content"]]
        assert streamed == choice["logprobs"]["content"]

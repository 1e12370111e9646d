"""`/v1/completions` over real sockets: several prompts, log-probabilities, limits."""

import numpy as np
import pytest
from served import Served, serving

import llamita
from llamita.engine.llm import LLM


@pytest.fixture(scope="module")
def llm() -> LLM:
    return llamita.load("embedded", scheme="llama3.2")


@pytest.fixture(scope="module")
def server(llm: LLM):
    with serving({"embedded": llm}) as served:
        yield served


def test_several_prompts_are_answered_in_order(server: Served, llm: LLM) -> None:
    prompts = ["Once upon a time", "The dog", "She said"]
    answer = server.post("/v1/completions", prompt=prompts, max_tokens=10, temperature=0)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    expected = [llm.generate(prompt, max_tokens=10, greedy=True) for prompt in prompts]
    assert [choice["text"] for choice in answer["choices"]] == [generation.text for generation in expected]
    assert answer["usage"]["prompt_tokens"] == sum(g.timings.prompt_tokens for g in expected)


def test_token_ids_are_taken_as_they_are(server: Served, llm: LLM) -> None:
    ids = llm.tokenizer.encode("The cat")
    for prompt in (ids, [ids]):
        answer = server.post("/v1/completions", prompt=prompt, max_tokens=5, temperature=0)
        assert answer["choices"][0]["text"] == llm.generate(ids, max_tokens=5, greedy=True).text
        assert answer["usage"]["prompt_tokens"] == len(ids)


def test_the_default_length_is_openais(server: Served) -> None:
    answer = server.post("/v1/completions", prompt="Once upon a time", ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 16


def test_logprobs_have_the_token_among_the_likeliest(server: Served) -> None:
    answer = server.post("/v1/completions", prompt="Once", max_tokens=6, logprobs=0, seed=3)
    logprobs = answer["choices"][0]["logprobs"]
    assert "".join(logprobs["tokens"]) == answer["choices"][0]["text"]
    for token, value, top in zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True):
        assert top == {token: value}


def test_a_stream_adds_up_to_the_whole(server: Served) -> None:
    body = {"prompt": "The sun", "max_tokens": 12, "seed": 2, "logprobs": 2}
    whole = server.post("/v1/completions", **body)["choices"][0]
    choices = [event["choices"][0] for event in server.events("/v1/completions", **body)]
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [v for choice in choices for v in choice["logprobs"][name]] == whole["logprobs"][name]
    assert choices[-1]["finish_reason"] == whole["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 3]}, "prompt"),
        ({"prompt": [4096]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["a"] * 65}, "prompt"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"prompt": [5] * 2048}, "prompt"),
    ],
)
def test_a_wrong_field_is_named(server: Served, change: dict, param: str) -> None:
    status, error = server.refuse("/v1/completions", {"prompt": "a", "max_tokens": 2, **change})
    assert status == 400
    assert error["param"] == param


@pytest.mark.parametrize("prompt", ["Once upon a time", "caf\u00e9 \U0001f999 \u4f60\u597d"])
def test_offsets_point_at_their_tokens(server: Served, prompt: str) -> None:
    body = {"prompt": prompt, "max_tokens": 8, "temperature": 0, "logprobs": 1, "echo": True}
    choice = server.post("/v1/completions", **body)["choices"][0]
    assert choice["text"].startswith(prompt)
    logprobs = choice["logprobs"]
    ends = [*logprobs["text_offset"][1:], len(choice["text"])]
    pieces = [choice["text"][a:b] for a, b in zip(logprobs["text_offset"], ends, strict=True)]
    assert "".join(pieces) == choice["text"]
    assert pieces[0] == ""  # the BOS token is not in the text
    whole = [(piece, token) for piece, token in zip(pieces, logprobs["tokens"], strict=True) if "\ufffd" not in token]
    assert all(piece == token for piece, token in whole[1:])
    assert logprobs["token_logprobs"][0] is None


def test_a_prompt_is_scored_alone(server: Served, llm: LLM) -> None:
    ids = llm.tokenizer.encode("The dog ran in the park and saw a bird.")
    body = {"prompt": [ids, ids[:4]], "max_tokens": 0, "logprobs": 2, "echo": True}
    for choice, tokens in zip(server.post("/v1/completions", **body)["choices"], (ids, ids[:4]), strict=True):
        logits = llm.logits(tokens).astype(float)
        exact = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        exact -= logits.max(1, keepdims=True)
        expected = [exact[place, token] for place, token in enumerate(tokens[1:])]
        assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(expected, abs=1e-4)
        assert len(choice["logprobs"]["tokens"]) == len(tokens)
        assert choice["finish_reason"] == "length"


def test_one_request_cannot_ask_for_more_than_the_queue_takes(server: Served) -> None:
    status, error = server.refuse("/v1/completions", {"prompt": ["a"] * 64, "n": 8, "max_tokens": 1})
    assert (status, error["param"]) == (400, "n")

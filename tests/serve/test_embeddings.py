"""`/v1/embeddings`, the tokenizer's endpoints, and the small ones."""

import base64
import json
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from rotated import RotatedCheckpoint
from served import Served, serving
from tiny import make_checkpoint

import llamita
from llamita.engine.llm import LLM
from llamita.models.checkpoint import Checkpoint

TEXTS = ["The dog ran in the park.", "A cat sat."]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return llamita.load("embedded", scheme="llama3.2")


@pytest.fixture(scope="module")
def server(llm: LLM):
    with serving({"embedded": llm}) as served:
        yield served


def test_a_vector_is_the_mean_of_transformers_final_states(tmp_path) -> None:
    torch = pytest.importorskip("torch", reason="compares with transformers")
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    path = make_checkpoint(tmp_path / "model", "llama32", dtype="F32")
    ids = list(np.random.default_rng(0).integers(0, 250, 300))
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        states = model.model(torch.tensor([ids])).last_hidden_state[0].double().numpy()
    expected = states.sum(axis=0) / np.linalg.norm(states.sum(axis=0))
    # float32 sums of some hundred terms in another order, over a handful of layers
    np.testing.assert_allclose(llamita.load(path).embed(ids), expected, atol=2e-5)


def test_a_rotation_keeps_the_angles(tmp_path) -> None:
    path = make_checkpoint(tmp_path / "model", "llama32", dtype="F32")
    texts = [list(range(2, 60)), list(range(100, 130)), [7] * 9]
    plain, rotated = LLM(Checkpoint(path)), LLM(RotatedCheckpoint(path, ("R1",)))
    vectors, turned = ([llm.embed(ids) for ids in texts] for llm in (plain, rotated))
    assert not np.allclose(vectors[0], turned[0], atol=0.01)  # they are in another space
    for one, other in ((0, 1), (0, 2), (1, 2)):
        # float32 in another order of sums
        assert vectors[one] @ vectors[other] == pytest.approx(turned[one] @ turned[other], abs=1e-4)


def test_embeddings_are_the_librarys(server: Served, llm: LLM) -> None:
    answer = server.post("/v1/embeddings", input=TEXTS)
    assert [entry["index"] for entry in answer["data"]] == [0, 1]
    ids = [llm.tokenizer.encode(text) for text in TEXTS]
    for entry, tokens in zip(answer["data"], ids, strict=True):
        vector = np.array(entry["embedding"], np.float32)
        np.testing.assert_array_equal(vector, llm.embed(tokens, chunk=64))
        np.testing.assert_allclose(np.linalg.norm(vector.astype(float)), 1, rtol=1e-6)
    assert answer["usage"] == {"prompt_tokens": sum(map(len, ids)), "total_tokens": sum(map(len, ids))}
    coded = server.post("/v1/embeddings", input=TEXTS, encoding_format="base64")["data"]
    for entry, other in zip(answer["data"], coded, strict=True):
        assert np.frombuffer(base64.b64decode(other["embedding"]), "<f4").tolist() == entry["embedding"]
    assert server.post("/v1/embeddings", input=ids)["data"] == answer["data"]


def test_a_place_is_held_until_the_thread_ends(server: Served, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, ended, found = threading.Event(), threading.Event(), []

    def embed(_ids: object, _adapter: object, _chunk: int, is_wanted: Callable[[], bool]) -> np.ndarray:
        begun.set()
        end = time.monotonic() + 20
        while is_wanted() and time.monotonic() < end:
            time.sleep(0.005)
        time.sleep(0.2)  # for a server that would give the place back now
        found.append((is_wanted(), server.state.queue.open))
        ended.set()
        return np.zeros(1, np.float32)

    monkeypatch.setattr(llm, "embed", embed)
    connection = server.connect()
    connection.request("POST", "/v1/embeddings", json.dumps({"input": "a"}), {"Content-Type": "application/json"})
    assert begun.wait(20)
    connection.close()
    assert ended.wait(30)
    assert found == [(False, 1)]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a"] * 65}, "input"),
        ({"input": [4096]}, "input"),
        ({"input": "a dog " * 2000}, "input"),
        ({"input": "a", "dimensions": 3}, "dimensions"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
    ],
)
def test_a_wrong_field_is_named(server: Served, body: dict, param: str) -> None:
    status, error = server.refuse("/v1/embeddings", body)
    assert (status, error["param"]) == (400, param)


def test_tokens_there_and_back(server: Served, llm: LLM) -> None:
    text = "The dog — ran."
    ids = llm.tokenizer.encode(text)
    answer = server.post("/tokenize", prompt=text, return_token_strs=True)
    assert answer["tokens"] == ids
    assert answer["count"] == len(ids)
    assert answer["max_model_len"] == 2048
    assert "".join(answer["token_strs"][1:]).replace("\ufffd", "") in text
    bare = llm.tokenizer.encode(text, add_bos=False)
    assert server.post("/tokenize", content=text)["tokens"] == bare
    assert server.post("/tokenize", prompt=text, add_special_tokens=False)["tokens"] == bare
    assert server.post("/tokenize", content=text, add_special=True)["tokens"] == ids
    messages = [{"role": "user", "content": "x"}]
    assert server.post("/v1/tokenize", messages=messages)["tokens"] == llm.encode_chat(messages)
    back = server.post("/detokenize", tokens=bare)
    assert back == {"prompt": text, "content": text}


@pytest.mark.parametrize("body", [{}, {"prompt": "a", "content": "b"}, {"tokens": [1]}])
def test_one_text_is_tokenized(server: Served, body: dict) -> None:
    assert server.refuse("/tokenize", body)[0] == 400


@pytest.mark.parametrize("tokens", [["a"], [1.5], [4096], [-1], 3])
def test_only_tokens_are_detokenized(server: Served, tokens: object) -> None:
    assert server.refuse("/detokenize", {"tokens": tokens})[0] == 400


def test_models_are_listed(server: Served) -> None:
    (entry,) = json.loads(server.ask("GET", "/v1/models")[2])["data"]
    assert entry["id"] == "embedded"
    assert entry["max_model_len"] == 2048
    assert json.loads(server.ask("GET", "/models/embedded")[2]) == entry
    assert server.ask("GET", "/v1/models/nothing")[0] == 404


def test_counters_count(server: Served) -> None:
    def value(name: str) -> float:
        lines = server.ask("GET", "/metrics")[2].decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.split("{")[0].split(" ")[0] == name)

    before = value("llamita_generation_tokens_total"), value("llamita_time_to_first_token_seconds_count")
    server.post("/v1/completions", prompt="a", max_tokens=7, ignore_eos=True)
    assert value("llamita_generation_tokens_total") == before[0] + 7
    assert value("llamita_time_to_first_token_seconds_count") == before[1] + 1
    assert value("llamita_num_requests_running") == 0

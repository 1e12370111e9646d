"""What one client could do to the others, or to the machine: each is bounded before it costs anything."""

import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from served import Served, serving

import llamita
from llamita.engine.llm import LLM
from llamita.serve import bodies, completions, encoding, start, structure
from llamita.serve.keys import Keys
from llamita.text.tokenizer import Tokenizer

KEYS = ["sk-first-key-123", "sk-second-key-456"]
FIRST, SECOND = ({"Authorization": f"Bearer {key}"} for key in KEYS)
CHAT = {"messages": [{"role": "user", "content": "Once"}], "max_tokens": 2}
PATH = "/v1/chat/completions"


@pytest.fixture(scope="module")
def llm() -> LLM:
    return llamita.load("embedded", scheme="llama3.2")


@pytest.fixture(scope="module")
def server(llm: LLM) -> Iterator[Served]:
    with serving({"embedded": llm}, Keys(KEYS)) as served:
        yield served


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grammars take half a second; the list gets those that were begun."""
    begun: list[str] = []
    made = structure.Structure.constraint

    def constraint(self, values, owner, tools=None):
        if "guided_regex" in values:
            begun.append(values["guided_regex"])
            time.sleep(0.5)
        return made(self, values, owner, tools)

    monkeypatch.setattr(structure.Structure, "constraint", constraint)
    return begun


def until_released(served: Served) -> None:
    """Wait until no body is counted: a client may have its answer a moment before."""
    end = time.monotonic() + 20
    while served.state.bodies.held:
        assert time.monotonic() < end
        time.sleep(0.01)


def send(served: Served, head: bytes) -> bytes:
    """Send bytes and return all that comes back until the server closes."""
    with socket.create_connection(("127.0.0.1", served.port), 10) as peer:
        peer.sendall(head)
        answer = b""
        while part := peer.recv(65536):
            answer += part
    return answer


# HTTP


def test_a_body_with_two_lengths_is_refused(server: Served) -> None:
    smuggled = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    lengths = b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    answer = send(server, b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n" + lengths + smuggled)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize("head", [
    b"GET http://localhost/v1/models HTTP/1.1\r\nHost: evil.example\r\n",
    b"GET http://evil.example/v1/models HTTP/1.1\r\nHost: localhost\r\n",
    b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n",
    b"GET /v1/models HTTP/1.1\r\nHost: evil.example#localhost\r\n", b"GET /v1/models HTTP/1.0\r\n",
    b"GET /v1/models HTTP/1.1\r\nHost: [::ffff:10.0.0.1]\r\n",
    b"GET /page/../v1/models HTTP/1.1\r\nHost: localhost\r\n",
    b"GET /page/%0a/../v1/models HTTP/1.1\r\nHost: localhost\r\n",
])  # fmt: skip
def test_no_form_of_a_head_gets_around_the_checks(server: Served, head: bytes) -> None:
    answer = send(server, head + b"Connection: close\r\n\r\n")
    assert answer.split()[1] in (b"400", b"401", b"403", b"404")
    assert b"max_model_len" not in answer


def test_a_log_line_is_one_line(server: Served, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        line = b"GET /a%0aGET%20/forged%0d%1b[31m HTTP/1.1\r\nHost: localhost\r\n"
        send(server, line + b"X-Request-Id: x%0ay\r\nConnection: close\r\n\r\n")
        server.ask("POST", PATH, {**CHAT, "model": "x\nforged\x1b[31m"}, FIRST)
    assert all(record.getMessage().isprintable() for record in caplog.records)
    assert caplog.records


def test_keys_are_in_no_repr(server: Served) -> None:
    state = server.state
    for shown in (repr(state), repr(vars(state)), repr(vars(state.keys)), repr(vars(state.queue))):
        assert not [key for key in KEYS if key in shown]


def chunked(size: int, number: int) -> bytes:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += (
        f"Authorization: {FIRST['Authorization']}\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n".encode()
    )
    body = b'{"prompt": "Once", "max_tokens": 1' + b" " * size * number + b"}"
    parts = [body[start : start + size] for start in range(0, len(body), size)]
    return head + b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def test_a_body_of_tiny_chunks_is_refused(server: Served) -> None:
    assert send(server, chunked(1, 4000)).startswith(b"HTTP/1.1 200 ")  # some may come
    assert send(server, chunked(300, 8000)).startswith(b"HTTP/1.1 200 ")
    with socket.create_connection(("127.0.0.1", server.port), 10) as peer, suppress(ConnectionError):
        peer.sendall(chunked(1, 2_000_000))
        assert peer.recv(100).startswith(b"HTTP/1.1 400 ")
    until_released(server)


# Memory


def test_bodies_of_all_together_are_bounded(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "ALL_BYTES", 400_000)
    large = json.dumps({**CHAT, "user": "x" * 150_000}).encode()
    head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Authorization: {FIRST['Authorization']}\r\nContent-Length: {len(large)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), 10) as peer:
        peer.sendall(head.encode() + large[:-1])  # it is held until its end comes
        until = time.monotonic() + 10
        while server.state.bodies.held < len(large) - 1 and time.monotonic() < until:
            time.sleep(0.01)
        status, error = server.refuse(PATH, large, FIRST)
        assert (status, error["code"]) == (429, "bodies_full")
        assert server.ask("POST", PATH, large, SECOND)[0] == 200  # half of all is for others
        peer.sendall(large[-1:])
        assert peer.recv(4096).startswith(b"HTTP/1.1 200 ")
    until_released(server)


def test_log_probabilities_of_prompts_count_with_the_bodies(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"prompt": [[5] * 500] * 4, "echo": True, "logprobs": 20, "max_tokens": 0}
    assert server.ask("POST", "/v1/completions", body, FIRST)[0] == 200
    until_released(server)
    monkeypatch.setattr(bodies, "ALL_BYTES", 5_000_000)
    assert server.refuse("/v1/completions", body, FIRST)[1]["code"] == "bodies_full"
    monkeypatch.setattr(completions, "ALL_BYTES", 5_000_000)
    assert server.refuse("/v1/completions", body, FIRST)[1]["param"] == "logprobs"


def test_a_body_of_very_many_values_is_refused(server: Served) -> None:
    body = b'{"messages": [' + b",".join([b"[]"] * 160_000) + b"]}"
    status, error = server.refuse(PATH, body, FIRST)
    assert (status, error["code"]) == (413, "request_too_large")


def test_a_text_that_is_much_too_long_is_not_encoded(server: Served, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[int] = []
    encode = Tokenizer.encode
    monkeypatch.setattr(
        Tokenizer, "encode", lambda self, text, **k: encoded.append(len(text)) or encode(self, text, **k)
    )
    text = "the cat sat " * 200_000
    for path, body in (
        (PATH, {"messages": [{"role": "user", "content": text}]}),
        ("/v1/completions", {"prompt": text}),
        ("/v1/embeddings", {"input": ["a", text]}),
        ("/v1/responses", {"input": text}),
    ):
        status, error = server.refuse(path, body, FIRST)
        assert (status, error["code"]) == (400, "context_length_exceeded")
        assert llm.context < error["n_prompt_tokens"] < 4 * len(text)
        assert "at least" in error["message"]
    assert sum(encoded) < 5 * encoding._PIECE


def test_a_text_in_pieces_counts_no_more_than_it_has(llm: LLM) -> None:
    (served,) = start.Models({"embedded": llm}).all
    for text in ("the cat sat. " * 21_000, " " * 270_000, "\u6f22\U0001f999 1" * 70_000):
        ids = llm.tokenizer.encode(text)
        assert encoding.encode_text(served, text, None, "prompt", len(ids)) == ids


@pytest.mark.parametrize("stop", ["x" * 1001, ["a", "x" * 1001], ["a"] * 17])
def test_long_stop_strings_are_refused(server: Served, stop: object) -> None:
    assert server.refuse(PATH, {**CHAT, "stop": stop}, FIRST)[1]["param"] == "stop"


# Time


def ask_slowly(server: Served, number: int, headers: dict[str, str]) -> int:
    return server.ask("POST", PATH, {**CHAT, "guided_regex": f"a{{{number + 1}}}"}, headers)[0]


def test_slow_grammars_of_one_key_stop_nobody(server: Served, slow: list[str]) -> None:
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask_slowly, server, number, FIRST) for number in range(6)]
        while not slow:
            time.sleep(0.01)
        began = time.monotonic()
        assert server.ask("POST", PATH, CHAT, FIRST)[0] == 200  # a plain one does not wait for them
        assert server.ask("POST", PATH, CHAT, SECOND)[0] == 200
        assert ask_slowly(server, 9, SECOND) == 200
        assert len(slow) < 6, time.monotonic() - began  # it did not wait for all of the other key's
        assert [one.result() for one in asked] == [200] * 6


def test_what_waits_is_dropped_with_its_client(server: Served, slow: list[str]) -> None:
    peers = []
    for number in range(8):
        data = json.dumps({**CHAT, "guided_regex": f"b{{{number + 1}}}"}).encode()
        peer = socket.create_connection(("127.0.0.1", server.port), 10)
        head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head += f"Authorization: {FIRST['Authorization']}\r\nContent-Length: {len(data)}\r\n\r\n"
        peer.sendall(head.encode() + data)
        peers.append(peer)
    while not slow:
        time.sleep(0.01)
    for peer in peers:
        peer.close()
    assert ask_slowly(server, 1, FIRST) == 200
    assert len(slow) < 5
    until_released(server)


def test_what_is_prepared_is_bounded(llm: LLM, slow: list[str]) -> None:
    with serving({"embedded": llm}, bounds=start.Bounds(requests=3)) as small:
        with ThreadPoolExecutor(3) as pool:
            asked = [pool.submit(ask_slowly, small, number, {}) for number in range(3)]
            while small.state.preparation._waiting.total() < 3:
                time.sleep(0.01)
            assert small.refuse(PATH, CHAT)[1]["code"] == "queue_full"
            assert [one.result() for one in asked] == [200] * 3
        assert small.ask("POST", PATH, CHAT)[0] == 200


def test_what_one_key_has_prepared_is_bounded(llm: LLM, slow: list[str]) -> None:
    bounds = start.Bounds(requests=4, requests_per_key=2)
    with serving({"embedded": llm}, Keys(KEYS), bounds=bounds) as small, ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(ask_slowly, small, number, FIRST) for number in range(2)]
        while small.state.preparation._waiting.total() < 2:
            time.sleep(0.01)
        assert small.refuse(PATH, CHAT, FIRST)[1]["code"] == "key_queue_full"
        assert small.ask("POST", PATH, CHAT, SECOND)[0] == 200
        assert [one.result() for one in asked] == [200] * 2


# Templates and other clients' prompts


@pytest.mark.parametrize("text", ["{{ 7 * 7 }}", "{% for i in range(10**9) %}{% endfor %}", "{{ messages }}", "{#"])
def test_messages_are_no_templates(server: Served, llm: LLM, text: str) -> None:
    messages = [{"role": "user", "content": text}]
    tokens = server.ask("POST", "/tokenize", {"messages": messages}, FIRST)[2]
    assert text in llm.tokenizer.decode(json.loads(tokens)["tokens"])
    tool = {"type": "function", "function": {"name": "f", "description": text}}
    assert server.ask("POST", PATH, {**CHAT, "tools": [tool]}, FIRST)[0] == 200


@pytest.mark.parametrize(
    "kwargs", [{"messages": []}, {"bos_token": "x"}, {"date_string": "a\nb"}, {"x": {}}, {"tools": 1}]
)
def test_variables_of_templates_are_few(server: Served, kwargs: dict) -> None:
    status, error = server.refuse(PATH, {**CHAT, "chat_template_kwargs": kwargs}, FIRST)
    assert (status, error["param"]) == (400, "chat_template_kwargs")


def test_a_kept_prompt_is_not_found_by_another_key(server: Served) -> None:
    body = {"prompt": "There was once a secret " * 40, "max_tokens": 1}

    def cached(headers: dict[str, str]) -> int:
        usage = json.loads(server.ask("POST", "/v1/completions", body, headers)[2])["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"]

    assert cached(FIRST) == 0
    assert cached(FIRST) > 100
    assert cached(SECOND) == 0
    assert cached(SECOND) > 100


def test_many_clients_at_once_leave_no_thread(server: Served) -> None:
    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(lambda _: server.ask("POST", PATH, CHAT, FIRST)[0], range(32))) == {200}
        names = {thread.name.rpartition("_")[0] for thread in threading.enumerate()}
    assert {"prepare"} <= names
    assert len([t for t in threading.enumerate() if t.name.startswith(("prepare", "mask", "embed"))]) <= 8

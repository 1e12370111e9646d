"""Requests end when their clients go away, and servers end without losing what runs."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest
from served import Served, serving

import llamita
from llamita.engine.llm import LLM
from llamita.serve import run, start
from llamita.serve.queue_limits import Bounds
from llamita.system.child import environment

LONG = {"messages": [{"role": "user", "content": "Once upon a time"}], "ignore_eos": True}
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def llm() -> LLM:
    return llamita.load("embedded", scheme="llama3.2", max_sequences=4)


@pytest.fixture(scope="module")
def server(llm: LLM):
    with serving({"embedded": llm}) as served:
        yield served


def until(is_so: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.005)


def post(port: int, body: dict) -> socket.socket:
    data = json.dumps(body).encode()
    peer = socket.create_connection(("127.0.0.1", port), 30)
    peer.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(data) + data)
    return peer


def is_idle(served: Served) -> bool:
    (load,) = json.loads(served.ask("GET", "/v1/load")[2])["models"]
    return not load["running"] and not load["waiting"] and served.state.queue.open == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_place(server: Served, stream: bool) -> None:
    peer = post(server.port, {**LONG, "stream": stream})
    until(lambda: server.state.queue.open == 1)
    if stream:
        assert peer.recv(100)
    peer.close()
    until(lambda: is_idle(server))


def test_a_client_in_the_queue_that_goes_away_is_taken_out(server: Served) -> None:
    peers = [post(server.port, {**LONG, "seed": i}) for i in range(6)]  # four slots
    until(lambda: server.state.queue.open == 6)
    peers[5].close()
    peers[4].close()
    until(lambda: server.state.queue.open <= 4)
    for peer in peers:
        peer.close()
    until(lambda: is_idle(server))


def test_many_clients_that_go_away_leave_nothing(server: Served) -> None:
    for place in range(60):
        peer = post(server.port, {**LONG, "stream": place % 2 == 0, "seed": place, "n": 1 + place % 3})
        if place % 3:
            time.sleep(0.002 * (place % 7))
        if place % 5 == 0:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # reset instead of an end
        peer.close()
    until(lambda: is_idle(server))
    answer = server.post("/v1/chat/completions", messages=LONG["messages"], max_tokens=5)
    assert answer["usage"]["completion_tokens"] == 5


def test_a_reader_that_stands_still_is_cut_and_holds_nobody(
    server: Served, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "STUCK_SECONDS", 0.5)
    body = {**LONG, "stream": True, "logprobs": True, "top_logprobs": 20, "n": 4}  # about 10 MB
    data = json.dumps(body).encode()
    peer = socket.socket()
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    peer.connect(("127.0.0.1", server.port))
    peer.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(data) + data)
    until(lambda: server.state.queue.open == 4)
    answer = server.post("/v1/chat/completions", messages=LONG["messages"], max_tokens=20, temperature=0)
    assert answer["choices"][0]["message"]["content"] == llm.generate(LONG["messages"], max_tokens=20, greedy=True).text
    until(lambda: is_idle(server))
    peer.close()


def test_answers_in_company_are_those_alone(server: Served, llm: LLM) -> None:
    prompts = [f"Once upon a time there was a {word}" for word in ("dog", "cat", "king", "tree", "boy", "fish")]
    bodies = [{"prompt": p, "max_tokens": 60, "seed": i, "temperature": 0.9} for i, p in enumerate(prompts)]
    answers: dict[int, str] = {}

    def ask(place: int) -> None:
        events = server.events("/v1/completions", **bodies[place])
        answers[place] = "".join(event["choices"][0]["text"] for event in events)

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place, body in enumerate(bodies):
        alone = llm.generate(body["prompt"], max_tokens=60, seed=place, temperature=0.9)
        assert answers[place] == alone.text


def test_a_full_queue_is_429_with_a_time(llm: LLM) -> None:
    with serving({"embedded": llm}, bounds=Bounds(requests=2, requests_per_key=2)) as small:
        peers = [post(small.port, LONG) for _ in range(2)]
        until(lambda: small.state.queue.open == 2)
        status, headers, data = small.ask("POST", "/v1/chat/completions", LONG)
        assert status == 429
        assert 1 <= int(headers["retry-after"]) <= 60
        assert json.loads(data)["error"]["code"] == "queue_full"
        assert small.ask("GET", "/ready")[0] == 503
        assert small.ask("GET", "/health")[0] == 200
        for peer in peers:
            peer.close()
        until(lambda: is_idle(small))
        assert small.ask("GET", "/ready")[0] == 200


def test_a_request_has_its_time(llm: LLM) -> None:
    limits = start.Limits(total_seconds=0.2, drain_seconds=1)
    with serving({"embedded": llm}, limits=limits) as hasty:
        status, error = hasty.refuse("/v1/chat/completions", {**LONG, "n": 4})
        assert (status, error["code"]) == (503, "timeout")
        until(lambda: is_idle(hasty))
        data = hasty.ask("POST", "/v1/chat/completions", {**LONG, "n": 4, "stream": True})[2].decode()
        assert json.loads(data.strip().split("\n\n")[-1].removeprefix("data: "))["error"]["code"] == "timeout"


def test_a_fault_of_the_engine_ends_its_requests_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    step, faults = llm.model.step, [True]

    def fail_once(*arguments: object, **named: object) -> object:
        if faults and faults.pop():
            raise ValueError("broken")
        return step(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(llm.model, "step", fail_once)
    with serving({"embedded": llm}) as served:
        status, error = served.refuse("/v1/chat/completions", {**LONG, "max_tokens": 4})
        assert (status, error["code"]) == (500, "internal")
        assert served.post("/v1/chat/completions", **LONG, max_tokens=4)["usage"]["completion_tokens"] == 4
        until(lambda: is_idle(served))


@pytest.fixture
def process():
    command = [sys.executable, "-m", "llamita", "serve", "embedded:llama3.2", "--port", "0", "--drain", "20"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment()) as server:
        assert server.stderr
        line = server.stderr.readline()
        port = int(line.split("http://127.0.0.1:")[1].split()[0])
        threading.Thread(target=server.stderr.read, daemon=True).start()
        yield server, port
        server.kill()


def test_sigterm_finishes_what_runs(process: tuple[subprocess.Popen, int]) -> None:
    server, port = process
    peer = post(port, {**LONG, "stream": True, "max_tokens": 1500})
    received = peer.recv(1000)
    server.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), 5)
    while part := peer.recv(65536):
        received += part
    assert received.rstrip(b"\r\n0").endswith(b"data: [DONE]")
    assert server.wait(10) == 0


def test_sigterm_finishes_what_runs_though_nobody_reads_its_log() -> None:
    command = [sys.executable, "-m", "llamita", "serve", "embedded:llama3.2", "--port", "0", "--drain", "20"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment()) as server:
        assert server.stderr
        port = int(server.stderr.readline().split("http://127.0.0.1:")[1].split()[0])
        while "curl" not in server.stderr.readline():
            pass
        peer = post(port, {**LONG, "stream": True, "max_tokens": 1500})
        received = peer.recv(1000)
        server.stderr.close()
        server.send_signal(signal.SIGTERM)
        while part := peer.recv(65536):
            received += part
        assert received.rstrip(b"\r\n0").endswith(b"data: [DONE]")
        assert server.wait(10) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_server_ends_at_once(process: tuple[subprocess.Popen, int], number: signal.Signals) -> None:
    server, _ = process
    server.send_signal(number)
    assert server.wait(10) == 0


def test_a_second_signal_does_not_wait(process: tuple[subprocess.Popen, int]) -> None:
    server, port = process
    peers = [post(port, {**LONG, "seed": i}) for i in range(16)]  # 32,000 tokens
    time.sleep(0.3)
    for _ in range(2):
        server.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    assert server.wait(10) == 0
    for peer in peers:
        peer.close()


def test_a_killed_server_leaves_no_process(process: tuple[subprocess.Popen, int]) -> None:
    server, port = process
    post(port, {**LONG, "max_tokens": 3}).recv(100)  # the template's process has started
    children = subprocess.run(["ps", "--ppid", str(server.pid), "-o", "pid="], capture_output=True, text=True).stdout
    assert children.split()
    server.kill()
    server.wait()
    until(lambda: not any(os.path.exists(f"/proc/{pid}/stat") and _lives(pid) for pid in children.split()))


def _lives(pid: str) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_socket_says_tcp_so_that_asyncio_sends_at_once() -> None:
    """Else Nagle's algorithm and a client's delayed acknowledgement add 40 ms to each answer in two parts."""
    with start.listen("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP

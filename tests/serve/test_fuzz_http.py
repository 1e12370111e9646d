"""Heads and bodies that are nearly HTTP: each connection is answered or closed within a time, and nobody else notices."""

import json
import random
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from served import Served, serving

import llamita
from llamita.engine.llm import LLM
from llamita.serve import run

SECONDS = 20
BODY = json.dumps({"prompt": "Once", "max_tokens": 2}).encode()
HEAD = b"Host: localhost\r\nContent-Type: application/json\r\n"
CHUNKS = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (BODY[:5], BODY[5:6], BODY[6:])) + b"0\r\n\r\n"
CLOSE = b"Connection: close\r\n"
MESSAGES = [
    b"POST /v1/completions HTTP/1.1\r\n" + HEAD + CLOSE + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY,
    b"POST /v1/completions HTTP/1.1\r\n" + HEAD + CLOSE + b"Transfer-Encoding: chunked\r\n\r\n" + CHUNKS,
    b"POST /v1/completions HTTP/1.1\r\n" + HEAD + CLOSE + b"Transfer-Encoding: chunked\r\n\r\n" + CHUNKS[:-2]
    + b"X-Trailer: a\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\nGET /health HTTP/1.0\r\nHost: localhost\r\n\r\n",
]  # fmt: skip
PARTS = [
    b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: gzip, chunked\r\n",
    b"Transfer-Encoding : chunked\r\n", b"transfer-encoding: identity\r\n", b"Content-Length: 5\r\n", b"Content-Length: -1\r\n",
    b"Content-Length: +5\r\n", b"Content-Length: 0x5\r\n", b"Content-Length: 5, 5\r\n", b"Content-Length: 99999999999999\r\n",
    b"Content-Length: " + b"9" * 5000 + b"\r\n", b"Host: evil\r\n", b" folded: line\r\n", b"Expect: 100-continue\r\n",
    b"Upgrade: websocket\r\nConnection: Upgrade\r\n", b"Upgrade: h2c\r\n", b"\xff\xfe", b"ffffffffffffffffffff\r\n", b"-1\r\n",
    b"0\r\n\r\n", b";a=b", b"5;" + b"x" * 3000, b"HTTP/9.9", b"HTTP/1.0", b"http://evil/", b"%00", b"%zz", b"*", b"CONNECT ",
    b"Content-Encoding: gzip\r\n", b"X: " + b"y" * 9000 + b"\r\n",
]  # fmt: skip


@pytest.fixture(scope="module")
def llm() -> LLM:
    return llamita.load("embedded", scheme="llama3.2", context=128)


@pytest.fixture
def server(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    for name in ("HEAD_SECONDS", "KEEP_ALIVE_SECONDS"):
        monkeypatch.setattr(run, name, 1)
    monkeypatch.setattr("llamita.serve.exchange.BODY_SECONDS", 1)
    with serving({"embedded": llm}) as served:
        yield served


def message(number: int) -> bytes:
    """Return a message of HTTP with up to four places changed; the same for a number each time."""
    random_ = random.Random(number)
    data = random_.choice(MESSAGES)
    for _ in range(random_.randint(1, 4)):
        ends = [match.end() for match in re.finditer(rb"\r\n", data)]
        place = random_.choice(ends) if ends and random_.random() < 0.5 else random_.randrange(len(data) + 1)
        what = random_.random()
        if what < 0.6:
            data = data[:place] + random_.choice(PARTS) + data[place:]
        elif what < 0.75:
            data = data[:place] + data[place + random_.choice((1, 2, 20)) :]
        elif what < 0.85:
            data = data[:place] + bytes([random_.randrange(256)]) + data[place + 1 :]
        else:
            data += random_.choice(MESSAGES)
    return data


def wrong(served: Served, number: int) -> str:
    """Send a message; return what is wrong with the answer, "" if nothing is."""
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", served.port), SECONDS) as peer:
        answer = b""
        try:
            peer.sendall(message(number))
            peer.shutdown(socket.SHUT_WR) if number % 2 else None
            while part := peer.recv(65536):
                answer += part
        except ConnectionError:  # it was cut while there was more to come
            pass
        except TimeoutError:
            return f"message({number}) hangs"
    statuses = [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)]
    if any(status >= 500 for status in statuses) or time.monotonic() - began > SECONDS:
        return f"message({number}): {answer[:300]!r}"
    return ""


@pytest.mark.parametrize("first", [0, pytest.param(100, marks=pytest.mark.slow)])
def test_changed_http_is_answered_or_closed(server: Served, llm: LLM, first: int) -> None:
    numbers = range(first, first + (400 if first else 100))
    with ThreadPoolExecutor(16) as pool:
        assert not [found for found in pool.map(lambda number: wrong(server, number), numbers) if found]
    prompt = "Once upon a time"
    answer = server.post("/v1/completions", prompt=prompt, max_tokens=20, temperature=0)
    assert answer["choices"][0]["text"] == llm.generate(prompt, max_tokens=20, greedy=True).text
    assert server.state.queue.open == 0
